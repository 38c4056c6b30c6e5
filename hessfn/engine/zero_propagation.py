"""Zero propagation: what derivative rules do with the zero derivatives of constants is left out of a lean graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def is_zero(func: Any, args: Any, knows_zero: Callable[[Tensor], bool]) -> bool:
    """Whether a result is zero because an argument in which the operation is linear is zero."""
    if func is aten.convolution.default and args[2] is not None:
        return False  # the bias stays
    factors = args[:2] if func in _BILINEAR else args[:1] if func in _LINEAR else ()
    return any(is_additive_identity(t, knows_zero) for t in factors)


def remaining_summand(func: Any, args: Any, kwargs: Any, knows_zero: Callable[[Tensor], bool]) -> Tensor | None:
    """The argument that a sum is equal to because the other one is zero (an additive identity), if there is one."""
    if kwargs or func not in (aten.add.Tensor, aten.sub.Tensor):
        return None
    first, second = args
    others = [first] if is_additive_identity(second, knows_zero) else []
    if func is aten.add.Tensor and is_additive_identity(first, knows_zero):
        others.append(second)
    if not others:
        return None
    shape = torch.broadcast_shapes(*(t.shape for t in args if isinstance(t, Tensor)))
    like = shape, torch.result_type(first, second)
    return next((t for t in others if isinstance(t, Tensor) and (t.shape, t.dtype) == like), None)


def is_additive_identity(x: Any, knows_zero: Callable[[Tensor], bool]) -> bool:
    """Whether a number is 0, or a tensor is known to hold nothing but zeros."""
    return knows_zero(x) if isinstance(x, Tensor) else x == 0


MAKERS = {
    aten.zeros.default,
    aten.zeros_like.default,
    aten.new_zeros.default,
    aten._new_zeros_with_same_feature_meta.default,
}
_BILINEAR = {aten.mm.default, aten.bmm.default, aten.mul.Tensor, aten.convolution.default}
_LINEAR = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.expand.default,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.slice.Tensor,
    aten.select.int,
    aten.clone.default,
    aten._to_copy.default,
    aten.neg.default,
    aten.sum.dim_IntList,
    aten.mul.Scalar,
    aten.div.Tensor,
    aten.div.Scalar,
    aten.unfold.default,
    aten.threshold_backward.default,
}
