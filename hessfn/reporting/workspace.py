"""The folder of a report: what is kept in it until the report is written, and how the files get there all at once."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hessfn.core.errors import CannotWrite, FolderInUse, InvalidInput
from hessfn.core.notes import add_note
from hessfn.core.tree import MatVec
from hessfn.parallel.all_reduce import gather
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

    Processes of a group meet here before the first of them makes anything: if it is killed, the others clear up.

    Raises:
        FolderInUse: another process has opened it.
        InvalidInput: ``out`` cannot be written to, or there is nothing to resume in it.
        CannotWrite: a file of the report cannot be written, as on a full disk.
    """
    if not options.is_first_process:
        try:
            _meet(options)
            yield Workspace(None, None)
        except BaseException:
            try:
                _clear_after_a_kill(out)
            except KeyboardInterrupt:  # torchrun has seen the kill, too, and ends those who are left: once
                _clear_after_a_kill(out)
            raise
        return
    _meet(options)
    if options.resume:
        with _explained(out):
            found = (out / _UNFINISHED).is_dir()
        if not found:
            raise InvalidInput(
                f"there is nothing to resume in {str(out)!r}: no report was begun there, or none was left unfinished. "
                "Without resume a report begins anew"
            )
    with _unfinished(out) as journals, staging(out) as scratch:
        yield Workspace(journals if options.keeps_products else None, scratch)


def _meet(options: Options) -> None:
    if options.group is not None:
        gather(None, options.group)


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
    return len(_products(out))


def _products(out: Path) -> dict[Path, int]:
    """The files of the products in ``out``, and when each was written."""
    folders = [folder for folder in (out / _UNFINISHED).glob("*") if folder.is_dir()]
    return {file: file.stat().st_mtime_ns for folder in folders for file in products_in(folder)}


@contextlib.contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A scratch folder inside ``out``. Its files move to ``out`` when all of them are there, or never."""
    with _folder(out):
        with _explained(out):
            scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=out))
        try:
            with _named(scratch, out):
                yield scratch
            _move(scratch, out)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _unfinished(out: Path) -> Iterator[Path]:
    """The folder of journals; gone once the report is written.

    It stays after what may not happen again, such as an interrupt or a full disk; after a mistake, which will happen
    again, only products of before stay. The error has a note of what is kept, if that is this report's: products of
    before may be those of another problem.
    """
    journals = out / _UNFINISHED
    with _folder(out), _locked(journals, out):
        _remove_scratch(out)
        stays, before = False, _products(out)
        try:
            yield journals
        except BaseException as error:
            mistake, now = isinstance(error, ValueError), _products(out)
            stays = bool(before if mistake else now)
            if not mistake and now.items() - before.items():
                add_note(error, f"{len(now)} products are kept, --resume goes on from there")
            raise
        finally:
            if not stays:
                # At once, so that a kill leaves all of the products or none.
                renamed = journals.rename(tempfile.mktemp(prefix=_SCRATCH, dir=out))
                shutil.rmtree(renamed, ignore_errors=True)


def _remove_scratch(out: Path) -> None:
    """Removes what a process that was killed has half written."""
    for scratch in out.glob(f"{_SCRATCH}*"):
        shutil.rmtree(scratch, ignore_errors=True)


def _clear_after_a_kill(out: Path) -> None:
    """Removes what the first process has left, if it was killed. A living one has the lock, and does so itself."""
    journals = out / _UNFINISHED
    with contextlib.suppress(OSError):
        if journals.is_dir():
            with records.lock(journals / "lock"):
                _remove_scratch(out)
                if not _products(out):
                    shutil.rmtree(journals)


@contextlib.contextmanager
def _folder(path: Path) -> Iterator[None]:
    """A folder with its parents. Those that are new and still empty at the end are removed."""
    new: list[Path] = []
    try:
        with _explained(path):
            new += [folder for folder in (path, *path.parents) if not folder.exists()]
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


@contextlib.contextmanager
def _named(scratch: Path, out: Path) -> Iterator[None]:
    """An error of the system at a file of the scratch folder becomes one that names what the file was to be."""
    try:
        yield
    except CannotWrite:
        raise
    except OSError as error:
        name = _file_of(error, scratch)
        if name is None:
            raise
        remedy = "make room and run it again" if error.errno in _FULL else "take another name or folder"
        raise CannotWrite(error.errno, f"{str(out / name)!r} cannot be written ({error.strerror}): {remedy}") from error


_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


def _file_of(error: OSError, scratch: Path) -> str | None:
    """The file in a scratch folder that an error is about; None where it is about something else."""
    if isinstance(error.filename, str):
        path = Path(error.filename)
        return "" if path == scratch else path.name if path.parent == scratch else None
    # A file that is written to does not tell its name: it is the one that was last written to.
    files = sorted(scratch.iterdir(), key=lambda file: file.stat().st_mtime_ns)
    return files[-1].name if files and error.errno in _FULL else None


def _move(scratch: Path, out: Path) -> None:
    files = sorted(scratch.iterdir())
    for file in files:
        target = out / file.name
        if target.exists() and not target.is_file():  # a folder or a device; asked before any file is moved
            raise CannotWrite(errno.EEXIST, f"{str(target)!r} cannot be written (it is no file): take another name")
    try:
        for file in files:
            os.replace(file, out / file.name)
    except OSError as error:
        message = f"{error.filename2!r} cannot be written ({error.strerror}): take another folder"
        raise CannotWrite(error.errno, message) from error


def _drop_journals(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
