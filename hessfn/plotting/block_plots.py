"""Figures of the blocks of a matrix: their densities, a row each, and how far apart they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from hessfn.core.errors import InvalidInput
from hessfn.core.results import Density, Estimate
from hessfn.plotting import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def density_rows_plot(densities: Mapping[str, Density], ax: Axes | None = None, *, floor: float = 1e-6) -> Axes:
    """Several spectral densities as rows of colours, in the order of the dict: the darker, the more eigenvalues.

    For many densities, whose lines would cover each other. Colours are logarithmic. For densities made with
    ``linthresh`` they show the fraction of eigenvalues per unit of the axis as it is drawn.

    Args:
        densities: a dict from name to ``hf.density(...)``, such as of the blocks of ``hf.slq_per_block(...)``.
        floor: densities below this fraction of the highest one are left blank.

    Returns:
        The ``Axes``.

    Raises:
        ValueError: there is no density, or ``floor`` is not between 0 and 1.

    >>> import torch
    >>> from matplotlib.figure import Figure
    >>> even = Density(torch.linspace(-1, 1, 5), torch.ones(5) / 2)
    >>> axes = density_rows_plot({"a": even, "b": even}, Figure().subplots())
    >>> [label.get_text() for label in axes.get_yticklabels()]
    ['a', 'b']
    """
    from matplotlib.colors import LogNorm

    if not isinstance(densities, Mapping) or not densities:
        raise InvalidInput("densities must be a dict from name to density, with one at least")
    if not 0 < floor < 1:
        raise InvalidInput(f"floor={floor} must be between 0 and 1: it is a part of the highest density")
    ax = style.axes(ax, figsize=(6.4, _height(len(densities))))
    grids = [style.array(one.grid) for one in densities.values()]
    threshold = min(map(style.linthresh, grids))
    heights = [
        style.array(one.values) * (np.hypot(grid, threshold) if np.isfinite(threshold) else 1.0)
        for one, grid in zip(densities.values(), grids, strict=True)
    ]
    most = max(height.max() for height in heights)
    norm = LogNorm(most * floor, most)
    for row, (grid, height) in enumerate(zip(grids, heights, strict=True)):
        edges = np.concatenate([grid[:1], (grid[1:] + grid[:-1]) / 2, grid[-1:]])
        cells = np.ma.masked_less(height, most * floor)[None]
        image = ax.pcolormesh(edges, [row - 0.42, row + 0.42], cells, cmap="Blues", norm=norm, rasterized=True)
    ax.figure.colorbar(image, ax=ax, label="density" if not np.isfinite(threshold) else "density along the axis")
    if np.isfinite(threshold):
        style.set_symlog(ax, "x", threshold, max(np.abs(grid).max() for grid in grids))
    ax.set_xlim(min(grid[0] for grid in grids), max(grid[-1] for grid in grids))
    ax.axvline(0, color="gray", linewidth=0.6)
    ax.set(xlabel="eigenvalue")
    _name_rows(ax, list(densities))
    return ax


def distance_plot(
    distances: Estimate[Tensor], names: Iterable[str], ax: Axes | None = None, *, furthest: float | None = None
) -> Axes:
    """Distances of every pair of spectra, of ``hf.jensen_shannon_per_pair``, as a heat map: the darker, the larger.

    For up to eight names, each cell shows its number with the standard error.

    Args:
        distances: ``mean`` and ``stderr``, each ``(b, b)``.
        names: of the b rows, such as the dict of quadratures, in the same order.
        furthest: the distance of the darkest colour; by default the largest one. Give it to compare several maps; log
            2 is the largest possible distance.

    Returns:
        The ``Axes``.

    Raises:
        ValueError: there are not b names, or ``furthest`` is not positive.

    >>> import torch
    >>> from matplotlib.figure import Figure
    >>> apart = Estimate(torch.tensor([[0.0, 0.5], [0.5, 0.0]]), torch.zeros(2, 2), torch.tensor(0))
    >>> axes = distance_plot(apart, ["a", "b"], Figure().subplots())
    >>> [label.get_text() for label in axes.get_xticklabels()]
    ['a', 'b']
    """
    mean, stderr, names = style.array(distances.mean), style.array(distances.stderr), list(names)
    if mean.shape != (len(names), len(names)):
        raise InvalidInput(f"there are {len(names)} names for distances of shape {mean.shape}: give one for each row")
    if furthest is not None and not furthest > 0:
        raise InvalidInput(f"furthest={furthest} must be positive: it is the distance of the darkest colour")
    size = _height(len(names))
    ax = style.axes(ax, figsize=(size + 1.0, size))
    most = max(float(mean.max()), np.finfo(float).tiny) if furthest is None else furthest
    image = ax.imshow(np.maximum(mean, 0.0), cmap="Blues", vmin=0.0, vmax=most)
    ax.figure.colorbar(image, ax=ax, label="Jensen-Shannon divergence, nats")
    if len(names) <= 8:
        options: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 6}
        for (row, column), value in np.ndenumerate(mean):
            if row != column:
                error = stderr[row, column]
                below = f"\n±{f'{error:.1g}'.removeprefix('0')}" if np.isfinite(error) else ""
                shade = "white" if value > most / 2 else "black"
                ax.text(column, row, f"{value:.2g}".removeprefix("0") + below, color=shade, **options)
    labels = _name_rows(ax, names)
    ax.set_xticks(np.arange(len(names)), labels, rotation=90, fontsize=8)
    return ax


def _height(rows: int) -> float:
    return min(1.6 + 0.3 * rows, 16.0)


def _name_rows(ax: Axes, names: list[str]) -> list[str]:
    labels = [name.replace("$", r"\$") for name in names]  # a dollar starts mathematics
    ax.set_yticks(np.arange(len(names)), labels, fontsize=8)
    ax.set_ylim(len(names) - 0.5, -0.5)
    return labels
