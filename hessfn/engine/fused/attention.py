"""Attention as a fused operation, with both derivatives of it: by tiles, or by definition where others are to see."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hessfn.engine.fused import attention_definition as definition
from hessfn.engine.fused import tiles
from hessfn.engine.fused.operation import Fused, call, is_followed, of_tangents, sees_operations

Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]
_WIDE = (torch.float32, torch.float64)
WORTH = 1 << 18  # scores of a head: with fewer, the matrix of them all is faster


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As ``torch.nn.functional.scaled_dot_product_attention``; where sequences are long, by tiles.

    It divides by the sum of the weights last, so that only one matrix of its size comes into the derivatives for two.
    """
    options: Any = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    if torch.is_autocast_enabled(device := query.device.type):
        # Cast here: under a transform torch casts within the math kernel again, which then has no gradient.
        given = _cast(torch.get_autocast_dtype(device), query, key, value, attn_mask)
        with torch.autocast(device, enabled=False):
            return scaled_dot_product_attention(*given, **options)
    if query.dtype in (torch.bfloat16, torch.float16) and is_fused(query, key) and not dropout_p:
        wider = _cast(torch.float32, query, key, value, attn_mask)  # sums over long rows, as in flash attention
        return scaled_dot_product_attention(*wider, **options).to(query.dtype)
    if dropout_p or query.dtype not in _WIDE or (is_causal and attn_mask is not None):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, **options)
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        # Added, a mask is nothing to differentiate; where the weights are zero, so is all that follows from them.
        attn_mask = torch.where(attn_mask, 0.0, -math.inf).to(query.dtype)
    if not is_fused(query, key):
        return definition.attention(query, key, value, attn_mask, is_causal, scale)[0]
    leading = torch.broadcast_shapes(*(x.shape[:-2] for x in (query, key, value)))
    query, key, value = (x.expand(*leading, *x.shape[-2:]) for x in (query, key, value))
    return attention(query, key, value, attn_mask, is_causal, scale)[0]


def _cast(dtype: torch.dtype, *given: Tensor | None) -> list[Any]:
    """As autocast does, which leaves float64 and masks of booleans."""
    return [x if x is None or x.dtype in (torch.float64, torch.bool) else x.to(dtype) for x in given]


def is_fused(query: Tensor, key: Tensor, *_: Any, **__: Any) -> bool:
    """Whether attention has so many scores that it is by tiles."""
    return query.shape[-2] * key.shape[-2] >= WORTH


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Pair:
    """``o = P v`` and the log-sum-exp of the scores by row, ``P = softmax(scale q k' + mask)``.

    Args:
        q, k, v: (..., n, d), (..., m, d), (..., m, e), of the same leading axes.
        mask: added to the scores, of a shape that expands to (..., n, m); not to be differentiated.
        causal: row i sees columns up to i.
    """
    if sees_operations() or is_followed(mask):
        return definition.attention(q, k, v, mask, causal, scale)
    if is_followed(q, k, v):
        return _Attention.apply(q, k, v, mask, causal, scale)
    return call(attention, _kernel, _look, q, k, v, mask, causal, scale)


def tangent(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float,
    out: Tensor, lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
) -> Pair:  # fmt: skip
    """Those of the results of :func:`attention`."""
    args = q, k, v, mask, causal, scale, out, lse, dq, dk, dv
    if sees_operations() or is_followed(*args):
        return definition.tangent(*args)
    return call(tangent, _tangent_kernel, _look, *args)


def gradient(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float,
    out: Tensor, lse: Tensor, g: Tensor,
) -> Triple:  # fmt: skip
    """The derivatives of ``<g, o>`` by queries, keys and values."""
    args = q, k, v, mask, causal, scale, out, lse, g
    if sees_operations():
        return definition.gradient(*args)
    if is_followed(*args):
        return _Gradient.apply(*args)
    return call(gradient, _gradient_kernel, _gradient_look, *args)


def tangent_of_gradient(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float,
    out: Tensor, lse: Tensor, g: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, dout: Tensor, dlse: Tensor, dg: Tensor,
) -> Triple:  # fmt: skip
    """Those of the results of :func:`gradient`."""
    args = q, k, v, mask, causal, scale, out, lse, g, dq, dk, dv, dout, dlse, dg
    if sees_operations() or is_followed(*args):
        return definition.tangent_of_gradient(*args)
    return call(tangent_of_gradient, _tangent_of_gradient_kernel, _gradient_look, *args)


