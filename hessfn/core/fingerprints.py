"""Whether two trees are the same: exactly, by a hash of their bytes; or cheaply and under transforms, by a checksum."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.core.arrays import as_tensor
from hessfn.core.errors import InvalidInput
from hessfn.core.torch_private import under_functorch
from hessfn.core.tree import Tree


def fingerprint(x: Tree) -> str:
    """SHA-256 of a tree: of the names, dtypes, shapes and bytes of its tensors, and of its numbers and strings.

    >>> fingerprint({"w": torch.zeros(2)}) == fingerprint({"w": torch.zeros(1, 2)})
    False
    """
    digest = hashlib.sha256()
    for name, leaf in zip(tree.names(x), tree.leaves(x), strict=True):
        if isinstance(leaf, Tensor):
            digest.update(json.dumps([name, *kind(leaf)]).encode())
            digest.update(as_bytes(leaf))
        elif leaf is None or isinstance(leaf, str | int | float | bytes | torch.dtype | torch.device):
            digest.update(json.dumps([name, type(leaf).__name__, repr(leaf)]).encode())
        else:
            raise InvalidInput(
                f"{name!r} is a {type(leaf).__name__}: only tensors, numbers and strings have fingerprints"
            )
    return digest.hexdigest()


def kind(leaf: Tensor) -> tuple[str, list[int]]:
    return str(leaf.dtype).removeprefix("torch."), list(leaf.shape)


def as_bytes(leaf: Tensor) -> Any:
    """The entries as flat uint8 in C order: of a contiguous tensor on the CPU, its own memory."""
    own = leaf.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return own.reshape(-1).view(torch.uint8).numpy()


def checksum(x: Tree) -> Tensor:
    """A sum of all bits of each tensor and array, ``(number of them,)`` int64: other data, almost surely another sum.

    No transfer, also under ``vmap``; the order of the entries of a tensor does not count.
    """
    flat = [as_tensor(leaf) for leaf in tree.leaves(x)]
    sums = [_sum_of_bits(leaf) for leaf in flat if isinstance(leaf, Tensor)]
    return (
        torch.stack([x.to(sums[0].device) for x in sums]) if sums else torch.zeros(0, dtype=torch.int64, device="cpu")
    )


def _sum_of_bits(leaf: Tensor) -> Tensor:
    entries = torch.view_as_real(leaf.detach().resolve_conj()) if leaf.is_complex() else leaf.detach()
    # Before 2.12 vmap had no rule for a view as another dtype: the operation below has one.
    sums = torch.ops.hessfn.sums_of_bits if under_functorch() else _sums_of_bits
    found: Tensor = sums(entries.reshape(1, -1))[0]
    return found


def _sums_of_bits(rows: Tensor) -> Tensor:
    if not rows.numel():
        return torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    return rows.contiguous().view(_BITS[rows.element_size()]).sum(1, dtype=torch.int64)


def _sums_for_each(info: Any, in_dims: Any, rows: Tensor) -> tuple[Tensor, int]:
    rows = rows.movedim(in_dims[0], 0)
    return torch.ops.hessfn.sums_of_bits(rows.flatten(0, 1)).reshape(rows.shape[:2]), 0


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_operation = torch.library.custom_op(
    "hessfn::sums_of_bits", _sums_of_bits, mutates_args=(), schema="(Tensor rows) -> Tensor"
)
_operation.register_fake(lambda rows: rows.new_empty(len(rows), dtype=torch.int64))
_operation.register_vmap(_sums_for_each)
