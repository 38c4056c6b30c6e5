"""Bars in the rows of a table, on a logarithmic axis: where each begins and ends, in percent of the column."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

_MOST_DECADES = 6


class Bar(NamedTuple):
    """A number in its row."""

    width: float  #: percent; 0 where the axis does not reach so low
    negative: bool
    lower: float  #: percent, the number less its error
    upper: float  #: and with it


class Scale(NamedTuple):
    """A logarithmic axis over whole decades."""

    low: int  #: 10**low is its beginning
    high: int

    @property
    def ticks(self) -> list[tuple[int, float]]:
        """Exponents with their places in percent: at most three, as there is no room for more labels."""
        step = -(-(self.high - self.low) // 2)
        return [(x, self.at(10.0**x)) for x in range(self.low, self.high + 1, step)]

    def at(self, size: float) -> float:
        """In percent of the column."""
        if not size > 0:
            return 0.0
        place = (math.log10(size) - self.low) / (self.high - self.low)
        return round(100 * min(max(place, 0.0), 1.0), 2)

    def bar(self, mean: float | None, *errors: float | None) -> Bar | None:
        """None where there is no number. Errors of several kinds add up by their squares."""
        if mean is None or not math.isfinite(mean):
            return None
        error = math.hypot(*(x for x in errors if x is not None and math.isfinite(x)), 0.0)
        return Bar(self.at(abs(mean)), mean < 0, self.at(abs(mean) - error), self.at(abs(mean) + error))


def scale_of(layers: Iterable[dict[str, Any]]) -> Scale:
    """For the traces of layers: at most so many decades, as what is smaller does not count."""
    sizes = [abs(x["trace"]) for x in layers if x["trace"] is not None and math.isfinite(x["trace"]) and x["trace"]]
    if not sizes:
        return Scale(-1, 0)
    high = math.floor(math.log10(max(sizes))) + 1
    return Scale(max(min(math.floor(math.log10(min(sizes))), high - 1), high - _MOST_DECADES), high)
