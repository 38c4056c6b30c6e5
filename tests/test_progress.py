"""Progress is a bar in a terminal, and lines in a pipe: how much is done, of how much, and how long it will take."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch

from hessfn.reporting import progress
from hessfn.reporting.options import Options
from hessfn.reporting.progress import Lines, kept_and_counted, progress_bar


class Time:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_a_line_every_ten_seconds_and_one_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    time = Time()
    with Lines(40, "product", "trace", now=time) as bar:
        for _ in range(40):
            time.seconds += 0.9
            bar.update()
    assert capsys.readouterr().err.splitlines() == [
        "trace: 12/40 products (30%), 25 s left",
        "trace: 24/40 products (60%), 14 s left",
        "trace: 36/40 products (90%), 4 s left",
        "trace: 40/40 products (100%), 36 s",
    ]


def test_what_was_done_before_says_nothing_of_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    time = Time()
    bar = Lines(100, "product", "trace", now=time)
    kept: list[int] = []

    def keep(name: str, matvec: Any) -> Any:  # the first 50 are in the journal
        return lambda v: v if len(kept) < 50 else matvec(v)

    matvec = kept_and_counted(lambda v: v, keep, "products", bar)
    for _ in range(60):
        time.seconds += 1.0 if len(kept) >= 50 else 0.0
        matvec(torch.zeros(1))
        kept.append(1)
    assert (bar.n, bar.initial) == (60, 50)
    assert capsys.readouterr().err == "trace: 60/100 products (60%), 40 s left\n"


def test_a_total_that_turns_out_on_the_way_and_none(capsys: pytest.CaptureFixture[str]) -> None:
    time = Time()
    for total in (None, 2):
        with Lines(total, "point", now=time) as bar:
            bar.set_description("landscape")
            time.seconds += 300
            bar.update(3)
    assert capsys.readouterr().err.splitlines() == [
        "landscape: 3 points, 5.0 min so far",
        "landscape: 3 points, 5.0 min",
        "landscape: 3/3 points (100%), 0 s left",
        "landscape: 3/3 points (100%), 5.0 min",
    ]


def test_nothing_is_said_after_an_error_and_by_other_processes(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        with Lines(2, "product") as bar:
            bar.update()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with Lines(2, "product", disable=True) as bar:
        bar.update()
    assert capsys.readouterr().err == ""


def test_in_a_pipe_there_are_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(progress_bar(Options(), 3, "product"), Lines)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_bar(Options(), 3, "product", "trace") as bar:
        assert isinstance(bar, progress.tqdm)
        bar.update()
    assert "trace" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_a_terminal_has_a_bar_and_a_file_none() -> None:
    code = (
        "import time; from hessfn.reporting.progress import *\n"
        "with progress_bar(Options(), 2, 'product', 'trace') as bar:\n"
        "    bar.update(); time.sleep(0.6); bar.update()"
    )
    import fcntl
    import pty
    import struct
    import termios

    above, below = pty.openpty()
    fcntl.ioctl(below, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    subprocess.run([sys.executable, "-c", code], stderr=below, check=True)
    os.close(below)
    shown = b""
    with contextlib.suppress(OSError):  # how the end of a terminal reads on Linux
        while part := os.read(above, 10_000):
            shown += part
    os.close(above)
    assert b"\rtrace" in shown and b"2/2" in shown
    piped = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
    assert re.fullmatch(r"trace: 2/2 products \(100%\), \d s\n", piped)
