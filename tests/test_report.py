from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from nets import classes, normal, seeded
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hessfn as hf
from hessfn.reporting import html, text
from hessfn.reporting.run import report

FILES = [
    "activations.png",
    "density.png",
    "eigenvalues.png",
    "landscape.png",
    "layers.png",
    "plane.png",
    "report.html",
    "report.json",
]
QUICK: dict[str, Any] = {"k": 3, "num_probes": 4, "num_runs": 1, "num_steps": 5, "num_activation_probes": 0}


def timeless(result: dict[str, Any]) -> dict[str, Any]:
    """A report without what the clock says."""
    cost = {name: value for name, value in result["cost"].items() if name not in ("seconds", "stages")}
    return {**result, "date": "", "cost": cost}


def mlp() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))


def batches() -> list[Any]:
    return [(normal(5, 3), classes(5, 2)), (normal(3, 3, seed=3), classes(3, 2, seed=4))]


def problem() -> tuple[Any, Any, Any]:
    return mlp(), nn.CrossEntropyLoss(), batches()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("parent") / "deep" / "out"
    return out, report(
        problem(),
        out,
        name="<script>alert(1)</script>",
        k=3,
        num_probes=50,
        num_runs=2,
        num_steps=20,
        num_activation_probes=40,
    )


@pytest.fixture(scope="module")
def exact() -> torch.Tensor:
    loss, params = hf.functionalize(mlp(), nn.CrossEntropyLoss())
    whole = tuple(torch.cat(parts) for parts in zip(*batches(), strict=True))
    return hf.dense(hf.hvp(loss, params, whole), params)


def test_numbers_agree_with_the_dense_hessian_within_their_errors(made: Any, exact: torch.Tensor) -> None:
    _, result = made
    values = torch.linalg.eigvalsh(exact)
    largest = values[values.abs().argsort(descending=True)][:3]
    for found, residual, true in zip(result["eigenvalues"], result["residuals"], largest.tolist(), strict=True):
        assert abs(found - true) <= residual + 1e-12
    assert abs(result["trace"]["mean"] - exact.trace()) <= 4 * result["trace"]["stderr"]
    start = 0
    for layer in result["layers"].values():
        block = exact[start : start + layer["numel"], start : start + layer["numel"]]
        assert abs(layer["trace"] - block.trace()) <= 4 * layer["stderr"]
        start += layer["numel"]
    assert start == len(exact)


def test_layers_add_up_to_the_trace(made: Any) -> None:
    _, result = made
    assert sum(layer["trace"] for layer in result["layers"].values()) == pytest.approx(result["trace"]["mean"])


def test_activations_and_weights_have_the_traces_of_the_dense_hessians(made: Any, exact: torch.Tensor) -> None:
    found = made[1]["activations"]
    whole = tuple(torch.cat(parts) for parts in zip(*batches(), strict=True))
    loss, shifts = hf.activation_loss(mlp(), nn.CrossEntropyLoss(), whole, nn.Linear)
    flat = hf.dense(hf.hvp(loss, shifts), shifts).diagonal()
    assert list(found) == list(shifts) == ["0", "2"]
    assert [(x["numel"], x["weight_numel"]) for x in found.values()] == [(3, 12), (4, 8)]
    for layer, true in zip(found.values(), (flat[:24].sum(), flat[24:].sum()), strict=True):
        assert abs(layer["trace"] - true) <= 4 * layer["stderr"]
    for layer, entries in zip(found.values(), (slice(0, 12), slice(16, 24)), strict=True):
        assert abs(layer["weight_trace"] - exact.diagonal()[entries].sum()) <= 4 * layer["weight_stderr"]


@pytest.mark.slow
def test_a_model_without_layers_to_shift_has_no_activations(tmp_path: Path) -> None:
    single = seeded(lambda: nn.Linear(3, 2)), nn.CrossEntropyLoss(), batches()
    result = report(single, tmp_path, **QUICK | {"num_activation_probes": 2})
    assert result["activations"] is None and not (tmp_path / "activations.png").exists()