def attention_with_tangent(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, dq: Tensor, dk: Tensor, dv: Tensor
) -> tuple[Tensor, ...]:
    """:func:`attention`, then :func:`tangent`."""
    out, lse = attention(q, k, v, mask, causal, scale)
    return out, lse, *tangent(q, k, v, mask, causal, scale, out, lse, dq, dk, dv)


def gradient_with_tangent(*args: Any) -> tuple[Tensor, ...]:
    """Both in one pass: :func:`gradient`, then :func:`tangent_of_gradient`, of the latter's arguments."""
    if sees_operations():
        return *gradient(*args[:9]), *tangent_of_gradient(*args)
    return _run(tiles.tangent_of_gradient, args, *args[:3], *args[:3], both=True)  # type: ignore[no-any-return]


class _Attention(Fused):
    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, mask: Any, causal: bool, scale: float) -> Any:
        out, lse = call(attention, _kernel, _look, q, k, v, mask, causal, scale)
        ctx.how = mask, causal, scale
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.save_for_forward(q, k, v, out, lse)
        return out, lse

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        given = (*_given(ctx), *tangents[:3])
        with of_tangents():
            return tangent(*given)

    @staticmethod
    def backward(ctx: Any, g: Any, _: Any) -> Any:
        given = (*_given(ctx), g)
        return *gradient(*given), None, None, None


class _Gradient(Fused):
    """Output and log-sum-exp are no variables of their own here: what they depend on is counted with q, k and v."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, mask: Any, causal: bool, scale: float, *rest: Any) -> Any:
        ctx.how = mask, causal, scale
        ctx.save_for_backward(q, k, v, *rest)
        ctx.save_for_forward(q, k, v, *rest)
        return call(gradient, _gradient_kernel, _gradient_look, q, k, v, mask, causal, scale, *rest)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        given = (*_given(ctx), *tangents[:3], *tangents[-3:])
        with of_tangents():
            return tangent_of_gradient(*given)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        # The Hessian of <g, o> by q, k and v is symmetric, and its derivative by g is the tangent of o.
        *given, g = _given(ctx)
        along = (*given, *cotangents)
        dout, dlse = tangent(*along)
        along = (*given, g, *cotangents, dout, dlse, torch.zeros_like(g))
        return *tangent_of_gradient(*along), None, None, None, None, None, dout


def _given(ctx: Any) -> Any:
    q, k, v, *rest = ctx.saved_tensors
    return q, k, v, *ctx.how, *rest


# Kernels: leading axes are one.


def _flat(x: Any) -> Any:
    return None if x is None else x.flatten(0, -3) if x.dim() > 3 else x if x.dim() == 3 else x[None]


def _run(kernel: Any, args: Any, *like: Tensor, **options: Any) -> Any:
    """A kernel's results, of some of the first axis at a time, shaped as these but for the last axis."""
    q, k, v, mask, causal, scale, *rest = args
    if mask is not None:
        leading = q.shape[:-2] if mask.shape[:-2].numel() > 1 else ()
        mask = mask if leading else mask.reshape(mask.shape[-2:])  # leading axes of one go
        mask = mask.expand(*leading, q.shape[-2], k.shape[-2])
    flat = [_flat(x) for x in (q, k, v, *rest)]
    parts = []
    for group in tiles.in_groups(tiles.Scores(flat[0], flat[1], mask, causal, scale)):
        q, k, v, *rest = (x[group] for x in flat)
        parts.append(kernel(tiles.Scores(q, k, mask, causal, scale, group), v, *rest, **options))
    found = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
    return tuple(x.view(*y.shape[:-1], x.shape[-1]) for x, y in zip(found, like, strict=True))


def _kernel(q: Any, *args: Any) -> Any:
    return _run(tiles.attention, (q, *args), q, q)


def _tangent_kernel(q: Any, *args: Any) -> Any:
    return _run(tiles.tangent, (q, *args), q, q)


def _gradient_kernel(q: Any, k: Any, v: Any, *args: Any) -> Any:
    return _run(tiles.gradient, (q, k, v, *args), q, k, v)


def _tangent_of_gradient_kernel(q: Any, k: Any, v: Any, *args: Any) -> Any:
    return _run(tiles.tangent_of_gradient, (q, k, v, *args), q, k, v)


def _look(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Any:
    return _meta(q, v.shape[-1]), _meta(q, 1)


def _gradient_look(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Any:
    return tuple(_meta(x, x.shape[-1]) for x in (q, k, v))


def _meta(like: Tensor, last: int) -> Tensor:
    return torch.empty(*like.shape[:-1], last, dtype=like.dtype, device="meta")
