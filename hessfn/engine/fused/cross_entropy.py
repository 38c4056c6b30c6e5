"""Cross-entropy as a fused operation, of logits or of the matrix product that makes them, with both derivatives."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hessfn.engine.fused import chunks
from hessfn.engine.fused.logits import Labels, Logits
from hessfn.engine.fused.operation import Fused, call, is_followed, of_tangents, sees_operations

WORTH = 1 << 20  # logits: with fewer, torch's own operations are as fast
Maybe = Tensor | None
Triple = tuple[Maybe, Maybe, Maybe]
Wanted = tuple[bool, ...]  # whether by x, weight and bias


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
    rows = losses(input, None, None, target, weights * (1 - label_smoothing), smooth)
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


def losses(x: Tensor, weight: Maybe, bias: Maybe, target: Tensor, part: Tensor, smooth: Maybe) -> Tensor:
    """The losses of rows (n,), as ``chunks.py`` defines them.

    Args:
        x, weight, bias: (n, d), (c, d), (c,): logits are ``x W' + b``; or x is (n, c), and these are None.
        target, part, smooth: (n,), (n,), (c,); not to be differentiated.
    """
    args = x, weight, bias, target, part, smooth
    if sees_operations() or is_followed(part, smooth):
        return _by_definition(*args)
    if is_followed(x, weight, bias):
        found: Tensor = _Losses.apply(*args)
        return found
    return call(losses, _kernel, _look, *args)  # type: ignore[no-any-return]


def tangents(
    x: Tensor, weight: Maybe, bias: Maybe, target: Tensor, part: Tensor, smooth: Maybe,
    dx: Maybe, dweight: Maybe, dbias: Maybe,
) -> Tensor:  # fmt: skip
    """Those of :func:`losses`."""
    args = x, weight, bias, target, part, smooth, dx, dweight, dbias
    if sees_operations() or is_followed(*args):
        return _tangents_by_definition(*args)
    return call(tangents, _tangents_kernel, _look, *args)  # type: ignore[no-any-return]


def gradients(
    x: Tensor, weight: Maybe, bias: Maybe, target: Tensor, part: Tensor, smooth: Maybe, g: Tensor, wanted: Wanted
) -> Triple:
    """The derivatives of ``sum_i g_i loss_i`` by x, weight and bias; None of what is not wanted."""
    args = x, weight, bias, target, part, smooth, g, wanted
    if sees_operations():
        return _gradients_by_definition(*args)
    if is_followed(*args):
        return _Gradients.apply(*args)  # type: ignore[no-any-return]
    return call(gradients, _gradients_kernel, look_of_gradients, *args)  # type: ignore[no-any-return]


def tangents_of_gradients(
    x: Tensor, weight: Maybe, bias: Maybe, target: Tensor, part: Tensor, smooth: Maybe, g: Tensor, wanted: Wanted,
    dx: Maybe, dweight: Maybe, dbias: Maybe, dg: Maybe,
) -> Triple:  # fmt: skip
    """Those of :func:`gradients`."""
    args = x, weight, bias, target, part, smooth, g, wanted, dx, dweight, dbias, dg
    if sees_operations() or is_followed(*args):
        return _tangents_of_gradients_by_definition(*args)
    return call(  # type: ignore[no-any-return]
        tangents_of_gradients, _tangents_of_gradients_kernel, look_of_gradients, *args
    )


def gradients_with_tangents(
    x: Tensor, weight: Maybe, bias: Maybe, target: Tensor, part: Tensor, smooth: Maybe, g: Tensor, wanted: Wanted,
    dx: Maybe, dweight: Maybe, dbias: Maybe, dg: Maybe, wanted_tangents: Wanted,
) -> tuple[Maybe, ...]:  # fmt: skip
    """Both in one pass: :func:`gradients`, then :func:`tangents_of_gradients`."""
    args = x, weight, bias, target, part, smooth, g
    if sees_operations() or is_followed(*args, dx, dweight, dbias, dg):
        tangents = tangents_of_gradients(*args, wanted_tangents, dx, dweight, dbias, dg)
        return *gradients(*args, wanted), *tangents
    z, labels = Logits(x, weight, bias), Labels(target, part, smooth)
    return chunks.gradients(z, labels, g, wanted, Logits(dx, dweight, dbias), dg, wanted_tangents)


class _Losses(Fused):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args)
        ctx.save_for_forward(*args)
        return call(losses, _kernel, _look, *args)

    @staticmethod
    def jvp(ctx: Any, *by: Any) -> Any:
        given: Any = (*ctx.saved_tensors, *by[:3])
        with of_tangents():
            return tangents(*given)

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        if g is None:
            return (None,) * 6
        given: Any = (*ctx.saved_tensors, g, tuple(ctx.needs_input_grad[:3]))
        return *gradients(*given), None, None, None


class _Gradients(Fused):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        *saved, ctx.wanted = args
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        return call(gradients, _gradients_kernel, look_of_gradients, *args)

    @staticmethod
    def jvp(ctx: Any, *by: Any) -> Any:
        given: Any = (*ctx.saved_tensors, ctx.wanted, *by[:3], by[6])
        with of_tangents():
            return tangents_of_gradients(*given)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        # The Hessian of sum_i g_i loss_i is symmetric, and its derivative by g is the tangent of the losses.
        given: Any = ctx.saved_tensors
        by_g: Any = (*given[:-1], *cotangents)
        by_rest: Any = (*given, tuple(ctx.needs_input_grad[:3]), *cotangents, None)
        return *tangents_of_gradients(*by_rest), None, None, None, tangents(*by_g), None


def change_of(x: Any, weight: Any, dx: Any, dweight: Any, dbias: Any) -> Any:
    terms = [None if dx is None else dx if weight is None else dx @ weight.T, dbias]
    terms.append(None if dweight is None else x @ dweight.T)
    total = torch.zeros((), dtype=x.dtype, device=x.device)
    return sum((t for t in terms if t is not None), start=total)


def logits(x: Tensor, weight: Maybe, bias: Maybe) -> Tensor:
    return x if weight is None else x @ weight.T if bias is None else x @ weight.T + bias


def _linear(z: Tensor, target: Tensor, part: Tensor, smooth: Maybe) -> Tensor:
    found = part * z.gather(1, target[:, None])[:, 0]
    return found if smooth is None else found + z @ smooth


def _total(part: Tensor, smooth: Maybe) -> Tensor:
    return part if smooth is None else part + smooth.sum()


def _by_definition(x: Any, weight: Any, bias: Any, target: Any, part: Any, smooth: Any) -> Tensor:
    z = logits(x, weight, bias)
    return _total(part, smooth) * z.logsumexp(1) - _linear(z, target, part, smooth)


def _tangents_by_definition(
    x: Any, weight: Any, bias: Any, target: Any, part: Any, smooth: Any, dx: Any, dweight: Any, dbias: Any
) -> Tensor:
    z = logits(x, weight, bias)
    change = change_of(x, weight, dx, dweight, dbias).expand_as(z)
    return _total(part, smooth) * (z.softmax(1) * change).sum(1) - _linear(change, target, part, smooth)


def _by_logits(weights: Tensor, target: Tensor, part: Tensor, smooth: Maybe) -> Tensor:
    found = (_total(part, smooth)[:, None] * weights).scatter_add(1, target[:, None], -part[:, None])
    return found if smooth is None else found - smooth


def pulled_back(by_logits: Tensor, x: Any, weight: Any, wanted: Wanted) -> list[Any]:
    by = [
        lambda: by_logits if weight is None else by_logits @ weight,
        lambda: by_logits.T @ x,
        lambda: by_logits.sum(0),
    ]
    return [of() if which else None for of, which in zip(by, wanted, strict=True)]


def _gradients_by_definition(
    x: Any, weight: Any, bias: Any, target: Any, part: Any, smooth: Any, g: Any, wanted: Any
) -> Any:
    weights = logits(x, weight, bias).softmax(1)
    return tuple(pulled_back(g[:, None] * _by_logits(weights, target, part, smooth), x, weight, wanted))


def _tangents_of_gradients_by_definition(
    x: Any, weight: Any, bias: Any, target: Any, part: Any, smooth: Any, g: Any, wanted: Any,
    dx: Any, dweight: Any, dbias: Any, dg: Any,
) -> Any:  # fmt: skip
    weights, change = logits(x, weight, bias).softmax(1), change_of(x, weight, dx, dweight, dbias)
    plain = _by_logits(weights, target, part, smooth)
    apart = change - (weights * change).sum(1, keepdim=True)
    change = (g * _total(part, smooth))[:, None] * weights * apart
    change = change if dg is None else change + dg[:, None] * plain
    found = pulled_back(change, x, weight, wanted)
    by_logits = g[:, None] * plain
    if dweight is not None and found[0] is not None:
        found[0] = found[0] + by_logits @ dweight
    if dx is not None and found[1] is not None:
        found[1] = found[1] + by_logits.T @ dx
    return tuple(found)


def _kernel(x: Any, weight: Any, bias: Any, *labels: Any) -> Any:
    return chunks.losses(Logits(x, weight, bias), Labels(*labels))


def _tangents_kernel(x: Any, weight: Any, bias: Any, target: Any, part: Any, smooth: Any, *d: Any) -> Any:
    return chunks.tangents(Logits(x, weight, bias), Labels(target, part, smooth), Logits(*d))


def _gradients_kernel(x: Any, weight: Any, bias: Any, target: Any, part: Any, smooth: Any, g: Any, wanted: Any) -> Any:
    return chunks.gradients(Logits(x, weight, bias), Labels(target, part, smooth), g, wanted)[:3]


def _tangents_of_gradients_kernel(
    x: Any, weight: Any, bias: Any, target: Any, part: Any, smooth: Any, g: Any, wanted: Any,
    dx: Any, dweight: Any, dbias: Any, dg: Any,
) -> Any:  # fmt: skip
    z, labels = Logits(x, weight, bias), Labels(target, part, smooth)
    return chunks.gradients(z, labels, g, (False,) * 3, Logits(dx, dweight, dbias), dg, wanted)[3:]


def _look(x: Tensor, *_: Any) -> Any:
    return torch.empty(len(x), dtype=x.dtype, device="meta")


def look_of_gradients(x: Tensor, weight: Maybe, bias: Maybe, *rest: Any) -> Any:
    wanted = next(part for part in rest if isinstance(part, tuple))
    parts = zip((x, weight, bias), wanted, strict=True)
    return tuple(torch.empty(p.shape, dtype=p.dtype, device="meta") if w and p is not None else None for p, w in parts)