class Reading(nn.Module):
    """One that reads integers: nothing that can be shifted enters its only layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.words(x)


@pytest.mark.slow
def test_a_model_that_allows_no_activations_is_a_warning_where_report_is_called(tmp_path: Path) -> None:
    single = seeded(Reading), nn.CrossEntropyLoss(), [(classes(5, 4), classes(5, 2))]
    with pytest.warns(UserWarning, match="the report leaves the activations out") as said:
        result = report(single, tmp_path, **QUICK | {"num_activation_probes": 2})
    assert result["activations"] is None
    assert said[0].filename == __file__


def test_density_integrates_to_one(made: Any) -> None:
    density = made[1]["density"]
    area = torch.trapezoid(torch.tensor(density["values"]), torch.tensor(density["grid"]))
    assert area == pytest.approx(1.0, abs=1e-2)


def test_landscape_curves_at_the_middle_as_the_eigenvalue_says(made: Any) -> None:
    _, result = made
    steps, curve = result["landscape"]["steps"], result["landscape"]["losses"]["top eigenvector"]
    middle = len(steps) // 2
    assert curve[middle] == pytest.approx(result["loss"], rel=1e-12)
    second = (curve[middle - 1] - 2 * curve[middle] + curve[middle + 1]) / steps[middle + 1] ** 2
    assert second == pytest.approx(result["eigenvalues"][0], rel=0.05)
    assert set(result["landscape"]["losses"]) == {"top eigenvector", "random", "gradient"}


def test_json_is_what_is_returned(made: Any) -> None:
    out, result = made
    assert json.loads((out / "report.json").read_text()) == result
    assert {"python", "torch", "hessfn"} <= set(result["versions"])
    assert sorted(file.name for file in out.iterdir()) == FILES


@pytest.mark.slow
def test_the_same_arguments_give_the_same_report(tmp_path: Path) -> None:
    first, second = (report(problem(), tmp_path / name, **QUICK) for name in "ab")
    assert timeless(first) == timeless(second)


def test_nothing_of_the_users_changes(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model, criterion, data = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), nn.MSELoss(), batches()
    loader = DataLoader(TensorDataset(torch.randn(8, 3), torch.randn(8, 2)), batch_size=3)
    state, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    drawn, figures, data_before = torch.get_rng_state(), plt.get_fignums(), copy.deepcopy(data)
    for dtype in (None, "float64"):
        report((model, criterion, loader), tmp_path, dtype=dtype, num_batches=2, **QUICK)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert plt.get_fignums() == figures
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(now, state[name]) for name, now in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    torch.testing.assert_close(data, data_before, rtol=0, atol=0)


@pytest.mark.slow
def test_options_choose_parameters_batches_and_dtype(tmp_path: Path) -> None:
    model, criterion, data = problem()
    weights = nn.CrossEntropyLoss(weight=torch.ones(2, dtype=torch.float32))
    options = {**QUICK, "params": ["0.weight"], "num_batches": 1}
    single = [(x.float(), y) for x, y in data]
    result = report((copy.deepcopy(model).float(), weights, single), tmp_path / "a", dtype="float64", **options)
    assert list(result["layers"]) == ["0.weight"]
    assert result["settings"]["num_samples"] == 5
    assert result["settings"]["dtype"] == "float64"
    double = report((model, criterion, data[:1]), tmp_path / "b", **{**options, "num_batches": None})
    assert result["eigenvalues"] == pytest.approx(double["eigenvalues"], rel=1e-4)


def not_finite() -> tuple[Any, Any, Any]:
    good, (inputs, targets) = batches()
    return mlp(), nn.CrossEntropyLoss(), [good, (inputs * torch.inf, targets)]


def dropout() -> tuple[Any, Any, Any]:
    return nn.Sequential(mlp(), nn.Dropout(0.5)).train(), nn.CrossEntropyLoss(), batches()


def shuffling() -> tuple[Any, Any, Any]:
    data = TensorDataset(*batches()[0])
    return mlp(), nn.CrossEntropyLoss(), DataLoader(data, batch_size=2, shuffle=True)


@pytest.mark.parametrize(
    ("broken", "options", "message"),
    [
        (lambda: None, {}, "not NoneType"),
        (lambda: (mlp(), batches()), {}, r"\(model, criterion, batches\)"),
        (lambda: (mlp().forward, nn.MSELoss(), batches()), {}, r"torch.nn.Module.*not \(method"),
        (lambda: (mlp(), nn.MSELoss(), []), {}, "no batch"),
        (lambda: (mlp(), nn.MSELoss(), iter(batches())), {}, "only once"),
        (shuffling, {}, "shuffles"),
        (shuffling, {"num_batches": 1}, "shuffles"),
        (dropout, {}, "eval"),
        (not_finite, {}, "batch 1: the loss is nan"),
        (lambda: (mlp(), nn.CrossEntropyLoss(), [(torch.ones(2, 7), classes(2, 2))]), {}, "batch 0: no loss"),
        (lambda: (mlp(), nn.CrossEntropyLoss(reduction="none"), batches()), {}, "one real number"),
        (problem, {"params": "nothing*"}, "no parameter matches"),
        (problem, {"k": 0}, "k=0 must be at least 1"),
        (problem, {"k": 27}, "k=27 must be between 1 and 26"),
        (problem, {"num_probes": 1}, "num_probes=1"),
    ],
)
def test_errors_say_what_is_wrong_and_nothing_is_written(
    broken: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        report(broken(), tmp_path / "deep" / "out", **{**QUICK, **options})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_computed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")

    def criterion(outputs: Any, targets: Any) -> Any:
        raise AssertionError("computed")

    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="cannot be written to"):
            report((mlp(), criterion, batches()), out)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["first loss", "later loss", "writing"])
def test_an_interrupt_leaves_no_report_or_the_old_one(moment: str, tmp_path: Path, monkeypatch: Any) -> None:
    report(problem(), tmp_path / "old", **QUICK)
    before = {file.name: file.read_bytes() for file in (tmp_path / "old").iterdir()}
    calls = {"first loss": 0, "later loss": 4, "writing": 10**6}[moment]

    def criterion(*arguments: Any) -> Any:
        nonlocal left
        left -= 1
        return interrupt() if left < 0 else nn.functional.cross_entropy(*arguments)

    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    if moment == "writing":
        monkeypatch.setattr(html.json, "dumps", interrupt)
    for out in (tmp_path / "old", tmp_path / "new"):
        left = calls
        with pytest.raises(KeyboardInterrupt):
            report((mlp(), criterion, batches()), out, **QUICK)
    assert {file.name: file.read_bytes() for file in (tmp_path / "old").iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_summary_fits_a_terminal(made: Any) -> None:
    result = copy.deepcopy(made[1])
    result["settings"]["problem"] = "a_package.with_long.names:and_a_long_function_name" * 2
    result["settings"] |= {"num_parameters": 10**9, "num_samples": 10**7}
    result["eigenvalues"], result["converged"] = [-1.23456789e-12, 1e30, 5.0], [False, True, True]
    layer = next(iter(result["layers"].values())) | {"numel": 10**9, "trace": -1e7, "stderr": 123.4}
    result["layers"] = {f"{'very.' * 20}{i}": layer for i in range(20)}
    lines = text.summary(result).splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("not converged" in line for line in lines) == 1
    assert "and 12 more in report.json" in lines[-1]


def test_estimates_show_the_digits_their_error_leaves() -> None:
    assert text.estimate(142.2371, 3.14159) == "142.2 +- 3.1"
    assert text.estimate(0.00123456, 0.0000123) == "0.001235 +- 0.000012"
    assert text.estimate(1234.5, 250.0) == "1,234 +- 250"
    assert text.estimate(5.0, 0.0) == "5"
    assert text.estimate(None, None) == "not finite +- not finite"
