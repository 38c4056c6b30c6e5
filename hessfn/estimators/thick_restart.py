"""Thick-restart Lanczos on flat vectors, from one starting vector or several."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.core.errors import InvalidInput
from hessfn.estimators import krylov
from hessfn.estimators.krylov import Space, Which, select
from hessfn.estimators.second_start import Chain


class Found(NamedTuple):
    values: Tensor  # (k,) float64
    vectors: Tensor  # (k, n)
    residuals: Tensor  # (k,)
    num_matvecs: int
    floor: float  # what rounding leaves of a residual
    outside: Tensor | None  # (2,), where the eigenvalues lie that have not been found
    device: torch.device  # of the starts


class Ritz(NamedTuple):
    values: Tensor  # (j,), ascending
    vectors: Tensor  # (j, j), columns
    residuals: Tensor  # (j,)
    floor: float


def thick_restart(
    space: Space,
    starts: Iterator[Tensor],
    num_starts: int,
    k: int,
    which: Which,
    rtol: float,
    max_matvecs: int,
    basis_size: int,
    basis_device: torch.device | str | None,
    second: Callable[[], Tensor] | None = None,
    keep_all: bool = False,
) -> Found:
    """Grows an orthonormal basis whose first ``done`` rows have been multiplied; ``pending`` more wait behind them.

    ``A Q_done = Q_{done + pending} H`` holds throughout, with H dense, after a restart as before, so H alone knows the
    residual of every Ritz pair. A breakdown takes one from ``pending``. When none are left, or all are rounding, the
    space is closed: a new direction, at row ``segment``, goes on in the complement, which may hold further copies.
    Once the wanted have settled, ``second`` is asked for a direction, whose chain looks for what they have missed;
    where it has found something, so does another one.
    """
    head = next(starts)
    n, device = len(head), head.device
    rows = min(basis_size + num_starts + (second is not None), n)
    basis = torch.empty(rows, n, dtype=head.dtype, device=basis_device or device)
    H = torch.zeros(rows, rows, dtype=torch.float64, device="cpu")
    first = pending = _begin(basis, itertools.chain(iter([head]), starts))
    del head
    if second and first < n and tree.norm(krylov.orthogonalize(_second(second, basis), basis[:first])[0]) < _NEW:
        raise InvalidInput("second_start lies within the first: give another random one, as gaussian(params, 2)[1]")
    keep = k + (basis_size - k) // 2  # Ritz vectors that a restart keeps
    done = count = segment = spent = 0
    scale, doubtful = 0.0, False
    chain: Chain | None = None  # from a second direction, once the wanted have settled
    before: Tensor | None = None  # the wanted values when it began
    outside: Tensor | None = None

    def multiply(v: Callable[[], Tensor]) -> Tensor:
        return space.product(space.unravel(v().to(device))).detach().to(basis.device)

    while True:
        product = multiply(partial(basis.select, 0, done))
        count += 1
        scale = max(scale, krylov.decided(tree.norm(product), partial(space.unravel, product), count))
        rest, components = krylov.orthogonalize(product, basis[: done + pending])
        H[: done + pending, done] = components.cpu().double()
        beta = float(tree.norm(rest))
        if beta > 10 * space.eps * scale and done + pending < n:
            basis[done + pending] = rest.div_(beta)
            H[done + pending, done] = beta
            pending += 1
        done, pending = done + 1, pending - 1
        del product, rest  # before the next product

        exhausted, full = count >= max_matvecs - 1, done >= basis_size or done + pending == rows < n
        if done < max(k, first) and pending:
            continue
        if chain:
            towards = chain.advance(H, done, pending)
            excluded = chain.excludes(which, rtol)
            if pending and not (exhausted or full or excluded or chain.closed() or chain.num_steps >= max(10, spent)):
                if pending > 1:
                    _turn(basis, H, done, pending, towards)
                chain.turned(H[done, :done])
                continue
            doubtful = doubtful or not excluded
            outside = torch.tensor(chain.bounds(), dtype=torch.float64, device="cpu")
            chain = None
        ritz = _ritz(H, done, pending, space.eps)
        coupling = torch.linalg.matrix_norm(H[done : done + pending, :done]) if pending else 0.0
        closed = coupling <= space.eps ** (2 / 3) * scale
        wanted = select(ritz.values, k, which)
        # A little less than asked for leaves room for the error that the last product may find.
        allowed = (0.9 * rtol * ritz.values.abs()).clamp(min=ritz.floor)
        if closed:
            finished = done == n or (done >= k and _repeats_change_nothing(H, ritz, segment, k, which))
        else:
            # Behind a closed space the new direction's own best must settle before the wanted are known, and so must
            # the next best where the second direction could not tell whether they are.
            settling = select(ritz.values, min(k + 2 * doubtful, done), which)
            unsettled = settling[ritz.residuals[settling] > allowed[settling]]
            finished = len(unsettled) == 0
        searched = before is not None and bool(((ritz.values[wanted] - before).abs() <= allowed[wanted]).all())
        room = not exhausted and done + pending < n and keep + pending + 2 <= rows
        if finished and second and room and not searched:
            spent = count if before is None else spent
            if done > keep:
                _compress(basis, H, done, pending, ritz, select(ritz.values, keep, which))
                ritz, done = _ritz(H, keep, pending, space.eps), keep
                wanted = select(ritz.values, k, which)
            w = _second(second, basis) if before is None else krylov.random(basis[0], count)
            w = _put(basis, H, done, pending, w)
            before, pending, segment = ritz.values[wanted], pending + 1, done
            chain = Chain(ritz.vectors[:, wanted], before, ritz.residuals[wanted], w, n, space.eps * scale)
            continue
        if finished or exhausted:
            kept = krylov.select_all(ritz.values, k, which) if keep_all else wanted
            return _checked(multiply, basis, H, done, pending, ritz, kept, count, outside, device)
        if pending > 1 and not closed:
            _turn(basis, H, done, pending, H[done : done + pending, :done] @ ritz.vectors[:, unsettled[0]])
        if full:
            _compress(basis, H, done, pending, ritz, select(ritz.values, keep, which))
            done, segment = keep, 0
        if closed:
            doubtful, segment = True, done
        if not pending:
            basis[done] = krylov.fresh(basis[0], basis[:done], count)
            pending = 1


def _second(second: Callable[[], Tensor], basis: Tensor) -> Tensor:
    return krylov.unit(second().detach(), "second_start").to(basis)


_NEW = 1e-3  # what a direction must have of itself beside earlier ones


def _put(basis: Tensor, H: Tensor, done: int, pending: int, w: Tensor) -> Tensor:
    """One more pending row, and all of them turned so that the first is what w has outside of the first ``done``.

    Returns the coordinates of w in the first ``done + 1``.
    """
    last = done + pending
    rest, components = krylov.orthogonalize(w, basis[:last])
    basis[last] = krylov.unit(rest)
    H[last, :done] = 0.0
    outside = torch.cat([components[done:], tree.norm(rest)[None]]).cpu().double()
    size = torch.linalg.vector_norm(outside)
    if pending:
        _turn(basis, H, done, pending + 1, outside)
        size = -torch.copysign(size, outside[0])  # as a reflection leaves it
    return torch.cat([components[:done].cpu().double(), size[None]])


def _begin(basis: Tensor, starts: Iterable[Tensor]) -> int:
    """Writes orthonormal rows that span the starts; says how many there are."""
    count = 0
    for start in starts:
        rest, _ = krylov.orthogonalize(krylov.unit(start.detach(), "the starting vector").to(basis), basis[:count])
        size = float(tree.norm(rest))
        if size > 10 * torch.finfo(rest.dtype).eps and count < len(basis):
            basis[count] = rest.div_(size)
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
    mirror[0] += torch.copysign(torch.ones_like(mirror[0]), mirror[0])
    mirror = mirror / torch.linalg.vector_norm(mirror)
    for rows in (basis[done : done + pending], H[done : done + pending, :done]):
        along = mirror.to(rows)
        rows.addr_(along, along @ rows, alpha=-2)


def _compress(basis: Tensor, H: Tensor, done: int, pending: int, ritz: Ritz, kept: Tensor) -> None:
    """The kept Ritz vectors and the pending rows become the whole basis."""
    turn, keep = ritz.vectors[:, kept], len(kept)
    krylov.rotated(basis[:done], turn)
    basis[keep : keep + pending] = basis[done : done + pending].clone()
    coupling = H[done : done + pending, :done] @ turn
    H.zero_()
    H[:keep, :keep] = ritz.values[kept].diag()
    H[keep : keep + pending, :keep] = coupling


def _checked(
    multiply: Callable[[Callable[[], Tensor]], Tensor],
    basis: Tensor,
    H: Tensor,
    done: int,
    pending: int,
    ritz: Ritz,
    wanted: Tensor,
    count: int,
    outside: Tensor | None,
    device: torch.device,
) -> Found:
    """The wanted pairs. One more product, of their mean, compares A with what H says of it."""
    turn = ritz.vectors[:, wanted]
    mean = turn.sum(1) / len(wanted) ** 0.5
    error = multiply(lambda: mean.to(basis) @ basis[:done])
    error.addmv_(basis[: done + pending].mT, (H[: done + pending, :done] @ mean).to(basis), alpha=-1)
    residuals = torch.hypot(ritz.residuals[wanted], tree.norm(error).cpu())
    krylov.rotated(basis[:done], turn)
    return Found(ritz.values[wanted], basis[: len(wanted)], residuals, count + 1, 3 * ritz.floor, outside, device)
