"""Attention and its derivatives a tile at a time: memory linear in the length, where a matrix of weights is quadratic.

Notation: ``S = scale q k' + mask``, ``lse`` its log-sum-exp by row, ``P = exp(S - lse)`` the weights, ``o = P v``.
Tangents begin with d. With the log-sum-exp known, no tile needs another one: nothing is rescaled on the way.
Queries, keys and values are (b, n, d), (b, m, d) and (b, m, e). A mask (..., n, m) is added, its leading axes b or 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

ENTRIES = 1 << 18  # of a tile: several of them fit into a processor's cache
ENTRIES_ON_DEVICE = 1 << 25  # each operation there is a launch, which costs as much as 10^6 entries
COLUMNS = 512  # of a tile at most, on a processor


class Scores(NamedTuple):
    """What the scores of attention are made of."""

    q: Tensor
    k: Tensor
    mask: Tensor | None
    causal: bool
    scale: float
    group: slice = slice(None)  # of the first axis, which part q and k are


def in_groups(s: Scores) -> Iterator[slice]:
    """Parts of the first axis, so that a tile of one has rows enough."""
    size = max(1, _entries(s) // (min(s.q.shape[1], _LEAST_ROWS) * _wide(s)))
    for start in range(0, len(s.q), size):
        yield slice(start, start + size)


def _entries(s: Scores) -> int:
    return ENTRIES if s.q.is_cpu else ENTRIES_ON_DEVICE


def _wide(s: Scores) -> int:
    return min(s.k.shape[1], COLUMNS if s.q.is_cpu else s.k.shape[1])


_LEAST_ROWS = 64


class _Tile(NamedTuple):
    rows: slice
    columns: slice
    is_cut: bool  # whether the causal mask goes through it


def attention(s: Scores, v: Tensor) -> tuple[Tensor, Tensor]:
    """The output (b, n, e) and the log-sum-exp (b, n, 1): of rows that attend to nothing 0 and inf."""
    b, n, _ = s.q.shape
    out = v.new_zeros(b, n, v.shape[-1])
    lse = v.new_empty(b, n, 1)
    for rows, tiles in _by_rows(s):
        highest = lse.new_full((b, rows.stop - rows.start, 1), -math.inf)
        total = torch.zeros_like(highest)
        mean = out[:, rows]
        for tile in tiles:
            scores = _scores(s, tile)
            top = torch.maximum(highest, scores.amax(-1, keepdim=True))
            finite = top.masked_fill(top == -math.inf, 0.0)
            weights = scores.sub_(finite).exp_()
            rescaling = (highest - finite).exp_()
            total = total.mul_(rescaling).add_(weights.sum(-1, keepdim=True))
            mean.mul_(rescaling).add_(weights @ v[:, tile.columns])
            highest = top
        lse[:, rows] = torch.where(total > 0, highest + total.log(), math.inf)
        mean.mul_(torch.where(total > 0, total, 1.0).reciprocal_())
    return out, lse


def tangent(
    s: Scores, v: Tensor, out: Tensor, lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor
) -> tuple[Tensor, Tensor]:
    """Those of the output and of the log-sum-exp."""
    dout, dlse = torch.zeros_like(out), torch.zeros_like(lse)
    k_dk = _beside(s.k, dk)
    for rows, tiles in _by_rows(s):
        dq_q = _beside(dq[:, rows], s.q[:, rows])
        for tile in tiles:
            weights = _scores(s, tile).sub_(lse[:, rows]).exp_()
            change = torch.bmm(dq_q, k_dk[:, tile.columns].mT).mul_(weights)
            dlse[:, rows] += change.sum(-1, keepdim=True)
            dout[:, rows].baddbmm_(change, v[:, tile.columns], alpha=s.scale)
            dout[:, rows].baddbmm_(weights, dv[:, tile.columns])
    dlse *= s.scale
    return dout.sub_(dlse * out), dlse


def gradient(s: Scores, v: Tensor, out: Tensor, lse: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Those of ``<g, o>`` by queries, keys and values."""
    gq, gk, gv = torch.zeros_like(s.q), torch.zeros_like(s.k), torch.zeros_like(v)
    along = (g * out).sum(-1, keepdim=True)
    for rows, tiles in _by_rows(s):
        for tile in tiles:
            columns = tile.columns
            weights = _scores(s, tile).sub_(lse[:, rows]).exp_()
            gv[:, columns].baddbmm_(weights.mT, g[:, rows])
            by_scores = torch.bmm(g[:, rows], v[:, columns].mT).sub_(along[:, rows]).mul_(weights)
            gq[:, rows].baddbmm_(by_scores, s.k[:, columns], alpha=s.scale)
            gk[:, columns].baddbmm_(by_scores.mT, s.q[:, rows], alpha=s.scale)
    return gq, gk, gv


