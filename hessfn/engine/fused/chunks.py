"""Cross-entropy and its derivatives for some rows at a time, two chunks of logits at most.

Notation: ``z = x W' + b`` the logits (or x itself where there is no W), ``lse`` their log-sum-exp. The loss of row i is
``total_i lse_i - part_i z_iy - z_i s`` with y its target, ``part_i`` what it weighs, ``s`` what all classes are given
(label smoothing), ``total_i = part_i + sum(s)``. Tangents begin with d and are None where they are 0.

Of a chunk only matrix products are taken: a derivative by the logits is made of exponentials K, of ``K * dz``, of ones
at the targets and of s, and is never written down. A chunk is (c, rows): matrix products that make it, and that take
it, are faster so. Those that make it are half as fast where a row of its memory is not a multiple of 64 numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hessfn.engine.fused.logits import (
    Labels,
    Logits,
    Room,
    change_of,
    entries_of,
    exponentials,
    logits_of,
    num_classes,
)


def losses(z: Logits, y: Labels) -> Tensor:
    """Those of the rows, (n,)."""
    out, room = entries_of(z).new_empty(len(entries_of(z))), Room(z)
    for rows in room.chunks():
        logits = logits_of(z, rows, room)
        linear = _linear(logits, y.of(rows))
        _, top, sums = exponentials(logits, z)
        out[rows] = y.total[rows] * (top + sums.log()) - linear
    return out


def tangents(z: Logits, y: Labels, d: Logits) -> Tensor:
    """Those of :func:`losses`."""
    out, room = entries_of(z).new_zeros(len(entries_of(z))), Room(z)
    for rows in room.chunks():
        change = change_of(z, d, rows, room)
        if change is not None:
            linear = _linear(change, y.of(rows))
            weights, _, sums = exponentials(logits_of(z, rows, room), z)
            out[rows] = y.total[rows] * change.mul_(weights).sum(0) / sums - linear
    return out


def gradients(
    z: Logits,
    y: Labels,
    g: Tensor,
    wanted: Sequence[bool],
    d: Logits | None = None,
    dg: Tensor | None = None,
    wanted_tangents: Sequence[bool] = (False,) * 3,
) -> tuple[Any, ...]:
    """Those of ``sum_i g_i loss_i`` by x, weight and bias, and their tangents in one pass; None where not wanted."""
    found, dfound, room = _blank(z, wanted), _blank(z, wanted_tangents), Room(z)
    by_rows = z.weight is not None and (wanted[0] or wanted_tangents[0])
    for rows in room.chunks():
        change = None if d is None else change_of(z, d, rows, room)
        weights, _, sums = exponentials(logits_of(z, rows, room), z)
        pulled = weights.T @ z.weight if by_rows else None  # type: ignore[operator]
        chunk = _Chunk(rows, weights, pulled, sums, y.of(rows), g[rows], None if dg is None else dg[rows])
        _add(found, chunk.gradient, chunk, z)
        if d is not None:
            _add_tangents(dfound, chunk, z, d, change)
    return *found, *dfound


def softmax(z: Logits) -> Tensor:
    """Of all logits, (c, n): what a linearized product keeps."""
    room, out = Room(z), entries_of(z).new_empty(num_classes(z), len(entries_of(z)))
    for rows in room.chunks():
        weights, _, sums = exponentials(logits_of(z, rows, room), z)
        torch.div(weights, sums, out=out[:, rows])
    return out


def tangents_with(
    weights: Tensor, pulled: Tensor, z: Logits, y: Labels, g: Tensor, d: Logits, wanted: Sequence[bool]
) -> list[Any]:
    """The tangents of :func:`gradients` through a matrix product by W, where the softmax P is known, and ``P' W``."""
    found, room, ones = _blank(z, wanted), Room(z, 1), torch.ones_like(g)
    for rows in room.chunks():
        chunk = _Chunk(rows, weights[:, rows], pulled[rows], ones[rows], y.of(rows), g[rows], None)
        _add_tangents(found, chunk, z, d, change_of(z, d, rows, room))
    return found


def curvatures(z: Logits, y: Labels, g: Tensor, d: Logits, dg: Tensor | None, wanted: Sequence[bool]) -> list[Any]:
    """As the tangents of :func:`gradients`, but for what is curved in the logits: a derivative by them is made here.

    It is pulled back by two matrix products, where its parts would take four.
    """
    found, room = _blank(z, wanted), Room(z)
    for rows in room.chunks():
        change = change_of(z, d, rows, room)
        weights, _, sums = exponentials(logits_of(z, rows, room), z)
        chunk = _Chunk(rows, weights, None, sums, y.of(rows), g[rows], None if dg is None else dg[rows])
        moved = torch.zeros_like(weights) if change is None else change.mul_(weights)
        by = chunk.tangent(moved.sum(0))
        moved.mul_(chunk.gradient.weights).addcmul_(weights, by.weights)
        _add(found, by._replace(weights=torch.ones_like(sums)), chunk._replace(weights=moved), z)
    return found


