"""From a model and its criterion to a matvec: the Gauss-Newton matrix, the Fisher matrix."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hessfn.core import tree
from hessfn.core.arguments import require_forward, require_pair
from hessfn.core.errors import InvalidInput
from hessfn.core.torch_state import is_observed, torch_state_lock
from hessfn.core.tree import MatVec, T, Tree
from hessfn.engine.op_definitions import by_definition
from hessfn.losses.criteria import known_criterion, summed
from hessfn.products.modes import vjp

P = ParamSpec("P")
R = TypeVar("R")


def _says_what_is_missing(make: Callable[P, R]) -> Callable[P, R]:
    """A loss and its parameters, as for ``hvp``, are one argument too few: what the first is tells more than that."""

    @functools.wraps(make)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        given: dict[str, Any] = dict(zip(("forward", "criterion", "params", "batch"), args, strict=False)) | kwargs
        if given.keys() == {"forward", "criterion", "params"}:
            require_forward(**given, call=_call(make))
        return make(*args, **kwargs)

    return checked


def _call(make: Callable[..., Any]) -> str:
    return f"{make.__name__}(forward, criterion, params, batch)"


@_says_what_is_missing
def ggnvp(
    forward: Callable[[T, Any], Any], criterion: Callable[[Any, Any], Tensor], params: T, batch: Any
) -> MatVec[T]:
    """Products with the generalized Gauss-Newton matrix ``J' H_out J``.

    ``J`` is the Jacobian of the outputs by the parameters, ``H_out`` the Hessian of the criterion by the outputs. It is
    positive semidefinite where the criterion is convex in the outputs, and the Hessian where the model is linear in its
    parameters.

    Args:
        forward: ``forward(params, inputs)`` to a tensor or a tree of them, such as :func:`hessfn.stateless` returns.
        criterion: ``criterion(outputs, targets)`` to a scalar.
        params: a tree of tensors.
        batch: ``(inputs, targets)``.

    Raises:
        ValueError: an argument is of another kind, such as a loss where the model's outputs are wanted, or a vector
            does not match ``params``.

    Source: Schraudolph (2002).

    >>> x = torch.tensor([[1.0, 2.0]])
    >>> matvec = ggnvp(lambda w, x: x @ w, lambda out, y: (out - y).square().sum(), torch.zeros(2), (x, torch.ones(1)))
    >>> matvec(torch.tensor([1.0, 0.0]))
    tensor([2., 4.])
    """
    require_forward(forward, criterion, params, _call(ggnvp))
    inputs, targets = require_pair(batch, "batch (inputs, targets)", _call(ggnvp))

    def loss_of(out: Any) -> Tensor:
        return criterion(out, targets)

    def matvec(v: T) -> T:
        v = tree.aligned(v, params)
        defined = by_definition(forward)

        def outputs(p: T) -> Any:
            return defined(p, inputs)

        with torch_state_lock(), sdpa_kernel(SDPBackend.MATH):
            out, pullback = vjp(outputs, params)
            # Reverse mode: the criterion is cheap, and the common ones lack a forward rule.
            _, curvature = vjp(torch.func.grad(loss_of), out)
            return pullback(curvature(_pushforward(outputs, params, v))[0])[0]

    return matvec


@_says_what_is_missing
def fvp(
    forward: Callable[[T, Any], Any],
    criterion: Callable[[Any, Any], Tensor],
    params: T,
    batch: Any,
    *,
    check: bool = True,
) -> MatVec[T]:
    """Products with the empirical Fisher matrix ``1/B sum_i g_i g_i'``, ``g_i`` the gradient of sample ``i``'s loss.

    A sample's loss is B times its share of the mean loss, so that the mean of ``g_i`` is the gradient of that: of
    torch's ``CrossEntropyLoss`` and ``NLLLoss``, with class weights or ignored targets, it is
    ``B w_i l_i / sum_j w_j``. Of a criterion that is a sum over samples it is the criterion of the sample alone.

    Arguments as :func:`ggnvp`. Samples lie along the first axis of outputs and targets, and the output of a sample must
    depend on that sample alone. With targets drawn from the model's own predictions it is a Monte-Carlo estimate of the
    Fisher matrix itself.

    Args:
        check: whether the first product asks that the criterion be the mean, or the sum, of those of single samples.

    Raises:
        ValueError: it is neither, such as a mean by class weights in a criterion of one's own.

    >>> x = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    >>> square = lambda out, y: (out - y).square().mean()
    >>> matvec = fvp(lambda w, x: x @ w, square, torch.zeros(2), (x, torch.ones(2)))
    >>> matvec(torch.tensor([1.0, 0.0]))
    tensor([2., 4.])
    """
    require_forward(forward, criterion, params, _call(fvp))
    inputs, targets = require_pair(batch, "batch (inputs, targets)", _call(fvp))
    known = known_criterion(criterion)
    is_weighed = known is not None and known.by_class and known.reduction == "mean"
    # A mean of one sample has its weight divided out, and of one that is ignored it is 0 / 0.
    of_sample = summed(criterion) if is_weighed else criterion
    weight = known.weight_of(batch, targets) if known is not None and is_weighed else None
    unchecked = [check and known is None]

    def alone(output: Any, target: Any) -> Tensor:
        one = tree.map(lambda leaf: leaf.unsqueeze(0), (output, target))
        return of_sample(*one)

    def matvec(v: T) -> T:
        v = tree.aligned(v, params)
        defined = by_definition(forward)

        def losses(p: T) -> Tensor:
            each = torch.func.vmap(alone)(defined(p, inputs), targets)
            return each if weight is None else each * torch.as_tensor(each.numel() / weight).to(each)

        with torch_state_lock(), sdpa_kernel(SDPBackend.MATH):
            each, pullback = vjp(losses, params)
            if unchecked[0] and not is_observed(each):
                with torch.no_grad():
                    _require_shares(each, criterion(defined(params, inputs), targets))
                unchecked[0] = False
            return pullback(_pushforward(losses, params, v) / each.numel())[0]

    return matvec


def _require_shares(each: Tensor, whole: Tensor) -> None:
    tolerance = max(torch.finfo(whole.dtype).eps ** 0.5, 1e-5)
    mean, total, value = float(each.mean()), float(each.sum()), float(whole)
    size = float(each.abs().max())
    if math.isfinite(value) and not (abs(mean - value) <= tolerance * size or abs(total - value) <= tolerance * size):
        raise InvalidInput(
            f"fvp: the criterion is {value:.6g} on the batch, and {mean:.6g} is the mean of it on single samples: what "
            "one adds to it depends on the others, as with class weights or ignored targets. Take CrossEntropyLoss or "
            "NLLLoss of torch, or a criterion that is a mean over samples; with check=False a sample's loss is the "
            "criterion of it alone"
        )


def _pushforward(function: Callable[[Tree], Any], point: Tree, v: Tree) -> Any:
    """``J v``; without forward rules as the derivative of ``u -> J' u``, which is linear, so any ``u`` will do."""
    try:
        return torch.func.jvp(function, (point,), (v,))[1]
    except (RuntimeError, NotImplementedError):
        out, pullback = vjp(function, point)
        return vjp(lambda u: pullback(u)[0], tree.map(torch.zeros_like, out))[1](v)[0]
