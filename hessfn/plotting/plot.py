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
from hessfn.plotting.block_plots import density_rows_plot as density_rows_plot
from hessfn.plotting.block_plots import distance_plot as distance_plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Numbers = Iterable[float] | Tensor
_STYLES: list[Any] = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1))]
_MARKERS = ["o", "s", "^", "D", "v"]


def density_plot(
    density: Density | Mapping[str, Density],
    ax: Axes | None = None,
    *,
    band: Band | Mapping[str, Band] | None = None,
    floor: float | None = None,
) -> Axes:
    """One spectral density or several, of ``hf.density``, over the eigenvalues, on a logarithmic vertical axis.

    An outlier is one eigenvalue of n, so its peak is up to n times lower than that of the bulk. A density made with
    ``linthresh`` gets a symmetric-logarithmic horizontal axis.

    Args:
        density: a density, or a dict from label to density.
        band: ``hf.density_band(...)`` of the same quadrature, drawn behind it, or a dict from the same labels to bands.
            Where a band reaches down to zero, which a logarithmic axis does not have, its upper edge is drawn alone.
        floor: the lower end of the vertical axis; by default nine orders of magnitude below the highest peak. A
            hundredth of ``1 / n`` of that peak shows every one of n eigenvalues, and little of the tails.

    Returns:
        The ``Axes``; so for every function here.

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
    if floor is None:
        floor = max(positive.min(), positive.max() * 1e-9) if positive.size else 1e-9
    for (label, (grid, values)), color, dashes in zip(arrays.items(), style.colors(ax), cycle(_STYLES)):
        if (one := bands.get(label)) is not None:
            style.band(ax, style.array(one.grid), style.array(one.lower), style.array(one.upper), floor, color)
        seen = np.where(values >= floor, values, np.nan)
        ax.plot(grid, seen, linestyle=dashes, color=color, linewidth=1.4, label=label or None)
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
    """Eigenvalues of ``hf.eigsh``, one row each, by magnitude on a logarithmic axis; negative ones are hollow.

    The narrow bar is the error for these data: residual and rounding. The wide pale bar is the 95 % interval for other
    data of the same number, if ``data_stderr`` is known.

    Args:
        eigenpairs: the result of ``hf.eigsh``, or a dict from label to such results, drawn side by side.

    Returns:
        The ``Axes``.

    >>> import torch
    >>> from hessfn import eigsh
    >>> from matplotlib.figure import Figure
    >>> pairs = eigsh(lambda v: torch.tensor([4.0, 2.0, 1.0]) * v, torch.ones(3), k=2)
    >>> eigen_plot(pairs, Figure().subplots()).get_xlabel()
    'size of the eigenvalue'
    """
    ax = style.axes(ax)
    results = style.labelled(eigenpairs)
    values = {label: style.array(one.values) for label, one in results.items()}
    low = style.set_log(ax, np.concatenate(list(values.values())))
    longest = max(map(len, values.values()))
    for number, ((label, one), color, marker) in enumerate(zip(results.items(), style.colors(ax), cycle(_MARKERS))):
        rows = np.arange(1, len(values[label]) + 1) + 0.3 * (number - (len(results) - 1) / 2)
        sure = style.known(one.residuals, rows) + style.known(one.rounding, rows)
        data = 1.96 * style.known(one.data_stderr, rows)
        style.sizes(ax, rows, values[label], sure, color, marker, low, wide=data, label=label)
    ax.set_yticks(np.arange(1, longest + 1, 1 if longest <= 20 else longest // 10))
    ax.set_ylim(longest + 0.6, 0.4)
    ax.set(xlabel="size of the eigenvalue", ylabel="number of the eigenvalue")
    return style.legend(ax, results)


def layer_plot(estimates: Estimate[Any] | Mapping[str, Estimate[Any]], ax: Axes | None = None) -> Axes:
    """Traces of layers, one row each in the order of the net, by magnitude on a logarithmic axis; negative are hollow.

    The narrow bar is one standard error by the probes, the wide pale bar one by the data, if known.

    Args:
        estimates: an estimate whose ``mean`` and ``stderr`` are trees of scalars, such as ``hf.hutchinson_per_leaf``
            returns; or a dict from label to such estimates of the same layers, drawn side by side.

    Returns:
        The ``Axes``.

    >>> import torch
    >>> from matplotlib.figure import Figure
    >>> traces = Estimate({"a": torch.tensor(2.0)}, {"a": torch.tensor(0.1)}, torch.tensor(10))
    >>> [label.get_text() for label in layer_plot(traces, Figure().subplots()).get_yticklabels()]
    ['a']
    """
    results = style.labelled(estimates if not isinstance(estimates, Estimate) else {"": estimates})
    first = next(iter(results.values()))
    names = [name.replace("$", r"\$") for name in tree.names(first.mean)]  # a dollar starts mathematics
    ax = style.axes(ax, figsize=(6.4, layer_plot_height(len(names))))
    scalars = {label: style.scalars(one.mean) for label, one in results.items()}
    low = style.set_log(ax, np.concatenate(list(scalars.values())))
    for number, ((label, one), color, marker) in enumerate(zip(results.items(), style.colors(ax), cycle(_MARKERS))):
        rows = np.arange(len(names)) + 0.3 * (number - (len(results) - 1) / 2)
        data = None if one.data_stderr is None else style.scalars(one.data_stderr)
        errors = style.scalars(one.stderr)
        style.sizes(ax, rows, scalars[label], errors, color, marker, low, wide=style.known(data, rows), label=label)
    shown = np.arange(len(names))[:: -(-len(names) // 80)]
    ax.set_yticks(shown, [names[row] for row in shown], fontsize=8)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set(xlabel="size of the trace, with its standard error")
    return style.legend(ax, results)


def layer_plot_height(num_layers: int) -> float:
    """The figure height, in inches, at which the names of so many layers can be read."""
    return min(1.2 + 0.18 * num_layers, 16.0)


def line_plot(steps: Numbers, losses: Tensor | Mapping[str, Tensor], ax: Axes | None = None) -> Axes:
    """Losses along one line or several, of ``hf.line``, over the distance from the parameters.

    Args:
        steps: as given to ``hf.line``.
        losses: a tensor like ``steps``, or a dict from label to such tensors.

    Returns:
        The ``Axes``.

    >>> import torch
    >>> from matplotlib.figure import Figure
    >>> line_plot([-1.0, 0.0, 1.0], torch.tensor([2.0, 1.0, 2.0]), Figure().subplots()).get_ylabel()
    'loss'
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
    """Losses over a plane, of ``hf.plane``, as contours; the cross marks the parameters.

    Args:
        steps_x, steps_y: as given to ``hf.plane``.
        losses: ``(len(steps_x), len(steps_y))``. Where they span orders of magnitude, the colours are logarithmic.

    Returns:
        The ``Axes``.

    >>> import torch
    >>> from matplotlib.figure import Figure
    >>> losses = torch.tensor([[0.0, 1.0], [1.0, 2.0]])
    >>> plane_plot([0.0, 1.0], [0.0, 1.0], losses, Figure().subplots()).get_xlabel()
    'distance along the first direction'
    """
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
    """The path of a training in a plane, for example on top of ``plane_plot``: a ring marks its start, a star its end.

    Args:
        points: ``(T, 2)``, the coordinates along the two directions of the plane, in the order of training.

    Returns:
        The ``Axes``.

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
    """Losses over a plane, of ``hf.plane``, as a surface in three dimensions.

    Args:
        steps_x, steps_y, losses: as for :func:`plane_plot`; of losses that span orders of magnitude, the logarithm.
        ax: with a 3d projection.

    Returns:
        The ``Axes``.

    Raises:
        ValueError: ``ax`` is not three-dimensional.

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
