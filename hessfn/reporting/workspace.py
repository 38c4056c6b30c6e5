"""The folder of a report: what is kept in it until the report is written, and how the files get there all at once."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hessfn.core.errors import FolderInUse, InvalidInput
from hessfn.core.tree import MatVec
from hessfn.reporting.options import Options
from hessfn.storage import records
from hessfn.storage.product_journal import journal, products_in

_UNFINISHED = ".unfinished"
_SCRATCH = ".report-"

Keep = Callable[[str, MatVec], MatVec]


class Workspace(NamedTuple):
    """Where a report puts its files while it is not finished."""

    journals: Path | None  #: a folder of journals; None where no products are kept
    scratch: Path | None  #: a folder whose files become the report; None where this process writes none


@contextlib.contextmanager
def open_workspace(out: Path, options: Options) -> Iterator[Workspace]:
    """Both folders inside ``out``, for one process at a time; nothing is made where another process writes.

    Raises:
        FolderInUse: another process has opened it.
        InvalidInput: ``out`` cannot be written to.
    """
    if not options.is_first_process:
        yield Workspace(None, None)
        return
    with _unfinished(out) as journals, staging(out) as scratch:
        yield Workspace(journals if options.keeps_products else None, scratch)


def keep_in(folder: Path | None, key: Mapping[str, Any], *, resume: bool) -> Keep:
    """``keep(name, matvec)``: a journal in a folder of that name; without a folder the matvec itself.

    Products of before are dropped, all of them at once, unless they are to be resumed.
    """
    if folder is None:
        return lambda name, matvec: matvec
    if not resume:
        _drop_journals(folder)
    return lambda name, matvec: journal(matvec, folder / name, key=key)


def num_products(out: Path) -> int:
    """How many products an unfinished report in ``out`` has made."""
    return sum(len(products_in(folder)) for folder in (out / _UNFINISHED).glob("*") if folder.is_dir())


@contextlib.contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A scratch folder inside ``out``. Its files move to ``out`` when all of them are there, or never."""
    with _folder(out):
        with _explained(out):
            scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=out))
        try:
            yield scratch
            for file in sorted(scratch.iterdir()):
                os.replace(file, out / file.name)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _unfinished(out: Path) -> Iterator[Path]:
    """The folder of journals; gone once the report is written.

    It stays after what may not happen again, such as an interrupt or a full disk; after a mistake, which will happen
    again, only products of before stay.
    """
    journals = out / _UNFINISHED
    with _folder(out), _locked(journals, out):
        for scratch in out.glob(f"{_SCRATCH}*"):  # of a process that was killed
            shutil.rmtree(scratch, ignore_errors=True)
        stays, before = False, num_products(out)
        try:
            yield journals
        except BaseException as error:
            stays = (before if isinstance(error, ValueError) else num_products(out)) > 0
            raise
        finally:
            if not stays:
                # At once, so that a kill leaves all of the products or none.
                renamed = journals.rename(tempfile.mktemp(prefix=_SCRATCH, dir=out))
                shutil.rmtree(renamed, ignore_errors=True)


@contextlib.contextmanager
def _folder(path: Path) -> Iterator[None]:
    """A folder with its parents. Those that are new and still empty at the end are removed."""
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        with _explained(path):
            path.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        with contextlib.suppress(OSError):  # the first that is not empty, and so its parents
            for folder in new:
                folder.rmdir()


@contextlib.contextmanager
def _locked(folder: Path, out: Path) -> Iterator[None]:
    with _explained(out):
        folder.mkdir(exist_ok=True)
        lock = records.lock(folder / "lock")
    with lock:
        yield


@contextlib.contextmanager
def _explained(out: Path) -> Iterator[None]:
    """An error of the system becomes one that names the folder and the remedy."""
    try:
        yield
    except FolderInUse:
        raise
    except OSError as error:
        raise InvalidInput(
            f"the report cannot be written to {str(out)!r} ({error.strerror}): take another folder"
        ) from error


def _drop_journals(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
