"""Gauss-Newton products by a trace of a model and its criterion: where there are many logits, which need not exist."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from hessfn.core.probes import gaussian
from hessfn.core.remembered import Remembered
from hessfn.core.tree import Tree
from hessfn.engine.fused.outputs import output
from hessfn.engine.op_definitions import noting_fused
from hessfn.losses.model_inputs import fresh
from hessfn.products.first_check import are_close, is_generic
from hessfn.products.just_in_time import recall
from hessfn.products.ladder import made
from hessfn.products.loss_memory import Memory, shapes_of
from hessfn.products.modes import Product
from hessfn.products.outputs import taken_apart
from hessfn.products.part_check import some_samples

Criterion = Callable[[Any, Any], Tensor]
Eager = Callable[[Criterion, tuple[Any, ...], Tree], Tree]  # with a criterion, of (inputs, targets) and a vector


class _ManyLogits(Exception):
    """A criterion asks for the cross-entropy of so many logits that they are not to be kept."""


class Traced:
    """Products of a model and its criterion: eager ones, and those of a trace where there are many logits.

    What is found out is kept with the model and its criterion, as long as both live.
    """

    def __init__(
        self, forward: Callable[..., Any], criterion: Criterion, params: Tree, eager: Eager, check: bool
    ) -> None:
        self._criterion, self._params, self._eager, self._is_checked = criterion, params, eager, check
        self._memory = _MEMORIES.get_or_make(forward, Remembered).get_or_make(criterion, Memory)
        self._loss = with_marked_outputs(forward, criterion)
        self._is_of_model = hasattr(forward, "closes_over")

    def __call__(self, args: tuple[Any, ...], v: Tree) -> Tree:
        """The product of ``(inputs, targets)`` with a vector."""
        is_right = self._memory.is_right  # by shapes: whether the product of a trace is that of the eager way
        key = self._key(args) if is_right else None
        if key not in is_right:
            try:
                return self._eager(noting_fused(self._criterion, _refuse_many_logits), args, v)
            except _ManyLogits:
                key = self._key(args)
            is_right[key] = self._is_right(args, v)
        product = self._product(args) if is_right[key] else None
        return self._eager(self._criterion, args, v) if product is None else product(self._params, args, v)

    def _key(self, args: tuple[Any, ...]) -> Any:
        return (self._is_checked, *shapes_of((self._params, args)))

    def _product(self, args: tuple[Any, ...]) -> Product | None:
        """That of a trace, from memory where it holds; None where no trace can be made."""
        memory, loss, params, key = self._memory, self._loss, self._params, self._key(args)
        found = recall(memory, key, loss, params, args)[0]
        if found is None:
            try:
                found = made("traced", loss, params, args, memory)
            except Exception:  # whatever a trace cannot do, the eager way may
                return None
            if found.trace is None or found.trace.product is None:
                return None
            memory.modes.setdefault(key, []).append(found)
        return found.traced

    def _is_right(self, args: tuple[Any, ...], v: Tree) -> bool:
        """Whether the product of a trace is that of the eager way: on some of the samples, or else on all."""
        if self._is_checked:
            v = v if is_generic(v) else gaussian(self._params, 1)[0]
            if not self._is_right_on_some(args, v) and not self._agrees(args, v):
                return False
        return self._product(args) is not None

    def _is_right_on_some(self, args: tuple[Any, ...], v: Tree) -> bool:
        part = some_samples(self._params, args, is_of_model=self._is_of_model)
        try:
            return part is not None and self._agrees(part, v)
        except Exception:  # no batch of its own
            return False

    def _agrees(self, args: tuple[Any, ...], v: Tree) -> bool:
        expected, product = self._eager(self._criterion, args, v), self._product(args)
        return product is not None and are_close(product(self._params, args, v), expected, self._params)


def with_marked_outputs(forward: Callable[..., Any], criterion: Criterion) -> Callable[..., Tensor]:
    def loss(params: Tree, inputs: Any, targets: Any) -> Tensor:
        out = taken_apart(forward(params, fresh(inputs)))
        return criterion(out.whole([output(x) for x in out.parts]), targets)

    return loss


def _refuse_many_logits(function: Any) -> None:
    if function is F.cross_entropy:
        raise _ManyLogits


_MEMORIES: Remembered[Remembered[Memory]] = Remembered()
