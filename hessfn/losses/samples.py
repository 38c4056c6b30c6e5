"""What a batch consists of: its tensors, how many samples it has, and some of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hessfn.core import tree
from hessfn.core.arrays import as_tensor
from hessfn.core.containers import PLAIN
from hessfn.core.errors import InvalidInput


def tensors(batch: Any) -> list[Tensor]:
    """The tensors of a batch, and its arrays as tensors."""
    return [x for x in map(as_tensor, tree.leaves(batch)) if isinstance(x, Tensor)]


def length(batch: Any) -> int:
    """The number of samples: the length of the first tensor that has an axis."""
    found = tensors(batch)
    first = next((x for x in found if x.dim()), None)
    if first is None or len(first) == 0:
        what = f"a first tensor of shape {tuple(first.shape)}" if first is not None else "no tensor with an axis"
        others = f", only {len(found)} of shape ()" if found and first is None else ""
        raise InvalidInput(
            f"a batch must have samples along the first axis of its tensors, but this one has {what}{others}: stack "
            "its samples, or say by weights= what it counts"
        )
    return len(first)


def moved(batch: Any, device: torch.device | None) -> Any:
    """A batch on a device; the batch itself where it is there."""
    if device is None or all(x.device == device for x in tree.leaves(batch) if isinstance(x, Tensor)):
        return batch

    def is_movable(x: Any) -> bool:
        # A packed sequence moves all but its sizes, which torch wants on the CPU.
        return isinstance(x, (Tensor, nn.utils.rnn.PackedSequence))

    return tree.map(lambda x: x.to(device) if is_movable(x) else x, batch, is_leaf=is_movable)


def rows(batch: Any, start: int, stop: int) -> Any:
    """Some samples of a batch; arrays stay arrays."""
    return tree.map(lambda x: x[start:stop] if isinstance(x, (Tensor, np.ndarray)) and x.ndim else x, batch)


def two_parts(batch: Any, most: int | None = None) -> tuple[Any, Any, Any] | None:
    """Some samples of a batch (all, or at most so many), their first third and the rest; None where it has no parts."""
    size = length(batch)
    # What cannot be known is not cut, and a tensor of another length is not one of samples.
    if not all(isinstance(as_tensor(x), (Tensor, *PLAIN)) for x in tree.leaves(batch)):
        return None
    if any(x.dim() and len(x) != size for x in tensors(batch)):
        return None
    stop = size if most is None else min(size, most)
    cut = max(1, stop // 3)
    some = batch if stop == size else rows(batch, 0, stop)
    return (some, rows(batch, 0, cut), rows(batch, cut, stop)) if stop > 1 else None


def few(batch: Any, least: int = 1) -> Any | None:
    """A part of a batch, for a look at the loss; None where it cannot be cut so.

    It has an eighth of the samples, ``least`` to eight and evenly spaced; of fewer than four samples, which are
    sequences, the first eighth of the positions of each. A tensor of a multiple of the batch's length has several rows
    a sample, as flattened targets have.
    """
    if not all(isinstance(as_tensor(x), (Tensor, *PLAIN)) for x in tree.leaves(batch)):
        return None
    found = [x for x in tensors(batch) if x.dim()]
    size = len(found[0]) if found else 0
    if not size or any(x.layout != torch.strided or len(x) % size for x in found):
        return None
    if size < 4:
        return _shorter(batch, size, next((x.shape[1] for x in found if x.dim() > 1), 0))
    number = min(max(size // 8, least), 8)
    stride = -(-size // number)

    def some(x: Any) -> Any:
        if not np.ndim(x):
            return x
        by_sample = x.reshape(size, len(x) // size, *x.shape[1:])[::stride]
        return _apart(by_sample.reshape(-1, *x.shape[1:]), x)

    return tree.map(some, batch)


def _shorter(batch: Any, size: int, positions: int) -> Any | None:
    """The first eighth of the positions of every sequence, where these are the second axis of all tensors."""

    def rows_of(x: Any) -> int:  # positions in a row of its first axis; 1 of flattened targets, 0 of anything else
        return positions if x.shape[:2] == (size, positions) else int(x.shape == (size * positions,))

    if positions < 64 or not all(map(rows_of, (x for x in tensors(batch) if x.dim()))):
        return None

    def some(x: Any) -> Any:
        if not np.ndim(x):
            return x
        by_position = x.reshape(size, positions, *x.shape[2:])[:, : positions // 8]
        return _apart(by_position if rows_of(x) > 1 else by_position.reshape(-1), x)

    return tree.map(some, batch)


def _apart(part: Any, of: Any) -> Any:
    """Some entries of a tensor, with memory of their own and no history; of an array as they are."""
    return part.detach().clone().requires_grad_(of.requires_grad) if isinstance(of, Tensor) else part


def refuse_uneven(batch: Any) -> None:
    """Raises where the tensors of a batch are not all cut into the same samples."""
    size = length(batch)
    for name, x in zip(tree.names(batch), map(as_tensor, tree.leaves(batch)), strict=True):
        if isinstance(x, Tensor) and x.dim() and len(x) != size:
            raise InvalidInput(
                f"microbatch cuts every tensor along its first axis, but {name!r} has shape {tuple(x.shape)} in a "
                f"batch of {size} samples: give smaller batches instead"
            )
