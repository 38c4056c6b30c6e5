"""Matplotlib figures of what the other functions return.

Each function takes a result and, as ``ax``, where to draw it; without one it opens a figure of its own. It returns the
``Axes``, for the caller to go on with. No style or backend is set. The colours are those of Okabe and Ito (2008), told
apart by colour-blind readers: the darker ones on light axes, the lighter ones on dark axes, such as those of
``plt.style.use("dark_background")``. Lines differ in style as well, for print without colour.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from hessfn.core import tree
from hessfn.core.errors import InvalidInput
from hessfn.core.results import Band, Density, EigenPairs, Estimate
from hessfn.plotting import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Numbers = Iterable[float] | Tensor
_STYLES: list[Any] = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1))]
_MARKERS = ["o", "s", "^", "D", "v"]


def density_plot(
    density: Density | Mapping[str, Density], ax: Axes | None = None, *, band: Band | Mapping[str, Band] | None = None
) -> Axes:
    """A spectral density, ``hf.density(...)``, or several, over the eigenvalues, on a logarithmic axis.

    Outliers are single eigenvalues among n, so their peaks are some n times lower than the bulk's; what lies more than
    nine orders of magnitude below the highest peak is cut off. A density made with ``linthresh`` has the axis of the
    eigenvalues symmetric-logarithmic beyond it.

    Args:
        density: a density, or a dict from label to density.
        band: ``hf.density_band(...)`` of the same quadrature, drawn behind it, or a dict from the same labels to bands.

    >>> import torch
    >>> from matplotlib.figure import Figure
    >>> from hessfn import Density
    >>> axes = density_plot(Density(torch.linspace(-1, 1, 5), torch.ones(5) / 2), Figure().subplots())
    >>> axes.get_yscale()
    'log'
    """
    ax = style.axes(ax)
    curves, bands = style.labelled(density), style.labelled(band)
    arrays = {label: (style.array(one.grid), style.array(one.values)) for label, one in curves.items()}
    positive = np.concatenate([values[values > 0] for _, values in arrays.values()])
    floor = max(positive.min(), positive.max() * 1e-9) if positive.size else 1e-9
    for (label, (grid, values)), color, dashes in zip(arrays.items(), style.colors(ax), cycle(_STYLES)):
        one = bands.get(label)
        at, low, high = (grid, 0 * grid, values) if one is None else map(style.array, one)
        ax.fill_between(at, np.maximum(low, floor), np.maximum(high, floor), color=color, alpha=0.25, linewidth=0)
        ax.plot(grid, np.maximum(values, floor), linestyle=dashes, color=color, linewidth=1.4, label=label or None)
    ax.set_yscale("log")
    ax.set_ylim(bottom=floor)
    visible = np.concatenate([grid[values >= floor] for grid, values in arrays.values()])
    linthresh = min((style.linthresh(grid) for grid, _ in arrays.values()), default=np.inf)
    if np.isfinite(linthresh):
        style.set_symlog(ax, "x", linthresh, max(np.abs(grid).max() for grid, _ in arrays.values()))
    elif visible.size:
        ax.set_xlim(style.span(visible))
    ax.axvline(0, color="gray", linewidth=0.6)
    ax.set(xlabel="eigenvalue", ylabel="spectral density")
    return style.legend(ax, curves)


def eigen_plot(eigenpairs: EigenPairs[Any] | Mapping[str, EigenPairs[Any]], ax: Axes | None = None) -> Axes:
    """Eigenvalues, ``hf.eigsh(...)``, in their order, each with its residual as the error bar.

    For a symmetric matrix an eigenvalue lies within the residual's distance of the value shown.

    Args:
        eigenpairs: ``values`` and ``residuals``, or a dict from label to such results, drawn side by side.
    """
    ax = style.axes(ax)
    results = style.labelled(eigenpairs)
    ax.axhline(0, color="gray", linewidth=0.6)
    everything: list[np.ndarray] = []
    for number, ((label, one), color, marker) in enumerate(zip(results.items(), style.colors(ax), cycle(_MARKERS))):
        values, residuals = style.array(one.values), style.array(one.residuals)
        at = np.arange(1, len(values) + 1) + 0.16 * (number - (len(results) - 1) / 2)
        bars = {"ecolor": style.ink(ax), "elinewidth": 1, "capsize": 4}
        ax.errorbar(at, values, residuals, fmt=marker, color=color, markersize=5, label=label or None, **bars)
        everything.append(values)
    style.set_scale(ax, "y", np.concatenate(everything))
    longest = max(map(len, everything))
    ax.set_xticks(np.arange(1, longest + 1, 1 if longest <= 20 else longest // 10))
    ax.set(xlabel="number of the eigenvalue", ylabel="eigenvalue and residual")
    return style.legend(ax, results)


def layer_plot(estimates: Estimate[Any], ax: Axes | None = None) -> Axes:
    """One bar a layer, top to bottom in the order of the net, with its standard error: ``hf.hutchinson_per_leaf(...)``.

    Args:
        estimates: ``mean`` and ``stderr`` are trees of scalars.
    """
    names = [name.replace("$", r"\$") for name in tree.names(estimates.mean)]  # a dollar starts mathematics
    means, errors = (np.array([float(x) for x in tree.leaves(part)]) for part in (estimates.mean, estimates.stderr))
    ax = style.axes(ax, figsize=(6.4, layer_plot_height(len(names))))
    rows = np.arange(len(names))
    ax.barh(rows, means, color=np.where(means < 0, style.VERMILLION, style.BLUE), height=0.75)
    ax.errorbar(means, rows, xerr=style.finite(errors), fmt="none", ecolor=style.ink(ax), elinewidth=1, capsize=2)
    ax.axvline(0, color="gray", linewidth=0.6)
    shown = rows[:: -(-len(rows) // 80)]
    ax.set_yticks(shown, [names[row] for row in shown], fontsize=8)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.locator_params(axis="x", nbins=5)
    style.set_scale(ax, "x", means)
    ax.set(xlabel="trace and standard error")
    return ax


def layer_plot_height(num_layers: int) -> float:
    """The figure height, in inches, at which the names of so many layers can be read."""
    return min(1.2 + 0.18 * num_layers, 16.0)


def line_plot(steps: Numbers, losses: Tensor | Mapping[str, Tensor], ax: Axes | None = None) -> Axes:
    """Losses along one line or several, ``hf.line(...)``, over the distance from the parameters.

    Args:
        steps: as given to ``hf.line``.
        losses: a tensor like ``steps``, or a dict from label to such tensors.
    """
    ax = style.axes(ax)
    curves = style.labelled(losses)
    positions, heights = style.array(steps), [style.array(curve) for curve in curves.values()]
    for label, height, color, dashes in zip(curves, heights, style.colors(ax), cycle(_STYLES)):
        ax.plot(positions, height, linestyle=dashes, color=color, label=label or None, linewidth=1.6)
    style.set_scale(ax, "y", np.concatenate(heights))
    ax.set(xlabel="distance from the parameters", ylabel="loss")
    return style.legend(ax, curves)


def plane_plot(steps_x: Numbers, steps_y: Numbers, losses: Tensor, ax: Axes | None = None) -> Axes:
    """Losses over a plane, ``hf.plane(...)``, as contours: ``losses[i, j]`` belongs to ``(steps_x[i], steps_y[j])``."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    ax = style.axes(ax)
    height = np.ma.masked_invalid(style.array(losses).T)
    wide = style.wide(height)
    spread: dict[str, Any] = (
        {"levels": style.log_levels(height), "norm": LogNorm()} if wide else {"locator": MaxNLocator(15)}
    )
    x, y = style.array(steps_x), style.array(steps_y)
    contours = ax.contourf(x, y, height, cmap="cividis", **spread)
    ax.contour(x, y, height, levels=contours.levels, colors="black", linewidths=0.4, alpha=0.5)
    ax.figure.colorbar(contours, ax=ax, label="loss", format="%.3g")
    ax.plot(0, 0, "P", color="white", markeredgecolor="black", markersize=8)
    ax.set(xlabel="distance along the first direction", ylabel="distance along the second direction")
    return ax


