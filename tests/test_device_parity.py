"""Every public function gives on a device what it gives on the CPU: `pytest -m gpu`."""

from __future__ import annotations

import copy
import inspect
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from devices import DEVICE, needs_device
from nets import conv_net, seeded, two_convolutions
from torch import Tensor, nn

import hessfn as hf

pytestmark = [pytest.mark.gpu, needs_device]
# What has no tensors, or has tests of its own on a device (test_gpu.py).
ELSEWHERE = {
    "compare", "kind_of_rounding", "show_config", "report", "all_reduce", "find_mode", "activation_shapes", "progress",
    "allocate_bits", "expected_rise", "hutchinson_per_sample",
}  # fmt: skip


class On:
    """One problem, with its tensors on one device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.model = seeded(lambda: conv_net(nn.BatchNorm2d(4))).to(device)
        self.criterion = nn.CrossEntropyLoss()
        x, y = hf.gaussian(torch.zeros(6, 1, 5, 5).double(), 1)[0], torch.arange(6) % 3
        self.batch = x.to(device), y.to(device)
        self.batches = [(x[:4].to(device), y[:4].to(device)), (x[4:].to(device), y[4:].to(device))]
        self.loss, self.params = hf.functionalize(self.model, self.criterion)
        self.forward, _ = hf.stateless(self.model)
        self.v, self.w = hf.gaussian(self.params, 2, seed=1)
        self.signs, self.normals = hf.rademacher(self.params, 6, seed=2), hf.gaussian(self.params, 6, seed=3)
        self.matvec = hf.linearized_hvp(self.loss, self.params, self.batch)
        self.n = hf.tree.numel(self.params)
        self.pairs = hf.eigsh(self.matvec, self.v, 3, rtol=1e-9, keep_all=True)
        self.density = hf.slq(self.matvec, self.normals, 12)

    def make(self, batch: Any) -> Any:
        return hf.linearized_hvp(self.loss, self.params, batch)

    def forms(self, vectors: Any) -> Any:
        return hf.batch_forms(self.make, self.batches, vectors)

    def cross_fitted(self) -> Any:
        def forms(half: list[Any]) -> Any:
            return lambda u: hf.batch_forms(self.make, half, hf.tree.map(lambda x: x[None], u), microbatch=1)

        a, b = self.batches[:1], self.batches[1:]
        return hf.cross_fitted(hf.batch_mean(self.make, a), hf.batch_mean(self.make, b), self.v, forms(a), forms(b))

    def part(self, part: Any) -> Any:
        rest = {k: x for k, x in self.params.items() if k not in part}
        return hf.linearized_hvp(lambda p, batch: self.loss({**rest, **p}, batch), part, self.batch)

    def adam_scale(self) -> Any:
        model = copy.deepcopy(self.model)
        found = torch.optim.Adam(model.parameters())
        self.criterion(model(self.batch[0]), self.batch[1]).backward()
        found.step()
        return hf.adam_scale(found, dict(model.named_parameters()))

    def by_activations(self) -> Tensor:
        loss, shifts = hf.activation_loss(self.model, self.criterion, self.batch, ["0"])
        return hf.dense(hf.hvp(loss, shifts), shifts)

    def journalled(self) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            return [hf.journal(self.matvec, folder)(self.v) for _ in range(2)]

    def stepped(self) -> Any:
        return hf.tree.add(self.params, self.w, 0.1)


def unsigned(pairs: Any) -> Any:
    """Eigenpairs without their vectors, whose signs and bases are free."""
    return pairs._replace(vectors=None)


RUNS: dict[str, Callable[[On], Any]] = {
    "activation_loss": lambda on: on.by_activations(),
    "activation_traces": lambda on: hf.activation_traces(on.model, on.criterion, on.batches, ["0", "6"], 4)[:2],
    "adam_scale": lambda on: on.adam_scale(),
    "as_linear_operator": lambda on: torch.as_tensor(
        hf.as_linear_operator(on.matvec, on.params) @ hf.tree.ravel(on.v)[0].cpu().numpy()
    ),
    "batch_forms": lambda on: tuple(on.forms(hf.tree.map(lambda a, b: torch.stack([a, b]), on.v, on.w))),
    "batch_mean": lambda on: hf.batch_mean(on.make, on.batches)(on.v),
    "batch_traces": lambda on: hf.batch_traces(on.make, on.batches, on.signs),
    "block": lambda on: hf.block(on.matvec, on.params, ["0.weight"], ["6.weight"])({"6.weight": on.v["6.weight"]}),
    "block_tops": lambda on: hf.block_tops(on.matvec, on.params, rtol=1e-8),
    "check_matvec": lambda on: hf.check_matvec(on.matvec, on.params),
    "check_slice": lambda on: hf.check_slice(on.matvec, on.loss, on.params, on.v, on.batch),
    "critical_sharpness": lambda on: hf.critical_sharpness(on.loss, on.params, on.v, on.batch),
    "cross_fitted": lambda on: on.cross_fitted(),
    "cumulative": lambda on: hf.cumulative(on.density),
    "data_interval": lambda on: hf.data_interval(on.forms(hf.tree.map(lambda a: a[None], on.v)).values),
    "data_stderr": lambda on: hf.data_stderr(on.forms(hf.tree.map(lambda a: a[None], on.v)).values),
    "deflate": lambda on: hf.deflate(on.matvec, on.pairs.vectors)(on.v),
    "deflated_trace": lambda on: hf.deflated_trace(on.matvec, on.signs, on.pairs),
    "dense": lambda on: hf.dense(on.matvec, on.params, batch_size=8),
    "density": lambda on: hf.density(on.density),
    "density_band": lambda on: hf.density_band(on.density),
    "diagonal_preconditioner": lambda on: hf.diagonal_preconditioner(hf.tree.map(torch.abs, on.v), 0.5)(on.w),
    "direction_to": lambda on: hf.direction_to(on.params, on.v),
    "eigsh": lambda on: unsigned(on.pairs),
    "eigsh_per_block": lambda on: {k: unsigned(x) for k, x in hf.eigsh_per_block(on.part, on.params, on.v).items()},
    "filter_normalized": lambda on: hf.filter_normalized(on.v, on.params),
    "follow": lambda on: unsigned(hf.follow(on.matvec, like=on.params, k=2, rtol=1e-8)[0]),
    "functionalize": lambda on: on.loss(on.params, on.batch),
    "fvp": lambda on: hf.fvp(on.forward, on.criterion, on.params, on.batch, num_samples=2)(on.v),
    "gaussian": lambda on: on.normals[5],
    "ggn_diagonal": lambda on: hf.ggn_diagonal(on.forward, on.criterion, on.params, on.batches),
    "ggn_traces": lambda on: hf.ggn_traces(on.forward, on.criterion, on.params, on.batches),
    "ggnvp": lambda on: hf.ggnvp(on.forward, on.criterion, on.params, on.batch)(on.v),
    "gradient_direction": lambda on: hf.gradient_direction(on.loss, on.params, on.batch),
    "hutchinson": lambda on: hf.hutchinson(on.matvec, on.signs, eigenpairs=on.pairs),
    "hutchinson_diag": lambda on: hf.hutchinson_diag(on.matvec, on.signs, eigenpairs=on.pairs),
    "hutchinson_per_leaf": lambda on: hf.hutchinson_per_leaf(on.matvec, on.signs, eigenpairs=on.pairs),
    "hutchpp": lambda on: hf.hutchpp(on.matvec, on.signs),
    "hvp": lambda on: hf.hvp(on.loss, on.params, on.batch)(on.v),
    "jensen_shannon": lambda on: hf.jensen_shannon(on.density, hf.slq(on.matvec, on.signs, 12)),
    "jensen_shannon_per_pair": lambda on: hf.jensen_shannon_per_pair(
        {"a": on.density, "b": hf.slq(on.matvec, on.signs, 12)}
    ),
    "journal": lambda on: on.journalled(),
    "lanczos": lambda on: hf.lanczos(on.matvec, on.v, 6)[:2],
    "line": lambda on: hf.line(on.loss, on.params, on.v, [-0.1, 0.0, 0.1], on.batch),
    "linearized_hvp": lambda on: on.matvec(on.v),
    "mean_hvp": lambda on: hf.mean_hvp(on.loss, on.params, on.batches)(on.v),
    "mean_traces": lambda on: hf.mean_traces(hf.hutchinson_per_leaf(on.matvec, on.signs), on.params),
    "negative_share_of_squares": lambda on: hf.negative_share_of_squares(on.density, on.n),
    "plane": lambda on: hf.plane(on.loss, on.params, [on.v, on.w], [0.0, 0.1], [-0.1, 0.1], on.batch, batch_size=2),
    "power_iter": lambda on: hf.power_iter(on.matvec, on.v, max_matvecs=9, rtol=None)._replace(vector=None),
    "principal_directions": lambda on: hf.principal_directions([on.params, on.stepped(), on.v]).fractions,
    "quadrature_of": lambda on: hf.quadrature_of(on.pairs, on.v),
    "quantized": lambda on: hf.quantized(on.params, dict.fromkeys(["0.weight", "3.weight", "6.weight"], 4)),
    "rademacher": lambda on: on.signs[5],
    "random_direction": lambda on: hf.random_direction(on.params),
    "restrict": lambda on: hf.restrict(on.matvec, on.params, "6.*")({k: x for k, x in on.v.items() if k[0] == "6"}),
    "rounding_of_pairs": lambda on: hf.rounding_of_pairs(on.matvec, on.matvec, on.pairs),
    "rounding_of_products": lambda on: hf.rounding_of_products(on.matvec, on.matvec, on.signs[0]).leaves,
    "rounding_of_trace": lambda on: hf.rounding_of_trace(on.matvec, on.matvec, on.signs[0]),
    "scaled": lambda on: hf.scaled(on.matvec, on.w)(on.v),
    "sensitivities": lambda on: hf.sensitivities(on.model, on.criterion, on.batches, num_probes=4),
    "slice_curvature": lambda on: hf.slice_curvature(on.loss, on.params, on.v, on.batch).value,
    "slq": lambda on: hf.slq(on.matvec, on.normals, 12, eigenpairs=on.pairs),
    "slq_per_block": lambda on: hf.slq_per_block(on.part, on.params, on.normals, 4),
    "solve": lambda on: hf.solve(on.matvec, on.v, damping=5.0, rtol=1e-9).x,
    "spectral_preconditioner": lambda on: hf.spectral_preconditioner(on.pairs, 0.5)(on.v),
    "squared_frobenius": lambda on: hf.squared_frobenius(on.matvec, on.signs, eigenpairs=on.pairs),
    "squared_frobenius_per_leaf": lambda on: hf.squared_frobenius_per_leaf(on.matvec, on.signs),
    "squared_row_norms": lambda on: hf.squared_row_norms(on.matvec, on.signs),
    "stable_ranks": lambda on: hf.stable_ranks(
        hf.squared_frobenius_per_leaf(on.matvec, on.signs), hf.block_tops(on.matvec, on.params, rtol=1e-8)
    ),
    "stateless": lambda on: on.forward(on.params, on.batch[0]),
    "trace_data_stderr": lambda on: hf.trace_data_stderr(
        hf.tree.leaves(hf.batch_traces(on.make, on.batches, on.signs).values)[0]
    ),
    "trace_of": lambda on: hf.trace_of(on.density, torch.square, on.n),
    "wasserstein": lambda on: hf.wasserstein(on.density, hf.slq(on.matvec, on.signs, 12)),
    "xdiag": lambda on: hf.xdiag(on.matvec, on.signs),
    "xtrace": lambda on: hf.xtrace(on.matvec, on.signs),
}  # fmt: skip


@pytest.fixture(scope="module")
def here_and_there() -> tuple[On, On]:
    return On("cpu"), On(DEVICE)


# A default device, as torch.set_default_device sets one, decides nothing: the tensors that are given do.
DEFAULTS = ["cpu", DEVICE]


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("name", RUNS)
def test_a_device_gives_what_the_cpu_gives(name: str, default: str, here_and_there: tuple[On, On]) -> None:
    expected = hf.tree.leaves(RUNS[name](here_and_there[0]))
    for on in here_and_there:
        with torch.device(default):
            found = hf.tree.leaves(RUNS[name](on))
        assert len(found) == len(expected)
        for a, b in zip(expected, found, strict=True):
            if isinstance(a, Tensor):
                assert torch.allclose(a.double(), b.cpu().double(), rtol=1e-6, atol=1e-8, equal_nan=True)


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("make", [hf.hvp, hf.linearized_hvp])
def test_a_product_of_the_cpu_keeps_its_memory_there(make: Any, default: str) -> None:
    loss, params, x = two_convolutions(16, 8, 16, torch.float32)  # large enough for a block, and for the kernel
    v = hf.gaussian(params, 1)[0]
    wide = hf.tree.map(Tensor.double, (params, x, v))
    expected = hf.hvp(loss, wide[0], wide[1], mode="double_backward")(wide[2])
    with torch.device(default):
        matvec = make(loss, params, x)
        found = [matvec(v) for _ in range(5)][-1]
    assert all(torch.allclose(found[k].double(), expected[k], rtol=1e-3, atol=1e-5) for k in expected)


@pytest.mark.filterwarnings("ignore")  # of few samples
def test_a_report_there_is_that_of_the_cpu(tmp_path: Path) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)))
    xs, y = hf.gaussian(torch.zeros(4, 6, 5).double(), 1)[0], torch.arange(6) % 3

    def numbers(device: str) -> list[Any]:
        problem = copy.deepcopy(model).to(device), nn.CrossEntropyLoss(), [(x.to(device), y.to(device)) for x in xs]
        found = hf.report(problem, tmp_path, num_probes=8, num_steps=6, num_layers=1, num_plane_points=3)
        for of_the_moment in ("date", "settings", "cost"):
            del found[of_the_moment]
        return [x for x in hf.tree.leaves(found) if isinstance(x, float)]

    expected = numbers("cpu")
    assert len(expected) > 100
    assert numbers(DEVICE) == pytest.approx(expected, rel=1e-4, abs=1e-7, nan_ok=True)
    with torch.device(DEVICE):
        for device in ("cpu", DEVICE):
            assert numbers(device) == pytest.approx(expected, rel=1e-4, abs=1e-7, nan_ok=True)


def test_every_public_function_is_among_them() -> None:
    functions = {name for name in hf.__all__ if inspect.isfunction(getattr(hf, name))}
    named = set(RUNS) | ELSEWHERE
    assert functions <= named, functions - named
