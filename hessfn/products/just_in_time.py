"""Products just in time: the loss as it is for the first ones, a trace where many follow, all kept with the loss."""

from __future__ import annotations

from typing import Any, get_args

import torch

from hessfn.core import tree
from hessfn.core.errors import InvalidInput, NoDerivative, Untraceable
from hessfn.core.torch_private import under_functorch
from hessfn.core.torch_state import carries_derivative, is_differentiated, is_observed, known, recorded
from hessfn.core.tree import Tree
from hessfn.core.warn import warn
from hessfn.products.first_check import are_close
from hessfn.products.guards import snapshot
from hessfn.products.ladder import DIFFERENTIATED, Climbed, Found, climb, made
from hessfn.products.loss_checks import Loss, inspect
from hessfn.products.loss_memory import Memory, memory_of, shapes_of
from hessfn.products.modes import MODES, OF_LOSS, ModeName, Product, differentiating, math_attention
from hessfn.products.reasons import reason

PATIENCE = 3  # a trace costs as much as some products
# What is exact before a trace, and plain autograd first: it takes least memory, and does not load torch's compiler.
_NOT_TRACED = ("double_backward", "forward", "reverse", "difference")
_AT_FIRST = (*_NOT_TRACED[:3], "traced", "difference")
_OF_PLAIN_AUTOGRAD = ("double_backward", "difference")
_CUT = (
    "a product in mode {mode!r} has no derivative by the parameters or the data, and one requires gradients: take mode "
    "'auto'; or, where no such derivative is wanted, detach them or use torch.no_grad()"
)


def product_of(loss: Loss, mode: ModeName, check: bool = True, trace_after: int = PATIENCE) -> Product:
    """The product in a mode, which is found, and checked, at the first call for arguments of their shapes.

    What is found is kept with the loss, for all products that are made of it. In mode ``"auto"`` the first products
    (``trace_after`` of them) are those of the loss as it is, where it has any; then a trace takes over.
    """
    if mode not in get_args(ModeName):
        raise InvalidInput(f"mode={mode!r} must be 'auto' or one of {', '.join(map(repr, MODES))}")
    if trace_after < 0:
        raise InvalidInput(f"trace_after={trace_after} must be 0, for a trace at once, or a number of products")
    memory = Memory() if torch.compiler.is_compiling() else memory_of(loss)  # what it looks into, a compiler guards
    seen: set[Any] = set()

    @recorded
    def product(params: Tree, args: tuple[Any, ...], v: Tree) -> Tree:
        if torch.compiler.is_compiling():
            with math_attention():
                return OF_LOSS["forward" if mode in ("auto", "traced") else mode](loss, params, args, v)
        if mode in _OF_PLAIN_AUTOGRAD and carries_derivative(params, args):
            raise NoDerivative(_CUT.format(mode=mode))
        differentiated = is_differentiated(params, args)
        key = (mode, check, trace_after, differentiated, *shapes_of((params, args)))
        found, stale = recall(memory, key, loss, params, args)
        if under_functorch() and (found is None or found.mode.mode in _OF_PLAIN_AUTOGRAD):
            key = ("transformed", *key)  # where nothing is checked, and plain autograd is of no use
            found, stale = recall(memory, key, loss, params, args)
        if found is None:
            order, patience = _order(mode, differentiated, trace_after, stale)
            climbed = climb(loss, params, args, v, order, check, memory)
            new = climbed.found
            new.patience = None if "traced" in order and new.mode.mode == "difference" else patience
            memory.modes.setdefault(key, []).append(new)
            _say(climbed.message, memory)
            return climbed.result
        if found.is_due and not is_observed(*tree.leaves((params, args, v))):
            _say(_add_trace(found, loss, params, args, v, check, memory), memory)
        found.num_products += 1
        with differentiating():
            result = found.product(loss)(params, args, v)
        if key not in seen:
            seen.add(key)
            _require_finite(result, loss, params, args)
        return result

    return product


def recall(
    memory: Memory, key: Any, loss: Loss, params: Tree, args: tuple[Any, ...]
) -> tuple[Found | None, Found | None]:
    """What is known for such arguments, and what was, before something changed that the loss closes over."""
    kept: list[Found] = memory.modes.get(key, [])
    stale = None
    if any(found.trace for found in kept):
        now = snapshot(loss, params)
        stale = next((found for found in kept if found.trace and found.trace.guard != now), None)
        if stale is not None:
            kept = memory.modes[key] = [found for found in kept if found.trace is None or found.trace.guard == now]
    in_order = sorted(kept, key=lambda found: found.trace is None)  # a trace before the loss as it is
    return next((found for found in in_order if found.holds(params, args)), None), stale


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
        return DIFFERENTIATED, None
    if not trace_after:
        return MODES, None
    if before is None:
        return _AT_FIRST, trace_after
    # A loss that has changed since it was traced may change again: the next trace is to be worth more products.
    return _NOT_TRACED, 2 * (before.patience or trace_after)


def _say(message: str, memory: Memory) -> None:
    if message and message not in memory.said:
        memory.said.add(message)
        warn(message)


def _add_trace(
    found: Found, loss: Loss, params: Tree, args: tuple[Any, ...], v: Tree, check: bool, memory: Memory
) -> str:
    """A trace in place of the loss as it is, once it is seen to give the same product, which was checked before.

    Where there is none, the best of the other modes.
    """
    traced = ("traced", *shapes_of((params, args)))
    try:
        if check and memory.is_right.get(traced) is False:
            raise Untraceable("not what gradients of the loss say")
        with differentiating():  # before the trace, which would not hold for a loss that counts its calls
            before = found.product(loss)(params, args, v) if check else v
        new = made("traced", loss, params, args, memory)
        with differentiating():
            held = new.product(loss)(params, args, v)
    except Exception as error:
        others = tuple(OF_LOSS)
        return _become(found, climb(loss, params, args, v, others, check, memory, [("traced", reason(error))]))
    if check and not are_close(held, before, params):  # the check says which of the two is right
        return _become(found, climb(loss, params, args, v, MODES, check, memory))
    if check:
        memory.is_right[traced] = True
    found.mode, found.traced, found.trace = new.mode, new.traced, new.trace
    return ""


def _become(found: Found, climbed: Climbed) -> str:
    new = climbed.found
    found.mode, found.traced, found.trace, found.patience = new.mode, new.traced, new.trace, None
    return climbed.message
