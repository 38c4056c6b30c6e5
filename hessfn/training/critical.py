"""The curvature that a training meets along its next step, from a few values of the loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.core.arguments import kind, require_loss, require_vector
from hessfn.core.errors import InvalidInput
from hessfn.core.results import CriticalSharpness
from hessfn.core.torch_state import carries_derivative, known, value_of
from hessfn.core.tree import T, Tree

_CALL = "critical_sharpness(loss, params, direction)"
_FACTOR = 8.0  # the search goes at most so far up or down at once


class _Point(NamedTuple):
    eta: float
    rise: float  # the loss there, less that at 0

    @property
    def slope(self) -> float:  # of the chord from 0: minus the gradient at 0, a straight line of eta for a quadratic
        return self.rise / self.eta


def critical_sharpness(
    loss: Callable[..., Tensor],
    params: T,
    direction: T,
    *args: Any,
    step: float | None = None,
    rtol: float = 0.02,
    max_losses: int = 9,
) -> CriticalSharpness:
    """``2 / eta``, with eta the step along an update at which the loss is again as large as before the step.

    ``loss(params + eta direction) = loss(params)``, from values of the loss alone. Where the loss is quadratic along
    the direction d, this is ``d'Hd / -g'd`` with the gradient g: for gradient descent, ``d = -g``, the mean of the
    eigenvalues with the weights ``(q_i'g)^2``, at most the sharpness. A step that is longer than eta raises the loss.

    The step is multiplied or divided by up to 8 until it brackets eta. Then the bracket shrinks: by the root of a
    parabola through ``(loss(eta) - loss(0)) / eta``, which is a straight line for a quadratic loss, or by bisection if
    that gains too little.

    Args:
        loss: ``loss(params, *args)`` to a scalar.
        params: a tree of tensors.
        direction: a tree like ``params`` that leads downhill: minus the gradient, or the update of an optimiser,
            ``direction_to(before, after)``, divided by its learning rate if eta should be a learning rate.
        args: what else the loss takes.
        step: where the search begins, such as the learning rate, or the last eta, ``2 / value``. By default the step
            that moves the parameters by a hundredth of their norm.
        rtol: the width of the final bracket, relative to eta.
        max_losses: the most evaluations of the loss.

    Returns:
        ``value`` with its ``error``, which covers the bracket and, as far as known, the rounding of the losses; the
        bracket as ``steps``. If no step raises the loss, ``value +- error`` covers 0 to the bound of the longest step.
        If every step raises it, ``value`` is that of the shortest one and ``error`` is inf: the direction leads uphill,
        as an update with momentum may. A rise and fall of the loss within a factor 8 of the step may go unseen.

    The loss must be a function: without dropout, on one batch. The search branches on values, so it has no derivative
    and does not run under ``vmap``.

    Cost: forward passes only, at most ``max_losses``; 5 for a quadratic from a ``step`` within a factor 8. One more
    copy of the parameters. It waits for the device at each loss.

    Raises:
        ValueError: the direction is not a tree like ``params``, or zero; the loss at ``params`` is not one finite
            number; ``step``, ``rtol`` or ``max_losses`` is out of range; it is under ``vmap``, compiled or
            differentiated.

    Source: Kalra et al. (2026).

    >>> loss = lambda w: (w * w * torch.tensor([1.0, 4.0])).sum() / 2
    >>> found = critical_sharpness(loss, torch.ones(2), -torch.tensor([1.0, 4.0]))
    >>> round(float(found.value), 3), int(found.num_losses)  # (1 + 4**3) / (1 + 4**2)
    (3.824, 7)
    """
    require_loss(loss, params, _CALL)
    require_vector(params, "params", _CALL)
    require_vector(direction, "direction", _CALL)
    direction = tree.aligned(direction, params, "the direction")
    if not rtol > 0 or max_losses < 3:
        raise InvalidInput(f"{_CALL}: rtol={rtol} must be positive, max_losses={max_losses} at least 3")
    if carries_derivative(params, direction, args):
        raise InvalidInput(
            f"{_CALL} has no derivative, since it compares losses, and this is being differentiated: differentiate "
            "v'Hv with hvp(loss, params, batch); or, where no derivative is wanted, use torch.no_grad()"
        )

    def at(eta: float) -> Tensor:
        return value_of(lambda: loss(tree.add(params, direction, eta) if eta else params, *args))

    zero = at(0.0)
    first = _number(zero)
    if not math.isfinite(first):
        raise InvalidInput(f"{_CALL}: the loss is {first} at params, so that none is above it")
    start = _start(step, params, direction)
    noise = 4 * max(tree.eps(params), torch.finfo(zero.dtype).eps) * abs(first)
    points: list[_Point] = []
    while len(points) + 1 < max_losses and (eta := _next(points, start, rtol, noise)) is not None:
        rise = _number(at(eta)) - first
        points.append(_Point(eta, math.inf if math.isnan(rise) else rise))
    return _result(points, rtol, noise, zero)


def _number(loss: Tensor) -> float:
    """The loss, where it may be asked."""
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        raise InvalidInput(f"{_CALL}: the loss is {kind(loss)}, not one real number")
    if known(loss.isfinite().all()) is None:
        raise InvalidInput(
            f"{_CALL} compares losses, which torch.func.vmap and torch.compile do not let it: call it in a loop, or "
            "leave it out of what is compiled"
        )
    return float(loss.detach())


def _start(step: float | None, params: Tree, direction: Tree) -> float:
    length = float(tree.norm(direction))
    if not (0 < length < math.inf):
        raise InvalidInput(f"{_CALL}: the direction has norm {length}, and leads nowhere")
    if step is not None:
        if not (0 < float(step) < math.inf):
            raise InvalidInput(f"{_CALL}: step={float(step)} must be positive and finite: the learning rate, say")
        return float(step)
    return 0.01 * (float(tree.norm(params)) or 1.0) / length


def _ends(points: list[_Point]) -> tuple[_Point | None, _Point | None]:
    """The smallest step that raises the loss, and below it the largest that does not."""
    high = min((p for p in points if p.rise > 0), default=None)
    low = max((p for p in points if p.rise <= 0 and (high is None or p.eta < high.eta)), default=None)
    return low, high


def _next(points: list[_Point], start: float, rtol: float, noise: float) -> float | None:
    """Where to take the next loss, or None when the ends are close enough."""
    if not points:
        return start
    low, high = _ends(points)
    if low and high:
        return _between(low, high, points, rtol)
    edge = points[-1]
    farthest = edge.eta * _FACTOR if low else edge.eta / _FACTOR
    if abs(edge.rise) <= 10 * noise or edge.rise == math.inf:
        return farthest
    if len(points) == 1:
        return edge.eta * 2 if low else edge.eta / 2
    # Past the root by a little, so that what comes next closes in from the other side.
    root = _root(*points[-2:])
    if low:
        return min(root * (1 + rtol / 3), farthest) if root > edge.eta else farthest
    return max(root * (1 - rtol / 3), farthest) if root < edge.eta else farthest


def _between(low: _Point, high: _Point, points: list[_Point], rtol: float) -> float | None:
    width, middle = high.eta - low.eta, (low.eta + high.eta) / 2
    if width <= rtol * high.eta:
        return None
    if high.rise == math.inf:
        return math.sqrt(low.eta * high.eta)
    earlier_low, earlier_high = _ends(points[:-2])
    if earlier_low and earlier_high and width > (earlier_high.eta - earlier_low.eta) / 2:
        return middle
    root = _crossing(low, high, points)
    return min(root * (1 + rtol / 3), middle) if root < middle else max(root * (1 - rtol / 3), middle)


def _root(a: _Point, b: _Point) -> float:
    """Where the line through two slopes is zero; inf where they are equal."""
    gain = b.slope - a.slope
    return b.eta - b.slope * (b.eta - a.eta) / gain if gain else math.inf


def _crossing(low: _Point, high: _Point, points: list[_Point]) -> float:
    """Where the parabola through the slopes of the ends and of the point nearest to them is zero, between the ends."""
    width = high.eta - low.eta
    others = [p for p in points if p not in (low, high) and p.rise < math.inf]
    line = (high.slope - low.slope) / width
    bend = 0.0
    if others:
        third = min(others, key=lambda p: abs(math.log(p.eta**2 / (low.eta * high.eta))))
        bend = ((third.slope - low.slope) / (third.eta - low.eta) - line) / (third.eta - high.eta)
    first = line - bend * width  # slope(low.eta + x) = low.slope + first x + bend x^2
    below = first + math.sqrt(max(first**2 - 4 * bend * low.slope, 0.0))
    return low.eta + min(-2 * low.slope / below, width) if below > 0 else (low.eta + high.eta) / 2


def _result(points: list[_Point], rtol: float, noise: float, like: Tensor) -> CriticalSharpness:
    low, high = _ends(points)
    converged = False
    if low and high:
        eta = _crossing(low, high, points) if high.rise < math.inf else (low.eta + high.eta) / 2
        value, converged = 2 / eta, high.eta - low.eta <= rtol * high.eta
        error = max(2 / low.eta - value, value - 2 / high.eta) + value / eta * _moved_by(noise, eta, low, points)
    elif low:  # from 0 to 2 / low.eta
        value = error = 1 / low.eta
    else:
        value, error = 2 / points[-1].eta, math.inf
    steps = (low.eta if low else 0.0, high.eta if high else math.inf)
    number = tree.wide(like.detach()).new_tensor
    counts = torch.tensor(len(points) + 1, device=like.device), torch.tensor(converged, device=like.device)
    return CriticalSharpness(number(value), number(error), number(steps), *counts)


def _moved_by(noise: float, eta: float, low: _Point, points: list[_Point]) -> float:
    """How far an error of the losses moves the step at which the loss is back: itself over the slope there."""
    deepest = min((p for p in points if p.eta <= low.eta), key=lambda p: p.rise)
    slope = -deepest.slope * eta / (eta - deepest.eta) if eta > deepest.eta else 0.0
    return noise / slope if slope > 0 else math.inf
