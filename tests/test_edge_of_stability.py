"""An outside check of the whole library: gradient descent holds the sharpness at 2/eta (Cohen et al. 2021)."""

import pytest
import torch
from nets import seeded
from torch import nn

import hessfn as hf

ETA, STEPS = 0.8, 400


@pytest.fixture(scope="module")
def descent():
    """The top two pairs on the way of full-batch gradient descent on 200 digits, the last from a cold start, losses."""
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    inputs = torch.from_numpy(images[:200])
    inputs = (inputs - inputs.mean(0)) / inputs.std()
    targets = nn.functional.one_hot(torch.from_numpy(labels[:200]), 10).double()

    def criterion(outputs, targets):
        return (outputs - targets).square().sum(1).mean() / 2

    model = seeded(
        lambda: nn.Sequential(
            *(nn.Linear(64, 16, bias=False), nn.Tanh(), nn.Linear(16, 16, bias=False), nn.Tanh()),
            *(nn.Linear(16, 16, bias=False), nn.Tanh(), nn.Linear(16, 10, bias=False)),
        )
    )
    loss, params = hf.functionalize(model, criterion)
    matvec = hf.hvp(loss, params, (inputs, targets))  # made once: it follows the optimiser, which steps in place
    v0, vectors = hf.gaussian(params, 1)[0], None
    optimizer = torch.optim.SGD(model.parameters(), lr=ETA)
    found, losses = [], []
    for step in range(STEPS):
        if step % 8 == 0:
            found.append(hf.eigsh(matvec, v0, 2, which="LA", rtol=1e-2, warm_start=vectors))
            vectors = found[-1].vectors
        optimizer.zero_grad()
        value = criterion(model(inputs), targets)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return found, hf.eigsh(matvec, v0, 2, which="LA", rtol=1e-2), torch.tensor(losses)


def test_the_sharpness_rises_to_two_over_eta_and_stays(descent):
    found, _, losses = descent
    sharpness = torch.stack([pairs.values[0] for pairs in found])
    assert all(pairs.converged.all() for pairs in found)
    assert sharpness[0] < 0.5 * 2 / ETA
    assert abs(sharpness[-12:].mean() / (2 / ETA) - 1) < 0.05
    assert sharpness[-12:].std() < 0.05 * 2 / ETA
    # It went beyond, where a quadratic loss would diverge; this one falls, though not at every step.
    assert sharpness.max() > 1.2 * 2 / ETA
    assert losses[-1] < losses[STEPS // 2] and (losses.diff() > 0).any()


def test_warm_starts_follow_the_top_at_less_than_cold_ones_cost(descent):
    found, cold, _ = descent
    warm = torch.stack([pairs.num_matvecs for pairs in found[1:]]).double().mean()
    assert warm < 0.75 * cold.num_matvecs
