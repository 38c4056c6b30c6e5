"""Eigenpairs of a matvec, each with the norm of its residual: power iteration, Lanczos, thick-restart Lanczos.

A matrix that is given becomes a matvec in one line: ``lambda v: A @ v`` for a tensor, and for a NumPy array, a SciPy
sparse matrix or a SciPy operator S ``lambda v: torch.from_numpy(S @ v.numpy())``, with ``v0`` of the same dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import get_args

import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.core.arguments import require_matvec, require_vector, require_vectors
from hessfn.core.dtensor import whole
from hessfn.core.errors import InvalidInput
from hessfn.core.memory import own
from hessfn.core.results import EigenPair, EigenPairs, Tridiagonal
from hessfn.core.tree import MatVec, T
from hessfn.core.unknown import unknown
from hessfn.estimators import krylov
from hessfn.estimators.krylov import Space, Which
from hessfn.estimators.thick_restart import thick_restart

_RTOL = 1e-3  # what `converged` means where no tolerance was asked for


def power_iter(
    matvec: MatVec[T], v0: T, *, max_matvecs: int = 100, rtol: float | None = 1e-3, shift: float = 0.0
) -> EigenPair[T]:
    """The eigenvalue largest in magnitude, and its vector, by power iteration.

    ``v <- (A + shift I) v / ||(A + shift I) v||`` until ``||A v - value v|| <= rtol |value|``, ``value = v'Av``.

    Args:
        v0: where to start, as ``gaussian(params, 1)[0]``.
        rtol: None for exactly ``max_matvecs`` products, under ``vmap`` and autograd too; ``converged`` is then judged
            by 1e-3. With a tolerance there is no derivative, and to ask for one is an error.
        shift: shifts the spectrum, for a matrix whose extreme eigenvalues are nearly opposite, between which the
            iteration would alternate. A shift as large as the largest eigenvalue selects the largest algebraic one; its
            negative, the smallest.

    Returns:
        ``value``, ``vector`` of unit norm, ``residual = ||A vector - value vector||``, ``num_matvecs``, ``converged``.
        The residual is of the vector returned, and bounds the distance from ``value`` to an eigenvalue of A.

    Cost: ``num_matvecs`` products; three vectors at the peak, including the product.

    Raises:
        ValueError: ``v0`` is zero, a product is not finite, ``max_matvecs`` < 1, or (with ``rtol``) a product has a
            derivative.

    Source: von Mises and Pollaczek-Geiringer (1929).

    >>> A = torch.diag(torch.tensor([3.0, 1.0]))
    >>> power_iter(lambda v: A @ v, torch.ones(2)).value.round(decimals=4)
    tensor(3., dtype=torch.float64)
    """
    _require_kinds(matvec, v0, "power_iter(matvec, v0)")
    if max_matvecs < 1:
        raise InvalidInput(f"max_matvecs={max_matvecs} must be at least 1")
    space = krylov.flatten(matvec, v0, tolerance=rtol is not None)
    # What a tolerance ends at depends on no start.
    following = krylov.unit(space.ravel(v0 if rtol is None else tree.map(Tensor.detach, v0)))
    for count in range(1, max_matvecs + 1):
        v = following
        product = space.matvec(v)
        value = tree.dot(v, product)
        scaled = value.to(v.dtype) * v
        residual = tree.norm(scaled.sub_(product) if krylov.is_private(scaled, product) else scaled - product)
        del scaled
        converged = residual <= (_RTOL if rtol is None else rtol) * value.abs()
        if rtol is not None:
            krylov.decided(residual, partial(space.unravel, product), count)
            if converged:
                break
        image = torch.add(product, v, alpha=shift)
        del product
        # A vector that A takes to zero is an eigenvector; there is no way on from it.
        image = torch.where(tree.norm(image.detach()) == 0, v, image)
        following = image / tree.norm(image).to(v.dtype)
        del image  # before the next product
    space.finished(value)
    return EigenPair(value, space.unravel(v), residual, torch.tensor(count, device="cpu"), converged)


def lanczos(matvec: MatVec[T], v0: T, num_matvecs: int) -> Tridiagonal[T]:
    """The Lanczos recurrence with full orthogonalisation: ``A Q = Q T + residual e_m'``, ``Q'Q = I``.

    T is tridiagonal with diagonal ``alpha`` and off-diagonal ``beta``. Where the Krylov space of ``v0`` ends early,
    it goes on from a fresh direction, and that beta is 0.

    Args:
        v0: where to start, as ``gaussian(params, 1)[0]``.
        num_matvecs: the number m of steps.

    Returns:
        ``alpha (m,)`` and ``beta (m - 1,)`` in float64, ``basis``, a tree whose leaves carry a leading axis of m, and
        ``residual``, a tree like ``v0``. All runs under ``vmap`` and autograd.

    Cost: m products; at its peak 2m + 2 vectors, since the basis becomes a tree; m + 2 of a tree of one tensor.

    Raises:
        ValueError: ``v0`` is zero, m is not between 1 and n, or a product is not finite.

    Source: Lanczos (1950); Parlett (1998) for the orthogonalisation.

    >>> A = torch.diag(torch.tensor([3.0, 1.0]))
    >>> lanczos(lambda v: A @ v, torch.ones(2), 2).alpha.round(decimals=4)
    tensor([2., 2.], dtype=torch.float64)
    """
    _require_kinds(matvec, v0, "lanczos(matvec, v0, num_matvecs)")
    _require_between("num_matvecs", num_matvecs, tree.numel(v0))
    space = krylov.flatten(matvec, v0)
    alpha, beta, basis, residual = space.finished(
        krylov.expand(space.matvec, krylov.unit(space.ravel(v0)), num_matvecs, space.eps)
    )
    return Tridiagonal(alpha, own(beta[:-1]), space.unravel(basis), space.unravel(residual))


def eigsh(
    matvec: MatVec[T],
    v0: T,
    k: int = 1,
    *,
    which: Which = "LM",
    rtol: float | None = 1e-3,
    max_matvecs: int | None = None,
    basis_size: int | None = None,
    basis_device: torch.device | str | None = None,
    warm_start: T | None = None,
    second_start: T | None = None,
    keep_all: bool = False,
) -> EigenPairs[T]:
    """The k eigenpairs at the ends of the spectrum, by thick-restart Lanczos with full orthogonalisation.

    Args:
        v0: where to start, as ``gaussian(params, 1)[0]``; or the sum of the ``vectors`` of a similar matrix: for a
            change by up to a tenth it saves about half of the products.
        which: ``"LM"`` largest magnitude, ``"LA"`` / ``"SA"`` largest / smallest algebraic, ``"BE"`` both ends (one
            more of the high end where k is odd).
        rtol: the relative residual asked of every pair. None for exactly ``max_matvecs`` products with no restart,
            under ``vmap`` and autograd too; ``converged`` is then judged by 1e-3. With a tolerance there is no
            derivative: where the products have one, by live parameters or under a transform, that is an error.
        max_matvecs: the most products spent; by default ten times ``basis_size``.
        basis_size: the most vectors kept, by default 2k + 20. Fewer cost more products.
        basis_device: where they are kept, such as ``"cpu"``; by default where the entries of ``v0`` are.
        second_start: another random direction, as ``gaussian(params, 2)[1]``, to find what the first start has missed.
            A small residual says that an eigenvalue is near, not that it is the wanted one: a single start can miss
            members of clusters, copies, and eigenvectors nearly orthogonal to ``v0``. Once the pairs have converged,
            the direction enters the space, and they must converge again; ``outside`` bounds all others. It costs a few
            products if the wanted eigenvalues are well separated, otherwise up to as many as the first search.
        keep_all: also return all other Ritz pairs of the space, converged or not, after the k pairs: orthonormal, each
            with its residual. It costs no product and makes a better control variate.
        warm_start: several vectors to start from instead of ``v0``, which then gives the shapes only: a tree whose
            leaves carry a leading axis. The ``vectors`` of a matrix that differs by a thousandth need few products. p
            random vectors find up to p copies of a repeated eigenvalue; ``v0`` alone finds one.

    Returns:
        ``values (k,)`` float64, ``vectors``, orthonormal, a tree whose leaves carry a leading axis of k, ``residuals
        (k,)`` with ``||A v - value v||``, ``num_matvecs``, ``converged (k,)``: the residual is at most ``rtol |value|``
        (or what rounding leaves of a value near 0). Pairs that have not converged are returned as well, with
        their residuals. ``outside (2,)``, with a ``second_start``: all other eigenvalues lie within, with probability
        0.999 over that direction. The order is by decreasing magnitude for LM, decreasing for LA, increasing for SA and
        BE. Residuals do not contain the rounding of the products: in float32 those of a deep net are off by about 1e-5
        of the norm of its Hessian.

    Cost: ``num_matvecs`` products, one of which checks the residuals. At the peak ``basis_size`` + 1 + k vectors,
    including the product, with k at least 2; with ``keep_all``, k is the number of pairs returned. A ``second_start``
    and every further start take one more.

    Raises:
        ValueError: k, ``which``, ``basis_size`` or ``max_matvecs`` is out of range, ``v0`` is zero, ``warm_start`` or
            ``second_start`` without ``rtol``, a second start within the first, a product is not finite, or (with
            ``rtol``) has a derivative.

    Source: Wu and Simon (2000); the form with one dense projected matrix is Stewart's (2001). ``outside``: van
    Dorsselaer, Hochstenbach and van der Vorst (2000), after Kuczynski and Wozniakowski (1992).

    >>> A = torch.diag(torch.arange(1.0, 10.0))
    >>> eigsh(lambda v: A @ v, torch.ones(9), k=2).values.round(decimals=4)
    tensor([9., 8.], dtype=torch.float64)
    """
    call = "eigsh(matvec, v0, k)"
    _require_kinds(matvec, v0, call)
    n = tree.numel(v0)
    _require_between("k", k, n)
    if which not in get_args(Which):
        raise InvalidInput(f"which={which!r} must be one of {', '.join(get_args(Which))}")
    if warm_start is not None:
        require_vectors(warm_start, "warm_start", call)
    space = krylov.flatten(matvec, v0, tolerance=rtol is not None)
    if rtol is None:
        if warm_start is not None:
            raise InvalidInput("rtol=None starts from one vector: give the sum of those of warm_start as v0")
        if second_start is not None:
            raise InvalidInput("rtol=None settles nothing: for a second_start give a tolerance")
        if max_matvecs is None:
            raise InvalidInput("rtol=None asks for a fixed number of products: give it as max_matvecs")
        return _unrestarted(space, v0, k, which, min(max_matvecs, n), keep_all)
    num_starts = 1 if warm_start is None else len(tree.leaves(warm_start)[0])
    least = max(k, num_starts) + 2
    size = min(n, max(2 * k + 20, least) if basis_size is None else basis_size)
    if size < min(n, least):
        raise InvalidInput(f"basis_size={basis_size} must be at least {least}, 2 more than k and the starting vectors")
    budget = 10 * size if max_matvecs is None else max_matvecs
    if budget <= max(k, num_starts):
        raise InvalidInput(
            f"max_matvecs={budget} must be at least {max(k, num_starts) + 1}, one more than k and the starting vectors"
        )
    second = None
    if second_start is not None:
        second = partial(space.ravel, tree.matched(second_start, v0, "second_start", "v0"))
    starts = _starts(space, v0, warm_start)
    found = thick_restart(space, starts, num_starts, k, which, rtol, budget, size, basis_device, second, keep_all)
    allowed = (rtol * found.values.abs()).clamp(min=found.floor)
    return EigenPairs(
        found.values,
        space.unravel(found.vectors.to(found.device)),
        found.residuals,
        torch.tensor(found.num_matvecs, device="cpu"),
        found.residuals <= allowed,
        outside=found.outside,
    )


def _starts(space: Space[T], v0: T, vectors: T | None) -> Iterator[Tensor]:
    """The starting vectors, one at a time; of several, the leaves are in the order of those of ``v0``."""
    if vectors is None:
        yield space.ravel(v0)
        return
    stack = tree.map(whole, vectors)
    for i in range(len(tree.leaves(stack)[0])):
        yield space.ravel(tree.matched(tree.map(lambda x: x[i], stack), v0, "warm_start", "v0"))  # noqa: B023


def _unrestarted(space: Space[T], v0: T, k: int, which: Which, num_matvecs: int, keep_all: bool) -> EigenPairs[T]:
    if num_matvecs < k:
        raise InvalidInput(f"max_matvecs={num_matvecs} must be at least k={k}")
    alpha, beta, basis, _ = krylov.expand(space.matvec, krylov.unit(space.ravel(v0)), num_matvecs, space.eps)
    space.finished(alpha)
    values, vectors = krylov.decompose(alpha, beta[:-1])
    # The recurrence knows of no rounding: its residuals fall below what the products can tell.
    floor = (10 * space.eps + krylov.APART * num_matvecs * torch.finfo(values.dtype).eps) * values.detach().abs().max()
    wanted = krylov.select_all(values, k, which) if keep_all else krylov.select(values, k, which)
    values, vectors = values[wanted], vectors[:, wanted]
    residuals = (beta[-1] * vectors[-1]).abs().clamp(min=floor)
    return EigenPairs(
        values,
        space.unravel(krylov.rotated(basis, vectors)),
        residuals,
        torch.tensor(num_matvecs, device="cpu"),
        residuals <= (_RTOL * values.abs()).clamp(min=floor),
        unknown(values),
        unknown(values),
        unknown(values[:1].expand(2)),
    )


def _require_kinds(matvec: MatVec[T], v0: T, call: str) -> None:
    require_matvec(matvec, call)
    require_vector(v0, "v0", call)


def _require_between(name: str, value: int, n: int) -> None:
    if not 1 <= value <= n:
        raise InvalidInput(f"{name}={value} must be between 1 and {n}, the number of entries in v0")
