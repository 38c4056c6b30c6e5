"""Blocks of a matrix that belong to some of the leaves, such as one layer, or what lies between two."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.core.arguments import require_matvec, require_vector
from hessfn.core.tree import MatVec, T


def restrict(matvec: MatVec[T], like: T, names: str | Iterable[str]) -> MatVec[dict[str, Tensor]]:
    """Products with the diagonal block of a matrix that belongs to some of the leaves.

    A vector of the block is padded with zeros, multiplied, and its own leaves are taken from the product.

    Args:
        matvec: products with the whole matrix, on trees like ``like``.
        names: glob patterns of dotted leaf names, as in ``"layer1.*"``.

    Returns:
        A matvec on dicts from leaf name to tensor, as ``tree.select(like, names)`` gives them.

    Cost: one product with the whole matrix for each product; two vectors of the whole.

    Raises:
        ValueError: a pattern matches no leaf, or an argument is of another kind; at a product, the vector has other
            leaves than the block.

    >>> A = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    >>> whole = lambda v: dict(zip("ab", A @ torch.stack([v["a"], v["b"]])))
    >>> restrict(whole, {"a": torch.zeros(()), "b": torch.zeros(())}, "b")({"b": torch.tensor(1.0)})
    {'b': tensor(3.)}
    """
    return _block(matvec, like, names, names, "restrict(matvec, like, names)")


def block(
    matvec: MatVec[T], like: T, rows: str | Iterable[str], columns: str | Iterable[str]
) -> MatVec[dict[str, Tensor]]:
    """Products with any block of a matrix, such as the one between two layers.

    Args:
        matvec: products with the whole matrix, on trees like ``like``.
        rows, columns: glob patterns of dotted leaf names.

    Returns:
        A function from dicts like ``tree.select(like, columns)`` to dicts like ``tree.select(like, rows)``. For a
        symmetric matrix, exchanging ``rows`` and ``columns`` gives the transpose.

    Cost: one product with the whole matrix for each product; two vectors of the whole.

    Raises:
        ValueError: as for :func:`restrict`.

    >>> A = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    >>> whole = lambda v: dict(zip("ab", A @ torch.stack([v["a"], v["b"]])))
    >>> block(whole, {"a": torch.zeros(()), "b": torch.zeros(())}, "a", "b")({"b": torch.tensor(1.0)})
    {'a': tensor(1.)}
    """
    return _block(matvec, like, rows, columns, "block(matvec, like, rows, columns)")


def _block(
    matvec: MatVec[T], like: T, rows: str | Iterable[str], columns: str | Iterable[str], call: str
) -> MatVec[dict[str, Tensor]]:
    require_matvec(matvec, call)
    require_vector(like, "like", call, floating=False)
    entering, leaving = tree.select(like, columns), tree.select(like, rows)
    known = tree.names(like)

    def product(v: dict[str, Tensor]) -> dict[str, Tensor]:
        v = tree.aligned(v, entering)
        blank = zip(known, tree.leaves(like), strict=True)
        padded = [v[name] if name in entering else torch.zeros_like(x) for name, x in blank]
        image = tree.matched(matvec(tree.unflatten(padded, like)), like, "the product", "like")
        whole = dict(zip(known, tree.leaves(image), strict=True))
        return tree.owned({name: whole[name] for name in leaving})

    return product
