"""Normalisations by their definitions: elementary operations, with right derivatives of every order.

The third derivatives of torch's fused LayerNorm, BatchNorm and InstanceNorm are wrong or refused (torch 2.9 to 2.14).
Those of GroupNorm and RMSNorm are right; by definition they depend on no rule of a version or a device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    if torch.is_autocast_enabled(input.device.type):
        return F.layer_norm(input, normalized_shape, weight, bias, eps)  # each device has its own dtype for this
    return _affine(_standardized(input, _last(normalized_shape), eps), weight, bias).to(input.dtype)


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    if torch.is_autocast_enabled(input.device.type):
        return F.rms_norm(input, normalized_shape, weight, eps)
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    return _affine(_scaled(_wide(input), _last(normalized_shape), eps), weight, None).to(input.dtype)


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    if torch.is_autocast_enabled(input.device.type):
        return F.group_norm(input, num_groups, weight, bias, eps)
    groups = input.unflatten(1, (num_groups, -1))  # a view in every layout
    x = _standardized(groups, list(range(2, groups.dim())), eps).flatten(1, 2)
    return _per_channel(x, weight, bias).to(input.dtype)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training or torch.is_autocast_enabled(input.device.type):
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return _per_channel(_standardized(input, [0, *range(2, input.dim())], eps), weight, bias).to(input.dtype)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats or torch.is_autocast_enabled(input.device.type):
        return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    return _per_channel(_standardized(input, list(range(2, input.dim())), eps), weight, bias).to(input.dtype)


def _last(shape: Sequence[int]) -> list[int]:
    return list(range(-len(shape), 0))


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x  # as the fused ones compute


def _standardized(x: Tensor, dims: list[int], eps: float) -> Tensor:
    x = _wide(x)
    return _scaled(x - x.sum(dims, keepdim=True) / _count(x, dims), dims, eps)


def _scaled(x: Tensor, dims: list[int], eps: float) -> Tensor:
    return x * torch.rsqrt((x * x).sum(dims, keepdim=True) / _count(x, dims) + eps)


def _count(x: Tensor, dims: list[int]) -> int:
    return math.prod(x.shape[i] for i in dims)


def _per_channel(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    trailing = [1] * (x.dim() - 2)
    return _affine(x, *(None if c is None else c.reshape(-1, *trailing) for c in (weight, bias)))


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias
