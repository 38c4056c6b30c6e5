"""The derivative of a solution by the system it solves, without the steps that led to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hessfn.core.errors import NoDerivative
from hessfn.core.torch_private import levels, num_derivatives, num_transforms, under_vmap_within_derivative
from hessfn.core.torch_state import carries_derivative
from hessfn.estimators.krylov import FlatMatVec

_SECOND = (
    "solve has first derivatives, and this asks for a second one (by nested transforms, create_graph=True, or "
    "parameters that require gradients under a transform): detach what no derivative is wanted of"
)
_LEFT = (
    "the derivative of a solve under vmap is asked for where that vmap is over, as by the pullback of vjp: take "
    "torch.func.grad or jacrev around it, or differentiate within the vmap"
)


def with_derivative(x: Tensor, rest: Tensor, inverse: FlatMatVec) -> Tensor:
    """``x``, a constant, with the derivative of a solution of ``rest = b - A x = 0``: ``inverse(d rest)``."""
    if not carries_derivative(rest):
        return x
    plain = torch.is_grad_enabled() and [*levels(rest)][-1].requires_grad
    if num_derivatives() + plain > 1:
        raise NoDerivative(_SECOND)
    # A vmap within is entered again for the derivative: what the matvec closes over must find it where it was.
    depth = num_transforms() if under_vmap_within_derivative() else None
    return x + _Root.apply(rest, inverse, plain, depth)


class _Root(torch.autograd.Function):
    """Zeros, whose derivative is that of the solution; A is symmetric, and so is its inverse."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rest: Tensor, inverse: FlatMatVec, plain: bool, depth: int | None) -> Tensor:
        return torch.zeros_like(rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.inverse, ctx.plain, ctx.depth = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # A transform always makes a graph of its backward pass; plain autograd does for a second derivative alone.
        if ctx.plain and torch.is_grad_enabled():
            raise NoDerivative(_SECOND)
        return _solved(ctx, gradient), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _solved(ctx, tangent)


def _solved(ctx: Any, v: Tensor) -> Tensor:
    if ctx.depth not in (None, num_transforms()):
        raise NoDerivative(_LEFT)
    found: Tensor = ctx.inverse(v)
    return found
