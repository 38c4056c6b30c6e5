"""The one projector: what is left of a vector outside the span of some others."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hessfn.core import tree
from hessfn.core.dtensor import whole
from hessfn.core.func import vmap
from hessfn.core.tree import T


def complement_of(vectors: T) -> Callable[[T], T]:
    """``v -> (I - QQ') v``, with Q an orthonormal basis of the span of some vectors, by one QR factorisation.

    Args:
        vectors: a tree whose leaves carry a leading axis of k vectors, orthonormal or not. Half precision is widened.
            Their leaves and those of v meet by name.
    """
    everywhere = tree.map(whole, vectors)
    one = tree.map(lambda x: x[0], everywhere)
    rows = vmap(lambda v: tree.ravel(v)[0], everywhere)
    basis = torch.linalg.qr(rows.T.to(torch.promote_types(rows.dtype, torch.float32))).Q

    def outside(v: T) -> T:
        flat, unravel = tree.ravel(tree.matched(v, one, "the vector", "the vectors to take out"))
        flat = flat.to(basis.dtype)
        return tree.matched(unravel(flat - basis @ (basis.T @ flat)), v, "the projection", "the vector")

    return outside
