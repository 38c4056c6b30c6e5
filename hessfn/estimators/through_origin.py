"""Least squares through the origin, entry by entry: the slopes of images over probes, one pair in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.core.errors import InvalidInput
from hessfn.core.results import Estimate
from hessfn.core.tree import T
from hessfn.estimators.running_mean import measured


def slopes(pairs: Iterable[tuple[T, T]]) -> Estimate[T]:
    """``sum z y / sum z^2`` of pairs ``(z, y)``, with the standard error that the residuals ``y - slope z`` give.

    For Rademacher probes it is the mean of ``z y``. For others it is unbiased too, as what is not ``slope z`` in y has
    mean 0 whatever z is, and the slope itself adds nothing to the variance.
    """
    slope: Any = None
    weight: Any = None
    root: Any = None
    num_pairs = 0
    for z, y in pairs:
        z, y = tree.map(_float, z), tree.map(_float, y)
        if num_pairs == 0:
            slope, weight, root = (tree.map(torch.zeros_like, y) for _ in range(3))
        slope, weight, root = _next(z, y, slope, weight, root)
        num_pairs += 1
    if num_pairs == 0:
        raise InvalidInput("there is no probe: rademacher(params, num) needs num >= 1")
    df = torch.tensor(num_pairs - 1.0, dtype=torch.float64, device="cpu")

    def stderr(w: Tensor, r: Tensor) -> Tensor:
        if num_pairs == 1:
            return torch.full_like(r, torch.inf)
        return torch.where(w > 0, r / (torch.where(w > 0, w, 1.0) * (num_pairs - 1)).sqrt(), torch.inf)

    return measured(tree.owned(slope), tree.owned(tree.map(stderr, weight, root)), num_pairs, df)


def _next(z: T, y: T, slope: T, weight: T, root: T) -> tuple[T, T, T]:
    """Recursive least squares; the root is that of the sum of squared residuals, which no square can overflow."""
    residual = tree.map(lambda a, s, b: b - s * a, z, slope, y)
    heavier = tree.map(lambda a, w: w + a.square(), z, weight)
    safe = tree.map(lambda w: torch.where(w > 0, w, 1.0), heavier)
    slope = tree.map(lambda s, a, e, w: s + a * e / w, slope, z, residual, safe)
    root = tree.map(lambda r, e, w, v: _hypot(r, e * (w / v).sqrt()), root, residual, weight, safe)
    return slope, heavier, root


def _hypot(a: Tensor, b: Tensor) -> Tensor:
    """As torch's, but that its derivative is 0 where both are."""
    none = (a == 0) & (b == 0)
    return torch.where(none, 0.0, torch.hypot(torch.where(none, 1.0, a), b))


def _float(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
