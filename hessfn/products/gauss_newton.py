"""From a model and its criterion to a matvec: the Gauss-Newton matrix."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.core.arguments import require_forward
from hessfn.core.func import gradient, vjp
from hessfn.core.torch_state import is_observed, recorded
from hessfn.core.tree import MatVec, T
from hessfn.engine.op_definitions import by_definition
from hessfn.losses.weights import knowing, of_criterion
from hessfn.products.modes import differentiating
from hessfn.products.outputs import has_entries, outputs_of, refuse_own_loss, sides, targets_of, value_of
from hessfn.products.traced_gauss_newton import Criterion, Traced

P = ParamSpec("P")
R = TypeVar("R")


def says_what_is_missing(make: Callable[P, R]) -> Callable[P, R]:
    """A loss and its parameters, as for ``hvp``, are one argument too few: what the first is tells more than that."""

    @functools.wraps(make)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        given: dict[str, Any] = dict(zip(("forward", "criterion", "params", "batch"), args, strict=False)) | kwargs
        if given.keys() == {"forward", "criterion", "params"}:
            require_forward(**given, call=call_of(make))
        return make(*args, **kwargs)

    return checked


def call_of(make: Callable[..., Any]) -> str:
    return f"{make.__name__}(forward, criterion, params, batch)"


@says_what_is_missing
def ggnvp(
    forward: Callable[[T, Any], Any],
    criterion: Callable[[Any, Any], Tensor],
    params: T,
    batch: Any,
    *,
    check: bool = True,
) -> MatVec[T]:
    """Products with the generalized Gauss-Newton matrix ``J' H_out J``.

    ``J`` is the Jacobian of the outputs by the parameters, ``H_out`` the Hessian of the criterion by the outputs. It is
    positive semidefinite where the criterion is convex in the outputs, and the Hessian where the model is linear in its
    parameters.

    Args:
        forward: ``forward(params, inputs)``, such as :func:`hessfn.stateless` returns, to a tensor, or to whatever
            holds tensors: a dict, a dataclass, an output object of Hugging Face's with its caches. The floating-point
            tensors in it are the outputs; all else is constant.
        criterion: ``criterion(outputs, targets)`` to a scalar.
        params: a tree of tensors.
        batch: ``(inputs, targets)``. One mapping or one object goes to both sides, as for
            :func:`hessfn.functionalize`.
        check: whether the first product that comes from a trace of this model and criterion, for these shapes, is
            compared with one that does not, on a few samples if they suffice.

    Returns:
        A matvec on trees like ``params``, symmetric. It runs under ``vmap`` and has derivatives.

    Cost: a product takes a forward pass with its tangent and a backward pass, about 2 gradients, and the intermediate
    results of one gradient while it runs. Where the criterion takes the cross-entropy of at least 2^20 logits, model
    and criterion are traced once for their shapes: a product then takes about 1 gradient, and logits that a matrix
    product makes exist in chunks only (measured with 50,257 classes: the time of 0.9 to 1.3 gradients, and 0.3 to 0.5
    of the memory). The first product makes the trace, which is kept with ``forward`` and ``criterion``, and has the
    logits once. Products under ``vmap``, autograd and ``torch.compile`` come from no trace.

    Raises:
        ValueError: an argument is of another kind, such as a loss where the model's outputs are wanted; the criterion
            gives the loss that the model itself has computed; or a vector does not match ``params``.

    Source: Schraudolph (2002).

    >>> import torch
    >>> x = torch.tensor([[1.0, 2.0]])
    >>> matvec = ggnvp(lambda w, x: x @ w, lambda out, y: (out - y).square().sum(), torch.zeros(2), (x, torch.ones(1)))
    >>> matvec(torch.tensor([1.0, 0.0]))
    tensor([2., 4.])
    """
    require_forward(forward, criterion, params, call_of(ggnvp))
    inputs, targets = sides(batch, call_of(ggnvp))
    unchecked = [True]

    def eager(criterion: Criterion, args: tuple[Any, ...], v: T) -> T:
        inputs, targets = args
        out = outputs_of(by_definition(forward), params, inputs)

        def slope_at(parts: list[Tensor]) -> list[Tensor]:
            return gradient(lambda parts: criterion(out.whole(parts), targets), parts)

        # Reverse mode: the criterion is cheap, and the common ones lack a forward rule.
        slope, curvature = vjp(slope_at, out.parts)
        image = curvature(out.pushforward(v))
        if unchecked[0] and not is_observed(*slope, *image):
            refuse_own_loss(ggnvp, slope, is_linear=not any(map(has_entries, image)))
            unchecked[0] = False
        found: T = out.pullback(image)
        return found

    product = None if torch.compiler.is_compiling() else Traced(forward, criterion, params, eager, check)

    @recorded
    def matvec(v: T) -> T:
        v = tree.aligned(v, params)
        with differentiating():
            if (
                product is None
                or torch.compiler.is_compiling()
                or is_observed(*tree.leaves((params, inputs, targets, v)))
            ):
                return tree.owned(eager(criterion, (inputs, targets), v))
            return tree.owned(product((inputs, targets), v))

    return knowing(matvec, of_criterion(criterion, targets_of), value_of(forward, criterion, params))
