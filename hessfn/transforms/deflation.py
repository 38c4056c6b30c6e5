"""A matrix with the span of some vectors taken out."""

from __future__ import annotations

from hessfn.core import tree
from hessfn.core.arguments import require_matvec, require_vectors
from hessfn.core.projection import complement_of
from hessfn.core.tree import MatVec, T


def deflate(matvec: MatVec[T], vectors: T) -> MatVec[T]:
    """``(I - QQ') A (I - QQ')``: the matrix with the span of some vectors taken out.

    Args:
        vectors: a tree whose leaves carry a leading axis of k vectors, as ``eigsh(...).vectors``. They need not be
            orthonormal; a QR factorisation makes them so, once. Their leaves meet those of a vector by name.

    >>> import torch
    >>> A = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    >>> deflate(lambda v: A @ v, torch.eye(3)[:1])(torch.ones(3))
    tensor([0., 2., 1.])
    """
    call = "deflate(matvec, vectors)"
    require_matvec(matvec, call)
    require_vectors(vectors, "vectors", call)
    outside = complement_of(vectors)

    def product(v: T) -> T:
        rest = outside(v)
        return outside(tree.matched(matvec(rest), rest, "the product", "its vector"))

    return product
