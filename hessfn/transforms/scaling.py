"""A matrix with its rows and columns scaled, such as by a diagonal preconditioner."""

from __future__ import annotations

from hessfn.core import tree
from hessfn.core.arguments import require_matvec, require_vector
from hessfn.core.errors import InvalidInput
from hessfn.core.tree import MatVec, T


def scaled(matvec: MatVec[T], scale: T) -> MatVec[T]:
    """Products with ``S A S``, ``S = diag(scale)``: the matrix with its rows and columns scaled.

    With ``scale = P^(-1/2)`` for a diagonal preconditioner P, it has the eigenvalues of ``P^(-1) A``; the eigenvectors
    of ``P^(-1) A`` are ``scale * v`` for its eigenvectors v. :func:`hessfn.adam_scale` gives Adam's P; ``torch.rsqrt``
    of a positive diagonal is Jacobi's.

    Args:
        matvec: products with A.
        scale: a tree like the vectors; leaves are matched by name. It may have another dtype. A negative entry changes
            a sign, a zero removes its row and column.

    Returns:
        A matvec on the same trees, each leaf in the vector's dtype. Entries are in the unit of A times that of
        ``scale`` squared.

    Cost: one product of A, and the memory of one more vector.

    Raises:
        ValueError: an entry of ``scale`` is not finite, or, at a product, its leaves, shapes or devices are not those
            of the vector.

    Source: Cohen et al. (2022), who call the largest eigenvalue for Adam's P the preconditioned sharpness.

    >>> import torch
    >>> A = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    >>> scaled(lambda v: A @ v, torch.tensor([1.0, 10.0]))(torch.ones(2))
    tensor([ 12., 310.])
    """
    call = "scaled(matvec, scale)"
    require_matvec(matvec, call)
    require_vector(scale, "scale", call)
    tree.require_finite(scale, "scale")

    def product(v: T) -> T:
        s = tree.matched(scale, v, "scale", "the vector")
        for name, a, b in zip(tree.names(v), tree.leaves(s), tree.leaves(v), strict=True):
            if a.device != b.device:
                raise InvalidInput(f"leaf {name!r} of scale is on {a.device}, the vector on {b.device}: move it first")
        entering = tree.map(lambda x, c: (c * x).to(x.dtype), v, s)
        image = tree.matched(matvec(entering), entering, "the product", "its vector")
        return tree.map(lambda x, c: (c * x).to(x.dtype), image, s)

    return product
