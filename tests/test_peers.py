"""What the page for those who come from other libraries says of them, on these libraries, where they are installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nets import classes, normal, seeded
from torch import Tensor, nn

import hessfn as hf

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]  # theirs

SIZES = 25, 15
X, Y = normal(sum(SIZES), 5), classes(sum(SIZES), 3)
LOADER = list(zip(X.split(SIZES), Y.split(SIZES), strict=True))


def net() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)))


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def columns(multiply: Any, n: int) -> Tensor:
    return torch.stack([multiply(unit) for unit in torch.eye(n).double()], 1)


class Positions(nn.Module):
    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.of_one, self.flat = nn.Linear(5, 3), flat

    def forward(self, x: Tensor) -> Tensor:
        out = self.of_one(x)
        return out.flatten(0, 1) if self.flat else out.movedim(-1, 1)


CRITERIA: dict[str, tuple[nn.Module, Tensor, float]] = {
    "cross-entropy": (nn.CrossEntropyLoss(), Y, 1),
    "squares": (nn.MSELoss(), normal(40, 3), 3),
    "logits": (nn.BCEWithLogitsLoss(), (normal(40, 3) > 0).double(), 3),
    "a sum": (nn.CrossEntropyLoss(reduction="sum"), Y, 40),
    "a sum of squares": (nn.MSELoss(reduction="sum"), normal(40, 3), 40),
}


@pytest.mark.parametrize("name", CRITERIA)
def test_the_empirical_fisher_matrix_of_curvlinops_is_ours_times_a_number(name: str) -> None:
    curvlinops = pytest.importorskip("curvlinops")
    criterion, y, factor = CRITERIA[name]
    model = net()
    theirs = curvlinops.EFLinearOperator(
        model, criterion, list(model.parameters()), [(X, y)], check_deterministic=False
    )
    forward, params = hf.stateless(model)
    ours = hf.dense(hf.fvp(forward, criterion, params, (X, y)), params)
    assert off(theirs @ torch.eye(len(ours)).double(), factor * ours) < 1e-12


def test_there_every_position_is_a_sample() -> None:
    curvlinops = pytest.importorskip("curvlinops")
    x, y, criterion = normal(8, 7, 5), classes(56, 3).reshape(8, 7), nn.CrossEntropyLoss()
    model, flat = (seeded(lambda flat=flat: Positions(flat)) for flat in (False, True))
    theirs = curvlinops.EFLinearOperator(
        model, criterion, list(model.parameters()), [(x, y)], check_deterministic=False
    )
    theirs = theirs @ torch.eye(18).double()
    forward, params = hf.stateless(flat)
    assert off(hf.dense(hf.fvp(forward, criterion, params, (x, y.flatten())), params), theirs) < 1e-12
    forward, params = hf.stateless(model)
    assert off(hf.dense(hf.fvp(forward, criterion, params, (x, y)), params), theirs) > 0.1


def test_operators_of_curvlinops_are_matvecs() -> None:
    curvlinops = pytest.importorskip("curvlinops")
    model, criterion = net(), nn.CrossEntropyLoss()
    loss, params = hf.functionalize(model, criterion)
    H = curvlinops.HessianLinearOperator(model, criterion, list(model.parameters()), LOADER)
    theirs = lambda v: dict(zip(params, H @ list(v.values()), strict=True))  # noqa: E731
    hf.check_matvec(theirs, params)
    ours = hf.dense(hf.mean_hvp(loss, params, LOADER), params)
    assert off(hf.dense(theirs, params), ours) < 1e-12
    with pytest.raises(AttributeError):  # the other way, SciPy's are none of theirs
        curvlinops.hutchinson_trace(hf.as_linear_operator(theirs, params), num_matvecs=3)


def test_hessian_eigenthings_weighs_batches_alike() -> None:
    peer = pytest.importorskip("hessian_eigenthings")
    model, criterion = net(), nn.CrossEntropyLoss()
    loss, params = hf.functionalize(model, criterion)
    n = hf.tree.numel(params)
    H = peer.HessianOperator(model, LOADER, peer.supervised_loss(criterion))
    unweighted = hf.dense(hf.mean_hvp(loss, params, LOADER, weights=lambda batch: 1.0), params)
    assert off(columns(H.matvec, n), unweighted) < 1e-12
    assert off(hf.dense(hf.mean_hvp(loss, params, LOADER), params), unweighted) > 0.1
    F = peer.EmpiricalFisherOperator(model, [(X, Y)], peer.supervised_per_sample_loss(criterion))
    forward, _ = hf.stateless(model)
    assert off(columns(F.matvec, n), hf.dense(hf.fvp(forward, criterion, params, (X, Y)), params)) < 1e-12


def test_the_density_of_pyhessian_does_not_run() -> None:
    pyhessian = pytest.importorskip("pyhessian")
    found = pyhessian.hessian(net().float(), nn.CrossEntropyLoss(), data=(X.float(), Y), cuda=False)
    with pytest.raises((AttributeError, RuntimeError), match="eig"):
        found.density(iter=3)
