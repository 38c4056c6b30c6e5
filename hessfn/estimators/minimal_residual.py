"""The solution of smallest residual in a Krylov space whose basis is kept, on flat vectors."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.core.errors import InvalidInput
from hessfn.estimators.krylov import FlatMatVec, is_private, number

NOT_DEFINITE = (
    "precondition is not positive definite, v'Mv is negative or no number for some v: diagonal_preconditioner and "
    "spectral_preconditioner make one that is"
)


class Rows:
    """Vectors that are added one at a time, as a matrix: in one memory where nothing looks on, else in copies."""

    def __init__(self, first: Tensor, most: int) -> None:
        self.matrix = first[None]
        self._all = first.new_empty(most, len(first)) if is_private(first) else None
        if self._all is not None:
            self._all[0] = first
            self.matrix = self._all[:1]

    def add(self, row: Tensor) -> None:
        if self._all is not None and is_private(row):
            count = len(self.matrix)
            self._all[count] = row
            self.matrix = self._all[: count + 1]
        else:
            self.matrix, self._all = torch.cat([self.matrix, row[None]]), None


class Correction(NamedTuple):
    x: Tensor  # (n,), what takes the residual to its smallest
    num_matvecs: int
    norm: float  # of the matrix, as far as its products show; with a goal only


def correction(
    matvec: FlatMatVec,
    precondition: FlatMatVec | None,
    rest: Tensor,
    num_matvecs: int,
    eps: float,
    goal: float | None = None,
) -> Correction:
    """``x`` with the smallest residual ``rest - A x`` after so many products, measured in the preconditioner's norm.

    Lanczos with full orthogonalisation, for without it eigenvalues far from the others come again and again, and each
    copy costs products. What the projected problem says of ``x`` is solved by singular values, so that a singular
    matrix has the shortest solution; where the space ends early, the rest is zeros. With a goal it stops once the norm
    of the residual is at most so much, or there is no way further down. Without one nothing is asked: where a product
    is not finite, or the preconditioner is not positive definite, x is NaN.
    """
    v, z, beta = _unit(rest, precondition, torch.zeros_like(tree.norm(rest)))
    left = rest.clone() if goal is not None and precondition is not None else None  # of the residual, step by step
    basis = Rows(v, num_matvecs + 1)
    images = basis if precondition is None else Rows(z, num_matvecs + 1)  # by the preconditioner
    del v, z, rest
    alphas, betas = [], [beta]
    scale = torch.zeros_like(beta)
    fit = None if goal is None else _Fit(_definite(beta), goal)
    for count in range(1, num_matvecs + 1):
        product = matvec(images.matrix[-1])
        if fit is not None:
            fit.see(number(tree.norm(product), product, count), float(tree.norm(images.matrix[-1])))
        rest, components = _orthogonalize(product, basis.matrix, images.matrix)
        del product
        alphas.append(tree.wide(components[-1]))
        before = betas[-1] if count > 1 else scale
        scale = torch.maximum(scale, torch.hypot(alphas[-1], before))
        v, z, beta = _unit(rest, precondition, 10 * eps * scale)
        del rest
        scale = torch.maximum(scale, (alphas[-1].square() + before.square() + beta.square()).sqrt())
        betas.append(beta)
        basis.add(v)
        if images is not basis:
            images.add(z)
        if fit is not None:
            fit.add(float(alphas[-1]), _definite(beta))
            if left is not None:
                fit.proceed(left, v)
            size = fit.size if left is None else float(tree.norm(left))
            if size <= fit.goal or fit.has_ended(10 * eps * float(scale)):
                break
        del v, z  # before the next product
    x = _solved(alphas, betas, eps).to(images.matrix) @ images.matrix[: len(alphas)]
    return Correction(x, len(alphas), 0.0 if fit is None else fit.norm)


def _definite(size: Tensor) -> float:
    """A norm by the preconditioner, to decide on; the products are known to be finite."""
    if math.isnan(size):
        raise InvalidInput(NOT_DEFINITE)
    return float(size)


def _orthogonalize(v: Tensor, basis: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """As that of :mod:`hessfn.estimators.krylov`, in the inner product of the preconditioner."""
    components = torch.zeros_like(basis[:, 0])
    for _ in range(2):
        c = images @ v
        v = v.addmv_(basis.mT, c, alpha=-1) if is_private(v, basis, images) else v - c @ basis
        components = components + c
    return v, components


def _unit(v: Tensor, precondition: FlatMatVec | None, floor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The next basis vector, its image and its norm; all 0 where the norm is at most the floor.

    Where the preconditioner is found not to be positive definite, the norm is NaN.
    """
    if precondition is None:
        z, size = v, tree.norm(v)
    else:
        z = precondition(v)
        square = tree.dot(v, z)
        size = torch.where(square < -floor.square(), torch.nan, square.clamp(min=0).sqrt())
    broken = ~(size > floor)
    by = torch.where(broken, torch.inf, size).to(v.dtype)
    unit = v / by
    return unit, unit if precondition is None else z / by, torch.where(size <= floor, 0.0, size)


def _solved(alphas: list[Tensor], betas: list[Tensor], eps: float) -> Tensor:
    """Of the tridiagonal problem the shortest solution ``(m,)`` of least squares."""
    alpha, beta = torch.stack(alphas), torch.stack(betas)
    off = torch.diag_embed(beta[1:-1], 1)
    square = torch.diag_embed(alpha) + off + off.mT
    last = torch.cat([torch.zeros_like(alpha[:-1]), beta[-1:]])
    matrix = torch.cat([square, last[None]])
    bad = ~(matrix.isfinite().all() & beta[0].isfinite())  # only where a transform hides it
    left, values, right = torch.linalg.svd(torch.where(bad, 0.0, matrix), full_matrices=False)
    kept = values > 10 * eps * values[:1]
    shares = torch.where(kept, beta[0] * left[0] / torch.where(kept, values, 1.0), 0.0)
    return torch.where(bad, torch.nan, shares @ right)


class _Fit:
    """The residual, step by step, by the rotations of a QR factorisation of the tridiagonal matrix."""

    def __init__(self, size: float, goal: float) -> None:
        self.size, self.goal = size, goal  # of the residual; the size is in the norm of the preconditioner
        self.norm = 0.0  # of the matrix, as far as its products show
        self._cosine, self._sine, self._delta_bar, self._beta = -1.0, 0.0, 0.0, 0.0
        self._image = math.inf

    def see(self, product: float, vector: float) -> None:
        self.norm = max(self.norm, product / vector)

    def add(self, alpha: float, beta: float) -> None:
        gamma_bar = self._sine * self._delta_bar - self._cosine * alpha
        self._delta_bar = -self._cosine * beta
        self._image = math.hypot(gamma_bar, self._delta_bar)
        self._beta = beta
        gamma = math.hypot(gamma_bar, beta)
        if gamma > 0:
            self._cosine, self._sine = gamma_bar / gamma, beta / gamma
            self.size *= self._sine

    def proceed(self, left: Tensor, v: Tensor) -> None:
        """Writes over a residual what it is after the step that led to the basis vector ``v``."""
        left.mul_(self._sine**2).add_(v, alpha=-self.size * self._cosine)

    def has_ended(self, floor: float) -> bool:
        """Whether the space has ended, or the matrix takes what is left of the residual to zero."""
        return self._beta <= 0 or self._image <= floor
