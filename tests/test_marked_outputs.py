"""Gauss-Newton products of many logits, through the head that makes them, against dense ``J' H J`` in float64."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import normal, seeded
from torch import Tensor, nn

import hessfn as hf
from hessfn.engine import pipeline
from hessfn.engine.fused import chunks, cross_entropy, logits, outputs
from hessfn.engine.op_definitions import by_definition
from hessfn.products import part_check
from hessfn.products.traced_gauss_newton import with_marked_outputs

CLASSES, WIDTH, LENGTH = 11, 4, 5
WEIGHTS = torch.linspace(0.5, 2, CLASSES, dtype=torch.float64)


@dataclasses.dataclass
class Found:
    """As output objects of Hugging Face's: logits, and what no criterion takes."""

    logits: Tensor
    hidden: Tensor
    caches: tuple[Tensor, ...] = ()
    length: int = LENGTH


class Language(nn.Module):
    """Tokens (n, LENGTH) to logits, by a head with a bias or by the embedding itself."""

    def __init__(self, bias: bool = True, tied: bool = False, flat: bool = True, shifted: bool = False) -> None:
        super().__init__()
        self.flat, self.shifted = flat, shifted
        self.token, self.body = nn.Embedding(CLASSES, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES, bias=bias)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, ids: Tensor) -> Any:
        hidden = self.body(self.token(ids).cumsum(1)).tanh()
        z = self.head(hidden)
        z = z[:, :-1].contiguous() if self.shifted else z
        return z.flatten(0, 1) if self.flat else Found(z, hidden, (hidden.sin(),))


def of_object(out: Found, targets: Tensor) -> Tensor:
    return F.cross_entropy(out.logits.flatten(0, 1), targets)


def of_both(out: Found, targets: Tensor) -> Tensor:
    """Of the logits and of another output, with curvature between the two."""
    return F.cross_entropy(out.logits.flatten(0, 1), targets).exp() * out.hidden.square().mean()


