"""Traces of networks that are linear in each leaf alone: who is found to be so, and what a report says of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import classes, normal, seeded
from test_report_errors import dense_hessian, numbers
from torch import Tensor, nn

import hessfn as hf
from hessfn.products.exact_gauss_newton import has_blocks_of_the_hessian
from hessfn.reporting import exact_traces, text
from hessfn.reporting.differences import Shared, difference, of_trace
from hessfn.reporting.exact_traces import Exact, ExactTraces


class Gated(nn.Module):
    """A leaf that meets itself by two ways, or two leaves that meet each other."""

    def __init__(self, same: bool) -> None:
        super().__init__()
        self.a, self.b, self.same = nn.Linear(6, 6), nn.Linear(6, 6), same

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * (self.a if self.same else self.b)(x)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Any:
        return {"logits": (x + self.inner(x)).clamp(min=-1.0)[:, :3], "mask": x > 0}


def stack(*parts: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(6, 6), *parts, nn.Linear(6, 3))


def images(*parts: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2, padding=1), *parts, nn.Flatten(), nn.Linear(8, 3)
    )


def tied() -> nn.Module:
    one = nn.Linear(6, 6)
    return nn.Sequential(one, nn.ReLU(), one)


LINEAR: dict[str, Callable[[], nn.Module]] = {
    "relu": stack(nn.ReLU()),
    "leaky": stack(nn.LeakyReLU(0.1), nn.Dropout(), nn.Identity()),
    "prelu": stack(nn.PReLU()),
    "kinks": stack(nn.Hardtanh(), nn.ReLU6(), nn.Threshold(0.1, 0.0), nn.Softshrink(0.0)),
    "convolutions": images(nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(1)),
    "two leaves that meet": lambda: Gated(same=False),
    "residual, in a dict": Residual,
}
BENT: dict[str, Callable[[], nn.Module]] = {
    "tanh": stack(nn.Tanh()),
    "gelu": stack(nn.GELU()),
    "silu": stack(nn.SiLU()),
    "hardswish": stack(nn.Hardswish()),
    "layer norm": stack(nn.LayerNorm(6)),
    "probabilities": lambda: nn.Sequential(nn.Linear(6, 3), nn.LogSoftmax(-1)),
    "a leaf that meets itself": lambda: Gated(same=True),
    "tied": tied,
}


def built(make: Callable[[], nn.Module]) -> tuple[Any, Any, Tensor]:
    forward, params = hf.stateless(seeded(make).double().eval())
    return forward, params, normal(4, 6)


def bends(forward: Any, params: Any, x: Tensor) -> bool:
    """Whether the outputs have a second derivative along a single leaf, by torch's own forward mode."""

    def outputs(name: str, leaf: Tensor) -> Tensor:
        out = forward({**params, name: leaf}, x)
        return out["logits"] if isinstance(out, dict) else out

    for i, (name, p) in enumerate(params.items()):
        z = normal(*p.shape, seed=i)

        def slope(leaf: Tensor, name: str = name, z: Tensor = z) -> Tensor:
            return torch.func.jvp(lambda q: outputs(name, q), (leaf,), (z,))[1]

        if torch.func.jvp(slope, (p,), (z,))[1].abs().max() > 1e-12:
            return True
    return False


@pytest.mark.parametrize("name", [*LINEAR, *BENT])
def test_a_network_is_found_to_be_linear_in_each_leaf_if_it_is(name: str) -> None:
    forward, params, x = built({**LINEAR, **BENT}[name])
    assert bends(forward, params, x) == (name in BENT)
    assert has_blocks_of_the_hessian(forward, params, x) == (name in LINEAR)


def test_batch_norm_of_the_batch_bends_and_what_cannot_be_traced_is_not_known() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)))
    forward, params = hf.stateless(model.train())
    assert not has_blocks_of_the_hessian(forward, params, normal(4, 6))

    def branching(params: Any, x: Tensor) -> Tensor:
        return params * x if bool((params > 0).all()) else x

    assert not has_blocks_of_the_hessian(branching, torch.ones(6), normal(4, 6))


def relu_net() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)))


def data(num: int) -> tuple[Tensor, Tensor]:
    return normal(num, 4).float(), classes(num, 3, seed=1)


def blocks(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, float]:
    diagonal = dense_hessian(model, batch).diagonal()
    parts = diagonal.split([p.numel() for p in model.parameters()])
    return {name: float(part.sum()) for (name, _), part in zip(model.named_parameters(), parts, strict=True)}


@pytest.mark.parametrize("dtype", [None, "float64"])
def test_the_traces_of_a_report_are_those_of_the_dense_blocks(dtype: str | None) -> None:
    model, batch = relu_net().float(), data(160)
    uneven = [(batch[0][:100], batch[1][:100]), (batch[0][100:], batch[1][100:])]
    found = numbers((model, nn.CrossEntropyLoss(), uneven), k=2, dtype=dtype)
    wanted = blocks(relu_net().float(), batch)
    assert found["trace"]["stderr"] == 0 and len(found["samples"]["trace"]) == 6
    for name, x in found["layers"].items():
        assert x["stderr"] == 0
        assert x["trace"] == pytest.approx(wanted[name], rel=2e-6 if dtype is None else 1e-9)
        assert abs(x["trace"] - wanted[name]) <= x["rounding"] + 1e-9
    assert found["trace"]["mean"] == pytest.approx(sum(wanted.values()), rel=2e-6)
    assert "without probes" in text.summary(found)
    # Those of the groups are exact too: the spread over them is the data's alone.
    groups = torch.tensor(found["samples"]["batches"]["trace"])
    weights = torch.tensor(found["samples"]["batch_weights"])
    assert float(groups @ weights) == pytest.approx(found["trace"]["mean"], rel=1e-6)
    first = sum(blocks(relu_net().float(), (batch[0][:25], batch[1][:25])).values())
    assert min(abs(float(x) / first - 1) for x in groups) < 1e-5


