"""The check of a linearized product: is it what gradients of the loss say?

A trace of some of the samples that consists of the same operations stands for that of all: what may be wrong with a
product, the rules of its operations, is the same in both. The product of some is held against gradients, which is a
small part of the work. Where the operations are others, the product of all is held against plain autograd.
"""

from __future__ import annotations

from typing import Any

import torch

from hessfn.core import tree
from hessfn.core.containers import PLAIN
from hessfn.core.errors import Untraceable
from hessfn.core.probes import gaussian
from hessfn.core.torch_state import is_observed, known
from hessfn.core.tree import MatVec, Tree
from hessfn.core.warn import warn
from hessfn.products.first_check import AT_A_KINK, Evidence, disagreement, evidence, not_finite, verdict
from hessfn.products.ladder import blame
from hessfn.products.loss_checks import Inspected, Loss
from hessfn.products.loss_memory import make_trace, memory_of, shapes_of
from hessfn.products.modes import Linear, differentiating, linear_of_trace
from hessfn.products.part_check import PartCheck


class LinearCheck:
    """Holds a linearized product against gradients of its loss, and asks whether its first result is finite.

    Args:
        matvec: the product. It can be sent to another process, as this can.
    """

    def __init__(
        self, loss: Loss, params: Tree, args: tuple[Any, ...], inspected: Inspected, matvec: MatVec[Any]
    ) -> None:
        self.loss, self.params, self.args, self.inspected, self.matvec = loss, params, args, inspected, matvec
        self.is_done = False

    def when_made(self, made: Linear) -> None:
        """Raises where the product is not what gradients say, once for its operations.

        Raises:
            Untraceable: the product is wrong.
            InvalidInput: the loss has no finite curvature here.
        """
        memory, shapes = memory_of(self.loss), ("linearized", *shapes_of((self.params, self.args)))
        if memory.is_right.get(shapes) or is_observed(*tree.leaves((self.params, self.args))):
            return
        numbers = tuple(repr(x) for x in tree.leaves(self.args) if isinstance(x, PLAIN))
        same = ("linearized", made.traced, made.lowered, numbers)
        if not memory.is_right.get(same):
            v = gaussian(self.params, 1)[0]
            custom = self.inspected.has_custom_backward
            # Of one sample a trace has fewer operations: what has one entry need not be expanded.
            of_part = PartCheck(self.loss, self.params, self.args, v, custom, least=2)
            memory.is_right[same] = of_part.ask() and _is_right_in_part(of_part, made)
            if not memory.is_right[same] and not self._can_be_right(of_part):
                return
        memory.is_right[shapes] = True

    def of_product(self, found: Tree) -> None:
        """Raises, as :meth:`when_made` does, where the first product is not finite, and its vector is not the cause."""
        leaves = tree.leaves(found)
        if self.is_done or torch.compiler.is_compiling() or is_observed(*leaves):
            return
        self.is_done = True
        if any(known(leaf.isfinite().all()) is False for leaf in leaves):
            self._can_be_right(None)

    def _can_be_right(self, of_part: PartCheck | None) -> bool:
        """Whether gradients of all samples tell nothing against the product; False where they tell nothing at all."""
        v = gaussian(self.params, 1)[0]
        plain = of_part is not None and of_part.ask_plain()
        seen = None if plain else self._evidence(v)
        if not plain and seen is None:
            return False
        found = self.matvec(v)
        if of_part is not None and of_part.agrees_with_plain(found):
            return True
        seen = seen or self._evidence(v)
        if seen is None:
            return False
        said = verdict(found, seen)
        if said == "not finite":
            raise not_finite(found)
        if said in ("agrees", "unknown"):
            return True
        message = disagreement("linearized", found, seen, v)
        if said == "wrong":
            raise Untraceable(f"{message}{blame(self.loss, self.params, self.args)}; hvp finds another way")
        warn(f"{message}. {AT_A_KINK}")
        return True

    def _evidence(self, v: Tree) -> Evidence | None:
        return evidence(self.loss, self.params, self.args, v, self.inspected.value)


def _is_right_in_part(of_part: PartCheck, made: Linear) -> bool:
    """Whether the product on some samples consists of the same operations, and is what gradients say."""
    loss, params, part = of_part.loss, of_part.params, of_part.part
    try:
        with differentiating():
            trace = make_trace(loss, params, part)
        if trace.operations != made.traced:
            return False
        other = linear_of_trace(trace, loss, params, part)
    except Untraceable:
        return False
    is_same = made.lowered <= other.lowered
    return is_same and of_part.agrees(lambda params, _, v: tree.unflatten(other.product(*tree.leaves(v)), params))
