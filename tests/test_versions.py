"""What has to hold on every supported version of torch, numpy, SciPy and Python, and which versions those are."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from types import ModuleType
from typing import Any

import pytest
import torch
from nets import NETS, Recurrent, classes, conv_net, normal, problem, seeded
from packaging.requirements import Requirement
from packaging.version import Version
from tools_of import tool
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import hessfn as hf
from hessfn.core.torch_private import uncompiled

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text("utf-8")
DEPENDENCIES = re.findall(r'"(.*?)"', re.findall(r"^dependencies = \[(.*?)\]$", PYPROJECT, re.MULTILINE | re.DOTALL)[0])


@pytest.fixture(scope="module")
def versions() -> ModuleType:
    return tool("versions")


def test_the_bounds_are_what_is_run(versions: ModuleType) -> None:
    pinned = versions.constraints("oldest")
    for text in DEPENDENCIES:
        name, bound = re.fullmatch(r"([\w-]+)>=([\d.]+)", text).groups()
        assert f"{name}=={bound}" in pinned
    assert versions.constraints("newest") == []
    assert versions.constraints("2.12") == ["torch==2.12.*"] and versions.python("2.12") == sys.executable
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert "tools/versions.py constraints $*" in makefile and "-m core" in makefile
    assert "versions-oldest" in (ROOT / ".ci" / "run").read_text("utf-8")


def test_what_is_installed_is_within_the_bounds_and_at_them_where_it_is_to_be() -> None:
    for requirement in map(Requirement, DEPENDENCIES):
        (bound,) = requirement.specifier
        installed = Version(Version(importlib.metadata.version(requirement.name)).public)
        assert installed in requirement.specifier
        if Path(sys.prefix).name == ".venv-oldest":
            assert installed == Version(bound.version)


def test_pythons_are_those_that_are_named(versions: ModuleType) -> None:
    named = versions.pythons()
    assert f'requires-python = ">={named[0]}"' in PYPROJECT
    assert named == [f"3.{minor}" for minor in range(int(named[0][2:]), int(named[-1][2:]) + 1)]
    assert f"3.{sys.version_info.minor}" in named
    assert f'python_version = "{named[0]}"' in PYPROJECT  # of mypy


def test_the_page_that_says_how_to_install_says_the_bounds(versions: ModuleType) -> None:
    bounds = dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", text).groups() for text in DEPENDENCIES)
    page = " ".join((ROOT / "docs" / "quickstart.md").read_text("utf-8").split())
    said = re.search(r"Python ([\d.]+), torch ([\d.]+), numpy ([\d.]+) and SciPy ([\d.]+), or newer ones\. ", page)
    assert said is not None
    assert [*said.groups()] == [versions.pythons()[0], *(bounds[name] for name in ("torch", "numpy", "scipy"))]


# The traced mode is lost without an error where an operation has another form, so it is asked for by name.


class Again(nn.Module):
    """The part before the last layer is computed again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Sequential(nn.Linear(4, 5), nn.Tanh()), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(checkpoint(self.inner, x, use_reentrant=False))


Net = tuple[Callable[[], nn.Module], tuple[int, ...]]
MORE: dict[str, Net] = {
    "group_norm of vectors": (lambda: nn.Sequential(nn.Linear(4, 6), nn.GroupNorm(2, 6), nn.Linear(6, 3)), (5, 4)),
    "instance_norm": (lambda: conv_net(nn.InstanceNorm2d(4, affine=True)), (5, 1, 5, 5)),
    "encoder": (
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True), nn.Flatten(), nn.Linear(20, 3)
        ),
        (4, 5, 4),
    ),
    "gru": (lambda: Recurrent(nn.GRU), (4, 5, 4)),
    "checkpoint": (Again, (6, 4)),
}


def problem_of(net: str) -> tuple[Any, Any, Any, nn.Module]:
    if net in NETS:
        return problem(net)
    build, shape = MORE[net]
    model = seeded(build)
    return *hf.functionalize(model, nn.CrossEntropyLoss()), (normal(*shape), classes(shape[0], 3)), model


