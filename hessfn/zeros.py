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
    return any(isinstance(t, Tensor) and t in zeros for t in factors)


def beside(func: Any, args: Any, kwargs: Any, zeros: Container[Tensor]) -> Tensor | None:
    """What zeros are added to, if it is the sum."""
    if func is not aten.add.Tensor or kwargs or not all(isinstance(t, Tensor) for t in args):
        return None
    like = torch.broadcast_shapes(args[0].shape, args[1].shape), torch.result_type(*args)
    others = (args[1 - i] for i in (0, 1) if args[i] in zeros)
    return next((t for t in others if (t.shape, t.dtype) == like), None)


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
