"""The negative end of a report, held against a dense Hessian."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nets import classes, normal
from torch import Tensor

import hessfn as hf
from hessfn.core.results import EigenPairs
from hessfn.reporting.ends import end_of

SHAPES = [(16, 8), (16,), (8, 16), (8,), (3, 8), (3,)]
SIZES = [torch.Size(shape).numel() for shape in SHAPES]


def loss(theta: Tensor) -> Tensor:
    a, b, c, d, e, f = (x.view(shape) for x, shape in zip(theta.split(SIZES), SHAPES, strict=True))
    hidden = torch.tanh(torch.tanh(normal(80, 8) @ a.T + b) @ c.T + d)
    return torch.nn.functional.cross_entropy(hidden @ e.T + f, classes(80, 3, seed=1))


@pytest.fixture(scope="module", params=range(2))
def found(request: Any) -> tuple[Tensor, EigenPairs]:
    """The Hessian of a trained net, and the space in which its largest eigenvalues were found."""
    theta = 0.6 * normal(sum(SIZES), seed=request.param)
    for _ in range(100):
        theta -= 0.5 * torch.func.grad(loss)(theta)
    matrix = torch.autograd.functional.hessian(loss, theta, vectorize=True)
    start, second = hf.gaussian(theta, 2, seed=request.param)
    return matrix, hf.eigsh(lambda v: matrix @ v, start, 10, second_start=second, keep_all=True)


def test_a_hundredth_of_it_as_residual_is_a_thousandth_of_the_eigenvalue_in_few_products(
    found: tuple[Tensor, EigenPairs],
) -> None:
    matrix, space = found
    calls = []

    def matvec(v: Tensor) -> Tensor:
        calls.append(1)
        return matrix @ v

    lowest = float(torch.linalg.eigvalsh(matrix)[0])
    pair: EigenPairs[Any] = end_of(space, -1, SimpleNamespace(matvec=matvec), 1e-2)  # type: ignore[arg-type]
    value, v = float(pair.values[0]), pair.vectors[0]
    assert pair.converged.all() and len(calls) <= 8
    residual = float((matrix @ v - value * v).norm())
    assert residual == pytest.approx(float(pair.residuals[0]), rel=0.1) and residual <= 1e-2 * abs(value)
    assert abs(value - lowest) <= 1e-3 * abs(value)


def test_an_end_that_the_space_knows_well_enough_takes_no_product(found: tuple[Tensor, EigenPairs]) -> None:
    matrix, space = found
    top = end_of(space, 1, SimpleNamespace(matvec=None), 1e-3)  # type: ignore[arg-type]
    assert top.converged.all()
    assert float(top.values[0]) == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]), rel=1e-6)
