"""The ladder: the first mode that a loss's operations allow, held against the gradients of the loss itself."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple, get_args

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from hessfn.core import tree
from hessfn.core.errors import InvalidInput, NoDerivative
from hessfn.core.probes import gaussian
from hessfn.core.results import Mode
from hessfn.core.torch_private import under_functorch
from hessfn.core.torch_state import is_differentiated, is_observed, known
from hessfn.core.tree import Tree
from hessfn.engine import pipeline
from hessfn.engine.op_definitions import by_definition
from hessfn.products.first_check import AT_A_KINK, are_close, disagreement, evidence, is_generic, verdict
from hessfn.products.loss_checks import Loss, inspect, two_differences
from hessfn.products.loss_memory import Memory, Trace, memory_of, shapes_of
from hessfn.products.modes import MODES, OF_LOSS, ModeName, Product, differentiating, of_loss, of_trace, refuse_mode
from hessfn.products.wrong_operation import wrong_operation

PATIENCE = 3  # a trace costs as much as some products
_AT_FIRST = ("forward", "traced", "reverse", "double_backward", "difference")
_DIFFERENTIATED = ("forward", "traced", "reverse")  # what autograd can see through
_NOT_TRACED = tuple(OF_LOSS)
_OF_PLAIN_AUTOGRAD = ("double_backward", "difference")


def find_mode(loss: Loss, params: Tree, *args: Any) -> Mode:
    """The mode that ``hvp(mode="auto")`` comes to take for this loss, and why; at the cost of one product, the trace
    and two gradients.

    >>> find_mode(lambda w: (w**4).sum(), torch.ones(3))
    Mode(mode='traced', reason='', error=0.0)
    """
    v = gaussian(params, 1)[0]  # not of ones, which nets with norms are often blind to
    order = _DIFFERENTIATED if is_differentiated(params, args) else MODES
    return _climb(loss, params, args, v, order, check=True).found.mode


class Found(NamedTuple):
    """What the ladder has found for arguments of some shapes. It holds no loss, which may be gone one day."""

    mode: Mode
    traced: Product | None = None
    trace: Trace | None = None
    num_products: int = 1  # so far
    patience: int | None = None  # of so many, after which a trace is tried; None where there is nothing to try

    def holds(self, loss: Loss, params: Tree, args: tuple[Any, ...]) -> bool:
        return self.trace is None or self.trace.holds(loss, params, args)

    @property
    def is_due(self) -> bool:
        return self.trace is None and self.patience is not None and self.num_products >= self.patience

    def product(self, loss: Loss) -> Product:
        return self.traced or of_loss(self.mode.mode, loss)


def product_of(loss: Loss, mode: ModeName, check: bool = True, trace_after: int = PATIENCE) -> Product:
    """The product in a mode, which is found, and checked, at the first call for arguments of their shapes.

    What is found is kept with the loss, for all products that are made of it. In mode ``"auto"`` the first products
    (``trace_after`` of them) are those of the loss as it is, where it has any; then a trace takes over.
    """
    if mode not in get_args(ModeName):
        raise InvalidInput(f"mode={mode!r} must be 'auto' or one of {', '.join(map(repr, MODES))}")
    if trace_after < 0:
        raise InvalidInput(f"trace_after={trace_after} must be 0, for a trace at once, or a number of products")
    memory = memory_of(loss)
    seen: set[Any] = set()

    def product(params: Tree, args: tuple[Any, ...], v: Tree) -> Tree:
        if torch.compiler.is_compiling():
            with sdpa_kernel(SDPBackend.MATH):
                return OF_LOSS["forward" if mode in ("auto", "traced") else mode](loss, params, args, v)
        differentiated = is_differentiated(params, args)
        key = (mode, check, trace_after, differentiated, *shapes_of((params, args)))
        found = memory.modes.get(key)
        if under_functorch() and (found is None or found.mode.mode in _OF_PLAIN_AUTOGRAD):
            key = ("transformed", *key)  # where nothing is checked, and plain autograd is of no use
            found = memory.modes.get(key)
        if found is None or not found.holds(loss, params, args):
            order, patience = _order(mode, differentiated, trace_after, found)
            climbed = _climb(loss, params, args, v, order, check, memory)
            if "traced" in order and climbed.found.mode.mode not in ("forward", "traced"):
                patience = None
            memory.modes[key] = climbed.found._replace(patience=patience)
            _say(climbed.message, memory)
            return climbed.result
        if found.is_due and not is_observed(*tree.leaves((params, args, v))):
            found, message = _with_trace(found, loss, params, args, v, check, memory)
            _say(message, memory)
        memory.modes[key] = found._replace(num_products=found.num_products + 1)
        with differentiating():
            result = found.product(loss)(params, args, v)
        if key not in seen:
            seen.add(key)
            _require_finite(result, loss, params, args)
        return result

    return product


def _require_finite(result: Tree, loss: Loss, params: Tree, args: tuple[Any, ...]) -> None:
    """Raises where the loss is not finite here, which it was where its mode was found."""
    if not all(known(leaf.isfinite().all()) is not False for leaf in tree.leaves(result)):
        with differentiating():
            inspect(loss, params, args)


def _order(
    mode: str, differentiated: bool, trace_after: int, before: Found | None
) -> tuple[tuple[str, ...], int | None]:
    """The modes to try, and after how many products a trace."""
    if mode != "auto":
        return (mode,), None
    if differentiated:
        return _DIFFERENTIATED, None
    if not trace_after:
        return MODES, None
    if before is None:
        return _AT_FIRST, trace_after
    # A loss that has changed since it was traced may change again: the next trace is to be worth more products.
    return _NOT_TRACED, 2 * (before.patience or trace_after)


def _say(message: str, memory: Memory) -> None:
    if message and message not in memory.said:
        memory.said.add(message)
        warnings.warn(message, stacklevel=4)


def _with_trace(
    found: Found, loss: Loss, params: Tree, args: tuple[Any, ...], v: Tree, check: bool, memory: Memory
) -> tuple[Found, str]:
    """A trace in place of the loss as it is, once it is seen to give the same product, which was checked before."""
    settled = found._replace(patience=None)
    if "traced" in (memory.wrong.get(shapes_of((params, args))) or ()):
        return settled, ""
    try:
        with differentiating():  # before the trace, which would not hold for a loss that counts its calls
            before = found.product(loss)(params, args, v) if check else v
        new = _made("traced", loss, params, args, memory)
        with differentiating():
            held = new.product(loss)(params, args, v)
    except Exception:  # it goes on as it was
        return settled, ""
    if check and not are_close(held, before, params):
        # The check says which of the two is right.
        memory.wrong.pop(shapes_of((params, args)), None)
        climbed = _climb(loss, params, args, v, MODES, check, memory)
        return climbed.found._replace(patience=None), climbed.message
    return new._replace(num_products=found.num_products, patience=found.patience), ""


def _made(name: str, loss: Loss, params: Tree, args: tuple[Any, ...], memory: Memory) -> Found:
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


class _Climbed(NamedTuple):
    found: Found
    result: Tree
    message: str  # for the user


def _climb(
    loss: Loss,
    params: Tree,
    args: tuple[Any, ...],
    v: Tree,
    order: tuple[str, ...],
    check: bool,
    memory: Memory | None = None,
) -> _Climbed:
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
    defined, reasons, finding = by_definition(loss), [], ""
    wrong = wrong or frozenset()

    def climbed(found: Found, result: Tree, message: str) -> _Climbed:
        if seen is not None:
            memory.wrong[checked] = wrong
        return _Climbed(found, result, message)

    for name in order:
        if name in wrong and len(order) > 1:
            continue
        try:
            found = _made(name, loss, params, args, memory)
            with differentiating():
                apart: Any = 0.0
                if name == "difference":
                    result, apart = two_differences(defined, params, args, v)
                else:
                    result = found.product(loss)(params, args, v)
        except Exception as error:
            if len(order) == 1:
                raise
            reasons.append(f"{name}: {(str(error) or type(error).__name__).splitlines()[0]}")
            continue
        found = found._replace(mode=Mode(name, "; ".join(reasons), float(apart)))
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
        finding = finding or message + blame(defined, params, args)
        reasons.append(f"{name}: not what gradients of the loss say")
    raise NoDerivative("this loss cannot be differentiated twice in any way:\n" + "\n".join(reasons))


_CUSTOM = (
    "The loss has an autograd.Function, and the product is the derivative of its backward, as in all of torch: right "
    "for a straight-through estimator, and without its curvature where the Function keeps its gradient from forward to "
    "backward, as fused losses do: then take mode='difference'"
)


def blame(loss: Loss, params: Tree, args: tuple[Any, ...]) -> str:
    """Which operation it is that a trace of the loss differentiates wrongly, where that can be told."""
    with differentiating():
        operation = wrong_operation(pipeline.run(pipeline.LOSS, None, pipeline.Job(loss, params, args)), params, args)
    return f" (wrong is torch's rule for {operation})" if operation else ""


def _announce(chosen: Mode) -> str:
    exact = "is exact (of an autograd.Function, the derivative of its backward) but may cost more"
    if chosen.mode == "difference":
        exact = f"is not exact: its relative error is about {chosen.error:.1g}"
    return f"Hessian-vector products in mode {chosen.mode!r}, which {exact}. Not possible were: {chosen.reason}"
