"""How much of a training's time may be spent on looking at it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hessfn.core.errors import InvalidInput


class Budget:
    """A share of the wall-clock time of a training, which goes on over its interruptions.

    The first measurement is made in any case, since nobody knows what it will cost. Each later one waits until all that
    has been spent, and as much again as the last one took, are within the share.
    """

    def __init__(self, share: float | None, *, clock: Callable[[], float] = time.perf_counter) -> None:
        """``share``: between 0 and 1; None for no limit."""
        if share is not None and not 0 < share <= 1:
            raise InvalidInput(f"max_share={share} must be above 0 and at most 1, or None for no limit")
        self.share, self._clock = share, clock
        self.spent = 0.0  # seconds, as all times here
        self.latest = 0.0
        self._before = 0.0  # what earlier runs of this training took
        self._since: float | None = None

    def start(self) -> None:
        """The training begins, or goes on."""
        if self._since is None:
            self._since = self._clock()

    def stop(self) -> None:
        """It ends, or is interrupted: what comes until the next start is none of its time."""
        self._before, self._since = self.elapsed(), None

    def elapsed(self) -> float:
        return self._before + (0.0 if self._since is None else self._clock() - self._since)

    def spent_share(self) -> float:
        return self.spent / max(self.elapsed(), 1e-9)

    def allows(self) -> bool:
        return self.share is None or self.spent + self.latest <= self.share * self.elapsed()

    @contextmanager
    def measuring(self) -> Iterator[None]:
        begin = self._clock()
        try:
            yield
        finally:
            self.latest = self._clock() - begin
            self.spent += self.latest

    def state_dict(self) -> dict[str, float]:
        return {"spent": self.spent, "latest": self.latest, "elapsed": self.elapsed()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.spent, self.latest = float(state["spent"]), float(state["latest"])
        self._before = float(state["elapsed"])
        if self._since is not None:
            self._since = self._clock()
