"""Cross-entropy and its derivatives for some rows at a time: no more than two chunks of logits are there at once.

Notation: ``z = x W' + b`` the logits (or x itself where there is no W), ``P`` their softmax, ``lse`` their
log-sum-exp. The loss of row i is ``total_i lse_i - part_i z_iy - z_i s`` with y its target, ``part_i`` what it weighs,
``s`` what all classes are given (label smoothing), ``total_i = part_i + sum(s)``. Tangents begin with d and are None
where they are 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

ENTRIES = 1 << 23  # of a chunk


class Logits(NamedTuple):
    """What the logits (n, c) are made of; all of them, or the tangents of all."""

    x: Tensor | None  # (n, d), or (n, c) where there is no weight
    weight: Tensor | None  # (c, d)
    bias: Tensor | None  # (c,)


class Labels(NamedTuple):
    """What they are held against."""

    target: Tensor  # (n,)
    part: Tensor  # (n, 1)
    smooth: Tensor | None  # (c,)

    @property
    def total(self) -> Tensor:
        return self.part if self.smooth is None else self.part + self.smooth.sum()


def losses(z: Logits, y: Labels) -> tuple[Tensor, Tensor]:
    """Those of the rows, and their log-sum-exps, both (n, 1)."""
    x = _of(z)
    out, lse = x.new_empty(len(x), 1), x.new_empty(len(x), 1)
    for rows in _chunks(z):
        logits = _logits(z, rows)
        out[rows] = -_linear(logits, y, rows)
        top = logits.amax(1, keepdim=True)
        logits = logits.sub_(top) if z.weight is not None else logits - top
        lse[rows] = top + logits.exp_().sum(1, keepdim=True).log_()
    return out.addcmul_(y.total, lse), lse


def tangents(z: Logits, y: Labels, lse: Tensor, d: Logits) -> tuple[Tensor, Tensor]:
    """Those of the results of :func:`losses`."""
    out, dlse = torch.zeros_like(lse), torch.zeros_like(lse)
    for rows in _chunks(z):
        change = _change(z, d, rows)
        if change is None:
            continue
        out[rows] = -_linear(change, y, rows)
        dlse[rows] = torch.linalg.vecdot(_softmax(z, lse, rows), change)[:, None]
    return out.addcmul_(y.total, dlse), dlse


def gradients(z: Logits, y: Labels, lse: Tensor, g: Tensor) -> tuple[Any, Any, Any]:
    """Those of ``sum_i g_i loss_i`` by x, weight and bias; None of what is not there."""
    found = _blank(z)
    for rows in _chunks(z):
        _add(found, _gradient(_softmax(z, lse, rows), y, g[rows], rows), z, rows)
    return found


def tangents_of_gradients(
    z: Logits, y: Labels, lse: Tensor, g: Tensor, d: Logits, dlse: Tensor, dg: Tensor | None
) -> tuple[Any, Any, Any]:
    """Those of :func:`gradients`."""
    found = _blank(z)
    for rows in _chunks(z):
        weights, change = _softmax(z, lse, rows), _change(z, d, rows)
        if change is None:
            change = torch.zeros_like(weights)
        else:
            change.sub_(dlse[rows]).mul_(weights).mul_(g[rows] * y.total[rows])
        by_logits = _gradient(weights, y, None, rows)  # of g = 1, in place of the softmax
        if dg is not None:
            change.addcmul_(by_logits, dg[rows])
        _add(found, change, z, rows)
        if z.weight is not None:
            _add(found, by_logits.mul_(g[rows]), d, rows, z)
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
    x = _of(z)[rows]
    if z.weight is None:
        return x
    return x @ z.weight.T if z.bias is None else torch.addmm(z.bias, x, z.weight.T)


def _softmax(z: Logits, lse: Tensor, rows: slice) -> Tensor:
    logits = _logits(z, rows)
    return (logits.sub_(lse[rows]) if z.weight is not None else logits - lse[rows]).exp_()


def _change(z: Logits, d: Logits, rows: slice) -> Tensor | None:
    """The tangent of the logits, in memory of its own."""
    if z.weight is None:
        return None if d.x is None else d.x[rows].clone()
    found = None if d.x is None else d.x[rows] @ z.weight.T
    if d.weight is not None:
        x = _of(z)[rows]
        found = x @ d.weight.T if found is None else found.addmm_(x, d.weight.T)
    if d.bias is not None:
        found = d.bias.expand(rows.stop - rows.start, -1).clone() if found is None else found.add_(d.bias)
    return found


def _linear(logits: Tensor, y: Labels, rows: slice) -> Tensor:
    found = y.part[rows] * logits.gather(1, y.target[rows, None])
    return found if y.smooth is None else found + logits @ y.smooth[:, None]


def _gradient(weights: Tensor, y: Labels, g: Tensor | None, rows: slice) -> Tensor:
    """By the logits, in place of their softmax."""
    given = weights.mul_(y.total[rows])
    given.scatter_add_(1, y.target[rows, None], -y.part[rows])
    if y.smooth is not None:
        given.sub_(y.smooth)
    return given if g is None else given.mul_(g)


def _blank(z: Logits) -> tuple[Any, Any, Any]:
    return tuple(None if part is None else torch.zeros_like(part, memory_format=torch.contiguous_format) for part in z)  # type: ignore[return-value]


def _add(found: tuple[Any, Any, Any], by_logits: Tensor, z: Logits, rows: slice, whole: Logits | None = None) -> None:
    """Adds what a derivative by the logits of some rows is by what they are made of.

    Args:
        z: what is multiplied with; of tangents (``whole``: what these are of) the bias has no part.
    """
    by_x, by_weight, by_bias = found
    if (whole or z).weight is None:
        by_x[rows] += by_logits
        return
    if z.weight is not None:
        by_x[rows] += by_logits @ z.weight
    if z.x is not None:
        by_weight.addmm_(by_logits.T, z.x[rows])
    if by_bias is not None and whole is None:
        by_bias += by_logits.sum(0)
