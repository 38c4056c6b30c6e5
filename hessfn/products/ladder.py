"""The ladder: the first mode that a loss's operations allow, held against the gradients of the loss itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.nn.functional as F

from hessfn.core import tree
from hessfn.core.errors import NoDerivative, Untraceable
from hessfn.core.probes import gaussian
from hessfn.core.results import Mode
from hessfn.core.torch_state import is_differentiated, is_observed, recorded
from hessfn.core.tree import Tree
from hessfn.engine import pipeline
from hessfn.engine.op_definitions import by_definition, noting_fused
from hessfn.losses.model_inputs import taken
from hessfn.products.first_check import AT_A_KINK, Evidence, disagreement, evidence, is_generic, not_finite, verdict
from hessfn.products.loss_checks import Inspected, Loss, inspect, refuse_once_differentiable, two_differences
from hessfn.products.loss_memory import Memory, Trace, memory_of, shapes_of
from hessfn.products.modes import MODES, Product, differentiating, double_backward_of, of_loss, of_trace
from hessfn.products.part_check import PartCheck
from hessfn.products.reasons import listed, reason
from hessfn.products.wrong_operation import wrong_operation

DIFFERENTIATED = ("forward", "traced", "reverse")  # the modes that autograd can see through


@recorded
def find_mode(loss: Loss, params: Tree, *args: Any) -> Mode:
    """The mode that ``hvp(mode="auto")`` takes for this loss, and why it takes no better one.

    Args:
        loss, params, args: as for :func:`hessfn.hvp`.

    Returns:
        ``mode``, the name of the mode; ``reason``, why each better mode fails, or an empty string; ``error``, the
        relative error of the products, 0 except in mode ``"difference"``.

    Cost: one product, the trace of the loss, and the two gradients of the first check.

    Raises:
        ValueError: the loss is not one finite number, draws random numbers, or does not depend on ``params``.

    >>> import torch
    >>> find_mode(lambda w: (w**4).sum(), torch.ones(3))
    Mode(mode='traced', reason='', error=0.0)
    """
    args = taken(loss, args)
    v = gaussian(params, 1)[0]  # not of ones, which nets with norms are often blind to
    order = DIFFERENTIATED if is_differentiated(params, args) else MODES
    return climb(loss, params, args, v, order, True, memory_of(loss)).found.mode


@dataclass
class Found:
    """What the ladder has found for arguments of some shapes. It holds no loss, which may be gone one day."""

    mode: Mode
    traced: Product | None = None
    trace: Trace | None = None
    num_products: int = 1  # so far
    patience: int | None = None  # of so many, after which a trace is tried; None where there is nothing to try

    def holds(self, params: Tree, args: tuple[Any, ...]) -> bool:
        return self.trace is None or self.trace.holds(params, args)

    @property
    def is_due(self) -> bool:
        return self.trace is None and self.patience is not None and self.num_products >= self.patience

    def product(self, loss: Loss) -> Product:
        return self.traced or of_loss(self.mode.mode, loss)


def made(name: str, loss: Loss, params: Tree, args: tuple[Any, ...], memory: Memory) -> Found:
    """A product in a mode.

    Raises:
        Untraceable: no trace can be made, or kept.
    """
    if name != "traced":
        return Found(Mode(name, "", 0.0))
    with differentiating():
        trace = memory.trace(loss, params, args)
    return Found(Mode(name, "", 0.0), of_trace(trace, params, args), trace)


class Climbed(NamedTuple):
    found: Found
    result: Tree
    message: str  # for the user


def climb(
    loss: Loss,
    params: Tree,
    args: tuple[Any, ...],
    v: Tree,
    order: tuple[str, ...],
    check: bool,
    memory: Memory,
    reasons: Sequence[tuple[str, str]] = (),
) -> Climbed:
    """The first of these modes that works, and that agrees with the gradients of the loss itself.

    Of one mode alone, which was asked for, it is said what is wrong with it. ``reasons`` are why modes that were tried
    before are not taken.
    """
    fused: set[Any] = set()
    with differentiating():
        inspected = inspect(by_definition(noting_fused(loss, fused.add)), params, args)
    # The graph of this evaluation is that of the product, which can go on from there.
    graphs = [inspected.graph] if order[0] == "double_backward" and inspected.graph else []
    inspected = inspected._replace(graph=None)
    if F.cross_entropy in fused and "traced" in order:  # the logits of many classes are more memory than all else
        graphs.clear()
        order = ("traced", *(mode for mode in order if mode != "traced"))
    shapes = shapes_of((params, args))
    is_checked = check and not is_observed(*tree.leaves((params, args, v)))
    judge = Judge(loss, params, args, v, inspected, memory if fused else None)
    finding, reasons = "", list(reasons)
    for name in order:
        if name != "double_backward":
            graphs.clear()
        key = (name, *shapes)
        is_right = memory.is_right.get(key) if is_checked else True
        if is_right is False and len(order) > 1:
            reasons.append((name, _WRONG))
            continue
        try:
            if name == "double_backward" and inspected.has_custom_backward:
                with differentiating():
                    refuse_once_differentiable(by_definition(loss), params, args)
            if name == "traced" and is_right is None:
                judge.ask(name)  # before the trace, which would not hold for a loss that counts its calls
            found = made(name, loss, params, args, memory)
            with differentiating():
                apart: Any = 0.0
                if name == "difference":
                    result, apart = two_differences(by_definition(loss), params, args, v)
                elif name == "double_backward" and graphs:
                    result = double_backward_of(graphs.pop(), params, v)
                else:
                    result = found.product(loss)(params, args, v)
        except Exception as error:
            if len(order) == 1:
                raise
            reasons.append((name, reason(error)))
            continue
        found.mode = Mode(name, listed(reasons), float(apart))
        message = f"{finding}. Taken is mode {name!r}, which agrees" if finding else ""
        if not message and any(mode == "traced" for mode, _ in reasons):
            message = announcement(found.mode)
        if is_right:
            return Climbed(found, result, message)
        judged = judge(name, found, result)
        memory.is_right[key] = judged.is_right
        if judged.is_right or len(order) == 1:
            return Climbed(found, result, judged.message or message)
        finding = finding or judged.message + blame(loss, params, args)
        reasons.append((name, _WRONG))
    raise NoDerivative("this loss cannot be differentiated twice in any way:\n" + listed(reasons, "\n"))


class Judged(NamedTuple):
    is_right: bool  # or nothing better can be had: there is a kink, or it cannot be told
    message: str


class Judge:
    """Holds products against gradients of the loss, which it asks for once, and only if it is asked.

    Some of the samples are asked first. What is right there is right; all samples are asked of the rest. A trace holds
    for one shape of arguments, so that of all samples its product is held against that by plain autograd; where this
    takes much more memory (``traces``: where traces are kept), that of a second trace is asked, for some samples.
    """

    def __init__(
        self, loss: Loss, params: Tree, args: tuple[Any, ...], v: Tree, inspected: Inspected, traces: Memory | None
    ) -> None:
        self.loss, self.params, self.args, self.v, self.inspected = loss, params, args, v, inspected
        self.traces = traces
        self.of_part: PartCheck | None = None
        self.of_all: list[Evidence | None] = []

    def ask(self, name: str) -> PartCheck:
        """Before a product in this mode, and before its trace."""
        if self.of_part is None:
            along = self.v if is_generic(self.v) else gaussian(self.params, 1)[0]
            custom = self.inspected.has_custom_backward
            self.of_part = PartCheck(self.loss, self.params, self.args, along, custom)
            by_plain = name == "traced" and self.traces is None
            if not (self.of_part.ask_with_plain() if by_plain else self.of_part.ask()):
                self.ask_all(along)
        return self.of_part

    def ask_all(self, along: Tree) -> Evidence | None:
        if not self.of_all:
            inspected = self.inspected
            custom = inspected.has_custom_backward
            self.of_all = [evidence(self.loss, self.params, self.args, along, inspected.value, custom)]
        return self.of_all[0]

    def __call__(self, name: str, found: Found, result: Tree) -> Judged:
        of_part = self.ask(name)
        along = of_part.v
        stated = min(10 * found.mode.error, 0.1)  # of differences, which say it themselves
        is_finite = math.isfinite(float(tree.norm(result)))
        if is_finite and self._agrees_in_part(name, found, of_part, stated):
            return Judged(True, "")
        if of_part.plain is None and self.ask_all(along) is None:
            return Judged(True, "")
        with differentiating():
            held = result if along is self.v else found.product(self.loss)(self.params, self.args, along)
        if name == "traced" and of_part.agrees_with_plain(held):
            return Judged(True, "")
        seen = self.ask_all(along)
        if seen is None:
            return Judged(True, "")
        said = verdict(held, seen._replace(tolerance=seen.tolerance + stated))
        if said == "not finite":
            raise not_finite(held)
        if said in ("agrees", "unknown"):
            return Judged(True, "")
        message = disagreement(name, held, seen, along)
        if self.inspected.has_custom_backward:
            return Judged(True, "" if name == "difference" else f"{message}. {_CUSTOM}")
        return Judged(True, f"{message}. {AT_A_KINK}") if said == "kink" else Judged(False, message)

    def _agrees_in_part(self, name: str, found: Found, of_part: PartCheck, stated: float) -> bool:
        if name == "traced":
            if of_part.seen is None or self.traces is None:
                return False
            try:
                found = made(name, self.loss, self.params, of_part.part, self.traces)
            except Untraceable:
                return False
        return of_part.agrees(found.product(self.loss), stated)


_WRONG = "not what gradients of the loss say"
_CUSTOM = (
    "The loss has an autograd.Function, and the product is the derivative of its backward, as in all of torch: right "
    "for a straight-through estimator, and without its curvature where the Function keeps its gradient from forward to "
    "backward, as fused losses do: then take mode='difference'"
)


def blame(loss: Loss, params: Tree, args: tuple[Any, ...]) -> str:
    """Which operation it is that torch differentiates wrongly, where that can be told."""
    try:
        with differentiating():
            graph = pipeline.run(pipeline.LOSS, None, pipeline.Job(by_definition(loss), params, args))
            operation = wrong_operation(graph, params, args)
    except Untraceable:
        return ""
    return f" (wrong is torch's rule for {operation})" if operation else ""


def announcement(chosen: Mode) -> str:
    """Of a mode that costs more than it might, or is not exact."""
    if chosen.mode in ("traced", "forward"):
        return ""
    exact = "is exact (of an autograd.Function, the derivative of its backward) but may cost more"
    if chosen.mode == "difference":
        exact = f"is not exact: its relative error is about {chosen.error:.1g}"
    return f"Hessian-vector products in mode {chosen.mode!r}, which {exact}. Not possible were: {chosen.reason}"
