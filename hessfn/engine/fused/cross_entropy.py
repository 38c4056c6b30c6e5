"""Cross-entropy as a fused operation, of logits or of the matrix product that makes them, with both derivatives."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hessfn.engine.fused import chunks
from hessfn.engine.fused.operation import Fused, call, is_followed, of_tangents, sees_operations

WORTH = 1 << 20  # logits: with fewer, torch's own operations are as fast
Maybe = Tensor | None
Triple = tuple[Maybe, Maybe, Maybe]


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """As ``torch.nn.functional.cross_entropy``; a fused operation where there are many logits."""
    if not is_fused(input, target, weight, size_average, ignore_index, reduce, reduction) or sees_operations():
        return F.cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)
    is_counted = target != ignore_index
    target = torch.where(is_counted, target, 0)
    counted = is_counted.to(input.dtype)
    weights = counted if weight is None else counted * weight.to(input.dtype)[target]
    smooth = None
    if label_smoothing:
        smooth = torch.ones(input.shape[1], dtype=input.dtype, device=input.device) if weight is None else weight
        smooth = smooth * (label_smoothing / input.shape[1])
    part = (weights * (1 - label_smoothing))[:, None]
    rows = losses(input, None, None, target, part, smooth)[0][:, 0]
    rows = rows if smooth is None else rows * counted
    return rows if reduction == "none" else rows.sum() / weights.sum() if reduction == "mean" else rows.sum()


def is_fused(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> bool:
    """Whether :func:`cross_entropy` of these is an operation of its own, where nobody is to see into it."""
    is_plain = input.dim() == 2 and target.dim() == 1 and target.dtype == torch.long and input.numel() >= WORTH
    is_wide = input.dtype in (torch.float32, torch.float64)
    is_known = size_average is None and reduce is None and reduction in ("mean", "sum", "none")
    return is_plain and is_wide and is_known and not is_followed(weight)


def losses(x: Tensor, weight: Maybe, bias: Maybe, target: Tensor, part: Tensor, smooth: Maybe) -> tuple[Tensor, Tensor]:
    """The losses of rows and their log-sum-exps (n, 1), as ``chunks.py`` defines them.

    Args:
        x, weight, bias: (n, d), (c, d), (c,): logits are ``x W' + b``; or x is (n, c), and these are None.
        target, part, smooth: (n,), (n, 1), (c,); not to be differentiated.
    """
    args = x, weight, bias, target, part, smooth
    if sees_operations() or is_followed(part, smooth):
        return _by_definition(*args)
    if is_followed(x, weight, bias):
        found: tuple[Tensor, Tensor] = _Losses.apply(*args)
        return found
    return call(losses, _kernel, _look, *args)  # type: ignore[no-any-return]


def tangents(
    x: Tensor, weight: Maybe, bias: Maybe, target: Tensor, part: Tensor, smooth: Maybe,
    lse: Tensor, dx: Maybe, dweight: Maybe, dbias: Maybe,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Those of the results of :func:`losses`."""
    args = x, weight, bias, target, part, smooth, lse, dx, dweight, dbias
    if sees_operations() or is_followed(*args):
        return _tangents_by_definition(*args)
    return call(tangents, _tangents_kernel, _look, *args)  # type: ignore[no-any-return]


def gradients(
    x: Tensor, weight: Maybe, bias: Maybe, target: Tensor, part: Tensor, smooth: Maybe, lse: Tensor, g: Tensor
) -> Triple:
    """The derivatives of ``sum_i g_i loss_i`` by x, weight and bias."""
    args = x, weight, bias, target, part, smooth, lse, g
    if sees_operations():
        return _gradients_by_definition(*args)
    if is_followed(*args):
        return _among(_Gradients.apply(*args), x, weight, bias)
    return _among(call(gradients_of_given, _gradients_kernel, _gradients_look, *args), x, weight, bias)


def gradients_of_given(*args: Any) -> tuple[Tensor, ...]:
    """As :func:`gradients`, without those of what is not there: a node of a graph has tensors only."""
    return tuple(g for g in gradients(*args) if g is not None)


