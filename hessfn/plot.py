"""Matplotlib figures of what the other functions return.

Each function takes a result and, as ``ax``, where to draw it; without one it opens a figure of its own. It returns the
``Axes``, for the caller to go on with. No style or backend is set; the colours are those of Okabe and Ito (2008), told
apart by colour-blind readers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hessfn import tree

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Numbers = Iterable[float] | Tensor
BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9"
_LINES = [(BLUE, "-"), (VERMILLION, "--"), (GREEN, "-."), (ORANGE, ":"), (PURPLE, "-"), (SKY, "--")]


def density_plot(density: Any, ax: Axes | None = None) -> Axes:
    """A spectral density, ``hf.density(...)``, over its eigenvalues, on a logarithmic axis.

    Outliers are single eigenvalues among n, so their peaks are some n times lower than the bulk's; what lies more than
    nine orders of magnitude below the highest peak is cut off.

    >>> from matplotlib.figure import Figure
    >>> from hessfn import Density
    >>> axes = density_plot(Density(torch.linspace(-1, 1, 5), torch.ones(5) / 2), Figure().subplots())
    >>> axes.get_yscale()
    'log'
    """
    ax = _axes(ax)
    grid, values = _array(density.grid), _array(density.values)
    positive = values[values > 0]
    floor = max(positive.min(), values.max() * 1e-9) if positive.size else 1e-9
    visible = values >= floor
    ax.fill_between(grid, floor, np.maximum(values, floor), color=BLUE, alpha=0.2, linewidth=0)
    ax.plot(grid, np.maximum(values, floor), color=BLUE, linewidth=1.2)
    ax.set_yscale("log")
    ax.set_ylim(bottom=floor)
    if visible.any():
        ax.set_xlim(_span(grid[visible]))
    ax.axvline(0, color="gray", linewidth=0.6)
    ax.set(xlabel="eigenvalue", ylabel="spectral density")
    return ax


def eigen_plot(eigenpairs: Any, ax: Axes | None = None) -> Axes:
    """Eigenvalues, ``hf.eigsh(...)``, in their order, each with its residual as the error bar.

    For a symmetric matrix an eigenvalue lies within the residual's distance of the value shown.
    """
    ax = _axes(ax)
    values, residuals = _array(eigenpairs.values), _array(eigenpairs.residuals)
    index = np.arange(1, len(values) + 1)
    ax.axhline(0, color="gray", linewidth=0.6)
    ax.errorbar(index, values, yerr=residuals, fmt="o", color=BLUE, ecolor=VERMILLION, capsize=4, markersize=5)
    _set_scale(ax, "y", values)
    ax.set_xticks(index if len(index) <= 20 else index[:: len(index) // 10])
    ax.set(xlabel="number", ylabel="eigenvalue and residual")
    return ax


def layer_plot(estimates: Any, ax: Axes | None = None) -> Axes:
    """One bar a layer, top to bottom in the order of the net, with its standard error: ``hf.hutchinson_per_leaf(...)``.

    Args:
        estimates: ``mean`` and ``stderr`` are trees of scalars.
    """
    names = [name.replace("$", r"\$") for name in tree.names(estimates.mean)]  # a dollar starts mathematics
    means, errors = (np.array([float(x) for x in tree.leaves(part)]) for part in (estimates.mean, estimates.stderr))
    ax = _axes(ax, figsize=(6.4, layer_plot_height(len(names))))
    rows = np.arange(len(names))
    ax.barh(rows, means, color=np.where(means < 0, ORANGE, BLUE), height=0.75)
    ax.errorbar(means, rows, xerr=np.nan_to_num(errors), fmt="none", ecolor="black", elinewidth=1, capsize=2)
    ax.axvline(0, color="gray", linewidth=0.6)
    shown = rows[:: -(-len(rows) // 80)]
    ax.set_yticks(shown, [names[row] for row in shown], fontsize=8)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.locator_params(axis="x", nbins=5)
    _set_scale(ax, "x", means)
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
    ax = _axes(ax)
    curves = losses if isinstance(losses, Mapping) else {"": losses}
    positions, heights = _array(steps), [_array(curve) for curve in curves.values()]
    for number, (label, height) in enumerate(zip(curves, heights, strict=True)):
        color, style = _LINES[number % len(_LINES)]
        ax.plot(positions, height, style, color=color, label=label or None, linewidth=1.6)
    _set_scale(ax, "y", np.concatenate(heights))
    if any(curves):
        ax.legend(frameon=False)
    ax.set(xlabel="distance from the parameters", ylabel="loss")
    return ax


def plane_plot(steps_x: Numbers, steps_y: Numbers, losses: Tensor, ax: Axes | None = None) -> Axes:
    """Losses over a plane, ``hf.plane(...)``, as contours: ``losses[i, j]`` belongs to ``(steps_x[i], steps_y[j])``."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    ax = _axes(ax)
    height = np.ma.masked_invalid(_array(losses).T)
    wide = bool(height.min() > 0 and height.max() > 50 * height.min())
    locator = LogLocator(subs=(1.0, 2.0, 5.0)) if wide else MaxNLocator(15)
    contours = ax.contourf(_array(steps_x), _array(steps_y), height, locator=locator, cmap="cividis")
    ax.figure.colorbar(contours, ax=ax, label="loss")
    ax.plot(0, 0, "+", color="white", markersize=10)
    ax.set(xlabel="distance along the first direction", ylabel="distance along the second direction")
    return ax


def surface_plot(steps_x: Numbers, steps_y: Numbers, losses: Tensor, ax: Axes | None = None) -> Axes:
    """Losses over a plane, ``hf.plane(...)``, as a surface in three dimensions; ``ax`` must have a 3d projection.

    >>> from matplotlib.figure import Figure
    >>> axes = Figure().add_subplot(projection="3d")
    >>> surface_plot([0.0, 1.0], [0.0, 1.0], torch.ones(2, 2), axes) is axes
    True
    """
    ax = _axes(ax, subplot_kw={"projection": "3d"})
    if not hasattr(ax, "plot_surface"):
        raise ValueError('ax must be three-dimensional: make it with add_subplot(projection="3d")')
    x, y = np.meshgrid(_array(steps_x), _array(steps_y), indexing="ij")
    ax.plot_surface(x, y, _array(losses), cmap="cividis", linewidth=0, antialiased=True)
    ax.set(xlabel="first direction", ylabel="second direction", zlabel="loss")
    return ax


def _axes(ax: Axes | None, **options: Any) -> Axes:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt  # only here: pyplot keeps global state and may want a display

    return plt.subplots(layout="constrained", **options)[1]


def _array(x: Numbers) -> np.ndarray:
    return torch.as_tensor(x).detach().cpu().double().numpy()


def _set_scale(ax: Axes, which: str, values: np.ndarray) -> None:
    """Logarithmic where the values span much; symmetric around zero where their signs differ."""
    sizes = np.abs(values[np.isfinite(values) & (values != 0)])
    if not sizes.size or sizes.max() <= 50 * np.median(sizes):
        return
    if (values[np.isfinite(values)] > 0).all():
        ax.set(**{f"{which}scale": "log"})
    else:
        threshold = max(np.quantile(sizes, 0.25), sizes.max() * 1e-4)
        getattr(ax, f"set_{which}scale")("symlog", linthresh=threshold)


def _span(x: np.ndarray) -> tuple[float, float]:
    margin = 0.03 * (x.max() - x.min()) or 1.0
    return float(x.min() - margin), float(x.max() + margin)
