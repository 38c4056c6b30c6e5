"""How every routine takes its products: paired with their vector by name, counted, and found to be finite."""

from __future__ import annotations

from typing import Any, Generic

import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.core.dtensor import layout
from hessfn.core.errors import InvalidInput
from hessfn.core.results import S
from hessfn.core.torch_private import under_functorch
from hessfn.core.torch_state import carries_derivative, known, on_cpu
from hessfn.core.tree import MatVec, T

_NO_VALUES = (
    "a tolerance stops on numbers that torch.compile has not: pass rtol=None for a fixed number of products, or leave "
    "the routine outside of the compiled function and compile its matvec"
)

_CONSTANT = (
    "what has stopped by a tolerance has no derivative, and this is being differentiated: pass rtol=None for a fixed "
    "number of products; or, where no derivative is wanted, detach the parameters or use torch.no_grad()"
)


class Watched(Generic[T]):
    """A matvec, for one run of one routine.

    A product that is not finite is an error that names its number and the leaf. On the CPU it comes at once. Elsewhere
    to ask is to wait, so that each product leaves a flag a leaf on its device, and all are asked by :meth:`finished`.
    What nobody may ask, under ``vmap`` or a compiler, is not asked; of groups under our own ``vmap`` the result is.
    """

    def __init__(self, matvec: MatVec[T], *, square: bool = True, tolerance: bool = False) -> None:
        """Not ``square``: rows and columns are different leaves. A ``tolerance`` is no matter of derivatives."""
        if tolerance and torch.compiler.is_compiling():
            raise InvalidInput(_NO_VALUES)
        self._matvec, self._square, self._tolerance = matvec, square, tolerance
        self._count = 0
        self._flags: list[Tensor] = []
        self._last: Any = None  # one tree of shapes, for the names

    def __call__(self, v: T) -> T:
        product = self._matvec(v)
        self._count += 1
        if self._square:
            product = tree.matched(product, v, "the product", "its vector")
        if torch.compiler.is_compiling():
            return product
        if self._tolerance:
            refuse_derivative(product)
        if on_cpu(product):
            return tree.require_finite(product, f"product {self._count} of the matvec")
        if not under_functorch():
            self._flags.append(_flags(product))
            if self._last is None:
                self._last = tree.map(lambda x: torch.empty(0, dtype=x.dtype, device="cpu"), product)
        return product

    def finished(self, result: S) -> S:
        """The result, when it and all products are finite, as far as anybody may know: a tree like the products, or one
        tensor."""
        if self._flags and known((good := torch.stack(self._flags)).all()) is False:
            row = int((~good).any(1).nonzero()[0])
            bad = [name for name, fine in zip(tree.names(self._last), good[row].tolist(), strict=False) if not fine]
            named = bad if good.shape[1] > 1 else []  # of DTensors there is one flag for all
            raise InvalidInput(tree.why_not_finite(f"product {row + 1} of the matvec", named, self._last))
        if not torch.compiler.is_compiling():
            tree.require_finite(result, "a product of the matvec")
        return result


def _flags(product: Any) -> Tensor:
    leaves = tree.leaves(product)
    if any(layout(leaf) for leaf in leaves):
        return tree.norm(product).isfinite()[None]
    return torch.stack([leaf.isfinite().all() for leaf in leaves])


def refuse_derivative(*values: Any) -> None:
    """For what a routine with a tolerance depends on: it detaches, or stops by a number that no derivative sees."""
    if carries_derivative(*values):
        raise InvalidInput(_CONSTANT)
