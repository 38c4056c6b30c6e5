"""Products kept on disk, so that whatever consumes them can be killed and called again."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.core.arguments import require_function
from hessfn.core.config import numerics
from hessfn.core.errors import InvalidInput, JournalError
from hessfn.core.fingerprints import fingerprint, kind
from hessfn.core.locks import OfThisProcess
from hessfn.core.memory import own
from hessfn.core.probes import gaussian
from hessfn.core.torch_private import is_functorch_wrapped_tensor
from hessfn.core.tree import MatVec, T, Tree
from hessfn.core.warn import warn
from hessfn.storage import records

_RECORD = re.compile(r"[0-9a-f]{64}-\d+")


def journal(
    matvec: MatVec[T], folder: str | os.PathLike[str], *, key: Mapping[str, Any] | None = None, resume: bool = True
) -> MatVec[T]:
    """The same products, each written to disk, so that a run that was killed can start again and read them.

    Routines are pure: with the same arguments they ask for the same vectors. So every routine resumes, and returns the
    same bits as without the interruption. With other arguments, such as more probes, it uses the products that exist. A
    product is found by a hash of its vector. A vector that one run asks for twice is computed twice, so that
    ``check_matvec`` still works. A product whose file is damaged is computed again, with a warning.

    The last bits also depend on the number of threads and on the compiled kernels (:func:`hessfn.show_config`): a
    journal made with others is refused. :func:`hessfn.hvp` also changes the last bits when a trace takes over from the
    loss: with ``trace_after=0`` all its products are made in one way.

    Args:
        matvec: or any other function from a tree to one of the same names.
        folder: made at the first product, with one file for each; delete it afterwards. Journals and threads of one
            process may share it.
        key: what the products depend on besides the vector, by name: parameters, data, settings, as trees of tensors,
            numbers and strings. A journal with another key is refused; the message names the entries that differ.
            Without a key, every run first computes one extra product, which identifies the matrix to the last bit.
        resume: False deletes the products that exist.

    Returns:
        A matvec on plain tensors: no ``DTensor``, and not under ``vmap``, ``torch.compile`` or autograd. Around it,
        ``all_reduce`` works if every rank has a folder of its own; a journal around ``all_reduce`` would leave ranks
        waiting for each other.

    Cost: a hash of the vector and of the product. On disk, the bytes of one vector a product.

    Raises:
        ValueError: ``matvec`` is no function; or, at a product, the journal is of another matrix, or the file that says
            of which one is damaged: the message says what to do.
        OSError: another process uses the folder, or it cannot be written, as on a full disk. Products already there
            stay good.

    >>> import tempfile
    >>> folder, w = tempfile.TemporaryDirectory(), torch.tensor([1.0, 2.0])
    >>> journal(lambda v: w * v, folder.name, key={"w": w})(torch.ones(2))
    tensor([1., 2.])
    >>> journal(lambda v: 1 / 0, folder.name, key={"w": w})(torch.ones(2))
    tensor([1., 2.])
    >>> journal(lambda v: v, folder.name, key={"w": torch.ones(2)})(torch.ones(2))
    Traceback (most recent call last):
    hessfn.core.errors.JournalError: the journal in ... is of another matrix: it has another 'w'. ...
    >>> folder.cleanup()
    """
    require_function(matvec, "matvec", "journal(matvec, folder)")
    path = Path(folder)
    opened: dict[int, _Opened] = OfThisProcess()  # by process: a fork has none of its parent's holds
    asked: dict[str, set[int]] = OfThisProcess()

    def opened_here(v: T) -> _Opened:
        process = os.getpid()
        if process not in opened:
            path.mkdir(parents=True, exist_ok=True)
            hold = records.share(path / "lock")
            given = {"matrix": matvec(gaussian(v, 1)[0])} if key is None else key
            identity = _identity(v, given)
            with hold.turn:
                if process not in opened:
                    _open(path, identity, resume or bool(opened))
                    hold.identity = json.dumps(identity, sort_keys=True)
                    opened[process] = _Opened(path, hold, hold.identity)
        return opened[process]

    def journaled(v: T) -> T:
        _require_plain(v)
        here, vector = opened_here(v), fingerprint(v)
        with here.hold.turn:
            before = asked.setdefault(vector, set())
            number = next(i for i in itertools.count(1) if i not in before)
            before.add(number)
        try:
            return here.product(f"{vector}-{number}", matvec, v)
        except BaseException:
            before.discard(number)  # it was not had: who asks again, asks for this one
            raise

    return journaled


class _Opened(NamedTuple):
    path: Path
    hold: records.Hold
    of: str

    def product(self, name: str, matvec: MatVec[T], v: T) -> T:
        """The product on the disk, or a new one, which then is. Other threads wait for the disk, not for the matvec."""
        file = self.path / name
        with self.hold.turn:
            self._require_still_ours()
            known = file.exists()
            kept = records.read(file, self.of) if known else None
        if known and kept is None:
            warn(f"{str(file)!r} is damaged or of another journal: its product is computed again")
        if kept is not None:
            product = [x.to(like.device) for x, like in zip(kept, tree.leaves(v), strict=True)]
        else:
            product = _like(matvec(v), v)
            with self.hold.turn:
                self._require_still_ours()
                records.write(file, product, self.of)
        return tree.unflatten(product, v)

    def _require_still_ours(self) -> None:
        if self.hold.identity != self.of:
            raise JournalError(
                f"the journal in {str(self.path)!r} was started over for another matrix since: make this one anew, in "
                "another folder"
            )


def products_in(folder: Path) -> list[Path]:
    """The products in a journal's folder."""
    return [file for file in folder.iterdir() if _RECORD.fullmatch(file.name)]


