"""What the command says in a terminal: text that cannot steer it, errors in one line, and an end in order."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, TextIO

from hessfn.core.errors import CannotWrite, HessfnError
from hessfn.core.notes import notes


def say(text: str, stream: TextIO | None = None) -> None:
    """Prints lines, on stdout if nothing else is said. What a terminal would obey or cannot show is escaped."""
    stream = sys.stdout if stream is None else stream
    encoding = stream.encoding or "utf-8"
    shown = "\n".join(printable(line) for line in text.split("\n"))
    # Flushed here: a pipe that is closed or a disk that is full is an error while there is someone to say so.
    print(shown.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


def printable(text: str) -> str:
    """Without control characters and what is no Unicode: these are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def in_one_line(error: BaseException) -> str:
    """What an error says, and then what the contexts that it went through know of it."""
    said = " ".join(str(error.strerror if isinstance(error, CannotWrite) else error).split())
    if not isinstance(error, HessfnError | ValueError | RuntimeError | OSError | ImportError) or not said:
        said = f"{type(error).__name__}{': ' if said else ''}{said} (--traceback shows where it came from)"
    return "; ".join([said, *notes(error)])


@contextlib.contextmanager
def ended_in_order() -> Iterator[list[int]]:
    """Within it SIGTERM, by which schedulers and torchrun end a process, is a KeyboardInterrupt, and cleared up after.

    The list has the signal afterwards. Only the main thread can do so; elsewhere nothing changes.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    process = os.getpid()

    def end(number: int, frame: Any) -> None:
        if os.getpid() != process:  # a fork, such as a DataLoader's worker, is none of ours to end in order
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not received:  # once: what is under way then is the end
            received.append(number)
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


def rank() -> str:
    """Which of the processes this is that torchrun has started, as the beginning of a line; else nothing."""
    return f"rank {os.environ['RANK']}: " if "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ else ""
