"""Attention and its derivatives by operations of torch, with the matrix of all scores: where these are to be seen."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    scores = (q * scale) @ k.mT
    if mask is not None:
        scores = scores + mask.to(scores.dtype)
    if causal:
        below = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores + torch.where(below, 0.0, -math.inf).to(scores.dtype)
    return scores


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Pair:
    scores = _scores(q, k, mask, causal, scale)
    highest = scores.detach().amax(-1, keepdim=True)
    highest = highest.masked_fill(highest == -math.inf, 0.0)
    weights = (scores - highest).exp()
    total = weights.sum(-1, keepdim=True)
    lse = torch.where(total > 0, highest + total.log(), math.inf)
    return (weights @ v) * total.masked_fill(total == 0, 1.0).reciprocal(), lse


def tangent(
    q: Any, k: Any, v: Any, mask: Any, causal: bool, scale: float, out: Any, lse: Any, dq: Any, dk: Any, dv: Any
) -> Pair:
    weights = (_scores(q, k, mask, causal, scale) - lse).exp()
    change = weights * (dq @ k.mT + q @ dk.mT) * scale
    dlse = change.sum(-1, keepdim=True)
    return change @ v + weights @ dv - dlse * out, dlse


def gradient(q: Any, k: Any, v: Any, mask: Any, causal: bool, scale: float, out: Any, lse: Any, g: Any) -> Triple:
    weights = (_scores(q, k, mask, causal, scale) - lse).exp()
    by_scores = weights * (g @ v.mT - (g * out).sum(-1, keepdim=True)) * scale
    return by_scores @ k, by_scores.mT @ q, weights.mT @ g


def tangent_of_gradient(
    q: Any, k: Any, v: Any, mask: Any, causal: bool, scale: float, out: Any, lse: Any, g: Any,
    dq: Any, dk: Any, dv: Any, dout: Any, dlse: Any, dg: Any,
) -> Triple:  # fmt: skip
    weights = (_scores(q, k, mask, causal, scale) - lse).exp()
    dweights = weights * ((dq @ k.mT + q @ dk.mT) * scale - dlse)
    apart = g @ v.mT - (g * out).sum(-1, keepdim=True)
    dapart = dg @ v.mT + g @ dv.mT - (dg * out + g * dout).sum(-1, keepdim=True)
    by_scores, dby_scores = weights * apart * scale, (dweights * apart + weights * dapart) * scale
    return (
        dby_scores @ k + by_scores @ dk,
        dby_scores.mT @ q + by_scores.mT @ dq,
        dweights.mT @ g + weights.mT @ dg,
    )
