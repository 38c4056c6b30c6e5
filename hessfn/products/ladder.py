"""The ladder: the first mode that a loss's operations allow, held against the gradients of the loss itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from hessfn.core import tree
from hessfn.core.errors import NoDerivative, Untraceable
from hessfn.core.probes import gaussian
from hessfn.core.results import Mode
from hessfn.core.torch_state import is_differentiated, is_observed, recorded
from hessfn.core.tree import Tree
from hessfn.engine import pipeline
from hessfn.engine.op_definitions import by_definition
from hessfn.products.first_check import AT_A_KINK, disagreement, evidence, is_generic, verdict
from hessfn.products.loss_checks import Loss, inspect, two_differences
from hessfn.products.loss_memory import Memory, Trace, shapes_of
from hessfn.products.modes import MODES, Product, differentiating, of_loss, of_trace, refuse_mode
from hessfn.products.reasons import listed, reason
from hessfn.products.wrong_operation import wrong_operation

DIFFERENTIATED = ("forward", "traced", "reverse")  # the modes that autograd can see through


@recorded
def find_mode(loss: Loss, params: Tree, *args: Any) -> Mode:
    """The mode that ``hvp(mode="auto")`` comes to take for this loss, and why; at the cost of one product, the trace
    and two gradients.

    >>> find_mode(lambda w: (w**4).sum(), torch.ones(3))
    Mode(mode='traced', reason='', error=0.0)
    """
    v = gaussian(params, 1)[0]  # not of ones, which nets with norms are often blind to
    order = DIFFERENTIATED if is_differentiated(params, args) else MODES
    return climb(loss, params, args, v, order, check=True).found.mode


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
        HessfnError: the mode is not for this loss.
    """
    if name != "traced":
        with differentiating():
            refuse_mode(name, by_definition(loss), params, args)
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
    memory: Memory | None = None,
) -> Climbed:
    """The first of these modes that works, and that agrees with the gradients of the loss itself.

    Of one mode alone, which was asked for, it is said what is wrong with it.
    """
    with differentiating():
        inspected = inspect(loss, params, args)
    memory = memory or Memory()
    checked = (*(order if len(order) == 1 else ()), *shapes_of((params, args)))
    observed = is_observed(*tree.leaves((params, args, v)))
    wrong = None if observed else memory.wrong.get(checked)
    seen, along = None, v
    if check and wrong is None and not observed:
        along = v if is_generic(v) else gaussian(params, 1)[0]
        seen = evidence(loss, params, args, along, inspected.value, inspected.has_custom_backward)
    defined, finding = by_definition(loss), ""
    reasons: list[tuple[str, str]] = []
    wrong = wrong or frozenset()

    def climbed(found: Found, result: Tree, message: str) -> Climbed:
        if seen is not None:
            memory.wrong[checked] = wrong
        return Climbed(found, result, message)

    for name in order:
        if name in wrong and len(order) > 1:
            continue
        try:
            found = made(name, loss, params, args, memory)
            with differentiating():
                apart: Any = 0.0
                if name == "difference":
                    result, apart = two_differences(defined, params, args, v)
                else:
                    result = found.product(loss)(params, args, v)
        except Exception as error:
            if len(order) == 1:
                raise
            reasons.append((name, reason(error)))
            continue
        found.mode = Mode(name, listed(reasons), float(apart))
        taken = f"{finding}. Taken is mode {name!r}, which agrees" if finding else ""
        if not taken and reasons and name not in ("traced", "forward") and "traced" in order:
            taken = _announce(found.mode)
        if seen is None or name == "difference":
            return climbed(found, result, taken)
        with differentiating():
            held = result if along is v else found.product(loss)(params, args, along)
        said = verdict(held, seen)
        if said in ("agrees", "unknown"):
            return climbed(found, result, taken)
        message = disagreement(name, held, seen, along)
        if inspected.has_custom_backward:
            return climbed(found, result, f"{message}. {_CUSTOM}")
        if said == "kink":
            return climbed(found, result, f"{message}. {AT_A_KINK}")
        if len(order) == 1:
            return climbed(found, result, message)
        wrong |= {name}
        finding = finding or message + blame(loss, params, args)
        reasons.append((name, "not what gradients of the loss say"))
    raise NoDerivative("this loss cannot be differentiated twice in any way:\n" + listed(reasons, "\n"))


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


def _announce(chosen: Mode) -> str:
    exact = "is exact (of an autograd.Function, the derivative of its backward) but may cost more"
    if chosen.mode == "difference":
        exact = f"is not exact: its relative error is about {chosen.error:.1g}"
    return f"Hessian-vector products in mode {chosen.mode!r}, which {exact}. Not possible were: {chosen.reason}"
