"""What a batch consists of: its tensors, how many samples it has, and some of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hessfn.core import tree
from hessfn.core.errors import InvalidInput


def tensors(batch: Any) -> list[Tensor]:
    return [x for x in tree.leaves(batch) if isinstance(x, Tensor)]


def length(batch: Any) -> int:
    first = next(iter(tensors(batch)), None)
    if first is None or first.dim() == 0 or len(first) == 0:
        found = "no tensor" if first is None else f"a first tensor of shape {tuple(first.shape)}"
        raise InvalidInput(f"a batch must have samples along the first axis of its tensors, but this one has {found}")
    return len(first)


def rows(batch: Any, start: int, stop: int) -> Any:
    return tree.map(lambda x: x[start:stop] if isinstance(x, Tensor) and x.dim() else x, batch)


def two_parts(batch: Any, most: int | None = None) -> tuple[Any, Any, Any] | None:
    """Some samples of a batch (all, or at most so many), their first third and the rest; None where it has no parts."""
    size = length(batch)
    leaves = tree.leaves(batch)
    # An object is not cut, and a tensor of another length is not one of samples.
    if not all(x is None or isinstance(x, Tensor | str | int | float) for x in leaves):
        return None
    if any(x.dim() and len(x) != size for x in tensors(batch)):
        return None
    stop = size if most is None else min(size, most)
    cut = max(1, stop // 3)
    return (rows(batch, 0, stop), rows(batch, 0, cut), rows(batch, cut, stop)) if stop > 1 else None
