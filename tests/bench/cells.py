"""Cells of a table of measurements, each in a try of its own: one failure costs one cell, one kill costs none.

A cell that does not fit into the seconds left is skipped, and its row says so. After each cell the rows are in the
file; a later run adds its rows to those of the same file, in the place of what it has measured again.
"""

from __future__ import annotations

import argparse
import gc
import json
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import record
import torch

Row = dict[str, Any]


class OutOfTime(Exception):
    """A cell has taken longer than it may."""


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raises :class:`OutOfTime` in the main thread, between two operations of Python."""

    def ring(*_: Any) -> None:
        raise OutOfTime(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def add_options(parser: argparse.ArgumentParser, seconds: float) -> None:
    parser.add_argument("--seconds", type=float, default=seconds, help="for all cells; what does not fit is skipped")
    parser.add_argument("--cell", type=float, default=90, help="seconds for one cell (default: 90)")
    record.add_option(parser)


class Cells:
    """The rows of a run. ``same`` are the columns that all of them share."""

    def __init__(self, given: argparse.Namespace, **same: Any) -> None:
        self.end, self.limit, self.file, self.same = time.monotonic() + given.seconds, given.cell, given.json, same
        self.rows: list[Row] = []
        self.before = earlier(self.file)

    @property
    def left(self) -> float:
        """Seconds that the next cell may take."""
        return min(self.end - time.monotonic(), self.limit)

    def run(self, key: Row, measure: Callable[[], Row], needs: float = 1.0) -> Row | None:
        """The row, or None where it failed or was skipped; ``needs`` are the seconds without which it is not begun."""
        row, key, done = {}, {**self.same, **key}, False
        try:
            if self.left < needs:
                row = {"skipped": f"{max(0, self.left):.0f} s left, and it needs {needs:.0f}"}
            else:
                begun = time.monotonic()
                with alarm(self.left):
                    row, done = measure(), True
                row["cell_seconds"] = round(time.monotonic() - begun, 2)
        except Exception as error:
            row = {"failed": f"{type(error).__name__}: {str(error)[:160]}", "where": place(error)}
        self.add({**key, **row})
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # raises if the device is lost: then no other cell of this process has a meaning
        return row if done else None

    def add(self, row: Row) -> None:
        row = {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in row.items()}
        self.rows = [*(x for x in self.rows if identity(x) != identity(row)), row]
        print(" ".join(f"{name}={short(value)}" for name, value in row.items() if value is not None), flush=True)
        keys = [identity(x) for x in self.rows]
        if self.file is not None:
            part = self.file.with_suffix(".part")  # a kill in the middle of a file costs this row alone
            record.write(part, [*(x for x in self.before if identity(x) not in keys), *self.rows])
            part.replace(self.file)


def earlier(file: Path | None) -> list[Row]:
    return json.loads(file.read_text("utf-8"))["rows"] if file is not None and file.is_file() else []


COLUMNS = "what", "model", "by", "number", "block", "images", "precision", "scale", "device"


def identity(row: Row) -> list[Any]:
    return [row.get(name) for name in COLUMNS]


def place(error: Exception) -> str:
    """The last three frames, in a line."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    return " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(frames))


def short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return f"[{len(value)}]" if len(value) > 6 else f"[{', '.join(map(short, value))}]"
    return str(value)
