"""Operations by their definitions, where torch's derivatives are silently not those of one function, or cost more."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hessfn.core.torch_private import weight_norm
from hessfn.engine import geometry_definitions, norm_definitions
from hessfn.engine.fused.attention import is_fused as has_many_scores
from hessfn.engine.fused.attention import scaled_dot_product_attention
from hessfn.engine.fused.cross_entropy import cross_entropy
from hessfn.engine.fused.cross_entropy import is_fused as has_many_logits


def by_definition(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same loss, made of operations whose derivatives are right and cheap, the third ones too.

    - The padding row of an embedding is a constant, as torch's gradient has it: the forward rule knows nothing of
      ``padding_idx``, so the Hessian would not be symmetric. Bags are sums: they have no second derivative.
    - Weight normalisation is a quotient: the second derivative of the fused operation is wrong in reverse mode.
    - LayerNorm, RMSNorm, GroupNorm, and BatchNorm and InstanceNorm by the data's own statistics, are elementary
      operations (``norm_definitions.py``): the third derivatives of most fused ones are wrong in every mode, and the
      second ones compute much of the first ones again.
    - The inverse from a Cholesky factor is a solve: its forward rule is wrong (pytorch#196682).
    - The likelihood of a Gaussian asks whether its variances are positive, which is a branch on values.
    - Means of squares, Huber's loss, the soft margin and ``hardsigmoid`` have no rule in forward mode.
    - Distances and samples of a grid are elementary operations, and leaky ReLUs with a random slope are in eval mode
      those with the mean slope: the fused ones have no forward rule.
    - Attention, and cross-entropy of many classes, are the operations of ``fused/``.

    >>> loss = by_definition(lambda w, x: torch.nn.functional.layer_norm(w * x, (3,)).square().sum())
    >>> loss(torch.tensor(2.0), torch.arange(3.0))
    tensor(3.0000)
    """

    def defined(*args: Any) -> Tensor:
        with _Replacing():
            return loss(*args)

    return defined


def noting_fused(loss: Callable[..., Tensor], note: Callable[[Any], Any]) -> Callable[..., Tensor]:
    """The same loss; ``note`` is called with each operation before it, if :func:`by_definition` would fuse it."""

    def noted(*args: Any) -> Tensor:
        with _Noting(note):
            return loss(*args)

    return noted


class _Noting(TorchFunctionMode):
    def __init__(self, note: Callable[[Any], Any]) -> None:
        super().__init__()
        self.note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FUSED and _FUSED[func](*args, **kwargs):
            self.note(func)
        return func(*args, **kwargs)


class _Replacing(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _DEFINITIONS.get(func, func)(*args, **(kwargs or {}))


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,  # a vector is dense
) -> Tensor:
    if padding_idx is not None:
        padding = torch.arange(len(weight), device=weight.device) == padding_idx % len(weight)
        weight = torch.where(padding[:, None], weight.detach(), weight)
    return F.embedding(input, weight, None, max_norm, norm_type, scale_grad_by_freq)


def _embedding_bag(input: Tensor, weight: Tensor, *args: Any, **options: Any) -> Tensor:
    mode, weights, padding_idx = (options.get(name) for name in ("mode", "per_sample_weights", "padding_idx"))
    if input.dim() != 2 or mode == "max" or len(args) > 1 or options.get("max_norm") is not None:
        args, dense = ((*args[:5], False, *args[6:]), {}) if len(args) > 5 else (args, {"sparse": False})
        return F.embedding_bag(input, weight, *args, **{**options, **dense})
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


def _cholesky_inverse(L: Tensor, upper: bool = False, **options: Any) -> Tensor:
    if options:
        return torch.cholesky_inverse(L, upper, **options)
    return torch.cholesky_solve(torch.eye(L.shape[-1], dtype=L.dtype, device=L.device).expand_as(L), L, upper)


def _mse_loss(input: Tensor, target: Tensor, *args: Any, reduction: str = "mean", **options: Any) -> Tensor:
    if args or any(x is not None for x in options.values()) or input.shape != target.shape:
        fused: Any = F.mse_loss
        return fused(input, target, *args, reduction=reduction, **options)
    return _reduced((input - target).square(), reduction)


def _huber_loss(
    input: Tensor, target: Tensor, reduction: str = "mean", delta: float = 1.0, weight: Tensor | None = None
) -> Tensor:
    if weight is not None or input.shape != target.shape:
        fused: Any = F.huber_loss
        return fused(input, target, reduction, delta, weight)
    apart = (input - target).abs()
    return _reduced(torch.where(apart <= delta, 0.5 * apart.square(), delta * (apart - 0.5 * delta)), reduction)


def _soft_margin_loss(input: Tensor, target: Tensor, *args: Any, reduction: str = "mean", **options: Any) -> Tensor:
    if args or any(x is not None for x in options.values()) or input.shape != target.shape:
        fused: Any = F.soft_margin_loss
        return fused(input, target, *args, reduction=reduction, **options)
    return _reduced((-target * input).exp().log1p(), reduction)


def _gaussian_nll_loss(
    input: Tensor, target: Tensor, var: Any, full: bool = False, eps: float = 1e-6, reduction: str = "mean"
) -> Tensor:
    if not isinstance(var, Tensor) or not input.shape == target.shape == var.shape:
        return F.gaussian_nll_loss(input, target, var, full, eps, reduction)
    var = var + (var.clamp(min=eps) - var).detach()  # as torch does: what is below has the slope of what is there
    constant = 0.5 * math.log(2 * math.pi) if full else 0.0
    return _reduced(0.5 * (var.log() + (input - target).square() / var) + constant, reduction)


def _reduced(x: Tensor, reduction: str) -> Tensor:
    return x if reduction == "none" else x.sum() if reduction == "sum" else x.mean()


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    if inplace:
        return F.hardsigmoid(input, inplace)
    inside = (input > -3) & (input < 3)
    return torch.where(inside, input / 6 + 0.5, (input >= 3).to(input.dtype))


def _rrelu(
    input: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, inplace: bool = False
) -> Tensor:
    if training:
        return F.rrelu(input, lower, upper, training, inplace)
    return F.leaky_relu(input, (lower + upper) / 2, inplace)


_FUSED: dict[Any, Callable[..., bool]] = {
    F.scaled_dot_product_attention: has_many_scores,
    F.cross_entropy: has_many_logits,
}
_DEFINITIONS: dict[Any, Callable[..., Tensor]] = {
    F.embedding: _embedding,
    F.embedding_bag: _embedding_bag,
    weight_norm: _weight_norm,
    torch.cholesky_inverse: _cholesky_inverse,
    F.layer_norm: norm_definitions.layer_norm,
    F.rms_norm: norm_definitions.rms_norm,
    F.group_norm: norm_definitions.group_norm,
    F.batch_norm: norm_definitions.batch_norm,
    F.instance_norm: norm_definitions.instance_norm,
    F.scaled_dot_product_attention: scaled_dot_product_attention,
    F.cross_entropy: cross_entropy,
    F.mse_loss: _mse_loss,
    F.huber_loss: _huber_loss,
    F.soft_margin_loss: _soft_margin_loss,
    F.gaussian_nll_loss: _gaussian_nll_loss,
    F.hardsigmoid: _hardsigmoid,
    F.rrelu: _rrelu,
    torch.rrelu: _rrelu,
    torch.cdist: geometry_definitions.cdist,
    F.pdist: geometry_definitions.pdist,
    torch.pdist: geometry_definitions.pdist,
    F.grid_sample: geometry_definitions.grid_sample,
}
