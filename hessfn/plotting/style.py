"""What the figures of ``plot`` share: colours for light and dark axes, scales that follow the data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hessfn.core import tree

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9"


def axes(ax: Axes | None, **options: Any) -> Axes:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt  # only here: pyplot keeps global state and may want a display

    return plt.subplots(layout="constrained", **options)[1]


def array(x: Any) -> np.ndarray:
    return torch.as_tensor(x, device="cpu").detach().double().numpy()


def scalars(tree_of_scalars: Any) -> np.ndarray:
    return np.array([float(x) for x in tree.leaves(tree_of_scalars)])


def known(errors: Any, like: np.ndarray) -> np.ndarray:
    """Errors, or zeros where they are not known."""
    found = np.zeros(len(like)) if errors is None else array(errors)
    return np.where(np.isfinite(found), found, 0.0)


def labelled(x: Any) -> Mapping[str, Any]:
    return x if isinstance(x, Mapping) else {"": x}


def legend(ax: Axes, curves: Mapping[str, Any]) -> Axes:
    if any(curves):
        ax.legend(frameon=False)
    return ax


def ink(ax: Axes) -> Any:
    """What text has, so that it is seen on this background."""
    return ax.xaxis.label.get_color()


def colors(ax: Axes) -> Iterator[Any]:
    from matplotlib.colors import to_rgb

    dark = np.dot(to_rgb(ax.get_facecolor()), [0.2126, 0.7152, 0.0722]) < 0.4
    rest = [SKY, ORANGE, GREEN, PURPLE] if dark else [BLUE, VERMILLION, GREEN, PURPLE]
    return cycle([*rest, ink(ax)])


def band(ax: Axes, at: np.ndarray, low: np.ndarray, high: np.ndarray, floor: float, color: Any) -> None:
    """Between two curves on a logarithmic axis; where the lower one is off it, the upper one alone."""
    inside = low > floor
    ax.fill_between(at, np.maximum(low, floor), np.maximum(high, floor), inside, color=color, alpha=0.25, linewidth=0)
    edge = np.where((high > floor) & ~inside, high, np.nan)
    ax.plot(at, edge, linestyle=":", color=color, linewidth=0.9, alpha=0.8)


def set_log(ax: Axes, values: np.ndarray) -> float:
    """A logarithmic horizontal axis for the sizes of these; returns its lower end, at most eight decades below."""
    found = np.abs(values[np.isfinite(values) & (values != 0)])
    if not found.size:
        return 0.0
    low = max(found.min() / 2, found.max() * 1e-8)
    ax.set_xscale("log")
    ax.set_xlim(low, found.max() * 2)
    ax.grid(axis="x", color="gray", alpha=0.25, linewidth=0.6)
    return float(low)


def sizes(
    ax: Axes,
    rows: np.ndarray,
    values: np.ndarray,
    errors: np.ndarray,
    color: Any,
    marker: str,
    low: float,
    *,
    wide: np.ndarray,
    label: str = "",
) -> None:
    """Sizes of numbers with two errors each, a row for each number; those of negative ones are hollow."""
    size = np.abs(values)

    def ends(error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        error = known(error, rows)
        return np.maximum(size - error, low), np.minimum(size + error, np.finfo(float).max)

    ax.hlines(rows, *ends(wide), color=color, linewidth=5, alpha=0.3)
    ax.hlines(rows, *ends(errors), color=ink(ax), linewidth=1.2)
    shown, options = size >= low, {"markersize": 5, "linestyle": "none", "color": color}
    positive, negative = shown & (values > 0), shown & (values < 0)
    ax.plot(size[positive], rows[positive], marker, label=label or None, **options)
    ax.plot(size[negative], rows[negative], marker, markerfacecolor=ax.get_facecolor(), **options)
    reach = max((ends(wide)[1].max(), ax.get_xlim()[1]))
    if np.isfinite(reach) and low:
        ax.set_xlim(right=reach)


def wide(height: np.ndarray) -> bool:
    return bool(height.min() > 0 and height.max() > 50 * height.min())


def log_levels(height: np.ndarray) -> np.ndarray:
    """1, 2 and 5 in every decade, or the decades alone where they are many; all heights lie between two of them."""
    low, high = height.min(), height.max()
    decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    levels = np.outer(decades, [1.0, 2.0, 5.0]).ravel() if len(decades) <= 6 else decades
    return levels[max(np.searchsorted(levels, low, "right") - 1, 0) : np.searchsorted(levels, high) + 1]


def linthresh(grid: np.ndarray) -> float:
    """Where ``sinh`` of an even grid, times linthresh, goes over from even to growing steps; infinite if it is even."""
    steps = np.diff(grid)
    if len(steps) < 2 or steps.max() <= 1.5 * steps.min():
        return np.inf
    # At x the steps are h sqrt(x^2 + linthresh^2).
    furthest = np.abs(grid).max()
    return float(furthest / np.sqrt((steps.max() / steps.min()) ** 2 - 1))


def set_scale(ax: Axes, which: str, values: np.ndarray) -> None:
    """Logarithmic where the values span much; symmetric around zero where their signs differ."""
    sizes = np.abs(values[np.isfinite(values) & (values != 0)])
    if not sizes.size or sizes.max() <= 50 * np.median(sizes):
        return
    if (values[np.isfinite(values)] > 0).all():
        ax.set(**{f"{which}scale": "log"})
    else:
        set_symlog(ax, which, max(np.quantile(sizes, 0.25), sizes.max() * 1e-4), sizes.max())


def set_symlog(ax: Axes, which: str, linthresh: float, furthest: float) -> None:
    threshold = 10.0 ** np.round(np.log10(linthresh))  # a power of ten has all ticks equally far apart
    # Few ticks, and room for those around zero: else their labels lie on one another.
    linscale = max(1.0, 0.3 * np.log10(furthest / threshold))
    getattr(ax, f"set_{which}scale")("symlog", linthresh=threshold, linscale=linscale)
    getattr(ax, f"{which}axis").get_major_locator().set_params(numticks=5)


def span(x: np.ndarray) -> tuple[float, float]:
    margin = 0.03 * (x.max() - x.min()) or 1.0
    return float(x.min() - margin), float(x.max() + margin)
