"""Eigenpairs as a control variate: what they know exactly is taken out of every sample and added once, at no product.

With ``B = sum_i theta_i q_i q_i'``, an estimate of a linear function of A is that of ``A - B`` plus the exact one of B.
It is unbiased whatever theta and q are, as long as they do not depend on the probes: B need not be close to A.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Generic

import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.core.arguments import require_eigenpairs, require_matvec, require_probes
from hessfn.core.dtensor import layout, place, whole
from hessfn.core.errors import InvalidInput
from hessfn.core.results import EigenPairs, Estimate, S
from hessfn.core.tree import MatVec, T


def require_kinds(matvec: MatVec[T], probes: Iterable[T], call: str) -> None:
    require_matvec(matvec, call)
    require_probes(probes, call)


def control_variate(eigenpairs: EigenPairs[T] | None, call: str) -> ControlVariate[T] | None:
    return None if eigenpairs is None else ControlVariate(eigenpairs, call)


def rest_of(known: ControlVariate[T] | None, z: T, image: T) -> T:
    return image if known is None else known.rest(z, image)


def plus(result: Estimate[S], exact: S) -> Estimate[S]:
    """What the samples leave out is added, in the layout of the mean."""
    return result._replace(mean=tree.map(lambda m, x: m + place(x.to(m.dtype), layout(m)), result.mean, exact))


class ControlVariate(Generic[T]):
    """``B = sum_i theta_i q_i q_i'`` of k pairs, which need not be orthonormal, leaf by leaf."""

    def __init__(self, eigenpairs: EigenPairs[T], call: str) -> None:
        require_eigenpairs(eigenpairs, call)
        vectors = tree.map(whole, eigenpairs.vectors)
        self.values = eigenpairs.values
        self._one: T = tree.map(lambda x: x[0], vectors)
        leaves = tree.leaves(vectors)
        if any(len(x) != len(self.values) for x in leaves):
            counts = sorted({len(x) for x in leaves})
            raise InvalidInput(
                f"{call}: eigenpairs has {len(self.values)} values and {counts} vectors: one vector for each value"
            )
        # Half precision is widened; everything else is a view of the caller's vectors.
        self._rows = [_float(x.reshape(len(x), -1)) for x in leaves]
        self.numel = sum(rows.shape[1] for rows in self._rows)
        home = self._rows[0]
        if self.values.device != home.device:  # eigenvalues lie on the CPU, wherever their vectors do
            self.values = self.values.to(home.device, tree.wide(home[:0]).dtype)

    def image(self, z: T) -> T:
        """``B z``, by two products with the (k, n) matrix of the vectors; in float32 at least."""
        flat = self._flat(z)
        components = self.components(z)

        def back(rows: Tensor, part: Tensor, leaf: Tensor) -> Tensor:
            image = (self.values * components).to(rows) @ rows
            return place(image.to(_float(part).dtype).reshape(part.shape), layout(leaf))

        parts = zip(self._rows, flat, tree.leaves(self._matched(z)), strict=True)
        return tree.matched(tree.unflatten([back(*each) for each in parts], self._one), z, "the image", "the vector")

    def rest(self, z: T, image: T) -> T:
        """``(A - B) z`` from ``A z``."""
        return tree.map(lambda a, b: _float(a) - b.to(_float(a).dtype), image, self.image(z))

    def components(self, z: T) -> Tensor:
        """``(k,)``: ``q_i'z``, in the dtype of theta."""
        return self.leaf_components(z).sum(1)

    def leaf_components(self, z: T) -> Tensor:
        """``(k, l)``: ``q_il'z_l`` of every leaf, in the dtype of theta."""
        parts = zip(self._rows, self._flat(z), strict=True)
        return torch.stack([(rows @ x.reshape(-1).to(rows.dtype)).to(self.values) for rows, x in parts], dim=1)

    def squares(self) -> Tensor:
        """``(k,)``: ``||q_i||^2``."""
        return self.leaf_squares().sum(1)

    def leaf_squares(self) -> Tensor:
        """``(k, l)``: ``||q_il||^2`` of every leaf."""
        return torch.stack([tree.wide(rows).square().sum(1) for rows in self._rows], dim=1).to(self.values)

    def trace(self) -> Tensor:
        return (self.values * self.squares()).sum()

    def traces(self) -> T:
        """Of the diagonal block of every leaf."""
        return self._per_leaf(lambda rows, like: (self.values * tree.wide(rows).square().sum(1).to(self.values)).sum())

    def diagonal(self) -> T:
        return self._per_leaf(lambda rows, like: (self.values.to(rows) @ rows.square()).reshape(like.shape))

    def squared_row_norms(self) -> T:
        """``sum_j b_ij^2`` of every row i."""
        weights = self.values[:, None] * self._gram() * self.values

        def norms(rows: Tensor, like: Tensor) -> Tensor:
            return (rows * (weights.to(rows) @ rows)).sum(0).reshape(like.shape)

        return self._per_leaf(norms)

    def squared_frobenius(self) -> Tensor:
        """``sum_ij b_ij^2``."""
        return (self.values[:, None] * self._gram().square() * self.values).sum()

    def _gram(self) -> Tensor:
        """``(k, k)``: ``q_i'q_j``."""
        return torch.stack([(rows @ rows.mT).to(self.values) for rows in self._rows]).sum(0)

    def _per_leaf(self, function: Callable[[Tensor, Tensor], Any]) -> T:
        pairs = zip(self._rows, tree.leaves(self._one), strict=True)
        return tree.unflatten([function(rows, like) for rows, like in pairs], self._one)

    def _matched(self, z: T) -> T:
        return tree.matched(z, self._one, "the vector", "the vectors of the eigenpairs")

    def _flat(self, z: T) -> list[Tensor]:
        return [whole(x) for x in tree.leaves(self._matched(z))]


def _float(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