def _like(product: Tree, v: Tree) -> list[Tensor]:
    named = dict(zip(tree.names(product), tree.leaves(product), strict=True))
    if named.keys() != set(tree.names(v)):
        raise InvalidInput("the product is a tree of other leaves than the vector: a journal needs the same names")
    # Contiguous as what is read: the order of sums, and so their last bits, are the memory's.
    return [own(named[name].detach()) for name in tree.names(v)]


def _require_plain(v: Tree) -> None:
    for leaf in tree.leaves(v):
        plain = not torch.compiler.is_compiling() and type(leaf) in (Tensor, torch.nn.Parameter) and not leaf.is_meta
        if not plain or is_functorch_wrapped_tensor(leaf) or (leaf.requires_grad and torch.is_grad_enabled()):
            raise InvalidInput(
                "a journal takes plain tensors, one vector at a time: no DTensors, and not under vmap (batch_size=1), "
                "torch.compile or autograd. Transform the matvec first, and put the journal around the result"
            )


def _open(path: Path, key: dict[str, Any], resume: bool) -> None:
    about = path / "journal.json"
    for file in [*path.glob("*.part"), *([] if resume else [*products_in(path), about])]:
        file.unlink(missing_ok=True)
    if resume and products_in(path) and not about.exists():
        raise JournalError(f"{str(about)!r} is missing, so nobody knows what its products are of: delete the folder")
    if resume and about.exists():
        _require_same(about, key)
    else:
        records.replace(about, [json.dumps({"format": records.FORMAT, "key": key}, indent=1).encode()])


def _require_same(about: Path, key: dict[str, Any]) -> None:
    try:
        found = json.loads(about.read_text("utf-8"))
        kept, known = found["key"], found["format"] == records.FORMAT
        names = [name for name in {**kept, **key} if kept.get(name) != key.get(name)]
    except (ValueError, KeyError, TypeError, AttributeError):
        known = False
    if not known:
        raise JournalError(
            f"{str(about)!r} is damaged or of another version of hessfn: delete the folder to start over"
        )
    if names:
        differ = ", ".join(
            f"another {n!r}" + (f" ({kept[n]}, here {key[n]})" if n in kept and _is_short(kept[n], key.get(n)) else "")
            for n in names
        )
        raise JournalError(
            f"the journal in {str(about.parent)!r} is of another matrix: it has {differ}. Take another folder, or "
            "delete this one to start over"
        )


def _identity(v: Tree, key: Mapping[str, Any]) -> dict[str, Any]:
    """What products depend on, by name. Sums in other parts, by threads or in a kernel, end in other bits."""
    own = {"vectors": _describe(v), **numerics()}
    return own | {f"key {name}" if name in own else name: x for name, x in _fingerprints(key).items()}


def _fingerprints(key: Mapping[str, Any]) -> dict[str, Any]:
    return {name: x if _is_short(x) else f"sha256 {fingerprint(x)}" for name, x in key.items()}


def _is_short(*values: Any) -> bool:
    """Whether a value is kept as it is, so that a message can show it."""
    return all(
        isinstance(x, int | float) or (isinstance(x, str) and len(x) < 60 and not x.startswith("sha256 "))
        for x in values
    )


def _describe(v: Tree) -> str:
    kinds = [[name, *kind(leaf)] for name, leaf in zip(tree.names(v), tree.leaves(v), strict=True)]
    dtypes = " and ".join(sorted({kind(leaf)[0] for leaf in tree.leaves(v)}))
    leaves = hashlib.sha256(json.dumps(kinds).encode()).hexdigest()[:8]
    return f"{tree.numel(v)} {dtypes}, leaves {leaves}"
