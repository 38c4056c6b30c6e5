"""Krylov spaces on flat vectors: what eigenpairs and spectral densities are both built from."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Generic, Literal

import torch
from torch import Tensor
from typing_extensions import NamedTuple  # typing's own cannot be generic before Python 3.11

from hessfn.core import tree
from hessfn.core.errors import InvalidInput
from hessfn.core.probes import gaussian
from hessfn.core.torch_private import under_dual_level, under_functorch
from hessfn.core.torch_state import known
from hessfn.core.tree import MatVec, T, Tree
from hessfn.core.watched import Watched

FlatMatVec = Callable[[Tensor], Tensor]
Which = Literal["LM", "LA", "SA", "BE"]


class Space(NamedTuple, Generic[T]):
    """A matvec on flat vectors ``(n,)``, and the ways there and back."""

    matvec: FlatMatVec
    product: Callable[[T], Tensor]  # of a tree, which is let go of before the product is copied
    ravel: Callable[[T], Tensor]
    unravel: Callable[[Tensor], T]
    eps: float
    finished: Callable[[Tree], Tree]  # the result, when all products are finite


def flatten(matvec: MatVec[T], like: T, *, tolerance: bool = False) -> Space[T]:
    """The matvec on flat vectors; half precision is widened to float32, where bases can be orthogonal."""
    if tree.numel(like) == 0:
        raise InvalidInput("the vectors have no entries: there must be at least one parameter")
    _, unravel = tree.ravel(like)
    watched = Watched(matvec, tolerance=tolerance)

    def ravel(v: T) -> Tensor:
        flat, _ = tree.ravel(v)
        return flat.to(torch.promote_types(flat.dtype, torch.float32))

    def product(v: T) -> Tensor:
        image = watched(v)
        del v
        return ravel(tree.aligned(image, like, "the product"))

    return Space(lambda flat: product(unravel(flat)), product, ravel, unravel, tree.eps(like), watched.finished)


def unit(v: Tensor, name: str = "v0") -> Tensor:
    size = tree.norm(v)
    if known(size > 0) is False or known(size.isfinite()) is False:
        raise InvalidInput(f"{name} has norm {float(size)}: start from gaussian(params, 1)[0]")
    return v / size.to(v.dtype)


def number(x: Tensor, product: Tree, count: int) -> float:
    """A scalar that depends on the latest product, to decide on."""
    return decided(x, lambda: product, count)


def decided(x: Tensor, product: Callable[[], Tree], count: int) -> float:
    """:func:`number`, of a product that is only made again for an error."""
    if known(x == x) is None:
        raise InvalidInput(
            "a tolerance stops on numbers that vmap hides: pass rtol=None for a fixed number of products"
        )
    if not math.isfinite(x):
        what = f"product {count} of the matvec"
        tree.require_finite(product(), what)
        raise InvalidInput(f"{what} is too large: a norm that depends on it is {float(x)}")
    return float(x)


def is_private(*tensors: Tensor) -> bool:
    """Whether nothing looks at these tensors but who made them, no transform and no derivative: then a result may take
    their memory."""
    if torch.compiler.is_compiling() or under_functorch() or under_dual_level():
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))


def less(v: Tensor, c: Tensor, x: Tensor) -> Tensor:
    """``v - c x``, c a scalar; in the memory of v where that is private."""
    c = c.to(v.dtype)
    return v.addcmul_(x, c, value=-1) if is_private(v, c, x) else v - c * x


def orthogonalize(v: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """``v`` without its components along orthonormal rows, and those components: twice is enough (Parlett 1980).

    It takes the memory of ``v`` where that is private.
    """
    components = torch.zeros_like(basis[:, 0])
    for _ in range(2):
        c = basis @ v
        v = v.addmv_(basis.mT, c, alpha=-1) if is_private(v, basis) else v - c @ basis
        components = components + c
    return v, components


def fresh(like: Tensor, basis: Tensor, index: int) -> Tensor:
    """A random direction orthogonal to the basis: the way on when a Krylov space is exhausted."""
    return unit(orthogonalize(random(like, index).to(basis.device), basis)[0])


def random(like: Tensor, index: int) -> Tensor:
    """A random unit vector; the index is that of the product it is made for."""
    return unit(gaussian(like.detach(), index + 1, seed=_FRESH)[index])


_FRESH = 0x5EED  # a stream of its own, so that a fresh direction is none that a user started from


class Krylov(NamedTuple):
    alpha: Tensor  # (m,) float64
    beta: Tensor  # (m,) float64; the last belongs to the residual
    basis: Tensor  # (m, n)
    residual: Tensor  # (n,)


def expand(matvec: FlatMatVec, start: Tensor, num_matvecs: int, eps: float) -> Krylov:
    """Lanczos with full two-pass orthogonalisation, functional throughout: for ``vmap`` and autograd."""
    basis = unit(start)[None]
    rows = None  # the places of all vectors, where nothing looks on
    if is_private(start):
        rows = start.new_empty(num_matvecs, len(start))
        rows[0] = basis[0]
        basis = rows[:1]
    del start
    alpha: list[Tensor] = []
    beta: list[Tensor] = []
    scale = torch.zeros_like(tree.wide(basis[0, 0]))
    for step in range(num_matvecs):
        product = matvec(basis[-1])
        scale = torch.maximum(scale, tree.norm(product).detach())
        residual, components = orthogonalize(product, basis)
        alpha.append(tree.wide(components[-1]))
        last = step + 1 == num_matvecs
        size, following, broken = _next(residual, 10 * eps * scale, keep=last)
        beta.append(size)
        if not last:
            if known(broken) is not False:
                following = torch.where(broken, fresh(basis[0], basis, step), following)
            if rows is None or not is_private(following):
                basis, rows = torch.cat([basis, following[None]]), None
            else:
                rows[step + 1] = following
                basis = rows[: step + 2]
            del product, residual, following  # before the next product
    return Krylov(torch.stack(alpha), torch.stack(beta), basis, residual)


def recur(matvec: FlatMatVec, start: Tensor, num_matvecs: int, eps: float) -> tuple[Tensor, Tensor]:
    """Lanczos by the three-term recurrence alone, two vectors kept and one product; ``alpha, beta`` as of
    :func:`expand`.

    Once the space is exhausted, the rest is decoupled: beta 0 and alpha repeated.
    """
    current = unit(start)
    del start
    previous = current
    alpha: list[Tensor] = []
    beta = [torch.zeros_like(tree.wide(current[0]))]
    scale, ended = beta[0], beta[0] > 0
    for _ in range(num_matvecs):
        product = matvec(current)
        scale = torch.maximum(scale, tree.norm(product).detach())
        product = less(product, beta[-1], previous)
        diagonal = tree.dot(current, product)
        alpha.append(torch.where(ended, alpha[0], diagonal) if alpha else diagonal)
        previous = current
        size, current, broken = _next(less(product, diagonal, current), 10 * eps * scale)
        ended = ended | broken
        beta.append(size)
    return torch.stack(alpha), torch.stack(beta[1:])


def _next(residual: Tensor, threshold: Tensor, *, keep: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Norm, direction and whether the space ends here: then the first two are 0, and so are their gradients.

    The direction takes the memory of the residual where that is private and need not be kept.
    """
    if is_private(residual):
        size = tree.norm(residual)
        broken = size <= threshold
        by = torch.where(broken, torch.inf, size).to(residual.dtype)
        return torch.where(broken, 0.0, size), residual if keep else residual.div_(by), broken
    broken = tree.norm(residual.detach()) <= threshold
    safe = torch.where(broken, torch.ones_like(residual), residual)
    size = tree.norm(safe)
    zero = torch.zeros_like(size)
    return torch.where(broken, zero, size), torch.where(broken, zero.to(safe.dtype), safe / size.to(safe.dtype)), broken


