"""The modes in which a loss is differentiated twice, and the ladder that finds the first one its operations allow."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hessfn.core import tree
from hessfn.core.errors import InvalidInput, NoDerivative, Untraceable
from hessfn.core.probes import gaussian
from hessfn.core.results import Mode
from hessfn.core.torch_state import is_differentiated, is_observed, torch_state_lock
from hessfn.core.tree import Tree
from hessfn.engine import pipeline
from hessfn.engine.op_definitions import by_definition
from hessfn.engine.trace import tensors
from hessfn.products.first_check import AT_A_KINK, disagreement, evidence, is_generic, known_wrong, remember, verdict
from hessfn.products.guards import PLAIN, Snapshot, snapshot
from hessfn.products.loss_checks import (
    Loss,
    inspect,
    plain_gradient,
    refuse_once_differentiable,
    two_differences,
)
from hessfn.products.wrong_operation import wrong_operation

vjp: Callable[..., Any] = torch.func.vjp  # as it is annotated, it always returns an auxiliary output too
Product = Callable[[Tree, tuple[Any, ...], Tree], Tree]
ModeName = Literal["auto", "traced", "forward", "reverse", "double_backward", "difference"]


# One mode a function, from a loss to its product.


def _traced(loss: Loss, params: Tree, args: tuple[Any, ...]) -> Product:
    for name, leaf in zip(tree.names(args), tree.leaves(args), strict=True):
        if not isinstance(leaf, (Tensor, *PLAIN)):
            raise Untraceable(f"a trace cannot see into {name!r} of the batch, a {type(leaf).__name__}")
    job = pipeline.Job(loss, params, args)
    with differentiating():
        graph = pipeline.run(pipeline.LOSS, None, job)
        try:
            module = pipeline.run(pipeline.PRODUCT, graph, job)
        except Untraceable:  # a derivative rule looks at values
            return _forward(pipeline.as_function(graph))
    module = pipeline.run(pipeline.LOWERING, module, job)  # it may wait for a compiler: not under the lock
    return lambda params, args, v: tree.unflatten(module(*tensors((params, args, v))[0]), params)


def _forward(loss: Loss, *_: Any) -> Product:
    def product(params: Tree, args: tuple[Any, ...], v: Tree) -> Tree:
        return torch.func.jvp(lambda p: _gradient(loss, p, args), (params,), (v,))[1]

    return product


def _reverse(loss: Loss, *_: Any) -> Product:
    def product(params: Tree, args: tuple[Any, ...], v: Tree) -> Tree:
        return vjp(lambda p: _gradient(loss, p, args), params)[1](v)[0]

    return product


def _double_backward(loss: Loss, params: Tree, args: tuple[Any, ...]) -> Product:
    refuse_once_differentiable(loss, params, args)

    def product(params: Tree, args: tuple[Any, ...], v: Tree) -> Tree:
        leaves, gradient = plain_gradient(loss, params, args, create_graph=True)
        pairs = [(g, d) for g, d in zip(gradient, tree.leaves(v), strict=True) if g.requires_grad]
        if not pairs:
            return tree.map(torch.zeros_like, params)
        outputs, directions = zip(*pairs, strict=True)
        options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
        return tree.unflatten(torch.autograd.grad(outputs, leaves, directions, **options), params)

    return product


def _difference(loss: Loss, *_: Any) -> Product:
    return lambda params, args, v: two_differences(loss, params, args, v)[0]


# In the order of preference.
MODES: dict[str, Callable[..., Product]] = {
    "traced": _traced,
    "forward": _forward,
    "reverse": _reverse,
    "double_backward": _double_backward,
    "difference": _difference,
}


def _gradient(loss: Loss, params: Tree, args: tuple[Any, ...]) -> Tree:
    value, pullback = vjp(lambda p: loss(p, *args), params)
    return pullback(torch.ones_like(value))[0]


@contextmanager
def differentiating() -> Iterator[None]:
    """Holds what torch has only once, with attention's math kernel: the others have no second derivatives."""
    with torch_state_lock(), sdpa_kernel(SDPBackend.MATH):
        yield


def find_mode(loss: Loss, params: Tree, *args: Any) -> Mode:
    """The mode that ``hvp(mode="auto")`` takes for this loss, and why; at the cost of one product and two gradients.

    >>> find_mode(lambda w: (w**4).sum(), torch.ones(3))
    Mode(mode='traced', reason='', error=0.0)
    """
    v = gaussian(params, 1)[0]  # not of ones, which nets with norms are often blind to
    return _first(loss, params, args, v, "auto", wrong=None).mode


