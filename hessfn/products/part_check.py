"""The check of the first product on some of the samples: a small part of the work, for the same rules of derivatives.

What agrees there is right. What does not, or cannot be told there, is asked of all samples, as if this were not here.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.core.dtensor import layout
from hessfn.core.tree import Tree
from hessfn.losses.samples import few, tensors
from hessfn.losses.weights import of_loss
from hessfn.products.first_check import Evidence, are_close, evidence, verdict
from hessfn.products.loss_checks import Loss
from hessfn.products.modes import Product, differentiating
from hessfn.products.modes import of_loss as in_mode
from hessfn.products.wide import Tape


class PartCheck:
    """Holds products of a loss on some of its samples against gradients on the same ones.

    Args:
        v: the vector, with something in every leaf.
        least: how many samples at least.
    """

    def __init__(
        self, loss: Loss, params: Tree, args: tuple[Any, ...], v: Tree, custom: bool = False, least: int = 1
    ) -> None:
        self.loss, self.params, self.args, self.v = loss, params, args, v
        self.part: Any = None
        if not custom:
            self.part = some_samples(params, args, is_of_model=of_loss(loss).state is not None, least=least)
        self.seen: Evidence | None = None
        self.plain: Tree | None = None  # the product on all samples by plain autograd, once that is seen to be right

    def ask(self) -> bool:
        """Takes the gradients; whether they tell anything."""
        if self.part is None:
            return False
        tape = Tape(wide=False)
        try:
            with differentiating(), tape.recording(), torch.enable_grad():
                value = self.loss(self.params, *self.part).detach()
        except Exception:  # no batch of its own
            return False
        plain = not tape.constants
        seen = evidence(self.loss, self.params, self.part, self.v, value, narrow=False, plain=plain)
        if seen is not None and _tells(seen):
            self.seen = seen._replace(tolerance=min(seen.tolerance, 0.05))
        return self.seen is not None

    def ask_with_plain(self) -> bool:
        """Takes the product on all samples by plain autograd, if it is right on some."""
        return self.ask() and self.ask_plain()

    def ask_plain(self) -> bool:
        """As :meth:`ask_with_plain`, once gradients have been asked."""
        product = in_mode("double_backward", self.loss)
        if self.agrees(product):
            try:
                with differentiating():
                    self.plain = product(self.params, self.args, self.v)
            except Exception:  # too large for it, say
                return False
        return self.plain is not None

    def agrees(self, product: Product, tolerance: float = 0.0) -> bool:
        """Whether the product of a mode that takes the loss as it is, is right on some samples."""
        if self.seen is None:
            return False
        try:
            with differentiating():
                found = product(self.params, self.part, self.v)
        except Exception:
            return False
        return verdict(found, self.seen._replace(tolerance=self.seen.tolerance + tolerance)) == "agrees"

    def agrees_with_plain(self, product: Tree) -> bool:
        """Whether the product on all samples is that by plain autograd."""
        return self.plain is not None and are_close(product, self.plain, self.params)


SMALL = 10**8  # entries of the parameters by those of the data: all samples cost no more than some of them


def _tells(seen: Evidence) -> bool:
    """Whether a wrong product would show: a loss that few samples hardly have has no digits, and no curvature."""
    size = float(tree.norm(seen.product))
    return size < math.inf and 10 * seen.error <= size


def some_samples(params: Tree, args: tuple[Any, ...], *, is_of_model: bool, least: int = 1) -> tuple[Any, ...] | None:
    """Some of the samples, where that is much less work; ``is_of_model``: whether they are known to be samples."""
    given = [x for x in tree.leaves((params, args)) if isinstance(x, Tensor)]
    if any(layout(x) or x.is_meta for x in given):
        return None
    if tree.numel(params) * sum(x.numel() for x in tensors(args)) < SMALL:
        return None
    # Were these no samples, indices could lead out of what is left, which is the end of the process on an accelerator.
    if not is_of_model and any(not x.is_cpu and not x.is_floating_point() for x in given):
        return None
    some: tuple[Any, ...] | None = few(args, least)
    return some
