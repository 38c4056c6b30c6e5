"""Leaves that lie in parts on several processes, as DTensors: sums over all parts, whole tensors, and back to parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Which part of a tensor lies where."""

    mesh: Any
    placements: tuple[Any, ...]


def layout(x: Any) -> Layout | None:
    """None for a tensor that is whole on this process."""
    # No import: torch.distributed.tensor is slow to load, and who has a DTensor has loaded it.
    return Layout(x.device_mesh, tuple(x.placements)) if hasattr(x, "full_tensor") else None


def whole(x: Tensor) -> Tensor:
    """All of a tensor, on every process."""
    return x if layout(x) is None else x.full_tensor()  # type: ignore[attr-defined]


def place(x: Tensor, where: Layout | None, lead: int = 0) -> Tensor:
    """The part of a whole tensor, with ``lead`` more axes in front, that this process keeps; nothing is sent."""
    if where is None:
        return x
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    placements = [Shard(p.dim + lead) if p.is_shard() else Replicate() for p in where.placements]
    return distribute_tensor(x, where.mesh, placements, src_data_rank=None)


def over_ranks(
    function: Callable[..., Tensor], combine: Callable[[Tensor], Tensor], *leaves: Sequence[Tensor]
) -> Tensor:
    """``combine`` of the values of ``function`` on the parts of every process: one exchange of scalars a layout."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    groups: dict[Layout | None, list[list[Tensor]]] = {}
    for first, *others in zip(*leaves, strict=True):
        where = layout(first)
        if where is None:
            groups.setdefault(None, []).append([first, *others])
            continue
        placements = tuple(Replicate() if p.is_partial() else p for p in where.placements)
        parts = [x.redistribute(where.mesh, placements).to_local() for x in (first, *others)]
        kinds = tuple(Shard(0) if p.is_shard() else Replicate() for p in placements)
        groups.setdefault(Layout(where.mesh, kinds), []).append(parts)
    values = []
    for kind, members in groups.items():
        value = function(*(list(column) for column in zip(*members, strict=True))).reshape(1)
        if kind is not None:
            value = DTensor.from_local(value, *kind, run_check=False).full_tensor()
        values.append(value)
    return combine(torch.cat(values))