def product_of(loss: Loss, mode: ModeName, check: bool = True) -> Product:
    """The product in a mode, which is found, and checked, at the first call for arguments of their shapes."""
    if mode not in get_args(ModeName):
        raise InvalidInput(f"mode={mode!r} must be 'auto' or one of {', '.join(map(repr, MODES))}")
    found: dict[Any, tuple[Product, Snapshot | None]] = {}
    said: set[str] = set()

    def say(message: str) -> None:
        if message not in said:
            said.add(message)
            warnings.warn(message, stacklevel=4)

    def product(params: Tree, args: tuple[Any, ...], v: Tree) -> Tree:
        if torch.compiler.is_compiling():
            with sdpa_kernel(SDPBackend.MATH):
                return MODES["forward" if mode == "auto" else mode](loss)(params, args, v)
        shapes = (is_differentiated(params, args), *shapes_of((params, args)))
        known, guard = found.get(shapes, (None, None))
        if known is not None and (guard is None or guard == snapshot(loss, params)):
            with differentiating():
                return known(params, args, v)
        guard = snapshot(loss, params)
        wrong: frozenset[str] | None = frozenset()
        if check and not is_observed(*tree.leaves((params, args, v))):
            wrong = known_wrong(loss, (mode, *shapes))
        first = _first(loss, params, args, v, mode, wrong)
        if wrong is None:
            remember(loss, (mode, *shapes), first.wrong)
        found[shapes] = first.product, guard if first.mode.mode == "traced" else None  # the others run the loss anew
        if first.finding:
            say(first.finding)
        elif first.mode.reason and first.mode.mode not in {"traced", "forward"}:
            say(_announce(first.mode))
        return first.result

    return product


def shapes_of(arguments: Any) -> Any:
    """What a product is good for: the structure, the shapes and dtypes of tensors, the values of what has one.

    Of other objects the type: a product that has seen into them, as a trace would, is not made.
    """
    return (*tree.names(arguments), *map(_kind, tree.leaves(arguments)))


def _kind(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.shape, x.dtype, x.device
    return type(x), repr(x) if isinstance(x, PLAIN) else ""


class _First(NamedTuple):
    """What the ladder has found at the first product."""

    product: Product
    mode: Mode
    result: Tree
    finding: str = ""  # of the check, for the user
    wrong: frozenset[str] = frozenset()  # modes whose product is not the curvature of the loss


def _first(loss: Loss, params: Tree, args: tuple[Any, ...], v: Tree, mode: str, wrong: frozenset[str] | None) -> _First:
    """The ladder: the first mode that works, and that agrees with the gradients of the loss itself.

    Args:
        wrong: the modes that are known to be wrong; None where that is still to be found.
    """
    with differentiating():
        inspected = inspect(loss, params, args)
    differentiated = is_differentiated(params, args)
    seen, along = None, v
    if wrong is None and not is_observed(*tree.leaves((params, args, v))):
        along = v if is_generic(v) else gaussian(params, 1)[0]
        seen = evidence(loss, params, args, along, inspected.value, inspected.has_custom_backward)
    defined, reasons, finding = by_definition(loss), [], ""
    wrong = wrong or frozenset()
    for name in (("forward", "reverse") if differentiated else MODES) if mode == "auto" else (mode,):
        if name in wrong and mode == "auto":
            continue
        try:
            product = MODES[name](defined, params, args)
            with differentiating():
                apart: Any = 0.0
                if name == "difference":
                    result, apart = two_differences(defined, params, args, v)
                else:
                    result = product(params, args, v)
        except Exception as error:
            if mode != "auto":
                raise
            reasons.append(f"{name}: {(str(error) or type(error).__name__).splitlines()[0]}")
            continue
        found = Mode(name, "; ".join(reasons), float(apart))
        taken = f"{finding}. Taken is mode {name!r}, which agrees" if finding else ""
        if seen is None or name == "difference":
            return _First(product, found, result, taken, wrong)
        with differentiating():
            held = result if along is v else product(params, args, along)
        said = verdict(held, seen)
        if said in ("agrees", "unknown"):
            return _First(product, found, result, taken, wrong)
        message = disagreement(name, held, seen, along)
        if inspected.has_custom_backward:
            return _First(product, found, result, f"{message}. {_CUSTOM}", wrong)
        if said == "kink":
            return _First(product, found, result, f"{message}. {AT_A_KINK}", wrong)
        if mode != "auto":
            return _First(product, found, result, message, wrong)
        wrong |= {name}
        finding = finding or message + (blame(defined, params, args) if name == "traced" else "")
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
