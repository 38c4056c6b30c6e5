"""The clock of a report that was given so much time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

X = TypeVar("X")


class Clock:
    """How much time is left of so many seconds; of None, all the time there is.

    >>> Clock(None).left
    inf
    """

    def __init__(
        self,
        seconds: float | None,
        *,
        now: Callable[[], float] | None = None,
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        """``agree``: of what this process says to whether there is time, what all processes say that share the work."""
        self._now, self._agree = now or time.monotonic, agree
        self.start = self._now()
        self.forward = 1 / 3  # of the time of a product, what a pass without derivatives takes: a pilot measures it
        self.deadline = float("inf") if seconds is None else self.start + seconds

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return self._now() - self.start

    @property
    def left(self) -> float:
        """Seconds to the deadline; negative after it."""
        return self.deadline - self._now()

    def fits(self, seconds: float) -> bool:
        """Whether there is time for what takes so long."""
        return self._agree(self.left >= seconds)

    def while_time(self, items: Iterable[X], *, reserve: float = 0.0, least: int = 0) -> Iterator[X]:
        """The items, as long as another one like the slowest so far leaves ``reserve`` seconds; at least so many."""
        slowest = 0.0
        for number, item in enumerate(items):
            before = self._now()
            if number >= least and not self.fits(reserve + slowest):
                return
            yield item
            slowest = max(slowest, self._now() - before)
