"""A model that takes a derivative itself, as force fields do, against the same one by its formula."""

import pytest
import torch
from nets import normal, seeded
from torch import nn

import hessfn as hf


class Energy(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 6), nn.Linear(6, 1, bias=False)


class ByAutograd(Energy):
    def forward(self, x):
        x = x.detach().requires_grad_()
        energy = self.outer(self.inner(x).tanh()).sum()
        return -torch.autograd.grad(energy, x, create_graph=True)[0]


class ByFormula(Energy):
    def forward(self, x):
        return -((1 - self.inner(x).tanh().square()) * self.outer.weight) @ self.inner.weight


BATCH = normal(12, 3), normal(12, 3)[torch.arange(11, -1, -1)]


def both():
    for kind in (ByAutograd, ByFormula):
        yield (*hf.functionalize(seeded(kind).double(), nn.MSELoss()), kind)


def numbers(loss, params):
    uphill = hf.gradient_direction(loss, params, BATCH)
    downhill = hf.tree.scale(-1.0, uphill)
    hf.check_slice(hf.hvp(loss, params, BATCH), loss, params, uphill, BATCH)
    steps = torch.linspace(-1, 1, 3)
    yield from uphill.values()
    yield hf.line(loss, params, uphill, steps, BATCH)
    yield hf.slice_curvature(loss, params, uphill, BATCH)[0]
    yield hf.critical_sharpness(loss, params, downhill, BATCH).value


def test_slices_and_directions_are_those_of_the_formula():
    (one, at, _), (other, there, _) = both()
    for a, b in zip(numbers(one, at), numbers(other, there), strict=True):
        assert torch.allclose(a, b, rtol=1e-6)


def test_a_loss_without_a_gradient_has_no_direction():
    with pytest.raises(ValueError, match="norm 0.0"):
        hf.gradient_direction(lambda w: torch.tensor(1.0), torch.ones(2))


@pytest.mark.slow
def test_a_report_is_that_of_the_formula(tmp_path):
    found = [
        hf.report(
            (seeded(kind).double(), nn.MSELoss(), [BATCH]), tmp_path / kind.__name__, k=2, num_probes=6, num_steps=4
        )
        for kind in (ByAutograd, ByFormula)
    ]
    for name in ("loss", "eigenvalues"):
        a, b = (torch.tensor(x[name], dtype=torch.float64) for x in found)
        assert torch.allclose(a, b, rtol=1e-6)
    assert found[0]["trace"]["mean"] == pytest.approx(found[1]["trace"]["mean"], rel=1e-6)
