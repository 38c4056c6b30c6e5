"""Traces by layer over whole data sets, against dense Hessians of all the data at once."""

from typing import Any

import pytest
import torch
from nets import classes, normal, seeded
from test_activation import CE, Residual
from torch import nn

import hessfn as hf
from hessfn.core import tree
from hessfn.quantization import forms

SIZES = 3, 1, 4


def problem():
    model = seeded(Residual)
    for p in model.parameters():
        p.data *= 2
    x, y = normal(sum(SIZES), 1, 3, 3), classes(sum(SIZES), 3)
    x[3] *= 8  # the batches differ
    return model, (x, y), list(zip(x.split(SIZES), y.split(SIZES), strict=True))


def dense_traces(loss, point):
    H = hf.dense(hf.hvp(loss, point), point).diagonal()
    return tree.map(torch.sum, tree.ravel(point)[1](H))


@pytest.mark.slow
def test_batches_of_unequal_size_give_the_traces_of_all_samples():
    model, whole, batches = problem()
    layers = ["conv2", "act", "fc"]
    loss, shifts = hf.activation_loss(model, CE, whole, layers)
    exact = dense_traces(loss, shifts)
    found = hf.activation_traces(model, CE, batches, layers, 150, microbatch=3)
    assert list(found.mean) == ["act#1", "conv2", "act#2", "fc"] and found.num_matvecs == 150
    for name, trace in exact.items():
        assert abs(found.mean[name] - trace) <= 4 * found.stderr[name]
        assert 0 < found.stderr[name] <= 0.2 * max(abs(t) for t in exact.values())
    alone = torch.stack([dense_traces(*hf.activation_loss(model, CE, b, "fc"))["fc"] for b in batches])
    assert abs(found.mean["fc"] - alone.mean()) > 8 * found.stderr["fc"]  # what batches of one weight would give
    average = hf.mean_traces(found, hf.activation_shapes(model, whole[0][:1], layers))
    assert average.mean["conv2"] == found.mean["conv2"] / shifts["conv2"][0].numel()


def test_blockwise_traces_have_the_variance_of_their_own_block():
    model, whole, _ = problem()
    layers = ["conv2", "fc"]
    loss, shifts = hf.activation_loss(model, CE, whole, layers)
    H = hf.dense(hf.hvp(loss, shifts), shifts)
    n = shifts["conv2"].numel()
    alone = hf.activation_traces(model, CE, [whole], layers, 200, blockwise=True)
    together = hf.activation_traces(model, CE, [whole], layers, 200)
    assert alone.num_matvecs == 2 * together.num_matvecs == 400
    for name, rows in (("conv2", slice(0, n)), ("fc", slice(n, None))):
        block = H[rows, rows] - H[rows, rows].diagonal().diag()
        others = H[rows].square().sum() - H[rows, rows].square().sum()
        for estimate, variance in ((alone, 2 * block.square().sum()), (together, 2 * block.square().sum() + others)):
            assert abs(estimate.mean[name] - H[rows, rows].trace()) <= 4 * estimate.stderr[name]
            assert estimate.stderr[name] == pytest.approx(float((variance / 200) ** 0.5), rel=0.3)


def test_sensitivities_are_the_traces_of_weights_and_activations():
    model, whole, batches = problem()
    found = hf.sensitivities(model, CE, batches, num_probes=150)
    assert list(found.weights.mean) == list(found.activations.mean) == ["stem", "conv1", "conv2", "fc"]
    loss, params = hf.functionalize(model, CE)
    of_weights = dense_traces(lambda p: loss(p, whole), params)
    of_activations = dense_traces(*hf.activation_loss(model, CE, whole, ["stem", "conv?", "fc"]))
    for name in found.weights.mean:
        assert abs(found.weights.mean[name] - of_weights[f"{name}.weight"]) <= 4 * found.weights.stderr[name]
        assert abs(found.activations.mean[name] - of_activations[name]) <= 4 * found.activations.stderr[name]
    assert found.weight_numel == {"stem": 18, "conv1": 36, "conv2": 36, "fc": 6}
    assert found.activation_numel == {"stem": 9, "conv1": 18, "conv2": 18, "fc": 2}
    assert all(p.grad is None for p in model.parameters())


