"""A landscape from few of its points: measured where it bends, interpolated in between, and checked on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.interpolate import RBFInterpolator
from scipy.spatial.distance import cdist

from hessfn.core.errors import InvalidInput

Array = np.ndarray[Any, np.dtype[Any]]
_Kind = tuple[str, bool]  # the radial function, and whether it is of the logarithm
_Predictions = dict[_Kind, Array]
_MATES: dict[_Kind, _Kind] = {
    (kernel, is_log): (mate, is_log)
    for kernel, mate in (("quintic", "cubic"), ("cubic", "quintic"))
    for is_log in (True, False)
}

_PATIENCE = 2  # rounds in a row that were as predicted
_WIDE = 50.0  # losses that span more than this factor are seen by their logarithm
_DEGREES = {"quintic": 2, "cubic": 1}  # of the polynomial beside the radial functions
_DIGITS = 7  # of doubts and distances; more are rounding
_LARGEST = 700.0  # the exponential of more overflows
_ROUNDING = 1e-6  # relative: losses in float32 are no better than that


class Refined(NamedTuple):
    """Losses on a grid."""

    losses: Array  #: (g,), NaN where nothing is known: nearest to a loss that is not finite
    measured: Array  #: (g,), bool: where the loss was computed, and not interpolated
    error: float  #: of the predictions that were measured last, the largest, as a part of the visible range


class Answer(NamedTuple):
    """What a refinement is sent."""

    losses: Mapping[int, float]  #: at the points it asked for, by index
    lowest: float  #: of all losses so far that are drawn on the same axis
    highest: float


Refinement = Generator[list[int], Answer, Refined]


def refinement(
    grid: Array,
    start: Sequence[int],
    *,
    known: tuple[Array, Array] | None = None,
    rtol: float = 0.01,
    at_once: int = 5,
    most: float = math.inf,
) -> Refinement:
    """A dialogue that ends with the losses on a grid: it yields indices of points, and is sent their losses by index.

    Interpolations with cubic and with quintic radial functions, of the losses and of their logarithms, predict all
    points from those that are measured. Where they differ most the next ones are measured, some at a time and apart
    from each other, and the one that is farthest from all; until they differ by little, and two rounds in a row were as
    predicted, by what was known before or by earlier rounds. The scale on which predictions were best is taken. Of
    losses that span more than a factor of 50, as they are drawn on a logarithmic axis, "little" is said of the
    logarithm.

    Args:
        grid: ``(g, d)``, the points.
        start: the indices that are measured in any case: a coarse grid, which finds what is wider than its meshes.
        known: points ``(m, d)`` of the same space, no two of them the same but on the grid, and their losses ``(m,)``.
        rtol: the tolerance, as a part of the range of all that is drawn on the same axis. It is no bound: at 0.01, of
            planes over six nets that were also measured in full, five were within it, and one, of a tiny net whose loss
            spans a factor of 500, 0.04 off. At 0.015 a single kink or a narrow valley was up to 0.05 off.
        at_once: how many points are measured before what they say is heard.
        most: so many points of the grid are measured at most.

    Source: the interpolation is Duchon's (1977).
    """
    grid = np.asarray(grid, dtype=float)
    if grid.ndim != 2 or not len(start):
        raise InvalidInput(f"the grid is {grid.shape} and must be (points, dimensions), with one point to start at")
    grid, beside, losses = _on_grid(grid, known)
    measured, wanted, num_good = ~np.isnan(losses), list(start), 0
    error = calibration = math.inf
    errors: dict[_Kind, list[float]] = {}  # of each prediction, in the rounds so far
    before = _range([*losses[measured], *beside[1]])
    sight = _Sight(*before)
    while True:
        points = np.concatenate([grid[measured], beside[0]])
        predictions = _predicted(grid, points, np.concatenate([losses[measured], beside[1]]), sight)
        best = min(predictions, key=lambda kind: max(errors.get(kind, [math.inf])[-2:]))
        doubt = np.abs(sight.of(predictions[best]) - sight.of(predictions[_MATES[best]]))
        if errors:
            is_open = ~measured & ~np.isnan(doubt)
            if not is_open.any():
                return Refined(sight.within(predictions[best], losses), measured, 0.0)
            is_good = error <= rtol and calibration * doubt[is_open].max() <= rtol * sight.span
            num_good = num_good + 1 if is_good else 0
            if num_good == _PATIENCE or measured.sum() >= most:
                return Refined(sight.within(predictions[best], losses), measured, error)
            wanted = _apart(grid, points, np.where(is_open, doubt / sight.span, -1.0), at_once)
        new, *seen = yield [i for i in wanted if not measured[i]]
        here, sight = list(new), _Sight(min(before[0], seen[0]), max(before[1], seen[1]))
        losses[here], measured[here] = list(new.values()), True
        for kind, values in predictions.items():
            errors.setdefault(kind, []).append(sight.difference(values[here], losses[here]) if here else math.inf)
        error = errors[best][-1]
        # How much further off than the predictions are from each other they are from the truth.
        apart = np.nan_to_num(doubt[here]).max(initial=0.0)
        calibration = max(1.0, error * sight.span / max(apart, _ROUNDING * sight.span))


def side_by_side(
    refinements: Mapping[str, Refinement],
    losses_at: Callable[[dict[str, list[int]]], Mapping[str, Mapping[int, float]]],
    agree: Callable[[Any], Any] = lambda decision: decision,
) -> dict[str, Refined]:
    """The results of several dialogues about losses on one axis, of which the points of a round are measured at once.

    Args:
        losses_at: from the indices wanted, by dialogue, to losses by index.
        agree: of what each process has decided, what the first one has: they all measure the same points.
    """
    found: dict[str, Refined] = {}
    lowest, highest = _range([])
    wanted: dict[str, list[int]] = agree({name: next(dialogue) for name, dialogue in refinements.items()})
    while wanted:
        losses, asked, wanted = losses_at(wanted), wanted, {}
        lowest, highest = _range([lowest, highest, *(x for one in losses.values() for x in one.values())])
        for name in asked:
            answer = _said(refinements[name], Answer(losses[name], lowest, highest))
            (found if isinstance(answer, Refined) else wanted)[name] = answer
        wanted, found = agree((wanted, found))
    return {name: found[name] for name in refinements}


def _said(dialogue: Refinement, answer: Answer) -> Any:
    """The next points that a dialogue wants, or its result."""
    try:
        return dialogue.send(answer)
    except StopIteration as end:
        return end.value


def _range(losses: Iterable[float]) -> tuple[float, float]:
    """The smallest and the largest, of those that are finite."""
    finite = [x for x in losses if math.isfinite(x)]
    return min(finite, default=math.inf), max(finite, default=-math.inf)


class _Sight:
    """The scale on which losses are seen that lie between two."""

    def __init__(self, low: float, high: float) -> None:
        low, high = (low, high) if low <= high else (0.0, 0.0)
        self.is_wide, self.low, self.high = 0 < _WIDE * low < high, low, high
        self.span = (
            math.log(high / low) if self.is_wide else max(high - low, _ROUNDING * max(abs(low), abs(high), 1e-30))
        )

    def of(self, losses: Array) -> Array:
        """A prediction may be below all losses, also below 0."""
        return np.log(np.maximum(losses, self.low / 10)) if self.is_wide else losses

    def within(self, predicted: Array, losses: Array) -> Array:
        """The losses, and predictions where they are NaN, within the range, so that the scale drawn is this one."""
        return np.where(np.isnan(losses), np.clip(predicted, self.low, self.high), losses)

    def difference(self, predicted: Array, losses: Array) -> float:
        """The largest, as a part of what is seen; infinite where either is not finite."""
        with np.errstate(invalid="ignore"):
            gaps = np.abs(self.of(predicted) - self.of(losses))
        return float(np.where(np.isfinite(gaps), gaps, math.inf).max() / self.span)


def _on_grid(grid: Array, known: tuple[Array, Array] | None) -> tuple[Array, tuple[Array, Array], Array]:
    """The grid in the unit of its own size, points known beside it, and the losses on it, NaN where not known."""
    size = np.ptp(grid, axis=0).max() or 1.0
    losses = np.full(len(grid), math.nan)
    if known is None:
        return grid / size, (grid[:0], losses[:0]), losses
    distance = cdist(known[0], grid)
    nearest = distance.argmin(1)
    on = distance.min(1) <= 1e-9 * size
    losses[nearest[on]] = known[1][on]
    return grid / size, (known[0][~on] / size, known[1][~on]), losses


def _predicted(grid: Array, points: Array, heights: Array, sight: _Sight) -> _Predictions:
    """Every kind of prediction on the grid, the scale that is seen first; NaN nearest to a loss that is not finite."""
    finite = np.isfinite(heights)
    found: _Predictions = {}
    for is_log in (True, False) if sight.is_wide else (False,):
        seen = np.log(heights[finite]) if is_log else heights[finite]
        for kernel in ("quintic", "cubic"):
            values = _interpolated(grid, points[finite], seen, kernel)
            found[kernel, is_log] = np.exp(np.minimum(values, _LARGEST)) if is_log else values
    if finite.all():
        return found
    known = finite[cdist(grid, points).argmin(1)]
    return {kind: np.where(known, values, math.nan) for kind, values in found.items()}


def _interpolated(grid: Array, points: Array, seen: Array, kernel: str) -> Array:
    try:
        return RBFInterpolator(points, seen, kernel=kernel, degree=_DEGREES[kernel])(grid)
    except (ValueError, np.linalg.LinAlgError):  # too few points, or all on a line
        return np.full(len(grid), math.nan)


def _apart(grid: Array, points: Array, doubt: Array, most: int) -> list[int]:
    """Some points of the largest doubts, none close to another, and the one that is farthest from all measured ones.

    Of what is the same but for rounding the first one is taken, so that rounding does not choose the points.
    """
    doubt = doubt.round(_DIGITS)
    far = np.where(doubt >= 0, cdist(grid, points).min(1).round(_DIGITS), -1.0)
    chosen = [int(far.argmax())]
    room = 1 / len(points) ** (1 / grid.shape[1]) / 1.5
    left = doubt.copy()
    while len(chosen) < most:
        left[np.abs(grid - grid[chosen[-1]]).max(1) < room] = -1.0
        if left.max() < 0:
            break
        chosen.append(int(left.argmax()))
    return chosen
