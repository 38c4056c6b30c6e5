"""Trees of tensors in files: hashed, written whole or not at all, and never read as anything but numbers."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hessfn import tree
from hessfn.tree import Tree

FORMAT = "hessfn journal 1"


class Refused(ValueError):
    """What is on the disk is damaged, or of something else."""


def fingerprint(x: Tree) -> str:
    """SHA-256 of a tree: of the names, dtypes, shapes and bytes of its tensors, and of its numbers and strings.

    >>> fingerprint({"w": torch.zeros(2)}) == fingerprint({"w": torch.zeros(1, 2)})
    False
    """
    digest = hashlib.sha256()
    for name, leaf in zip(tree.names(x), tree.leaves(x), strict=True):
        if isinstance(leaf, Tensor):
            digest.update(json.dumps([name, *kind(leaf)]).encode())
            digest.update(_bytes(leaf))
        elif leaf is None or isinstance(leaf, str | int | float | bytes | torch.dtype | torch.device):
            digest.update(json.dumps([name, type(leaf).__name__, repr(leaf)]).encode())
        else:
            raise ValueError(
                f"{name!r} is a {type(leaf).__name__}: only tensors, numbers and strings have fingerprints"
            )
    return digest.hexdigest()


def lock(path: Path) -> Any:
    """An open file that no other process can lock until it is closed, or its process has died."""
    file = path.open("a")
    with contextlib.suppress(ImportError):  # on Windows there is none; files are written whole all the same
        import fcntl

        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            message = (
                f"{str(path.parent)!r} is in use by another process: wait until it has ended, or take another folder"
            )
            raise BlockingIOError(message) from None
    return file


def kind(leaf: Tensor) -> tuple[str, list[int]]:
    return str(leaf.dtype).removeprefix("torch."), list(leaf.shape)


def _bytes(leaf: Tensor) -> Any:
    """The entries as flat uint8 in C order: of a contiguous tensor on the CPU, its own memory."""
    own = leaf.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return own.reshape(-1).view(torch.uint8).numpy()


# A record is a line of JSON and the tensors' bytes. Its SHA-256 is of these, its name, and what journal it belongs to.


def write(file: Path, leaves: Sequence[Tensor], of: str) -> None:
    digest = _digest(file, leaves, of)
    parts = [_bytes(leaf) for leaf in leaves]
    for part in parts:
        digest.update(part)
    replace(file, [_header(leaves, digest), *parts])


def read(file: Path, of: str) -> list[Tensor]:
    with file.open("rb") as stream:
        first = stream.readline()
        leaves = _blank(first, file.stat().st_size - len(first))
        if leaves is not None:
            digest = _digest(file, leaves, of)
            for part in map(_bytes, leaves):
                stream.readinto(part)
                digest.update(part)
    if leaves is None or first != _header(leaves, digest):
        raise Refused(
            f"{str(file)!r} is damaged or of another journal: delete this file, and its product is computed again"
        )
    return leaves


def _blank(header: bytes, num_bytes: int) -> list[Tensor] | None:
    """Tensors of the kinds in a header, if they take just so many bytes."""
    try:
        kinds = [(getattr(torch, dtype), shape) for dtype, shape in json.loads(header)["leaves"]]
        if sum(dtype.itemsize * math.prod(shape) for dtype, shape in kinds) != num_bytes:
            return None
        return [torch.empty(shape, dtype=dtype) for dtype, shape in kinds]
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError):
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
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".part", delete=False) as stream:
            part = Path(stream.name)
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
            raise OSError(error.errno, message) from error
        raise
