"""Every error that a report states, held against dense Hessians of the same net, and of other samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from nets import classes, normal, seeded
from torch import Tensor, nn

import hessfn as hf
from hessfn.core import tree
from hessfn.reporting import text
from hessfn.reporting.clock import Clock
from hessfn.reporting.options import Options
from hessfn.reporting.problem import first_pass, prepare
from hessfn.reporting.result import result_of
from hessfn.reporting.run import analyse, report

SMALL: dict[str, Any] = {"num_activation_probes": 0, "num_plane_points": 0}


def numbers(problem: Any, **options: Any) -> dict[str, Any]:
    """What a report holds, without its page."""
    chosen = Options(**{**SMALL, **options})
    prepared = prepare(problem, chosen)
    chosen, first = chosen.fitted(tree.numel(prepared.params)), first_pass(prepared)
    return result_of(
        analyse(prepared, first, chosen, lambda _, matvec: matvec, Clock(None)), prepared, first, chosen, 0.0
    )


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))).to(dtype)


def data(num: int = 160, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return normal(num, 4).to(dtype), classes(num, 3, seed=1)


def dense_hessian(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """In float64, by torch's own, over the flat parameters."""
    params = {name: p.detach().double() for name, p in model.named_parameters()}
    sizes = [p.numel() for p in params.values()]
    flat = torch.cat([p.flatten() for p in params.values()])

    def loss(theta: Tensor) -> Tensor:
        parts = [x.view_as(p) for x, p in zip(theta.split(sizes), params.values(), strict=True)]
        named = dict(zip(params, parts, strict=True))
        outputs = torch.func.functional_call(model.double(), named, (batch[0].double(),))
        return nn.functional.cross_entropy(outputs, batch[1])

    return torch.autograd.functional.hessian(loss, flat)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return numbers((net(), nn.CrossEntropyLoss(), [data()]), k=4, num_layers=4)


@pytest.fixture(scope="module")
def exact() -> Tensor:
    return dense_hessian(net(), data())


def blocks(matrix: Tensor, model: nn.Module) -> dict[str, Tensor]:
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    ends = torch.tensor(list(sizes.values())).cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    return {name: matrix[a:b, a:b] for name, a, b in zip(sizes, starts, ends, strict=True)}


def test_residual_and_rounding_cover_the_eigenvalues(found: dict[str, Any], exact: Tensor) -> None:
    values = torch.linalg.eigvalsh(exact)
    largest = values[values.abs().argsort(descending=True)].tolist()
    for i, value in enumerate(found["eigenvalues"]):
        assert abs(value - largest[i]) <= found["residuals"][i] + found["rounding"][i]
        assert 0 < found["rounding"][i] < 1e-3 * abs(value)
    smallest = found["negative_curvature"]["smallest"]
    assert abs(smallest["value"] - float(values[0])) <= smallest["residual"] + smallest["rounding"]
    top = found["sharpness"]
    assert abs(top["value"] - float(values[-1])) <= top["residual"] + top["rounding"]


def test_the_trace_is_within_its_interval_and_far_better_than_without_the_eigenpairs(
    found: dict[str, Any], exact: Tensor
) -> None:
    trace = found["trace"]
    assert abs(trace["mean"] - float(exact.trace())) <= 4 * trace["stderr"]
    assert trace["lower"] < trace["mean"] < trace["upper"]
    params = dict(net().named_parameters())
    loss, theta = hf.functionalize(net(), nn.CrossEntropyLoss())
    plain = hf.hutchinson(hf.hvp(loss, theta, data()), hf.rademacher(params, 40))
    assert trace["stderr"] < float(plain.stderr) / 4


def test_layers_have_the_traces_tops_and_ranks_of_their_blocks(found: dict[str, Any], exact: Tensor) -> None:
    for name, block in blocks(exact, net()).items():
        layer, top = found["layers"][name], float(torch.linalg.eigvalsh(block).abs().max())
        assert abs(layer["trace"] - float(block.trace())) <= 4 * layer["stderr"] + layer["rounding"]
        assert abs(layer["top"] - top) <= layer["top_residual"] + 1e-4 * top
        rank = float(block.square().sum()) / top**2
        assert abs(layer["stable_rank"] - rank) <= 4 * layer["stable_rank_stderr"] + 0.05 * rank
    total = sum(layer["pairs_share"] * layer["trace"] for layer in found["layers"].values())
    assert total == pytest.approx(sum(found["eigenvalues"]), rel=1e-4)


def test_negative_share_of_squares_is_that_of_the_spectrum(found: dict[str, Any], exact: Tensor) -> None:
    values = torch.linalg.eigvalsh(exact)
    true = float(values.clamp(max=0).square().sum() / values.square().sum())
    share = found["negative_curvature"]["share_of_squares"]
    assert abs(share["mean"] - true) <= 4 * share["stderr"] + share["steps_error"]