def test_a_layer_called_twice_has_the_sum_and_tied_weights_one_trace():
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh()))
    model[2].weight = model[0].weight
    twice = nn.Sequential(*model, model[0])
    batch = normal(5, 3), classes(5, 3)
    found = hf.sensitivities(twice, CE, [batch], num_probes=100)
    exact = dense_traces(*hf.activation_loss(twice, CE, batch, nn.Linear))
    assert list(exact) == ["0#1", "2", "0#2"] and list(found.activations.mean) == ["0", "2"]
    assert abs(found.activations.mean["0"] - exact["0#1"] - exact["0#2"]) <= 4 * found.activations.stderr["0"]
    assert found.activation_numel == {"0": 6, "2": 3}
    assert found.weights.mean["0"] == found.weights.mean["2"]


def test_estimates_are_a_function_of_the_seed_and_products_can_be_watched():
    model, _, batches = problem()
    counted = []

    def transform(matvec):
        return lambda v: counted.append(1) or matvec(v)

    first, again, other = (
        hf.activation_traces(model, CE, batches, "fc", 3, seed=s, transform=transform) for s in (0, 0, 1)
    )
    assert first.mean == again.mean and first.mean != other.mean
    assert len(counted) == 3 * 3 * len(batches)


def test_bad_input_is_named():
    model, _, batches = problem()
    with pytest.raises(ValueError, match="num_probes=0 must be at least 1"):
        hf.activation_traces(model, CE, batches, "fc", 0)
    with pytest.raises(ValueError, match="layer 'act' .SiLU. has no parameter 'weight'"):
        hf.sensitivities(model, CE, batches, "act")
    sometimes = seeded(Sometimes)
    with pytest.raises(ValueError, match="batch 1: the model does not call 'fc'"):
        hf.activation_traces(sometimes, CE, batches, "fc", 2)


class Sometimes(Residual):
    def forward(self, x):
        return super().forward(x) if len(x) > 1 else self.stem(x).mean((2, 3))


def test_a_product_that_is_not_finite_is_an_error() -> None:
    """Its gradient is finite where its curvature is not: sqrt at 0 of what has slope 0 there."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.first(x)
            return out + (out - out.detach()).abs().pow(1.5)

    batch = (torch.ones(3, 2), torch.ones(3, 2))
    with pytest.raises(ValueError, match="finite"):
        hf.sensitivities(Net(), nn.MSELoss(), [batch], num_probes=2)


def test_rules_of_derivatives_are_checked_once_and_on_few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)))
    batches = [(normal(size, 4, seed=size), classes(size, 2)) for size in (40, 40, 24)]
    made: list[tuple[int, bool]] = []

    def linearized(loss: Any, point: Any, batch: Any, *, check: bool = True, factor: float = 1.0) -> Any:
        made.append((len(batch[0]), check))
        matvec = hf.linearized_hvp(loss, point, batch, check=check)
        return lambda v: tree.scale(factor, matvec(v))

    monkeypatch.setattr(forms, "linearized_hvp", linearized)
    found = hf.sensitivities(model, CE, batches, num_probes=2)
    assert made == [(5, False), (40, False), (40, False), (24, False)]
    made.clear()
    monkeypatch.setattr(forms, "linearized_hvp", lambda *args, **options: linearized(*args, **options, factor=1.5))
    hf.sensitivities(model, CE, batches, num_probes=2)
    assert made == [(5, False), (40, True), (40, True), (24, True)]  # what is wrong on few is asked of all
    assert float(found.weights.df) == 1


def test_what_takes_no_few_samples_is_checked_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.first(x.reshape(8, 4)).tanh()

    checks: list[bool] = []

    def linearized(*args: Any, check: bool = True) -> Any:
        checks.append(check)
        return hf.linearized_hvp(*args, check=check)

    monkeypatch.setattr(forms, "linearized_hvp", linearized)
    hf.sensitivities(seeded(Fixed), nn.MSELoss(), [(normal(8, 4), normal(8, 2))], num_probes=2)
    assert checks == [True]
