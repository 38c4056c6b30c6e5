"""Distances and sampling by their definitions: torch has no rule in forward mode for the fused operations."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

_IF_NECESSARY, _NEVER = "use_mm_for_euclid_dist_if_necessary", "donot_use_mm_for_euclid_dist"
_NORMS = (1.0, 2.0, math.inf)


def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str = _IF_NECESSARY) -> Tensor:
    rows = max(x1.shape[-2], x2.shape[-2]) if x1.dim() > 1 and x2.dim() > 1 else 0
    if p not in _NORMS or not rows:
        return torch.cdist(x1, x2, p, compute_mode)
    if p == 2 and compute_mode != _NEVER and (rows > 25 or compute_mode != _IF_NECESSARY):  # as torch does
        products = x1.square().sum(-1)[..., :, None] + x2.square().sum(-1)[..., None, :]
        return _root((products - 2 * (x1 @ x2.transpose(-2, -1))).clamp(min=0.0))
    return _norm(x1[..., :, None, :] - x2[..., None, :, :], p)


def pdist(x: Tensor, p: float = 2.0) -> Tensor:
    if p not in _NORMS:
        return torch.pdist(x, p)
    i, j = torch.triu_indices(len(x), len(x), 1, device=x.device)
    return _norm(x[i] - x[j], p)


def _norm(x: Tensor, p: float) -> Tensor:
    if p == 2:
        return _root(x.square().sum(-1))
    return x.abs().sum(-1) if p == 1 else x.abs().amax(-1)


def _root(x: Tensor) -> Tensor:
    """The square root; of zero it has the derivative that torch gives to the distance of a point to itself, zero."""
    apart = x > 0
    return torch.where(apart, x, 1.0).sqrt() * apart


def grid_sample(
    input: Tensor,
    grid: Tensor,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool | None = None,
) -> Tensor:
    sizes = list(input.shape[2:])
    fits = input.dim() == grid.dim() and grid.shape[-1] == len(sizes) and len(grid) == len(input) and input.numel() > 0
    cubic = mode == "bicubic" and len(sizes) == 2
    if not fits or not (cubic or mode in ("bilinear", "nearest")) or padding_mode not in _PADDINGS:
        return F.grid_sample(input, grid, mode, padding_mode, align_corners)
    corners = bool(align_corners)
    taps = []  # of each dimension: what is read, and with which weight
    for size, where in zip(sizes, reversed(grid.unbind(-1)), strict=True):
        at = (where + 1) / 2 * (size - 1) if corners else ((where + 1) * size - 1) / 2
        if cubic:
            taps.append([(_padded(i, size, padding_mode, corners), w) for i, w in _cubic(at)])
        else:
            at = _padded(at, size, padding_mode, corners)
            taps.append(_linear(at) if mode == "bilinear" else [(at.detach().round(), torch.ones_like(at))])
    flat = input.flatten(2)
    result: Tensor | None = None
    for chosen in itertools.product(*taps):
        place, weight = torch.zeros_like(grid[..., 0], dtype=torch.long), torch.ones_like(grid[..., 0])
        for size, (i, w) in zip(sizes, chosen, strict=True):
            inside = (i >= 0) & (i <= size - 1)
            place = place * size + i.clamp(0, size - 1).nan_to_num(0.0).long()
            weight = torch.where(inside, weight * w, 0.0)
        read = flat.gather(2, place.flatten(1)[:, None].expand(-1, flat.shape[1], -1))
        term = read.unflatten(2, grid.shape[1:-1]) * weight[:, None]
        result = term if result is None else result + term
    return result  # type: ignore[return-value]


_PADDINGS = ("zeros", "border", "reflection")


def _padded(at: Tensor, size: int, padding_mode: str, corners: bool) -> Tensor:
    if padding_mode == "zeros":
        return at
    if padding_mode == "reflection":
        low, span = (0.0, size - 1.0) if corners else (-0.5, float(size))
        if not span:
            return torch.zeros_like(at)
        apart = (at - low).abs()
        turns = (apart.detach() / span).floor()
        rest = apart - turns * span
        at = torch.where(turns % 2 == 0, rest, span - rest) + low
    return torch.where((at > 0) & (at < size - 1), at, at.detach().clamp(0, size - 1))


def _linear(at: Tensor) -> list[tuple[Tensor, Tensor]]:
    low = at.detach().floor()
    return [(low, low + 1 - at), (low + 1, at - low)]


def _cubic(at: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys' kernel of convolution with a = -0.75."""
    low = at.detach().floor()
    t = at - low

    def near(x: Tensor) -> Tensor:
        return (1.25 * x - 2.25) * x * x + 1

    def far(x: Tensor) -> Tensor:
        return ((-0.75 * x + 3.75) * x - 6) * x + 3

    return [(low - 1, far(t + 1)), (low, near(t)), (low + 1, near(1 - t)), (low + 2, far(2 - t))]
