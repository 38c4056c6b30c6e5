"""Cross-entropy and its derivatives for some rows at a time, two chunks of logits at most.

Notation: ``z = x W' + b`` the logits (or x itself where there is no W), ``lse`` their log-sum-exp. The loss of row i is
``total_i lse_i - part_i z_iy - z_i s`` with y its target, ``part_i`` what it weighs, ``s`` what all classes are given
(label smoothing), ``total_i = part_i + sum(s)``. Tangents begin with d and are None where they are 0.

A chunk is (c, rows): matrix products that make it, and that take it, are faster so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

ENTRIES = 1 << 24  # of a chunk


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


def losses(z: Logits, y: Labels) -> Tensor:
    """Those of the rows, (n,)."""
    out = _of(z).new_empty(len(_of(z)))
    for rows in _chunks(z):
        logits = _logits(z, rows)
        linear = _linear(logits, y, rows)
        _, top, sums = _exponentials(logits, z)
        out[rows] = y.total[rows] * (top + sums.log()) - linear
    return out


def tangents(z: Logits, y: Labels, d: Logits) -> Tensor:
    """Those of :func:`losses`."""
    out = _of(z).new_zeros(len(_of(z)))
    for rows in _chunks(z):
        change = _change(z, d, rows)
        if change is not None:
            linear = _linear(change, y, rows)
            weights, _, sums = _exponentials(_logits(z, rows), z)
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
    found, dfound = (_blank(z, which) for which in (wanted, wanted_tangents))
    for rows in _chunks(z):
        change = None if d is None else _change(z, d, rows)
        weights, _, sums = _exponentials(_logits(z, rows), z)
        scale = y.total[rows] / sums
        if change is not None:
            along = change.mul_(weights).sum(0) / sums
            change.addcmul_(weights, along, value=-1).mul_(scale * g[rows])
        by_logits = weights.mul_(scale).scatter_add_(0, y.target[None, rows], -y.part[None, rows])
        if y.smooth is not None:
            by_logits.sub_(y.smooth[:, None])
        if dg is not None:
            change = by_logits * dg[rows] if change is None else change.addcmul_(by_logits, dg[rows])
        by_logits.mul_(g[rows])
        _add(found, by_logits, z, rows)
        if change is not None:
            _add(dfound, change, z, rows)
        if d is not None and z.weight is not None:
            _add(dfound, by_logits, d._replace(bias=None), rows)
    return *found, *dfound


def softmax(z: Logits) -> Tensor:
    """Of all logits, (c, n): what a linearized product keeps."""
    parts = [_exponentials(_logits(z, rows), z) for rows in _chunks(z)]
    return torch.cat([weights.div_(sums) for weights, _, sums in parts], 1)


def tangents_with(weights: Tensor, z: Logits, y: Labels, g: Tensor, d: Logits, wanted: Sequence[bool]) -> list[Any]:
    """The tangents of :func:`gradients` where the softmax is known, through a matrix product."""
    found = by_x, by_weight, _ = _blank(z, wanted)
    for rows in _chunks(z):
        known, change, scale = weights[:, rows], _change(z, d, rows), g[rows] * y.total[rows]
        if change is not None:
            along = change.mul_(known).sum(0)
            _add(found, change.addcmul_(known, along, value=-1).mul_(scale), z, rows)
        # By the logits the gradient is scale P - g part at the target - g s: of it only products are taken.
        target, part = y.target[rows], (g[rows] * y.part[rows])[:, None]
        if by_x is not None and d.weight is not None:
            by_x[rows] += scale[:, None] * (known.T @ d.weight) - part * d.weight[target]
            if y.smooth is not None:
                by_x[rows] -= g[rows, None] * (y.smooth @ d.weight)
        if by_weight is not None and d.x is not None:
            by_weight.addmm_(known, d.x[rows] * scale[:, None]).index_add_(0, target, part * d.x[rows], alpha=-1)
            if y.smooth is not None:
                by_weight.addr_(y.smooth, g[rows] @ d.x[rows], alpha=-1)
    return found


def _of(z: Logits) -> Tensor:
    assert z.x is not None
    return z.x


def _chunks(z: Logits) -> Iterator[slice]:
    x = _of(z)
    size = max(1, ENTRIES // (x.shape[1] if z.weight is None else len(z.weight)))
    for start in range(0, len(x), size):
        yield slice(start, min(start + size, len(x)))


def _logits(z: Logits, rows: slice) -> Tensor:
    x = _of(z)[rows].T
    if z.weight is None:
        return x
    return z.weight @ x if z.bias is None else (z.weight @ x).add_(z.bias[:, None])


def _exponentials(logits: Tensor, z: Logits) -> tuple[Tensor, Tensor, Tensor]:
    """``exp(z - top)``, in place of the logits where these are the chunk's own, the top, and the sums."""
    top = logits.amax(0)
    weights = (logits - top if z.weight is None else logits.sub_(top)).exp_()
    return weights, top, weights.sum(0)


def _change(z: Logits, d: Logits, rows: slice) -> Tensor | None:
    """The tangent of the logits, in memory of its own."""
    if z.weight is None:
        return None if d.x is None else d.x[rows].T.clone()
    found = None if d.x is None else z.weight @ d.x[rows].T
    if d.weight is not None:
        x = _of(z)[rows].T
        found = d.weight @ x if found is None else found.addmm_(d.weight, x)
    if d.bias is not None:
        bias = d.bias[:, None]
        found = bias.repeat(1, rows.stop - rows.start) if found is None else found.add_(bias)
    return found


def _linear(logits: Tensor, y: Labels, rows: slice) -> Tensor:
    found = y.part[rows] * logits.gather(0, y.target[None, rows])[0]
    return found if y.smooth is None else found + y.smooth @ logits


def _blank(z: Logits, wanted: Sequence[bool]) -> list[Any]:
    return [
        torch.zeros(part.shape, dtype=part.dtype, device=part.device) if which and part is not None else None
        for part, which in zip(z, wanted, strict=True)
    ]


def _add(found: list[Any], by_logits: Tensor, z: Logits, rows: slice) -> None:
    """Adds what a derivative by the logits of some rows is by what they are made of."""
    by_x, by_weight, by_bias = found
    if by_x is not None:
        if z.weight is not None:
            by_x[rows].addmm_(by_logits.T, z.weight)
        elif by_weight is None and z.x is not None:
            by_x[rows] += by_logits.T
    if by_weight is not None and z.x is not None:
        by_weight.addmm_(by_logits, z.x[rows])
    if by_bias is not None and z.bias is not None:
        by_bias += by_logits.sum(1)
