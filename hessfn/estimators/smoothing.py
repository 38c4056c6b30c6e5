"""Nodes and weights as a smooth density on a grid: a Gaussian at every node, on a linear or a logarithmic axis."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hessfn.core.errors import InvalidInput
from hessfn.core.memory import own
from hessfn.core.results import Quadrature
from hessfn.core.torch_state import known

_MOST_WIDTHS = 1e7


def smoothed(
    quadrature: Quadrature,
    grid: Tensor | None,
    sigma: float | None,
    linthresh: float | None,
    *,
    squared: bool = False,
) -> tuple[Tensor, Tensor]:
    """Grid ``(g,)`` and the density of every probe ``(p, g)``; or the same sum with the squares of the kernel."""
    power = 2 if squared else 1
    nodes, weights = quadrature
    for name, value in (("sigma", sigma), ("linthresh", linthresh)):
        if value is not None and value <= 0:
            raise InvalidInput(f"{name}={value} must be positive: it is a width on the axis of the eigenvalues")
    if linthresh is not None:
        nodes = (nodes / linthresh).asinh()
    low, high = nodes.min(), nodes.max()
    resolved = max(nodes.shape[-1] - 1, 1) * math.sqrt(8 * math.log(3))  # widths in the range
    if sigma is None:
        # Nodes that differ by rounding have no range of their own: their size is the only scale there is.
        size = torch.maximum(low.abs(), high.abs())
        span = torch.where(high - low > 1e-6 * size, high - low, torch.where(size > 0, 1e-3 * size, 1.0))
        width = span / resolved
    else:
        width = torch.as_tensor(sigma, dtype=nodes.dtype, device=nodes.device)
        if grid is None:
            if known(high > low) is None:
                raise InvalidInput("how many points sigma takes depends on the range, which vmap hides: give grid")
            resolved = float((high - low) / width)
            if resolved > _MOST_WIDTHS:
                raise InvalidInput(
                    f"sigma={sigma:.3g} is {resolved:.1g} times within the range of the nodes, more than "
                    f"{_MOST_WIDTHS:.0e}: a grid over all of it takes too many points; widen sigma, or give grid"
                )
    if grid is None:
        steps = max(1024, math.ceil(2 * resolved) + 20)
        unit = torch.linspace(0, 1, steps, dtype=nodes.dtype, device=nodes.device)
        at = low - 5 * width + (high - low + 10 * width) * unit
        grid = at if linthresh is None else at.sinh() * linthresh
    at = grid if linthresh is None else (grid / linthresh).asinh()

    def row(theta: Tensor, weight: Tensor) -> Tensor:
        z = (at[:, None] - theta) / width
        return (-0.5 * power * z.square()).exp() @ weight / (width * math.sqrt(2 * math.pi)) ** power

    rows = torch.stack([row(theta, weight) for theta, weight in zip(nodes, weights, strict=True)])
    return own(grid), rows if linthresh is None else rows / (grid.square() + linthresh**2).sqrt() ** power
