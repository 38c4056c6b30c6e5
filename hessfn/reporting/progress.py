"""The progress of a report: a bar in a terminal, lines in a pipe, both on the first process alone."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from tqdm.auto import tqdm

from hessfn.core.tree import MatVec, Tree
from hessfn.reporting.options import Options
from hessfn.reporting.workspace import Keep

_EVERY = 10.0  # seconds from line to line


def progress_bar(options: Options, total: int | None, unit: str, desc: str = "") -> Any:
    """What counts the steps of a stage, and says how long it will take at the mean rate so far.

    In a terminal or a notebook that is a bar of tqdm. Elsewhere a bar would fill a file with what was meant to be
    overwritten: there it is a line every ten seconds and one at the end.
    """
    quiet = not options.is_first_process
    if sys.stderr.isatty() or any(kind.__module__ == "tqdm.notebook" for kind in tqdm.__mro__):
        return tqdm(
            total=total or None, unit=unit, desc=desc, disable=quiet, dynamic_ncols=True, mininterval=0.5, smoothing=0
        )
    return Lines(total or None, unit, desc, disable=quiet)


def say(options: Options, line: str) -> None:
    """Prints a line beside the progress, on the first process."""
    if options.is_first_process:
        tqdm.write(line, file=sys.stderr)


class Lines:
    """What of a bar of tqdm is used here, in lines."""

    def __init__(
        self,
        total: int | None,
        unit: str,
        desc: str = "",
        *,
        disable: bool = False,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.n, self.initial = total, 0, 0
        self._unit, self._desc, self._disable, self._now = unit, desc, disable, now
        self._begun = self._said = now()

    def update(self, n: int = 1) -> None:
        self.n += n
        if self._now() - self._said >= _EVERY:
            self._said = self._now()
            self._say(self._time_left())

    def set_description(self, desc: str) -> None:
        self._desc = desc

    def __enter__(self) -> Lines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self.n:
            self._say(f"{_duration(self._now() - self._begun)}")

    def _time_left(self) -> str:
        done = self.n - self.initial  # of what was done before nobody knows how long it took
        if self.total is None or not done:
            return f"{_duration(self._now() - self._begun)} so far"
        left = (self._now() - self._begun) / done * max(0, self.total - self.n)
        return f"{_duration(left)} left"

    def _say(self, what: str) -> None:
        if self._disable:
            return
        total = max(self.n, self.total) if self.total else None  # it may have been a guess
        of, part = (f"/{total}", f" ({100 * self.n // total}%)") if total else ("", "")
        print(f"{self._desc}: {self.n}{of} {self._unit}s{part}, {what}", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def kept_and_counted(matvec: MatVec, keep: Keep, name: str, bar: Any) -> MatVec:
    """The products, kept in the journal ``name`` and counted on the bar.

    One that is read from the journal counts as done, and says nothing of the time left.
    """
    num_computed = 0

    def computed(v: Tree) -> Tree:
        nonlocal num_computed
        num_computed += 1
        return matvec(v)

    kept = keep(name, computed)

    def counted(v: Tree) -> Tree:
        before = num_computed
        product = kept(v)
        if num_computed == before:
            bar.initial += 1
        bar.update()
        return product

    return counted
