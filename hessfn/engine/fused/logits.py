"""Logits for some rows at a time: what they are made of, and memory for two chunks of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

ENTRIES = 1 << 24  # of a chunk
_ALIGNED = 64  # rows


class Logits(NamedTuple):
    """What the logits (n, c) are made of; all of them, or the tangents of all."""

    x: Tensor | None  # (n, d), or (n, c) where there is no weight
    weight: Tensor | None  # (c, d)
    bias: Tensor | None  # (c,)


class Labels(NamedTuple):
    """What they are held against."""

    target: Tensor  # (n,)
    part: Tensor  # (n,)
    smooth: Tensor | None  # (c,)

    @property
    def total(self) -> Tensor:
        return self.part if self.smooth is None else self.part + self.smooth.sum()

    def of(self, rows: slice) -> Labels:
        return Labels(self.target[rows], self.part[rows], self.smooth)


class Room:
    """Memory for two chunks, used by one pair of chunks after the other; of one alone, for one twice as large."""

    def __init__(self, z: Logits, num: int = 2) -> None:
        self._like, self._num_classes = entries_of(z), num_classes(z)
        size = max(1, 2 * ENTRIES // num // self._num_classes)
        self._size = size // _ALIGNED * _ALIGNED or size
        self._made: dict[str, Tensor] = {}

    def chunks(self) -> Iterator[slice]:
        for start in range(0, len(self._like), self._size):
            yield slice(start, min(start + self._size, len(self._like)))

    def take(self, name: str, rows: slice) -> Tensor:
        """(c, rows), not filled."""
        if name not in self._made:
            num = min(self._size, -(-len(self._like) // _ALIGNED) * _ALIGNED)
            self._made[name] = self._like.new_empty(self._num_classes, num)
        return self._made[name][:, : rows.stop - rows.start]


def entries_of(z: Logits) -> Tensor:
    assert z.x is not None
    return z.x


def num_classes(z: Logits) -> int:
    return entries_of(z).shape[1] if z.weight is None else len(z.weight)


def logits_of(z: Logits, rows: slice, room: Room) -> Tensor:
    x = entries_of(z)[rows].T
    if z.weight is None:
        return x
    found = torch.mm(z.weight, x, out=room.take("logits", rows))
    return found if z.bias is None else found.add_(z.bias[:, None])


def exponentials(logits: Tensor, z: Logits) -> tuple[Tensor, Tensor, Tensor]:
    """``exp(z - top)``, in place of the logits where these are the chunk's own, the top, and the sums."""
    top = logits.amax(0)
    weights = (logits - top if z.weight is None else logits.sub_(top)).exp_()
    return weights, top, weights.sum(0)


def change_of(z: Logits, d: Logits, rows: slice, room: Room) -> Tensor | None:
    """The tangent of the logits, in memory of its own."""
    if z.weight is None:
        return None if d.x is None else d.x[rows].T.clone()
    terms = [] if d.x is None else [(z.weight, d.x[rows].T)]
    terms += [] if d.weight is None else [(d.weight, entries_of(z)[rows].T)]
    if not terms and d.bias is None:
        return None
    found = room.take("change", rows)
    if terms:
        torch.mm(*terms[0], out=found)
    else:
        found.zero_()
    for factors in terms[1:]:
        found.addmm_(*factors)
    return found if d.bias is None else found.add_(d.bias[:, None])
