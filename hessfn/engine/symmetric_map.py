"""A symmetric linear map whose graph is not differentiable: its derivatives are its own products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Product = Callable[..., Any]  # from a vector's tensors in a row to the product's


class _Compiled(torch.autograd.Function):
    """Of ``v -> Av`` the pullback of g is ``A'g = Ag``. What torch.compile takes has no derivative in forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(product: Product, *v: Tensor) -> tuple[Tensor, ...]:
        return tuple(product(*v))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.product = inputs[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *differentiable(ctx.product, *gradients)


class _SymmetricMap(_Compiled):
    """Its derivative along t is ``At``."""

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor) -> tuple[Tensor, ...]:
        return tuple(differentiable(ctx.product, *tangents))


def differentiable(product: Product, *v: Tensor) -> list[Tensor]:
    """The product, with derivatives of any order by the vector, in any mode; in reverse mode under a compiler."""
    return list((_Compiled if torch.compiler.is_compiling() else _SymmetricMap).apply(product, *v))
