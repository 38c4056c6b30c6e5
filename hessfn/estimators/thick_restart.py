"""Thick-restart Lanczos on flat vectors, from one starting vector or several."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.estimators import krylov
from hessfn.estimators.krylov import FlatMatVec, Space, Which, select


class Found(NamedTuple):
    values: Tensor  # (k,) float64
    vectors: Tensor  # (k, n)
    residuals: Tensor  # (k,)
    num_matvecs: int
    floor: float  # what rounding leaves of a residual


class Ritz(NamedTuple):
    values: Tensor  # (j,), ascending
    vectors: Tensor  # (j, j), columns
    residuals: Tensor  # (j,)
    floor: float


def thick_restart(
    space: Space,
    starts: Tensor,
    k: int,
    which: Which,
    rtol: float,
    max_matvecs: int,
    basis_size: int,
    basis_device: torch.device | str | None,
) -> Found:
    """Grows an orthonormal basis whose first ``done`` rows have been multiplied; ``pending`` more wait behind them.

    ``A Q_done = Q_{done + pending} H`` holds throughout, with H dense, after a restart as before, so H alone knows the
    residual of every Ritz pair. A breakdown takes one from ``pending``. When none are left, or all are rounding, the
    space is closed: a new direction, at row ``segment``, goes on in the complement, which may hold further copies.
    """
    n, starts = starts.shape[1], starts.detach()
    rows = min(basis_size + len(starts), n)
    basis = torch.empty(rows, n, dtype=starts.dtype, device=basis_device or starts.device)
    H = torch.zeros(rows, rows, dtype=torch.float64)
    first = pending = _begin(basis, starts)
    done = count = segment = 0
    scale, reopened = 0.0, False

    def multiply(v: Tensor) -> Tensor:
        return space.matvec(v.to(starts.device)).detach().to(basis.device)

    while True:
        product = multiply(basis[done])
        count += 1
        scale = max(scale, krylov.number(tree.norm(product), space.unravel(product), count))
        rest, components = krylov.orthogonalize(product, basis[: done + pending])
        H[: done + pending, done] = components.cpu().double()
        beta = float(tree.norm(rest))
        if beta > 10 * space.eps * scale and done + pending < n:
            basis[done + pending] = rest / beta
            H[done + pending, done] = beta
            pending += 1
        done, pending = done + 1, pending - 1

        if done < max(k, first) and pending:
            continue
        ritz = _ritz(H, done, pending, space.eps)
        coupling = torch.linalg.matrix_norm(H[done : done + pending, :done]) if pending else 0.0
        closed = coupling <= space.eps ** (2 / 3) * scale
        if closed:
            finished = done == n or (done >= k and _repeats_change_nothing(H, ritz, segment, k, which))
        else:
            # Behind a closed space the new direction's own best must settle before the wanted are known.
            wanted = select(ritz.values, min(k + 2 * reopened, done), which)
            # A little less than asked for leaves room for the error that the last product may find.
            allowed = (0.9 * rtol * ritz.values.abs()).clamp(min=ritz.floor)
            unsettled = wanted[ritz.residuals[wanted] > allowed[wanted]]
            finished = len(unsettled) == 0
        if finished or count >= max_matvecs - 1:
            return _checked(multiply, basis, H, done, pending, ritz, select(ritz.values, k, which), count)
        if pending > 1 and not closed:
            _turn(basis, H, done, pending, H[done : done + pending, :done] @ ritz.vectors[:, unsettled[0]])
        if done == basis_size:
            keep = k + (basis_size - k) // 2
            _compress(basis, H, done, pending, ritz, select(ritz.values, keep, which))
            done, segment = keep, 0
        if closed:
            reopened, segment = True, done
        if not pending:
            basis[done] = krylov.fresh(starts[0], basis[:done], count)
            pending = 1


def _begin(basis: Tensor, starts: Tensor) -> int:
    """Writes orthonormal rows that span the starts; says how many there are."""
    count = 0
    for start in starts:
        start = krylov.unit(start, "the starting vector").to(basis.device)
        rest, _ = krylov.orthogonalize(start, basis[:count])
        size = float(tree.norm(rest))
        if size > 10 * torch.finfo(rest.dtype).eps and count < len(basis):
            basis[count] = rest / size
            count += 1
    return count


def _ritz(H: Tensor, done: int, pending: int, eps: float) -> Ritz:
    values, vectors = torch.linalg.eigh(H[:done, :done], UPLO="U")
    # What lies under the diagonal is 0 for a symmetric matrix, and counts as residual for any other.
    residuals = H[: done + pending, :done] @ vectors
    residuals[:done] -= vectors * values
    return Ritz(values, vectors, torch.linalg.vector_norm(residuals, dim=0), 10 * eps * float(values.abs().max()))


def _repeats_change_nothing(H: Tensor, ritz: Ritz, segment: int, k: int, which: Which) -> bool:
    """Whether the wanted stay the same should all that the last fresh direction has seen be there once more."""
    last = torch.linalg.eigvalsh(H[segment : len(ritz.values), segment : len(ritz.values)], UPLO="U")
    doubled = torch.cat([ritz.values, last]).sort().values
    change = doubled[select(doubled, k, which)] - ritz.values[select(ritz.values, k, which)]
    return bool((change.abs() <= ritz.floor).all())


def _turn(basis: Tensor, H: Tensor, done: int, pending: int, towards: Tensor) -> None:
    """Reflects the pending rows so that the first of them is the residual of the pair most in need of it."""
    mirror = towards / torch.linalg.vector_norm(towards)
    mirror[0] += torch.copysign(torch.ones(()), mirror[0])
    mirror = mirror / torch.linalg.vector_norm(mirror)
    rows = basis[done : done + pending]
    rows -= torch.outer(2 * mirror.to(rows), mirror.to(rows) @ rows)
    entries = H[done : done + pending, :done]
    entries -= torch.outer(2 * mirror, mirror @ entries)


def _compress(basis: Tensor, H: Tensor, done: int, pending: int, ritz: Ritz, kept: Tensor) -> None:
    """The kept Ritz vectors and the pending rows become the whole basis."""
    turn, keep = ritz.vectors[:, kept], len(kept)
    for columns in basis.split(_COLUMNS, dim=1):  # in place, block by block: no second basis
        columns[: keep + pending] = torch.cat([turn.T.to(columns) @ columns[:done], columns[done : done + pending]])
    coupling = H[done : done + pending, :done] @ turn
    H.zero_()
    H[:keep, :keep] = ritz.values[kept].diag()
    H[keep : keep + pending, :keep] = coupling


_COLUMNS = 1 << 16


def _checked(
    multiply: FlatMatVec, basis: Tensor, H: Tensor, done: int, pending: int, ritz: Ritz, wanted: Tensor, count: int
) -> Found:
    """The wanted pairs. One more product, of their mean, compares A with what H says of it."""
    turn = ritz.vectors[:, wanted]
    mean = turn.sum(1) / len(wanted) ** 0.5
    error = multiply(mean.to(basis) @ basis[:done])  # first, while there are no vectors: a product takes memory
    error = error - (H[: done + pending, :done] @ mean).to(basis) @ basis[: done + pending]
    residuals = torch.hypot(ritz.residuals[wanted], tree.norm(error).cpu())
    return Found(ritz.values[wanted], turn.T.to(basis) @ basis[:done], residuals, count + 1, 3 * ritz.floor)
