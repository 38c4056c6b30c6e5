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
from hessfn.core.torch_state import known, on_cpu
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


def flatten(matvec: MatVec[T] | Watched[T], like: T, *, tolerance: bool = False) -> Space[T]:
    """The matvec on flat vectors; half precision is widened to float32, where bases can be orthogonal."""
    if tree.numel(like) == 0:
        raise InvalidInput("the vectors have no entries: there must be at least one parameter")
    _, unravel = tree.ravel(like)
    watched = matvec if isinstance(matvec, Watched) else Watched(matvec, tolerance=tolerance)

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
    require_norms(size, name)
    return v / size.to(v.dtype)


def require_norms(sizes: Tensor, name: str, *, if_known: bool = False) -> None:
    """Raises for a norm that is 0 or not finite; ``if_known``, only where to ask is not to wait."""
    if if_known and not on_cpu(sizes):
        return
    bad = ~((sizes > 0) & sizes.isfinite())
    if known(bad.any()):
        raise InvalidInput(f"{name} has norm {float(sizes[bad][0])}: start from gaussian(params, 1)[0]")


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


def project(v: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """``v`` without its components along orthonormal rows, and those; in the memory of v where that is private."""
    c = basis @ v
    return (v.addmv_(basis.mT, c, alpha=-1) if is_private(v, basis) else v - c @ basis), c


def orthogonalize(v: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`project` twice, which is enough (Parlett 1980)."""
    v, components = project(v, basis)
    v, more = project(v, basis)
    return v, components + more


def fresh(like: Tensor, basis: Tensor, index: int) -> Tensor:
    """A random direction orthogonal to the basis: the way on when a Krylov space is exhausted."""
    return unit(orthogonalize(random(like, index).to(basis.device), basis)[0])


def random(like: Tensor, index: int) -> Tensor:
    """A random unit vector; the index is that of the product it is made for."""
    v = gaussian(like.detach(), index + 1, seed=_FRESH)[index]
    return v / tree.norm(v).to(v.dtype)  # which is not 0: to ask is to wait


APART = 4  # units of rounding between equal diagonals, which are off by one or two themselves
_FRESH = 0x5EED  # a stream of its own, so that a fresh direction is none that a user started from


class Krylov(NamedTuple):
    alpha: Tensor  # (m,) float64
    beta: Tensor  # (m,) float64; the last belongs to the residual
    basis: Tensor  # (m, n)
    residual: Tensor  # (n,)


def expand(matvec: FlatMatVec, start: Tensor, num_matvecs: int, eps: float) -> Krylov:
    """Lanczos from a unit vector with full two-pass orthogonalisation, functional for ``vmap`` and autograd.

    Where the space has ended, a random direction goes on. On a device it is chosen without a wait: between the two
    passes, so that it costs no pass of its own.
    """
    basis = start[None]
    rows = None  # the places of all vectors, where nothing looks on
    if is_private(start):
        rows = start.new_empty(num_matvecs, len(start))
        rows[0] = start
        basis = rows[:1]
    del start
    alpha: list[Tensor] = []
    beta: list[Tensor] = []
    scale = torch.zeros_like(tree.wide(basis[0, 0]))
    spare: Tensor | None = None
    for step in range(num_matvecs):
        product = matvec(basis[-1])
        scale = torch.maximum(scale, tree.norm(product).detach())
        residual, components = project(product, basis)
        alpha.append(tree.wide(components[-1] + basis[-1] @ residual))  # as two passes have it
        last = step + 1 == num_matvecs
        ended = tree.norm(residual.detach()) <= 10 * eps * scale
        if not last and (not on_cpu(ended) or known(ended) is not False):
            spare = random(basis[0], 0) if spare is None else spare
            residual = torch.where(ended, torch.where(scale > 0, scale, 1.0).to(spare) * spare.roll(step), residual)
        residual, _ = project(residual, basis)
        size, following, _ = _next(residual, 10 * eps * scale, anew=ended, keep=last)
        beta.append(size)
        if not last:
            if rows is None or not is_private(following):
                basis, rows = torch.cat([basis, following[None]]), None
            else:
                rows[step + 1] = following
                basis = rows[: step + 2]
            del product, residual, following  # before the next product
    return Krylov(torch.stack(alpha), torch.stack(beta), basis, residual)


def recur(matvec: FlatMatVec, start: Tensor, num_matvecs: int, eps: float) -> tuple[Tensor, Tensor]:
    """Lanczos from a unit vector by the three-term recurrence alone, two vectors kept and one product; ``alpha, beta``
    as of :func:`expand`.

    Once the space is exhausted, the rest is decoupled: beta 0 and alpha repeated.
    """
    current = previous = start
    del start
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


def _next(
    residual: Tensor, threshold: Tensor, *, anew: Tensor | None = None, keep: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm, direction and whether the space ends here: then the norm is 0, and neither has a derivative.

    The direction is then 0; or that of the residual, with ``anew``, which says whether that is a random one. It takes
    the memory of the residual where that is private and need not be kept.
    """
    size = tree.norm(residual.detach())
    broken = size <= threshold if anew is None else (size <= threshold) | anew
    by = torch.where(broken if anew is None else size == 0, torch.inf, size).to(residual.dtype)
    zero = torch.zeros_like(size)
    if is_private(residual):
        return torch.where(broken, zero, size), residual if keep else residual.div_(by), broken
    safe = torch.where(broken, torch.ones_like(residual), residual)
    size = tree.norm(safe)
    direction = torch.where(broken, residual.detach() / by, safe / size.to(safe.dtype))
    return torch.where(broken, zero, size), direction, broken


def decompose(alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``(..., m)``, ascending, and eigenvectors (columns) of the tridiagonal matrices of recurrences."""
    bad = ~(alpha + torch.nn.functional.pad(beta, (0, 1))).isfinite()
    if known(bad.any()):
        count = int(bad.nonzero()[0, -1]) + 1
        raise InvalidInput(f"product {count} of the matvec is not finite: are the loss and its curvature finite there?")
    offset = _apart(alpha.detach())
    values, vectors = torch.linalg.eigh(tridiagonal(alpha + offset, beta))
    values = values - (vectors.detach().square() * offset[..., None]).sum(-2)
    order = values.detach().argsort(stable=True)
    return values.gather(-1, order), vectors.gather(-1, order[..., None, :].expand_as(vectors))


def _apart(alpha: Tensor) -> Tensor:
    """Diagonals of the size of rounding, that tell copies of an eigenvalue apart by where in the recurrence they live.

    Eigenvalues of two blocks (where a beta is 0) may agree, and so may those of a recurrence that lost its
    orthogonality: there the derivative of eigenvectors is 0/0.
    """
    size = alpha.abs().amax(-1, keepdim=True)
    size = torch.where(size > 0, size, 1.0)
    places = torch.arange(alpha.shape[-1], dtype=alpha.dtype, device=alpha.device)
    return APART * torch.finfo(alpha.dtype).eps * size * places


def tridiagonal(alpha: Tensor, beta: Tensor) -> Tensor:
    """Symmetric matrices ``(..., m, m)`` with diagonals ``alpha (..., m)``, off-diagonals ``beta (..., m - 1)``."""
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
