"""The first product of a loss is held against plain gradients of the untouched loss, in float64 where it runs in it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.core.dtensor import layout
from hessfn.core.errors import InvalidInput
from hessfn.core.func import gradients
from hessfn.core.tree import Tree
from hessfn.products.loss_checks import Loss
from hessfn.products.wide import Tape, widened

Gradient = Callable[[float], list[Tensor]]  # of the loss at params + c v
Verdict = Literal["agrees", "wrong", "kink", "unknown", "not finite"]


class Evidence(NamedTuple):
    """What gradients along a vector say of the product with it."""

    difference: Callable[[float], list[Tensor]]  # central, with a step so many times smaller
    product: list[Tensor]  # that with the step itself
    error: float  # how far its norm may be off by rounding
    tolerance: float  # how much of its norm a right product may differ, by its own rounding


def evidence(
    loss: Loss,
    params: Tree,
    args: tuple[Any, ...],
    v: Tree,
    value: Tensor,
    custom: bool = False,
    narrow: bool = True,
    plain: bool = False,
) -> Evidence | None:
    """Two gradients; None where no difference tells anything.

    In float64 the step is so small that hardly a unit of a net has its kink within it. A loss that takes its own dtype
    only is differenced in that, and only what is grossly wrong shows.

    Args:
        value: the loss at ``params``, in its own dtype: how far float64 is from it says how exact it is.
        custom: whether the loss has an ``autograd.Function``.
        narrow: whether what takes its own dtype only is differenced in that.
        plain: whether the loss is known to take nothing for a constant, so that there is nothing to record.
    """
    given = [x for x in tree.leaves((params, args, v)) if isinstance(x, Tensor)]
    if any(layout(x) or x.is_meta or x.is_complex() or x.device.type == "mps" for x in given):
        return None
    if not float(tree.norm(v)) > 0:
        return None
    if not math.isfinite(float(tree.norm(params))):
        return None
    for wide in (True, False)[: 1 + narrow]:
        rest = tree.map(widened, args) if wide else args
        eps = tree.eps(tree.map(lambda x: widened(x.new_empty(0)), params) if wide else params)
        tape = Tape(wide, all_without_grad=not custom)
        try:
            if not plain:
                with tape.recording(), torch.enable_grad():
                    exact = loss(tree.map(widened, params) if wide else params, *rest).detach()
            relative = 1e-8 if wide else eps**0.25
            gradient = _along(loss, tape, params, rest, v)
            seen = _evidence(gradient, params, v, relative, float(value.abs()), eps)
            if plain and tape.loss is not None:
                exact = tape.loss.detach()  # a step away
            rounding = float((exact - value).abs() / value.abs().clamp(min=1e-30))
            if rounding < 1e-2:
                return seen._replace(tolerance=_tolerance(params) + (30 * rounding**0.5 if wide else 0.3))
        except Exception:  # it takes its own dtype only, or its gradient cannot be had alone: the modes will tell
            continue
    return None


def _tolerance(params: Tree) -> float:
    # Deep nets lose digits to cancellation: a product in float32 may be off by some thousandths.
    return 50 * tree.eps(params) + (1e-3 if tree.eps(params) < 1e-10 else 0.02)


def are_close(product: Tree, other: Tree, params: Tree) -> bool:
    """Whether two products of a vector are one, but for rounding."""
    return _agrees(product, [x.detach() for x in tree.leaves(other)], _tolerance(params), 0.0)


def _along(loss: Loss, tape: Tape, params: Tree, args: tuple[Any, ...], v: Tree) -> Gradient:
    def gradient(c: float) -> list[Tensor]:
        # Not plain_gradient: the tape would hold its detached leaves fast.
        pairs = zip(tree.leaves(params), tree.leaves(v), strict=True)
        wide = widened if tape.wide else lambda x: x
        leaves = [torch.add(wide(x.detach()), wide(d.detach()), alpha=c).requires_grad_() for x, d in pairs]
        with tape.playing(), torch.enable_grad():
            value = tape.loss = loss(tree.unflatten(leaves, params), *args)
            return [g.to_dense() if g.is_sparse else g for g in gradients(value, leaves)]

    return gradient


def _evidence(gradient: Gradient, params: Tree, v: Tree, relative: float, value: float, eps: float) -> Evidence:
    size = float(tree.norm(params)) or 1.0
    step = relative * size / float(tree.norm(v))
    slopes = []

    def difference(smaller: float) -> list[Tensor]:
        h = step / smaller
        plus = gradient(h)
        slopes.append(float(tree.norm(plus)))
        minus = gradient(-h)
        # Of a large model both are gigabytes in float64: each leaf goes when it has been used.
        found = [torch.sub(plus.pop(), minus.pop()).div_(2 * h) for _ in range(len(plus))]
        return found[::-1]

    product = difference(1)
    # A gradient is right to some tens of roundings, of itself or of what cancelled in it; the step is exact to one.
    error = 30 * eps * max(slopes[0], value / size) / step
    return Evidence(difference, product, error, 0.0)


def verdict(found: Tree, seen: Evidence) -> Verdict:
    """Whether a product is what the gradients say. Where it seems not, a ten times smaller step is asked as well."""
    if not math.isfinite(float(tree.norm(seen.product))):
        # Where the product is finite, there is nothing only a step further.
        return "unknown" if math.isfinite(float(tree.norm(found))) else "not finite"
    if _agrees(found, seen.product, seen.tolerance, seen.error):
        return "agrees"
    finer = seen.difference(10)
    if _agrees(found, finer, seen.tolerance, 10 * seen.error):
        return "agrees"  # the step was too long for this loss
    if float(tree.norm(finer)) > 5 * float(tree.norm(seen.product)) + 10 * seen.error:
        return "kink"  # a jump of the gradient, over 2h
    steady = _agrees(finer, seen.product, seen.tolerance, 10 * seen.error)
    return "wrong" if steady else "unknown"


def not_finite(product: Tree) -> InvalidInput:
    """The error for a product that is not finite, as the gradients of its loss are not."""
    leaves = zip(tree.names(product), tree.leaves(product), strict=True)
    bad = [name for name, leaf in leaves if not leaf.isfinite().all()]
    where = f", in leaf {bad[0]!r}" * bool(bad[0]) + f" and {len(bad) - 1} more" * (len(bad) > 1)
    return InvalidInput(
        f"the loss is finite at these parameters, and its gradient or its curvature is not{where}. Of "
        "torch.where(condition, a, b) both a and b are differentiated, also where they are not taken (give them "
        "arguments that are safe), and a root or a norm has no slope at zero (add a small number inside)"
    )


def _agrees(found: Tree, expected: list[Tensor], tolerance: float, error: float) -> bool:
    leaves = [x.detach() for x in tree.leaves(found)]
    size = max(float(tree.norm(leaves)), float(tree.norm(expected)))
    apart = math.hypot(*(float(tree.norm(e - x)) for x, e in zip(leaves, expected, strict=True)))  # in the wider dtype
    return apart <= tolerance * size + error


def is_generic(v: Tree) -> bool:
    """Whether a vector has something in every leaf, so that what is wrong in one of them shows."""
    return all(int((leaf != 0).sum()) * 2 > leaf.numel() for leaf in tree.leaves(v) if leaf.numel())


def disagreement(mode: str, found: Tree, seen: Evidence, v: Tree) -> str:
    """What is wrong, with both numbers."""
    along, ours, theirs = ([x.detach().double() for x in tree.leaves(p)] for p in (v, found, seen.product))
    return (
        f"the product in mode {mode!r} is not the curvature of the loss: v'Hv = {float(tree.dot(along, ours)):.6g}, "
        f"where its gradients give {float(tree.dot(along, theirs)):.6g}"
    )


AT_A_KINK = (
    "The gradient has a jump within a tiny step from here, so the loss has a kink, or jumps, at these very parameters, "
    "and no second derivative: the product is that of one side"
)