class _Chunk(NamedTuple):
    """Some rows. A derivative by their logits is ``K diag(a) + E diag(b) + s c'``, where E has ones at the targets."""

    rows: slice
    weights: Tensor  # K (c, rows), the softmax times ``sums``
    pulled: Tensor | None  # K' W
    sums: Tensor
    y: Labels
    g: Tensor
    dg: Tensor | None

    @property
    def gradient(self) -> _Combination:
        return _Combination(self.g * self.y.total / self.sums, -self.g * self.y.part, -self.g)

    def tangent(self, along: Tensor) -> _Combination:
        """But for ``K * dz`` by the same a; ``along``: its sums over the classes."""
        by_sums = -along * self.g * self.y.total / self.sums**2
        if self.dg is None:
            zero = torch.zeros_like(by_sums)
            return _Combination(by_sums, zero, zero)
        change = self._replace(g=self.dg).gradient
        return change._replace(weights=change.weights + by_sums)


class _Combination(NamedTuple):
    weights: Tensor  # a (rows,)
    targets: Tensor  # b (rows,)
    smooth: Tensor  # c (rows,)


def _add(found: list[Any], by: _Combination, chunk: _Chunk, z: Logits) -> None:
    by_x, by_weight, by_bias = found
    if by_x is not None:
        by_x[chunk.rows] += _times_weight(by, chunk, z.weight, chunk.pulled)
    if by_weight is not None:
        _add_times(by_weight, chunk, [(by, entries_of(z)[chunk.rows])])
    if by_bias is not None:
        _add_times(by_bias[:, None], chunk, [(by, _column(by))])


def _add_tangents(found: list[Any], chunk: _Chunk, z: Logits, d: Logits, change: Tensor | None) -> None:
    """``change``: dz, which is changed."""
    by_x, by_weight, by_bias = found
    by = chunk.gradient
    moved = None if change is None else change.mul_(chunk.weights)
    dpulled = chunk.weights.T @ d.weight if by_x is not None and d.weight is not None else None
    dby = chunk.tangent(_along(chunk, z, d, moved, dpulled))
    if by_x is not None:
        total = _times_weight(dby, chunk, z.weight, chunk.pulled)
        if moved is not None:
            total += by.weights[:, None] * (moved.T if z.weight is None else moved.T @ z.weight)
        if d.weight is not None:
            total += _times_weight(by, chunk, d.weight, dpulled)
        by_x[chunk.rows] += total
    if by_weight is not None:
        x = entries_of(z)[chunk.rows]
        terms = [(dby, x)] if d.x is None else [(dby, x), (by, d.x[chunk.rows])]
        _add_times(by_weight, chunk, terms)
        if moved is not None:
            by_weight.addmm_(moved, by.weights[:, None] * x)
    if by_bias is not None:
        _add_times(by_bias[:, None], chunk, [(dby, _column(dby))])
        if moved is not None:
            by_bias += moved @ by.weights


def _along(chunk: _Chunk, z: Logits, d: Logits, moved: Tensor | None, dpulled: Tensor | None) -> Tensor:
    """Sums over the classes of K * dz; through K' W and K' dW where these are known, for there are fewer entries."""
    if moved is None or chunk.pulled is None or d.bias is not None or (d.weight is not None and dpulled is None):
        return torch.zeros_like(chunk.g) if moved is None else moved.sum(0)
    total = torch.zeros_like(chunk.g)
    for x, pulled in ((d.x, chunk.pulled), (z.x, dpulled)):
        if x is not None and pulled is not None:
            total += (x[chunk.rows] * pulled).sum(1)
    return total


def _column(by: _Combination) -> Tensor:
    return torch.ones_like(by.weights)[:, None]


def _times_weight(by: _Combination, chunk: _Chunk, weight: Tensor | None, pulled: Tensor | None) -> Tensor:
    """The derivative (c, rows), transposed, times W (c, d), or itself where there is none; ``pulled``: K' W."""
    y = chunk.y
    if weight is None:
        found = (chunk.weights * by.weights).T.scatter_add_(1, y.target[:, None], by.targets[:, None])
        return found if y.smooth is None else found + by.smooth[:, None] * y.smooth
    found = by.weights[:, None] * (chunk.weights.T @ weight if pulled is None else pulled)
    found += by.targets[:, None] * weight[y.target]
    return found if y.smooth is None else found + by.smooth[:, None] * (y.smooth @ weight)


def _add_times(total: Tensor, chunk: _Chunk, terms: Sequence[tuple[_Combination, Tensor]]) -> None:
    """Adds derivatives (c, rows) times matrices (rows, d): K is gone through once for all of them."""
    weights, targets, smooth = (reduce(torch.add, (by[i][:, None] * x for by, x in terms)) for i in range(3))
    total.addmm_(chunk.weights, weights).index_add_(0, chunk.y.target, targets)
    if chunk.y.smooth is not None:
        total.addr_(chunk.y.smooth, smooth.sum(0))


def _linear(logits: Tensor, y: Labels) -> Tensor:
    found = y.part * logits.gather(0, y.target[None])[0]
    return found if y.smooth is None else found + y.smooth @ logits


def _blank(z: Logits, wanted: Sequence[bool]) -> list[Any]:
    return [
        torch.zeros(part.shape, dtype=part.dtype, device=part.device) if which and part is not None else None
        for part, which in zip(z, wanted, strict=True)
    ]
