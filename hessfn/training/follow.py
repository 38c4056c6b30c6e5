"""The ends of a spectrum along a training: each time from where they were last time."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.core.arguments import kind, require_matvec, require_vector
from hessfn.core.errors import InvalidInput
from hessfn.core.probes import gaussian
from hessfn.core.results import EigenPairs, FollowState
from hessfn.core.tree import MatVec, T
from hessfn.estimators.eigen import eigsh
from hessfn.estimators.krylov import Which

_CALL = "follow(matvec, state)"
_APART = 1 << 32  # the directions of follow are no probes of a user's, whose seeds are small


def follow(
    matvec: MatVec[T],
    state: FollowState[T] | None = None,
    *,
    like: T | None = None,
    k: int = 1,
    which: Which = "LA",
    rtol: float | None = 1e-2,
    max_matvecs: int | None = None,
    search: bool = True,
    seed: int | Tensor = 0,
) -> tuple[EigenPairs[T], FollowState[T]]:
    """The k eigenpairs at the ends of the spectrum of a matrix that changes, and the state for the next call.

    Each call starts from the vectors of the last one, and from a new random direction. The vectors alone could
    converge, with small residuals, to an eigenvalue that is no longer the largest, since the eigenvector of a new
    largest eigenvalue may be orthogonal to all of them.

    Args:
        matvec: of the matrix as it is now, such as ``hvp(loss, params, batch)`` of a fixed batch.
        state: what the last call returned; None for the first call.
        like: a tree like the vectors. The first call needs it. A later one takes it to move the state to its device
            and dtype, as after ``torch.load``.
        k, which: which pairs, as for :func:`hessfn.eigsh`. The k of a state stays; ``which`` may change.
        rtol: the relative residual asked of each pair. None for exactly ``max_matvecs`` products, under ``vmap`` and
            autograd too: Lanczos from the sum of the vectors and a random one.
        max_matvecs: the most products of a call; by default as many as ``eigsh`` allows.
        search: whether to use a random direction. Without it a call costs half as much, and an eigenvector that is
            nearly orthogonal to those of the state is missed without a sign. Not for ``rtol=None``.
        seed: of the random direction of the first call; the state contains the seed of the next one.

    Returns:
        The pairs as of ``eigsh``: ``values``, ``vectors``, ``residuals``, ``num_matvecs``, ``converged``, and with
        ``search`` their ``outside``: with probability 0.999 all other eigenvalues lie within. And the state, a tree for
        ``torch.save`` and ``torch.load``: a training that resumes gets the same numbers.

    Cost: ``num_matvecs`` products: for one pair of a matrix that has hardly changed 2, and about 5 more with
    ``search``; the how-to page has those of a training. Memory as for ``eigsh``; the state keeps k vectors.

    Raises:
        ValueError: there is neither a state nor ``like``, the state is of another k or of a tree of other leaves, or is
            no state; and what ``eigsh`` raises.

    Source: thick-restart Lanczos as of :func:`hessfn.eigsh`, from a block of vectors.

    >>> A = torch.diag(torch.arange(1.0, 100.0))
    >>> pairs, state = follow(lambda v: A @ v, like=torch.zeros(99))
    >>> nearly = 1.01 * A
    >>> pairs, state = follow(lambda v: nearly @ v, state, search=False)
    >>> round(float(pairs.values[0]), 1), int(pairs.num_matvecs)
    (100.0, 2)
    """
    require_matvec(matvec, _CALL)
    if which not in get_args(Which):
        raise InvalidInput(f"which={which!r} must be one of {', '.join(get_args(Which))}")
    if like is not None:
        require_vector(like, "like", _CALL)
    if state is None:
        if like is None:
            raise InvalidInput(f"{_CALL}: the first call needs like=params, a tree like the vectors")
        vectors, now = None, torch.as_tensor(_checked(seed), device="cpu") + _APART
        start = gaussian(like, 1, seed=now)[0]
    else:
        vectors, now = _of(state, like, k)
        start = tree.map(lambda x: x[0], vectors)
    second = gaussian(start, 2, seed=now)[1]
    if rtol is None:
        v0 = start if vectors is None else _mixed(vectors, second)
        pairs = eigsh(matvec, v0, k, which=which, rtol=None, max_matvecs=max_matvecs)
    else:
        pairs = eigsh(
            matvec,
            start,
            k,
            which=which,
            rtol=rtol,
            max_matvecs=max_matvecs,
            warm_start=vectors,
            second_start=second if search and tree.numel(start) > k else None,
        )
    return pairs, FollowState(pairs.vectors, now + 1)


def _of(state: Any, like: T | None, k: int) -> tuple[T, Tensor]:
    """The vectors of a state, in the place of ``like``, and its seed."""
    if not isinstance(state, FollowState):
        raise InvalidInput(f"{_CALL}: state is {kind(state)}; give the second of the two that follow(...) returned")
    counts = {len(leaf) for leaf in tree.leaves(state.vectors)}
    if counts != {k}:
        raise InvalidInput(f"k={k}, but the state follows {max(counts, default=0)}: the k of the first call stays")
    if like is None:
        return state.vectors, state.seed
    stacked = tree.map(lambda x: x.expand(k, *x.shape), like)  # shapes only
    vectors = tree.matched(state.vectors, stacked, "the state", "like")
    return tree.map(lambda x, y: x.to(y.device, y.dtype), vectors, like), state.seed


def _mixed(vectors: T, direction: T) -> T:
    """The sum of k orthonormal vectors, and as much again of a random one."""
    k = len(tree.leaves(vectors)[0])
    size = k**0.5 / tree.norm(direction)
    return tree.map(lambda x, r: x.sum(0) + (size * r).to(r.dtype), vectors, direction)


def _checked(seed: int | Tensor) -> int | Tensor:
    if not isinstance(seed, Tensor) and seed < 0:
        raise InvalidInput(f"seed={seed} must not be negative")
    return seed
