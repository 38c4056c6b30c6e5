"""Tensors in files: hashed, written whole or not at all, and never read as anything but numbers."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from hessfn.core.errors import CannotWrite, FolderInUse
from hessfn.core.fingerprints import as_bytes, kind
from hessfn.core.locks import Lock

FORMAT = "hessfn journal 2"


class Hold:
    """A folder that is ours by the lock on a file in it, until this is closed or dropped, or the process has died."""

    def __init__(self, path: Path) -> None:
        self.turn = Lock()  # of the threads that share this hold, at the folder's files
        self.identity = ""  # what the folder's records are of, as its last journal said
        # Not at once: one that has just been dropped, by another thread or a process that was killed, may linger.
        self._lock = FileLock(path, timeout=0.5, thread_local=False)
        try:
            self._lock.acquire()
        except Timeout:
            raise FolderInUse(
                f"{str(path.parent)!r} is in use by another process or thread: wait until it has ended, or take "
                "another folder"
            ) from None

    def close(self) -> None:
        self._lock.release()

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def lock(path: Path) -> Hold:
    """A hold for its caller alone: nobody else has the folder, in no process and no thread."""
    return Hold(path)


def share(path: Path) -> Hold:
    """The one hold that all who ask here have in common, in one process; it ends with the last of them."""
    with _SHARING:
        found = _SHARED.get(_place(path)) if path.exists() else None
        if found is None:
            found = Hold(path)
            _SHARED[_place(path)] = found
        return found


def _place(path: Path) -> tuple[int, int, int]:
    """The file itself, whatever its path: a folder that was deleted and made anew has another, and so has a fork."""
    status = path.stat()
    return os.getpid(), status.st_dev, status.st_ino


_SHARED: weakref.WeakValueDictionary[tuple[int, int, int], Hold] = weakref.WeakValueDictionary()
_SHARING = Lock()


# A record is a line of JSON and the tensors' bytes. Its SHA-256 is of these, its name, and what journal it belongs to.


def write(file: Path, leaves: Sequence[Tensor], of: str) -> None:
    digest = _digest(file, leaves, of)
    parts = [as_bytes(leaf) for leaf in leaves]
    for part in parts:
        digest.update(part)
    replace(file, [_header(leaves, digest), *parts])


def read(file: Path, of: str) -> list[Tensor] | None:
    """The tensors of a record; None where it cannot be read, is damaged, or belongs to another journal."""
    try:
        with file.open("rb") as stream:
            first = stream.readline()
            leaves = _blank(first, os.fstat(stream.fileno()).st_size - len(first))
            if leaves is None:
                return None
            digest = _digest(file, leaves, of)
            for part in map(as_bytes, leaves):
                stream.readinto(part)
                digest.update(part)
    except OSError:  # a sector that is lost, say: the record is made again, and then lies elsewhere
        return None
    return leaves if first == _header(leaves, digest) else None


def _blank(header: bytes, num_bytes: int) -> list[Tensor] | None:
    """Tensors of the kinds in a header, if they take just so many bytes."""
    try:
        kinds = [(getattr(torch, dtype), shape) for dtype, shape in json.loads(header)["leaves"]]
        if sum(dtype.itemsize * math.prod(shape) for dtype, shape in kinds) != num_bytes:
            return None
        return [torch.empty(shape, dtype=dtype, device="cpu") for dtype, shape in kinds]
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError):
        return None


def _digest(file: Path, leaves: Sequence[Tensor], of: str) -> Any:
    return hashlib.sha256(json.dumps([FORMAT, of, file.name, [kind(leaf) for leaf in leaves]]).encode())


def _header(leaves: Sequence[Tensor], digest: Any) -> bytes:
    kinds = [kind(leaf) for leaf in leaves]
    return json.dumps({"format": FORMAT, "leaves": kinds, "sha256": digest.hexdigest()}).encode() + b"\n"


def replace(file: Path, parts: Iterable[Any]) -> None:
    """Written whole or not at all, whenever the process, the machine or the disk gives up."""
    part = None
    try:
        # Not NamedTemporaryFile: on a full disk its own closing fails halfway, of which Python 3.14 warns.
        handle, name = tempfile.mkstemp(dir=file.parent, suffix=".part")
        part = Path(name)
        with os.fdopen(handle, "wb") as stream:
            for data in parts:
                stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, file)
    except BaseException as error:
        if part is not None:
            part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            message = (
                f"{str(file)!r} cannot be written ({error.strerror}): the products already there are good, so make "
                "room and run it again"
            )
            raise CannotWrite(error.errno, message) from error
        raise