def trajectory_plot(points: Iterable[Iterable[float]] | Tensor, ax: Axes | None = None) -> Axes:
    """A path of training in a plane, such as on top of ``plane_plot``: from the ring to the star.

    Args:
        points: ``(T, 2)``, the coordinates along the plane's two directions, in order of time.

    Raises:
        ValueError: ``points`` is not ``(T, 2)``.

    >>> from matplotlib.figure import Figure
    >>> axes = trajectory_plot([[1.0, 1.0], [0.5, 0.1], [0.0, 0.0]], Figure().subplots())
    >>> [text.get_text() for text in axes.get_legend().get_texts()]
    ['start', 'end']
    """
    from matplotlib.patheffects import Normal, Stroke

    path = style.array(points)
    if path.ndim != 2 or path.shape[1] != 2 or not len(path):
        raise InvalidInput(f"points must be (T, 2), two coordinates for each moment, not {tuple(path.shape)}")
    ax = style.axes(ax)
    outlined = [Stroke(linewidth=3.2, foreground="black"), Normal()]  # seen on any colour of a map, and on none
    ax.plot(*path.T, ".-", color="white", linewidth=1.4, markersize=4, path_effects=outlined)
    for label, point, marker, size in (("start", path[0], "o", 8), ("end", path[-1], "*", 14)):
        ax.plot(*point, marker, markersize=size, color=style.ORANGE, markeredgecolor="black", label=label)
    ax.legend()
    return ax


def surface_plot(steps_x: Numbers, steps_y: Numbers, losses: Tensor, ax: Axes | None = None) -> Axes:
    """Losses over a plane, ``hf.plane(...)``, as a surface in three dimensions; ``ax`` must have a 3d projection.

    Where the losses span much, their logarithm is drawn.

    >>> import torch
    >>> from matplotlib.figure import Figure
    >>> axes = Figure().add_subplot(projection="3d")
    >>> surface_plot([0.0, 1.0], [0.0, 1.0], torch.ones(2, 2), axes) is axes
    True
    """
    ax = style.axes(ax, subplot_kw={"projection": "3d"})
    if not hasattr(ax, "plot_surface"):
        raise InvalidInput('ax must be three-dimensional: make it with add_subplot(projection="3d")')
    x, y = np.meshgrid(style.array(steps_x), style.array(steps_y), indexing="ij")
    height = style.array(losses)
    wide = style.wide(np.ma.masked_invalid(height))  # there are no logarithmic axes in three dimensions
    ax.plot_surface(x, y, np.log10(height) if wide else height, cmap="cividis", rstride=1, cstride=1, linewidth=0)
    ax.locator_params(nbins=5)
    ax.set(xlabel="first direction", ylabel="second direction", zlabel="log10 of the loss" if wide else "loss")
    return ax
