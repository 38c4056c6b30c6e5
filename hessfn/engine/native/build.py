"""From C to a loaded library: compiled once on a machine, kept in the user's cache, checked before it is loaded."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import logging
import os
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hessfn.core.config import processor

FLAGS = ["-x", "c", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared"]
SECONDS = 8.0  # that a compiler may take; half of one is usual
_LOG = logging.getLogger("hessfn")


class Built(NamedTuple):
    library: ctypes.CDLL
    digest: str  # of the bytes of its file


def build(source: Path) -> Built | None:
    """The library from the cache, or compiled into it, or None; it may take a compiler's time, but never hangs."""
    with _folder() as folder:
        found = filter(None, map(_load, _finished(source, folder)))
        return next(found, None) or _compiled(source, folder)


def can_be_had(source: Path) -> bool:
    """Whether :func:`build` will find a library, as far as can be told without compiling it."""
    folder = cache_folder()
    return (folder is not None and bool(_finished(source, folder))) or bool(compilers())


def compilers() -> list[list[str]]:
    """The commands to try, in this order; ``CXX`` may have several words, as in ``ccache g++``."""
    try:
        own = shlex.split(os.environ.get("CXX", ""), posix=os.name == "posix")
    except ValueError:  # an open quotation
        own = []
    found = [own, ["g++"], ["clang++"], ["c++"]]
    return [words for i, words in enumerate(found) if words and shutil.which(words[0]) and words not in found[:i]]


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    cache = cache_folder()
    if cache is not None:
        yield cache
    else:  # what is loaded stays when its file goes
        with tempfile.TemporaryDirectory(prefix="hessfn-", ignore_cleanup_errors=True) as private:
            yield Path(private)


def cache_folder() -> Path | None:
    """The user's folder for compiled code, if nobody else can put code into it."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    with contextlib.suppress(OSError, RuntimeError):  # read-only, or no home
        folder = (base if base.is_absolute() else Path.home() / ".cache") / "hessfn"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _is_ours_alone(folder.stat()) and os.access(folder, os.W_OK):
            return folder
        _LOG.info("%s is not used: it belongs to another user, or others may write to it", folder)
    return None


def _is_ours_alone(status: os.stat_result) -> bool:
    if os.name != "posix":  # there a home is its user's alone
        return True
    return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def library_name(source: Path) -> str:
    """Of the source, the flags and the processor: homes are shared between machines, native code is not."""
    given = json.dumps([FLAGS, processor()], sort_keys=True).encode()
    return f"{source.parent.name}-{_digest(source.read_bytes() + given)}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _finished(source: Path, folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{library_name(source)}-*.so"))


def _load(file: Path) -> Built | None:
    """A library whose bytes are those that its name tells: loading half a file would end the process."""
    try:
        digest = _digest(file.read_bytes())
        if not file.stem.endswith(f"-{digest}"):
            _LOG.warning("%s is damaged, and is made anew", file)
            file.unlink(missing_ok=True)
            return None
        return Built(_opened(file), digest)
    except OSError as error:
        _LOG.warning("%s cannot be loaded: %s", file, error)
        return None


def _opened(file: Path) -> ctypes.CDLL:
    with contextlib.suppress(OSError):
        return ctypes.CDLL(str(file))
    # Some homes are on disks from which no code may run.
    with tempfile.TemporaryDirectory(prefix="hessfn-", ignore_cleanup_errors=True) as private:
        return ctypes.CDLL(shutil.copy(file, private))


def _compiled(source: Path, folder: Path) -> Built | None:
    """By the first compiler whose library can be loaded."""
    found = compilers()
    if not found:
        _LOG.info("there is no compiler for %s: neither CXX nor g++, clang++ or c++ is on the PATH", source.name)
    for compiler in found:
        file = compiled_by(compiler, source, folder)
        if file is not None:
            built = _load(file)
            if built is not None:
                _LOG.info("%s was compiled by %s into %s", source.name, shlex.join(compiler), file)
                return built
            file.unlink(missing_ok=True)
    return None


def compiled_by(compiler: list[str], source: Path, folder: Path) -> Path | None:
    """The finished file, which appears whole under its name, also where two processes compile at once."""
    part = None
    try:
        handle, part = tempfile.mkstemp(dir=folder, prefix=f"{library_name(source)}-", suffix=".part")
        os.close(handle)
        wrong = _run([*compiler, *FLAGS, str(source), "-o", part])
        if wrong is None:
            made = folder / f"{library_name(source)}-{_digest(Path(part).read_bytes())}.so"
            os.replace(part, made)
            return made
    except OSError as error:
        wrong = str(error)
    finally:
        if part is not None:
            Path(part).unlink(missing_ok=True)
    _LOG.warning("%s was not compiled by %s: %s", source.name, shlex.join(compiler), wrong)
    return None


def _run(command: list[str]) -> str | None:
    """What went wrong, if something did. A compiler that hangs is ended with all that it has started."""
    # Not a pipe: a child that outlives its parent would keep it open.
    with tempfile.TemporaryFile() as said:
        options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": said, "stderr": said}
        process = subprocess.Popen(command, start_new_session=True, **options)
        try:
            status = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            _end(process)
            return f"it was not done after {SECONDS:g} s"
        except BaseException:
            _end(process)
            raise
        if status == 0:
            return None
        said.seek(0)
        lines = said.read().decode("utf-8", "replace").strip().splitlines()
        return "; ".join(lines[:3]) or f"it ended with status {status}"


def _end(process: subprocess.Popen[bytes]) -> None:
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
