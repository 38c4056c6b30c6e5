"""What derivative rules do with the zero derivatives of constants, so that a graph can leave it out."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def vanishes(func: Any, args: Any, zeros: Container[Tensor]) -> bool:
    """Whether the result is zero because what it is linear in is."""
    if func is aten.convolution.default and args[2] is not None:
        return False  # the bias stays
    factors = args[:2] if func in _BILINEAR else args[:1] if func in _LINEAR else ()
    return any(_is_zero(t, zeros) for t in factors)


def beside(func: Any, args: Any, kwargs: Any, zeros: Container[Tensor]) -> Tensor | None:
    """What zeros are added to, or taken from, if it is the result."""
    if kwargs or func not in (aten.add.Tensor, aten.sub.Tensor):
        return None
    first, second = args
    others = [first] if _is_zero(second, zeros) else []
    if func is aten.add.Tensor and _is_zero(first, zeros):
        others.append(second)
    shape = torch.broadcast_shapes(*(t.shape for t in args if isinstance(t, Tensor)))
    like = shape, torch.result_type(first, second)
    return next((t for t in others if isinstance(t, Tensor) and (t.shape, t.dtype) == like), None)


def _is_zero(x: Any, zeros: Container[Tensor]) -> bool:
    return x in zeros if isinstance(x, Tensor) else x == 0


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