def tangents_of_gradients(
    x: Tensor, weight: Maybe, bias: Maybe, target: Tensor, part: Tensor, smooth: Maybe, lse: Tensor, g: Tensor,
    dx: Maybe, dweight: Maybe, dbias: Maybe, dlse: Tensor, dg: Maybe,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Those of :func:`gradients_of_given`."""
    args = x, weight, bias, target, part, smooth, lse, g, dx, dweight, dbias, dlse, dg
    if sees_operations() or is_followed(*args):
        return _tangents_of_gradients_by_definition(*args)
    found: tuple[Tensor, ...] = call(tangents_of_gradients, _tangents_of_gradients_kernel, _gradients_look, *args)
    return found


def _among(found: tuple[Tensor, ...], *inputs: Maybe) -> Any:
    rest = iter(found)
    return tuple(None if x is None else next(rest) for x in inputs)


class _Losses(Fused):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        out, lse = call(losses, _kernel, _look, *args)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args, lse)
        ctx.save_for_forward(*args, lse)
        return out, lse

    @staticmethod
    def jvp(ctx: Any, dx: Any, dweight: Any, dbias: Any, *_: Any) -> Any:
        with of_tangents():
            given: Any = (*ctx.saved_tensors, dx, dweight, dbias)
            return tangents(*given)

    @staticmethod
    def backward(ctx: Any, g: Any, _: Any) -> Any:
        if g is None:
            return (None,) * 6
        given: Any = (*ctx.saved_tensors, g)
        return *gradients(*given), None, None, None


class _Gradients(Fused):
    """The log-sum-exp is no variable of its own here: what it depends on is counted with x, weight and bias."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args)
        ctx.save_for_forward(*args)
        return call(gradients_of_given, _gradients_kernel, _gradients_look, *args)

    @staticmethod
    def jvp(ctx: Any, dx: Any, dweight: Any, dbias: Any, *others: Any) -> Any:
        *_, dlse, dg = others
        with of_tangents():
            *_, lse, _ = ctx.saved_tensors
            dlse = torch.zeros_like(lse) if dlse is None else dlse
            given: Any = (*ctx.saved_tensors, dx, dweight, dbias, dlse, dg)
            return tangents_of_gradients(*given)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        # The Hessian of sum_i g_i loss_i is symmetric, and its derivative by g is the tangent of the losses.
        *args, g = ctx.saved_tensors
        by = _among(cotangents, *args[:3])
        along: Any = (*args, *by)
        out, dlse = tangents(*along)
        along = (*args, g, *by, dlse, None)
        return *_among(tangents_of_gradients(*along), *args[:3]), None, None, None, None, out


def _logits(x: Tensor, weight: Maybe, bias: Maybe) -> Tensor:
    return x if weight is None else x @ weight.T if bias is None else x @ weight.T + bias


def _change(x: Any, weight: Any, dx: Any, dweight: Any, dbias: Any) -> Any:
    terms = [None if dx is None else dx if weight is None else dx @ weight.T, dbias]
    terms.append(None if dweight is None else x @ dweight.T)
    total = torch.zeros((), dtype=x.dtype, device=x.device)
    return sum((t for t in terms if t is not None), start=total)


def _linear(z: Tensor, target: Tensor, part: Tensor, smooth: Maybe) -> Tensor:
    found = part * z.gather(1, target[:, None])
    return found if smooth is None else found + z @ smooth[:, None]


def _total(part: Tensor, smooth: Maybe) -> Tensor:
    return part if smooth is None else part + smooth.sum()


def _by_definition(x: Any, weight: Any, bias: Any, target: Any, part: Any, smooth: Any) -> tuple[Tensor, Tensor]:
    z = _logits(x, weight, bias)
    lse = z.logsumexp(1, keepdim=True)
    return _total(part, smooth) * lse - _linear(z, target, part, smooth), lse


def _tangents_by_definition(
    x: Any, weight: Any, bias: Any, target: Any, part: Any, smooth: Any, lse: Any, dx: Any, dweight: Any, dbias: Any
) -> tuple[Tensor, Tensor]:
    z = _logits(x, weight, bias)
    change = _change(x, weight, dx, dweight, dbias).expand_as(z)
    dlse = ((z - lse).exp() * change).sum(1, keepdim=True)
    return _total(part, smooth) * dlse - _linear(change, target, part, smooth), dlse


def _by_logits(z: Tensor, target: Tensor, part: Tensor, smooth: Maybe, lse: Tensor) -> Tensor:
    found = _total(part, smooth) * (z - lse).exp()
    found = found.scatter_add(1, target[:, None], -part)
    return found if smooth is None else found - smooth


def _pulled_back(by_logits: Tensor, x: Any, weight: Any, bias: Any) -> Triple:
    if weight is None:
        return by_logits, None, None
    return by_logits @ weight, by_logits.T @ x, None if bias is None else by_logits.sum(0)


def _gradients_by_definition(
    x: Any, weight: Any, bias: Any, target: Any, part: Any, smooth: Any, lse: Any, g: Any
) -> Triple:
    return _pulled_back(g * _by_logits(_logits(x, weight, bias), target, part, smooth, lse), x, weight, bias)


def _tangents_of_gradients_by_definition(
    x: Any, weight: Any, bias: Any, target: Any, part: Any, smooth: Any, lse: Any, g: Any,
    dx: Any, dweight: Any, dbias: Any, dlse: Any, dg: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    z = _logits(x, weight, bias)
    plain = _by_logits(z, target, part, smooth, lse)
    change = g * _total(part, smooth) * (z - lse).exp() * (_change(x, weight, dx, dweight, dbias) - dlse)
    change = change if dg is None else change + dg * plain
    by_x, by_weight, by_bias = _pulled_back(change, x, weight, bias)
    if weight is not None:
        by_x = by_x if dweight is None else by_x + (g * plain) @ dweight
        by_weight = by_weight if dx is None else by_weight + (g * plain).T @ dx
    return tuple(part for part in (by_x, by_weight, by_bias) if part is not None)


def _kernel(x: Any, weight: Any, bias: Any, *labels: Any) -> Any:
    return chunks.losses(chunks.Logits(x, weight, bias), chunks.Labels(*labels))


def _tangents_kernel(x: Any, weight: Any, bias: Any, target: Any, part: Any, smooth: Any, lse: Any, *d: Any) -> Any:
    return chunks.tangents(chunks.Logits(x, weight, bias), chunks.Labels(target, part, smooth), lse, chunks.Logits(*d))


def _gradients_kernel(x: Any, weight: Any, bias: Any, target: Any, part: Any, smooth: Any, lse: Any, g: Any) -> Any:
    found = chunks.gradients(chunks.Logits(x, weight, bias), chunks.Labels(target, part, smooth), lse, g)
    return tuple(part for part in found if part is not None)


def _tangents_of_gradients_kernel(
    x: Any, weight: Any, bias: Any, target: Any, part: Any, smooth: Any, lse: Any, g: Any,
    dx: Any, dweight: Any, dbias: Any, dlse: Any, dg: Any,
) -> Any:  # fmt: skip
    z, d = chunks.Logits(x, weight, bias), chunks.Logits(dx, dweight, dbias)
    found = chunks.tangents_of_gradients(z, chunks.Labels(target, part, smooth), lse, g, d, dlse, dg)
    return tuple(part for part in found if part is not None)


def _look(x: Tensor, *_: Any) -> Any:
    return tuple(torch.empty(len(x), 1, dtype=x.dtype, device="meta") for _ in range(2))


def _gradients_look(x: Tensor, weight: Maybe, bias: Maybe, *_: Any) -> Any:
    return tuple(torch.empty(p.shape, dtype=p.dtype, device="meta") for p in (x, weight, bias) if p is not None)