@pytest.mark.slow
def test_other_nets_and_few_probes_take_probes() -> None:
    tanh = seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))).float()
    for model, num_probes in ((tanh, 12), (relu_net().float(), 2)):  # two probes cost less than three outputs
        found = numbers((model, nn.CrossEntropyLoss(), [data(40)]), k=2, num_probes=num_probes)
        assert found["trace"]["stderr"] > 0 and len(found["samples"]["trace"]) == num_probes


def test_what_the_probes_contradict_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Exact.__call__

    def wrong(self: Exact) -> ExactTraces:
        found = right(self)
        return found._replace(groups=9 * found.groups)

    monkeypatch.setattr(Exact, "__call__", wrong)
    with pytest.warns(UserWarning, match="not those of the probes"):
        found = numbers((relu_net().float(), nn.CrossEntropyLoss(), [data(160)]), k=2, num_probes=20)
    assert len(found["samples"]["trace"]) == 20
    lower, upper = found["trace"]["lower"], found["trace"]["upper"]
    assert found["trace"]["stderr"] > 0 and lower < sum(blocks(relu_net().float(), data(160)).values()) < upper


@pytest.mark.slow
def test_two_exact_traces_are_compared_without_probes() -> None:
    model = relu_net().float()
    before = numbers((model, nn.CrossEntropyLoss(), [data(80)]), k=2)
    with torch.no_grad():
        model[0].weight.mul_(1.001)
    after = numbers((model, nn.CrossEntropyLoss(), [data(80)]), k=2)
    samples = (before["samples"]["trace"], after["samples"]["trace"])
    counts = {"num_probes": 6, "num_batches": 8}
    by = difference(of_trace(before["trace"]), of_trace(after["trace"]), Shared(samples=samples), **counts)
    wanted = sum(blocks(model, data(80)).values()) - sum(blocks(relu_net().float(), data(80)).values())
    assert by.stderr == 0 and not by.paired and by.differs
    assert abs(by.mean - wanted) <= by.bound


def test_the_activations_of_a_report_are_exact_too() -> None:
    model, batch = relu_net().float(), data(40)
    found = numbers((model, nn.CrossEntropyLoss(), [batch]), k=2, num_activation_probes=6)["activations"]
    double = relu_net().float().double()
    for index in (0, 2, 4):
        entering = double[:index](batch[0].double()).detach()
        shape = entering.shape

        def loss(shift: Tensor, index: int = index, entering: Tensor = entering, shape: Any = shape) -> Tensor:
            return nn.functional.cross_entropy(double[index:](entering + shift.reshape(shape)), batch[1])

        H = torch.autograd.functional.hessian(loss, torch.zeros(shape.numel()).double())
        x = found[f"{index}"]
        assert x["stderr"] == x["weight_stderr"] == 0
        assert x["trace"] == pytest.approx(float(H.trace()), rel=1e-5)
        assert x["weight_trace"] == pytest.approx(blocks(relu_net().float(), batch)[f"{index}.weight"], rel=1e-5)
        assert (x["numel"], x["weight_numel"]) == (shape[1], double[index].weight.numel())


def test_a_weight_that_is_not_among_the_parameters_leaves_the_activations_to_probes() -> None:
    model = relu_net().float()
    found = numbers((model, nn.CrossEntropyLoss(), [data(40)]), k=2, params="4.*", num_activation_probes=6)
    assert found["trace"]["stderr"] == 0
    assert found["activations"]["0"]["stderr"] > 0


@pytest.mark.slow
def test_the_page_and_the_comparison_show_exact_traces_without_an_error(tmp_path: Path) -> None:
    model = relu_net().float()
    for name in ("before", "after"):
        found = hf.report((model, nn.CrossEntropyLoss(), [data(80)]), tmp_path / name, k=2, num_plane_points=0)
        with torch.no_grad():
            model[0].weight.mul_(1.001)
    page = (tmp_path / "after" / "report.html").read_text()
    assert f"<dd>{text.number(found['trace']['mean'])}</dd>" in page and "&plusmn; </small>" not in page
    by = hf.compare(tmp_path / "before", tmp_path / "after", out=tmp_path / "compare.html")["trace"]
    assert by.stderr == 0 and not by.paired
    assert "&plusmn; </small>" not in (tmp_path / "compare.html").read_text()


@pytest.mark.slow
def test_a_net_whose_gradients_are_large_takes_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(p.numel() for p in relu_net().parameters()) * 4 * 3
    for most, is_exact in ((size, True), (size - 1, False)):
        monkeypatch.setattr(exact_traces, "_MOST_BYTES", most)
        found = numbers((relu_net().float(), nn.CrossEntropyLoss(), [data(40)]), k=2, num_probes=12)
        assert (found["trace"]["stderr"] == 0) == is_exact