def tangent_of_gradient(
    s: Scores,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    g: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dout: Tensor,
    dlse: Tensor,
    dg: Tensor,
    both: bool = False,
) -> tuple[Tensor, ...]:
    """Those of :func:`gradient`; with ``both``, the gradient's own results before them."""
    gq, gk, gv = (torch.zeros_like(x) for x in (s.q, s.k, v)) if both else (s.q, s.k, v)
    dgq, dgk, dgv = torch.zeros_like(s.q), torch.zeros_like(s.k), torch.zeros_like(v)
    along = (g * out).sum(-1, keepdim=True)
    dalong = (dg * out).sum(-1, keepdim=True) + (g * dout).sum(-1, keepdim=True)
    k_dk, v_dv = _beside(s.k, dk), _beside(v, dv)
    for rows, tiles in _by_rows(s):
        dq_q, dg_g = _beside(dq[:, rows], s.q[:, rows]).mul_(s.scale), _beside(dg[:, rows], g[:, rows])
        for tile in tiles:
            columns = tile.columns
            weights = _scores(s, tile).sub_(lse[:, rows]).exp_()
            change = torch.bmm(dq_q, k_dk[:, columns].mT).sub_(dlse[:, rows])  # of the weights, relative
            by_scores = torch.bmm(g[:, rows], v[:, columns].mT).sub_(along[:, rows])
            dby_scores = torch.bmm(dg_g, v_dv[:, columns].mT).sub_(dalong[:, rows])
            dby_scores.addcmul_(change, by_scores).mul_(weights)
            by_scores.mul_(weights)
            change.mul_(weights)
            dgv[:, columns].baddbmm_(change.mT, g[:, rows]).baddbmm_(weights.mT, dg[:, rows])
            dgq[:, rows].baddbmm_(dby_scores, s.k[:, columns], alpha=s.scale)
            dgq[:, rows].baddbmm_(by_scores, dk[:, columns], alpha=s.scale)
            dgk[:, columns].baddbmm_(dby_scores.mT, s.q[:, rows], alpha=s.scale)
            dgk[:, columns].baddbmm_(by_scores.mT, dq[:, rows], alpha=s.scale)
            if both:
                gq[:, rows].baddbmm_(by_scores, s.k[:, columns], alpha=s.scale)
                gk[:, columns].baddbmm_(by_scores.mT, s.q[:, rows], alpha=s.scale)
                gv[:, columns].baddbmm_(weights.mT, g[:, rows])
    return (gq, gk, gv, dgq, dgk, dgv) if both else (dgq, dgk, dgv)


def _by_rows(s: Scores) -> Iterator[tuple[slice, list[_Tile]]]:
    (b, n, _), m = s.q.shape, s.k.shape[1]
    wide = _wide(s)
    high = max(1, min(n, _entries(s) // (b * wide)))
    for start in range(0, n, high):
        stop = min(start + high, n)
        seen = min(m, stop) if s.causal else m
        tiles = [
            _Tile(slice(start, stop), slice(c, min(c + wide, seen)), s.causal and min(c + wide, seen) > start + 1)
            for c in range(0, seen, wide)
        ]
        yield slice(start, stop), tiles


def _scores(s: Scores, tile: _Tile) -> Tensor:
    q, k = s.q[:, tile.rows], s.k[:, tile.columns]
    scores = torch.bmm(q * s.scale, k.mT)
    if s.mask is not None:
        mask = s.mask[..., tile.rows, tile.columns].reshape(-1, *scores.shape[1:])
        scores += mask if len(mask) == 1 else mask[s.group]
    if tile.is_cut:
        rows = torch.arange(tile.rows.start, tile.rows.stop, device=q.device)
        columns = torch.arange(tile.columns.start, tile.columns.stop, device=q.device)
        scores.masked_fill_(columns > rows[:, None], -math.inf)
    return scores


def _beside(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([x, y], -1)
