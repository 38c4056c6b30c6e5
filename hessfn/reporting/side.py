"""One side of a comparison: ``report.json`` of a folder, read and checked."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, NamedTuple

from hessfn.core.errors import InvalidInput
from hessfn.reporting.schema import parsed
from hessfn.reporting.text import cut, printable

_MOST_BYTES = 2**26  # a report of a thousand layers with a thousand samples each is a third of that


class Side(NamedTuple):
    """What the ``report.json`` of one folder says."""

    folder: str  #: as it was given, with nothing in it that a terminal obeys
    result: dict[str, Any]  #: as :func:`hessfn.report` returns it, with NaN for null


def read(folder: str | Path) -> Side:
    """``report.json`` of a folder, checked. Nothing in it is trusted: it may be anybody's file.

    Raises:
        InvalidInput: there is none, or it is not what this version of hessfn writes; the message is one line.
    """
    file, name = Path(folder) / "report.json", cut(repr(str(folder)), 200)
    where = cut(repr(str(file)), 200)
    remedy = f"hessfn report PROBLEM --out {name} makes one"
    try:
        found = json.loads(_bytes(file).decode("utf-8"), parse_constant=_refuse)
        return Side(printable(str(folder)), parsed(found))
    except OSError as error:
        raise InvalidInput(f"there is no report in {name} ({error.strerror}: {file.name}); {remedy}") from error
    except InvalidInput as error:
        raise InvalidInput(f"{where} is not a report of this version of hessfn ({error}); {remedy}") from None
    except RecursionError:
        raise InvalidInput(f"{where} is not a report of this version of hessfn: it is nested too deep") from None
    except ValueError as error:  # of the file system, of UTF-8 and of JSON
        raise InvalidInput(f"{where} is not JSON: {printable(str(error))}") from error


def _bytes(file: Path) -> bytes:
    """A regular file of a bounded size. To open a pipe would be to wait for who writes into it."""
    descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise InvalidInput("it is no regular file")
        with os.fdopen(descriptor, "rb", closefd=False) as opened:
            content = opened.read(_MOST_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(content) > _MOST_BYTES:
        raise InvalidInput(f"it is larger than {_MOST_BYTES:,} bytes")
    return content


def _refuse(constant: str) -> Any:
    raise InvalidInput(f"it holds {constant}, where null stands for what is not finite")