def decompose(alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors (columns) of the tridiagonal matrix of a recurrence."""
    bad = ~(alpha + torch.nn.functional.pad(beta, (0, 1))).isfinite()
    if known(bad.any()):
        count = int(bad.nonzero()[0]) + 1
        raise InvalidInput(f"product {count} of the matvec is not finite: are the loss and its curvature finite there?")
    offset = _apart(alpha.detach())
    values, vectors = torch.linalg.eigh(tridiagonal(alpha + offset, beta))
    values = values - (vectors.detach().square() * offset[:, None]).sum(0)
    order = values.detach().argsort(stable=True)
    return values[order], vectors[:, order]


def _apart(alpha: Tensor) -> Tensor:
    """Diagonals, of the size of rounding, that tell copies of an eigenvalue apart by where in the recurrence they live.

    Eigenvalues of two blocks (where a beta is 0) may agree, and so may those of a recurrence that lost its
    orthogonality: there the derivative of eigenvectors is 0/0.
    """
    size = alpha.abs().max()
    size = torch.where(size > 0, size, 1.0)
    return torch.finfo(alpha.dtype).eps * size * torch.arange(len(alpha), dtype=alpha.dtype, device=alpha.device)


def tridiagonal(alpha: Tensor, beta: Tensor) -> Tensor:
    """The symmetric matrix ``(m, m)`` with diagonal ``alpha (m,)`` and off-diagonal ``beta (m - 1,)``."""
    off = torch.diag_embed(beta, 1)
    return torch.diag_embed(alpha) + off + off.mT


def rotated(basis: Tensor, turn: Tensor) -> Tensor:
    """``turn' basis``, for ``turn (m, k)`` and ``basis (m, n)``; where that is private, in its first rows by blocks."""
    if not is_private(basis, turn):
        return turn.mT.to(basis.dtype) @ basis
    for columns in basis.split(_COLUMNS, dim=1):
        columns[: turn.shape[1]] = turn.mT.to(columns) @ columns
    return basis[: turn.shape[1]]


_COLUMNS = 1 << 16


def select(values: Tensor, k: int, which: Which) -> Tensor:
    """Positions of the wanted among ascending values ``(m,)``, in the order they are reported in."""
    positions = torch.arange(values.shape[-1], device=values.device)
    if which == "LM":
        return torch.argsort(values.abs(), descending=True, stable=True)[:k]
    if which == "LA":
        return positions.flip(0)[:k]
    if which == "SA":
        return positions[:k]
    return torch.cat([positions[: k // 2], positions[len(positions) - (k - k // 2) :]])


def select_all(values: Tensor, k: int, which: Which) -> Tensor:
    """Positions of all values: first those of :func:`select`, then the others, further and further in."""
    if which != "BE":
        return select(values, len(values), which)
    return torch.cat([select(values, k, which), torch.arange(k // 2, len(values) - (k - k // 2), device=values.device)])