def double_backward(loss: Any, params: Any, batch: Any, v: Any) -> Any:
    live = {name: p.clone().requires_grad_() for name, p in params.items()}
    leaves = list(live.values())
    with sdpa_kernel(SDPBackend.MATH):
        gradient = torch.autograd.grad(loss(live, batch), leaves, create_graph=True)
        return dict(zip(live, torch.autograd.grad(gradient, leaves, list(v.values())), strict=True))


@pytest.mark.parametrize("net", [*NETS, *MORE])
def test_products_are_traced_and_right(net: str) -> None:
    loss, params, batch, _ = problem_of(net)
    assert hf.find_mode(loss, params, batch) == ("traced", "", 0.0)
    v = hf.gaussian(params, 1)[0]
    exact = double_backward(loss, params, batch, v)
    for make in (hf.hvp, hf.linearized_hvp):
        apart = hf.tree.add(make(loss, params, batch)(v), exact, -1.0)
        assert hf.tree.norm(apart) <= 1e-10 * hf.tree.norm(exact)


@pytest.mark.parametrize("mode", ["traced", "forward", "reverse", "double_backward", "difference"])
def test_a_product_by_what_is_not_used_is_a_plain_zero(mode: Any) -> None:
    params = {"used": normal(3), "unused": normal(3)}
    product = hf.hvp(lambda p: (p["used"] ** 4).sum(), params, mode=mode)(params)
    assert not product["unused"].any()
    assert not any(x.requires_grad for x in product.values())


@pytest.mark.parametrize("net", ["batch_norm", "layer_norm", "rms_norm", "group_norm", "instance_norm"])
def test_traces_by_layer_are_those_of_the_dense_matrix(net: str) -> None:
    loss, params, batch, model = problem_of(net)
    found = hf.sensitivities(model, nn.CrossEntropyLoss(), [batch], num_probes=60)
    diagonal = hf.tree.ravel(params)[1](hf.dense(hf.hvp(loss, params, batch), params).diagonal())
    for name, mean in found.weights.mean.items():
        assert abs(mean - diagonal[f"{name}.weight"].sum()) <= 4 * found.weights.stderr[name]
    assert found.activations.mean.keys() == found.weights.mean.keys()


@pytest.mark.parametrize("net", ["batch_norm", "layer_norm", "rms_norm", "group_norm", "instance_norm"])
def test_a_product_has_right_derivatives_through_a_norm(net: str) -> None:
    """Third derivatives of the loss, against differences of products."""
    loss, params, batch, model = problem_of(net)
    model.train()
    loss, params = hf.functionalize(model, nn.CrossEntropyLoss())
    u, v = (hf.tree.scale(1 / hf.tree.norm(x), x) for x in hf.gaussian(params, 2, seed=3))

    def curvature(p: Any) -> Tensor:
        return hf.tree.dot(v, hf.hvp(loss, p, batch, check=False)(v))

    live = {name: p.clone().requires_grad_() for name, p in params.items()}
    slopes = dict(zip(live, torch.autograd.grad(curvature(live), list(live.values())), strict=True))
    h = 1e-4
    above, below = (curvature(hf.tree.add(params, u, c)) for c in (h, -h))
    assert abs(hf.tree.dot(slopes, u) - (above - below) / (2 * h)) <= 1e-6 * hf.tree.norm(slopes)


def test_threads_that_overlap_leave_the_compiler_on() -> None:
    """Before torch 2.14 it can only be switched off for all threads at once."""
    import torch._dynamo  # where it was never imported, there is nothing to switch off

    graphs, inside, may_leave = [], Event(), Event()
    compiled = torch.compile(Tensor.sin, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)

    def first() -> None:
        with uncompiled():
            inside.set()
            may_leave.wait()

    thread = Thread(target=first)
    thread.start()
    inside.wait()
    with uncompiled():
        may_leave.set()
        thread.join()
        compiled(torch.ones(2))
        assert not graphs
    compiled(torch.ones(2))
    assert graphs
