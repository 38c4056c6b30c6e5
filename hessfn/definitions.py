"""Operations by their definitions, where torch's own derivatives of them are silently not those of one function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def by_definition(loss: Callable[..., Tensor], *, thrice: bool = False) -> Callable[..., Tensor]:
    """The same loss, made of operations whose second derivatives are right; or ``thrice``, their third ones too.

    - The padding row of an embedding is a constant, as torch's gradient has it: the forward rule knows nothing of
      ``padding_idx``, so the Hessian would not be symmetric. Bags are sums: they have no second derivative.
    - Weight normalisation is a quotient: the second derivative of the fused operation is wrong in reverse mode.
    - ``thrice``: LayerNorm, and BatchNorm and InstanceNorm by the data's own statistics, are elementary operations: the
      third derivatives of the fused ones are wrong in every mode.

    >>> loss = by_definition(lambda w, x: torch.nn.functional.layer_norm(w * x, (3,)).square().sum(), thrice=True)
    >>> loss(torch.tensor(2.0), torch.arange(3.0))
    tensor(3.0000)
    """
    definitions = {**_TWICE, **_THRICE} if thrice else _TWICE

    def defined(*args: Any) -> Tensor:
        with _Replacing(definitions):
            return loss(*args)

    return defined


class _Replacing(TorchFunctionMode):
    def __init__(self, definitions: dict[Any, Callable[..., Tensor]]) -> None:
        super().__init__()
        self.definitions = definitions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.definitions.get(func, func)(*args, **(kwargs or {}))


def _embedding(input: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **options: Any) -> Tensor:
    if padding_idx is not None:
        padding = torch.arange(len(weight), device=weight.device) == padding_idx % len(weight)
        weight = torch.where(padding[:, None], weight.detach(), weight)
    return F.embedding(input, weight, None, *args, **options)


def _embedding_bag(input: Tensor, weight: Tensor, *args: Any, **options: Any) -> Tensor:
    mode, weights, padding_idx = (options.get(name) for name in ("mode", "per_sample_weights", "padding_idx"))
    if input.dim() != 2 or mode == "max" or len(args) > 1 or options.get("max_norm") is not None:
        return F.embedding_bag(input, weight, *args, **options)
    counted = torch.ones_like(input, dtype=weight.dtype)
    if padding_idx is not None:
        counted = (input != padding_idx % len(weight)).to(weight.dtype)
    rows = F.embedding(input, weight) * (counted if weights is None else counted * weights)[..., None]
    return rows.sum(1) if mode == "sum" else rows.sum(1) / counted.sum(1, keepdim=True).clamp(min=1)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    squares = v.square()
    if dim == -1:  # one norm for all
        return v * (g * squares.sum().rsqrt())
    return v * (g * squares.sum([i for i in range(v.dim()) if i != dim], keepdim=True).rsqrt())


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    return _affine(_standardized(input, list(range(-len(normalized_shape), 0)), eps), weight, bias)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return _per_channel(_standardized(input, [0, *range(2, input.dim())], eps), weight, bias)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    return _per_channel(_standardized(input, list(range(2, input.dim())), eps), weight, bias)


def _standardized(x: Tensor, dims: list[int], eps: float) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)


def _per_channel(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    trailing = [1] * (x.dim() - 2)
    return _affine(x, *(None if c is None else c.reshape(-1, *trailing) for c in (weight, bias)))


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


_TWICE: dict[Any, Callable[..., Tensor]] = {
    F.embedding: _embedding,
    F.embedding_bag: _embedding_bag,
    torch._weight_norm: _weight_norm,
}
_THRICE: dict[Any, Callable[..., Tensor]] = {
    F.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
}