Problem = tuple[dict[str, Any], Callable[[Any, Any], Tensor], int]  # of a net, its criterion, and how many texts
PROBLEMS: dict[str, Problem] = {
    "a bias": ({}, nn.CrossEntropyLoss(), 4),
    "a sum, ignored": ({"bias": False}, nn.CrossEntropyLoss(reduction="sum", ignore_index=3), 3),
    "smoothed, weights": ({}, nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.1, ignore_index=2), 4),
    "tied": ({"bias": False, "tied": True}, nn.CrossEntropyLoss(), 3),
    "shifted, curved": ({"shifted": True}, lambda out, y: F.cross_entropy(out, y).square(), 5),
    "an object": ({"flat": False, "bias": False}, of_object, 4),
    "two outputs": ({"flat": False}, of_both, 3),
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every cross-entropy is of many logits, of seven rows at a time; which of them have been computed in chunks."""
    monkeypatch.setattr(cross_entropy, "WORTH", 1)
    monkeypatch.setattr(logits, "ENTRIES", 7 * CLASSES)
    found: list[int] = []
    plain = chunks.curvatures
    monkeypatch.setattr(chunks, "curvatures", lambda z, *args: (found.append(len(z.x)), plain(z, *args))[1])
    return found


def tokens(number: int, net: dict[str, Any]) -> tuple[Tensor, Tensor]:
    drawn = torch.randint(CLASSES, (number, LENGTH + 1), generator=torch.Generator().manual_seed(4))
    return drawn[:, :-1], (drawn[:, 2:] if net.get("shifted") else drawn[:, 1:]).flatten()


def truth(forward: Any, criterion: Any, params: Any, batch: Any) -> Tensor:
    """Dense, of all parts of the outputs that have curvature."""
    flat, unravel = hf.tree.ravel(params)

    def parts(out: Any) -> list[Tensor]:
        return [out.logits, out.hidden] if isinstance(out, Found) else [out]

    def joined(w: Tensor) -> Tensor:
        return torch.cat([x.flatten() for x in parts(forward(unravel(w), batch[0]))])

    out = forward(params, batch[0])
    shapes = [x.shape for x in parts(out)]

    def of_outputs(z: Tensor) -> Tensor:
        rows = [x.view(shape) for x, shape in zip(z.split([s.numel() for s in shapes]), shapes, strict=True)]
        return criterion(Found(*rows) if isinstance(out, Found) else rows[0], batch[1])

    jacobian = torch.autograd.functional.jacobian(joined, flat)
    return jacobian.T @ torch.autograd.functional.hessian(of_outputs, joined(flat)) @ jacobian


def flat_of(x: Any) -> Tensor:
    return hf.tree.ravel(x)[0]


def require_close(found: Tensor, expected: Tensor) -> None:
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12 * float(expected.norm()))


@pytest.mark.parametrize(("net", "criterion", "number"), PROBLEMS.values(), ids=PROBLEMS)
def test_a_product_through_the_head_is_that_of_dense_matrices(
    calls: list[int], net: dict[str, Any], criterion: Any, number: int
) -> None:
    forward, params = hf.stateless(seeded(lambda: Language(**net)))
    batch = tokens(number, net)
    v = hf.gaussian(params, 1)[0]
    expected = truth(forward, criterion, params, batch) @ flat_of(v)
    matvec = hf.ggnvp(forward, criterion, params, batch)
    require_close(flat_of(matvec(v)), expected)
    require_close(flat_of(matvec(v)), expected)
    assert calls == [len(batch[1])] * 3  # the check takes one
    stacked = torch.func.vmap(matvec)(hf.tree.map(lambda x: torch.stack([x, -x]), v))
    require_close(flat_of(hf.tree.map(lambda x: x[1], stacked)), -expected)  # vmap sees operations of torch
    assert len(calls) == 3
    require_close(flat_of(hf.ggnvp(forward, criterion, params, batch)(v)), expected)
    assert len(calls) == 4  # what is known is kept with the model and its criterion


def test_some_of_the_texts_are_checked(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_check, "SMALL", 0)
    forward, params = hf.stateless(seeded(Language))
    batch, criterion, v = tokens(8, {}), nn.CrossEntropyLoss(), hf.gaussian(params, 1)[0]
    found = hf.ggnvp(forward, criterion, params, batch)(v)
    require_close(flat_of(found), truth(forward, criterion, params, batch) @ flat_of(v))
    assert calls == [LENGTH, 8 * LENGTH]


@pytest.mark.parametrize("net", [{}, {"shifted": True, "flat": False}])
def test_no_operation_has_the_logits(calls: list[int], net: dict[str, Any]) -> None:
    forward, params = hf.stateless(seeded(lambda: Language(**net)))
    loss = with_marked_outputs(forward, nn.CrossEntropyLoss() if net == {} else of_object)
    job = pipeline.Job(by_definition(loss), params, tokens(6, net))
    graph = pipeline.run(pipeline.LOSS + pipeline.PRODUCT, None, job).graph
    assert len(graph.find_nodes(op="call_function", target=outputs.curvatures)) == 1
    shapes = [n.meta["val"].shape for n in graph.nodes if n.op == "call_function" and "val" in n.meta]
    assert len(shapes) > 10 and not any(CLASSES in s and s.numel() > CLASSES * WIDTH for s in shapes)
    # Nor is anything computed that is not of the product: no loss, and no slope of what is before the outputs.
    fused = (outputs.head, cross_entropy.losses, cross_entropy.gradients, cross_entropy.tangents_of_gradients)
    assert not any(node.target in fused for node in graph.nodes)


@pytest.mark.parametrize("choice", ["head.*", "body.*", "head.bias"])
def test_what_is_frozen_has_no_part_in_it(calls: list[int], choice: str) -> None:
    forward, params = hf.stateless(seeded(Language), params=choice)
    batch, criterion = tokens(3, {}), nn.CrossEntropyLoss()
    v = hf.gaussian(params, 1)[0]
    found = hf.ggnvp(forward, criterion, params, batch)(v)
    require_close(flat_of(found), truth(forward, criterion, params, batch) @ flat_of(v))
    assert calls


def test_what_a_criterion_closes_over_may_change(calls: list[int]) -> None:
    forward, params = hf.stateless(seeded(Language))
    batch, scale = tokens(3, {}), torch.tensor(2.0, dtype=torch.float64)

    def criterion(out: Tensor, targets: Tensor) -> Tensor:
        return scale * F.cross_entropy(out, targets)

    matvec, v = hf.ggnvp(forward, criterion, params, batch), hf.gaussian(params, 1)[0]
    before = matvec(v)
    scale.mul_(3)
    after = matvec(v)
    assert len(calls) == 3
    for x, y in zip(before.values(), after.values(), strict=True):
        require_close(y, 3 * x)


def test_a_product_has_derivatives_by_the_parameters(calls: list[int]) -> None:
    forward, params = hf.stateless(seeded(Language))
    batch, criterion = tokens(3, {}), nn.CrossEntropyLoss()
    flat, unravel = hf.tree.ravel(params)
    v, along = (hf.tree.ravel(x)[0] for x in hf.gaussian(params, 2))

    def form(w: Tensor) -> Tensor:
        return hf.tree.dot(unravel(v), hf.ggnvp(forward, criterion, unravel(w), batch)(unravel(v)))

    point = flat.clone().requires_grad_()
    (slope,) = torch.autograd.grad(form(point), point)
    assert not calls
    h = 1e-5
    difference = (form(flat + h * along) - form(flat - h * along)) / (2 * h)
    assert calls
    assert float(slope @ along) == pytest.approx(float(difference), rel=1e-6)
    assert float(torch.func.jvp(form, (flat,), (along,))[1]) == pytest.approx(float(difference), rel=1e-6)


def test_a_model_that_cannot_be_traced_keeps_the_eager_way(calls: list[int]) -> None:
    net = seeded(Language)

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, ids: Tensor) -> Tensor:
            out = self.net(ids)
            return out if float(out.detach().sum()) > 1e9 else 2 * out

    forward, params = hf.stateless(Branching())
    batch, criterion = tokens(3, {}), nn.CrossEntropyLoss()
    v = hf.gaussian(params, 1)[0]
    found = hf.ggnvp(forward, criterion, params, batch)(v)
    require_close(flat_of(found), truth(forward, criterion, params, batch) @ flat_of(v))
    assert not calls


def test_a_wrong_trace_is_found_out(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    forward, params = hf.stateless(seeded(Language))
    batch, criterion = tokens(3, {}), nn.CrossEntropyLoss()
    right = chunks.curvatures
    monkeypatch.setattr(chunks, "curvatures", lambda *args: [x if x is None else 1.2 * x for x in right(*args)])
    v = hf.gaussian(params, 1)[0]
    expected = truth(forward, criterion, params, batch) @ flat_of(v)
    require_close(flat_of(hf.ggnvp(forward, criterion, params, batch)(v)), expected)
    require_close(flat_of(hf.ggnvp(forward, criterion, params, batch, check=False)(v)), 1.2 * expected)


def test_a_mark_is_made_in_a_recorded_graph_alone() -> None:
    with pytest.raises(outputs.Unsupported, match="marked"):
        outputs.output(torch.ones(2))


@pytest.mark.parametrize("smooth", [None, WEIGHTS / 10], ids=["plain", "smoothed"])
def test_chunks_and_definition_are_one_function(calls: list[int], smooth: Tensor | None) -> None:
    n, args = 9, [normal(9, WIDTH, seed=1), normal(CLASSES, WIDTH, seed=2), normal(CLASSES, seed=3)]
    target, part, g, dg = torch.arange(n) % CLASSES, normal(n, seed=4), normal(n, seed=5), normal(n, seed=6)
    tangents = [normal(*x.shape, seed=7 + i) for i, x in enumerate(args)]

    def slope(z: Tensor, t: Tensor) -> Tensor:
        z = z.detach().requires_grad_()
        of_rows = cross_entropy.losses(z, None, None, target, part, smooth)
        return torch.autograd.grad((of_rows * (g + t * dg)).sum(), z)[0]

    x, weight, bias = args
    z, dz = x @ weight.T + bias, tangents[0] @ weight.T + x @ tangents[1].T + tangents[2]
    h = 1e-5
    image = (slope(z + h * dz, torch.tensor(h)) - slope(z - h * dz, torch.tensor(-h))) / (2 * h)
    given: Any = (*args, target, part, smooth, g, (True,) * 3, *tangents, dg)
    by_vmap = torch.func.vmap(lambda dg: outputs.curvatures(*given[:-1], dg))(dg[None])
    expected = (image @ weight, image.T @ x, image.sum(0))
    for of_chunks, defined, by_difference in zip(outputs.curvatures(*given), by_vmap, expected, strict=True):
        require_close(of_chunks, defined[0])
        assert torch.allclose(of_chunks, by_difference, rtol=1e-6, atol=1e-8)
    assert calls == [n]


PEAK = """
import re, torch, hessfn as hf
from pathlib import Path
from torch import nn
def bytes_of(what):
    return 1024 * int(re.search(what + r":\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))
torch.manual_seed(0)
net = nn.Sequential(nn.Embedding(50257, 64), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 50257, bias=False)).eval()
forward, params = hf.stateless(net)
ids, v = torch.randint(50257, (2048,)), hf.gaussian(params, 1)[0]
matvec = hf.ggnvp(forward, nn.CrossEntropyLoss(), params, (ids, ids.roll(1)), check=False)
matvec(v)
before = bytes_of("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
matvec(v)
print(bytes_of("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
def test_a_product_takes_less_than_its_logits() -> None:
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    found = re.fullmatch(r"\d+", done.stdout.strip())
    assert found is not None
    assert int(found[0]) < 0.7 * 4 * 50257 * 2048