def test_the_samples_are_those_of_the_means(found: dict[str, Any]) -> None:
    samples, groups = found["samples"], found["samples"]["batches"]
    weights = torch.tensor(samples["batch_weights"])
    assert found["data"]["parts"] == len(weights) == 8
    # Those of the groups are of the first probes.
    assert float(weights @ torch.tensor(groups["trace"])) == pytest.approx(found["trace"]["mean"], rel=2e-2)
    x, y = data()
    losses = nn.functional.cross_entropy(net()(x), y, reduction="none").detach().double()
    of_parts = torch.stack([part.mean() for part in losses.split(-(-len(losses) // 8))])
    torch.testing.assert_close(torch.tensor(groups["losses"]), of_parts, rtol=1e-5, atol=0, check_dtype=False)
    assert found["loss_data_stderr"] == pytest.approx(float(losses.std()) / len(losses) ** 0.5, rel=0.6)  # of 8 parts
    for value, forms in zip(found["eigenvalues"], groups["eigenvalues"], strict=True):
        assert float(weights @ torch.tensor(forms)) == pytest.approx(value, rel=1e-4)
    for name, layer in found["layers"].items():
        of_first = float(weights @ torch.tensor(groups["layers"][name]))
        assert abs(of_first - layer["trace"]) <= 10 * layer["stderr"]


@pytest.mark.slow
def test_the_datas_error_covers_the_trace_and_the_top_of_all_samples() -> None:
    """Of 1600 samples 20 reports see 80 each."""
    whole = data(1600)
    true = torch.linalg.eigvalsh(dense_hessian(net(), whole))
    hits = {"trace": 0, "sharpness": 0}
    for i in range(20):
        part = tuple(x[80 * i : 80 * (i + 1)] for x in whole)
        quick = {"k": 1, "num_pairs": 3, "num_probes": 12, "num_runs": 1, "num_steps": 5, "num_layers": 0}
        made = numbers((net(), nn.CrossEntropyLoss(), [part]), **quick)
        error = 2.4 * (made["trace"]["data_stderr"] + made["trace"]["stderr"])  # Student's t of 8 parts
        hits["trace"] += abs(made["trace"]["mean"] - float(true.sum())) <= error
        hits["sharpness"] += made["sharpness"]["lower"] <= float(true[-1]) <= made["sharpness"]["upper"]
    assert min(hits.values()) >= 17, hits


def test_float64_has_no_rounding_to_tell() -> None:
    model, batch = net(torch.float64), data(dtype=torch.float64)
    made = numbers((model, nn.CrossEntropyLoss(), [batch]), k=2, num_probes=10)
    assert made["rounding"] == [0.0, 0.0] and made["trace"]["rounding"] == 0.0


def test_where_nothing_finer_can_be_had_nothing_is_said_of_rounding() -> None:
    """As on a device without float64: 0 would be untrue of float32."""
    chosen = Options(**SMALL)
    prepared = prepare((net(), nn.CrossEntropyLoss(), [data()]), chosen)._replace(finer=None)
    chosen, first = chosen.fitted(tree.numel(prepared.params)), first_pass(prepared)
    made = result_of(
        analyse(prepared, first, chosen, lambda _, matvec: matvec, Clock(None)), prepared, first, chosen, 0.0
    )
    assert made["rounding"] is None and made["trace"]["rounding"] is None and made["sharpness"]["rounding"] is None
    assert all(layer["rounding"] is None for layer in made["layers"].values())
    assert "sharpness" in text.summary(made)


@pytest.mark.slow
def test_a_tolerance_of_the_trace_takes_as_many_probes_as_it_takes() -> None:
    problem = (net(), nn.CrossEntropyLoss(), [data()])
    counts = []
    for rtol in (0.2, 0.03):
        made = numbers(problem, num_pairs=5, rtol_trace=rtol)
        trace = made["trace"]
        assert trace["upper"] - trace["lower"] <= 2 * rtol * trace["mean"] * (1 + 1e-6)
        counts.append(len(made["samples"]["trace"]))
    assert counts[0] < counts[1] < 1000


def test_a_tolerance_that_is_not_reached_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hessfn.reporting.traces.MOST_PROBES", 20)
    with pytest.warns(UserWarning, match=r"the trace is not known to rtol_trace=1e-06 after 20 probes"):
        numbers((net(), nn.CrossEntropyLoss(), [data()]), num_pairs=5, rtol_trace=1e-6)


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_samples_that_meet_are_not_cut() -> None:
    made = numbers((seeded(Mixing).float().train(), nn.CrossEntropyLoss(), [data(40), data(40)]))
    assert made["data"]["parts"] == 2
    assert made["model"]["mode"] == "training"
    single = numbers((seeded(Mixing).float().train(), nn.CrossEntropyLoss(), [data(40)]))
    assert single["trace"]["data_stderr"] is None and single["sharpness"]["lower"] is None


class Branching(nn.Module):
    """One that no trace can stand for."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y.tanh() if float(y.detach().sum()) > 0 else y.sin()


def test_what_cannot_be_linearized_has_the_same_numbers_and_says_so() -> None:
    model, batch = seeded(Branching).float(), data(60)
    made = numbers((model, nn.CrossEntropyLoss(), [batch]), num_batches=1)
    assert made["cost"]["products_mode"] == "each computed from the loss"
    assert abs(made["trace"]["mean"] - float(dense_hessian(model, batch).trace())) <= 4 * made["trace"]["stderr"]


@pytest.mark.slow
def test_a_given_time_is_kept_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    batches = [tuple(x[50 * i : 50 * (i + 1)] for x in data(2000)) for i in range(40)]
    made = report((net(), nn.CrossEntropyLoss(), batches), tmp_path, minutes=0.5, **SMALL)
    assert "plan: " in capsys.readouterr().err
    assert made["cost"]["seconds"] < 40  # on a machine that has other things to do, too
    assert made["data"]["num_batches"] >= 2
    assert len(made["samples"]["trace"]) >= 10
    assert abs(made["trace"]["mean"]) > 0


def test_too_short_a_time_is_an_error_that_says_which_would_do(tmp_path: Path) -> None:
    batches = [data(200)] * 3
    with pytest.raises(ValueError, match=r"minutes=.* too short.*give minutes="):
        report((net(), nn.CrossEntropyLoss(), batches), tmp_path, minutes=0.01, **SMALL)
