"""An outside check of the whole library: where training holds the sharpness (Cohen et al. 2021 and 2022)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from nets import seeded
from torch import Tensor, nn
from torch.optim import SGD, Adam

import hessfn as hf

ETA, STEPS = 0.8, 400


def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum(1).mean() / 2


def digits_net() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A tanh net and 200 digits, all of them in every step."""
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    inputs = torch.from_numpy(images[:200])
    inputs = (inputs - inputs.mean(0)) / inputs.std()
    model = seeded(
        lambda: nn.Sequential(
            *(nn.Linear(64, 16, bias=False), nn.Tanh(), nn.Linear(16, 16, bias=False), nn.Tanh()),
            *(nn.Linear(16, 16, bias=False), nn.Tanh(), nn.Linear(16, 10, bias=False)),
        )
    )
    return model, (inputs, nn.functional.one_hot(torch.from_numpy(labels[:200]), 10).double())


def train(model: nn.Module, batch: tuple[Tensor, Tensor], optimizer: Any, num_steps: int, measure: Any) -> list[float]:
    """The losses of so many steps, before each of which ``measure`` is called."""
    losses = []
    for step in range(num_steps):
        measure(step)
        optimizer.zero_grad()
        value = criterion(model(batch[0]), batch[1])
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


@pytest.fixture(scope="module")
def descent() -> Any:
    """Of gradient descent: the top two pairs on the way, those of a cold start, losses, what a step meets."""
    model, batch = digits_net()
    loss, params = hf.functionalize(model, criterion)
    matvec = hf.hvp(loss, params, batch)  # made once: it follows the optimiser, which steps in place
    v0 = hf.gaussian(params, 1)[0]
    found: list[Any] = []
    along: list[tuple[Any, float]] = []

    def measure(step: int) -> None:
        if step % 8 == 0:
            last = found[-1].vectors if found else None
            found.append(hf.eigsh(matvec, v0, 2, which="LA", rtol=1e-2, warm_start=last))
            if step >= STEPS // 2:
                slopes = torch.autograd.grad(criterion(model(batch[0]), batch[1]), list(model.parameters()))
                downhill = {name: -slope for name, slope in zip(params, slopes, strict=True)}
                curvature = hf.tree.dot(downhill, matvec(downhill)) / hf.tree.dot(downhill, downhill)
                along.append((hf.critical_sharpness(loss, params, downhill, batch, step=ETA), float(curvature)))

    losses = train(model, batch, SGD(model.parameters(), lr=ETA), STEPS, measure)
    return found, hf.eigsh(matvec, v0, 2, which="LA", rtol=1e-2), torch.tensor(losses), along


def test_the_sharpness_rises_to_two_over_eta_and_stays(descent: Any) -> None:
    found, _, losses, _ = descent
    sharpness = torch.stack([pairs.values[0] for pairs in found])
    assert all(pairs.converged.all() for pairs in found)
    assert sharpness[0] < 0.5 * 2 / ETA
    assert abs(sharpness[-12:].mean() / (2 / ETA) - 1) < 0.05
    assert sharpness[-12:].std() < 0.05 * 2 / ETA
    # It went beyond, where a quadratic loss would diverge; this one falls, though not at every step.
    assert sharpness.max() > 1.2 * 2 / ETA
    assert losses[-1] < losses[STEPS // 2] and (losses.diff() > 0).any()


def test_warm_starts_follow_the_top_at_less_than_cold_ones_cost(descent: Any) -> None:
    found, cold, _, _ = descent
    warm = torch.stack([pairs.num_matvecs for pairs in found[1:]]).double().mean()
    assert warm < 0.75 * cold.num_matvecs


def test_at_the_edge_the_critical_sharpness_is_the_curvature_along_the_gradient(descent: Any) -> None:
    found, _, _, along = descent
    assert len(along) == 25
    for (critical, curvature), pairs in zip(along, found[-25:], strict=True):
        assert critical.converged and critical.num_losses <= 7
        assert abs(float(critical.value) / curvature - 1) < 0.1  # the loss is a quadratic along it, nearly
        assert critical.value < 1.02 * pairs.values[0]
    ratios = [float(critical.value) / curvature for critical, curvature in along]
    assert abs(np.mean(ratios) - 1) < 0.02
    # And it says what the largest eigenvalue does: 2 / eta.
    assert abs(np.mean([float(critical.value) for critical, _ in along[-12:]]) / (2 / ETA) - 1) < 0.05


# Where the largest eigenvalue of the preconditioned Hessian times eta is held, and what gets there soon.
HELD = {
    "Nesterov": (SGD, {"lr": 0.6, "momentum": 0.5, "nesterov": True}, 400, (2 + 2 * 0.5) / (1 + 2 * 0.5)),
    "Adam 0.9": (Adam, {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-7}, 800, 38.0),
    "heavy ball": (SGD, {"lr": 1.5, "momentum": 0.5}, 400, 2 + 2 * 0.5),
    "Adam 0.8": (Adam, {"lr": 5e-3, "betas": (0.8, 0.999), "eps": 1e-7}, 800, 18.0),
    "Adam 0": (Adam, {"lr": 2e-3, "betas": (0.0, 0.999), "eps": 1e-7}, 600, 2.0),
}
QUICK = ("Nesterov", "Adam 0.9")


@pytest.mark.parametrize(
    ("kind", "options", "num_steps", "threshold"),
    [pytest.param(*HELD[name], id=name, marks=() if name in QUICK else pytest.mark.slow) for name in HELD],
)
def test_each_optimiser_holds_its_own_sharpness(
    kind: Callable[..., Any], options: dict[str, Any], num_steps: int, threshold: float
) -> None:
    model, batch = digits_net()
    loss, params = hf.functionalize(model, criterion)
    matvec = hf.hvp(loss, params, batch)
    optimizer = kind(model.parameters(), **options)
    v0, found = hf.gaussian(params, 1)[0], []

    def measure(step: int) -> None:
        if step > num_steps * 2 / 3 and step % 20 == 0:
            seen = matvec
            if kind is Adam:
                seen = hf.scaled(matvec, hf.adam_scale(optimizer, dict(model.named_parameters())))
            last = found[-1].vectors if found else None
            found.append(hf.eigsh(seen, v0, 2, which="LA", rtol=1e-2, warm_start=last))

    losses = train(model, batch, optimizer, num_steps, measure)
    held = torch.stack([pairs.values[0] for pairs in found]) * options["lr"]
    assert all(pairs.converged[0] for pairs in found) and len(held) >= 6
    assert abs(held.mean() / threshold - 1) < 0.06, held
    assert held.std() < 0.06 * threshold
    assert losses[-1] < 0.02 * losses[0]
