"""A matrix with the span of some vectors taken out."""

from __future__ import annotations

from hessfn.core import tree
from hessfn.core.arguments import require_matvec, require_vectors
from hessfn.core.projection import complement_of
from hessfn.core.tree import MatVec, T


def deflate(matvec: MatVec[T], vectors: T) -> MatVec[T]:
    """Products with ``(I - QQ') A (I - QQ')``: the matrix projected onto the complement of some vectors.

    Q is an orthonormal basis of the span of the vectors. Where these are eigenvectors, the other eigenpairs of A stay
    as they are, and the given ones get the eigenvalue 0.

    Args:
        matvec: products with a symmetric A.
        vectors: a tree whose leaves carry a leading axis of k vectors, as ``eigsh(...).vectors``. They need not be
            orthonormal: a QR factorisation makes them so, once. Leaves are matched by name.

    Returns:
        A matvec on trees like one of the vectors.

    Cost: one product of A for each product; the k basis vectors are kept, three times that during the QR factorisation.

    Raises:
        ValueError: an argument is of another kind; at a product, the vector or the product of A has other leaves than
            ``vectors``.

    Source: Parlett (1998), for deflation of known eigenvectors.

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
