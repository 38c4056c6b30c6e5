from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from pages import contrast

import hessfn as hf
from hessfn.plotting import plot

GRID = torch.linspace(-1, 2, 301)
DENSITY = hf.Density(GRID, torch.exp(-50 * GRID**2))


def pairs(*values: float) -> hf.EigenPairs:
    k = len(values)
    return hf.EigenPairs(torch.tensor(values), torch.eye(k), torch.full((k,), 0.5), torch.tensor(9), torch.ones(k) > 0)


def layers(*means: float) -> hf.Estimate:
    names = [f"layer{i}" for i in range(len(means))]
    return hf.Estimate(
        {name: torch.tensor(mean) for name, mean in zip(names, means, strict=True)},
        {name: torch.tensor(0.25) for name in names},
        torch.tensor(3),
    )


STEPS = torch.linspace(-1, 1, 11)
LOSSES = 1 + STEPS[:, None] ** 2 + 3 * STEPS[:7] ** 2
DRAWN: dict[str, Callable[[Any], Any]] = {
    "density_plot": lambda ax: plot.density_plot(DENSITY, ax),
    "eigen_plot": lambda ax: plot.eigen_plot(pairs(3.0, 2.0, -1.0), ax),
    "layer_plot": lambda ax: plot.layer_plot(layers(3.0, -2.0), ax),
    "line_plot": lambda ax: plot.line_plot(STEPS, STEPS**2, ax),
    "trajectory_plot": lambda ax: plot.trajectory_plot(torch.stack([STEPS, STEPS**2], 1), ax),
    "plane_plot": lambda ax: plot.plane_plot(STEPS, STEPS[:7], LOSSES, ax),
    "surface_plot": lambda ax: plot.surface_plot(STEPS, STEPS[:7], LOSSES, ax),
}


@pytest.mark.parametrize("name", DRAWN)
def test_plots_draw_where_they_are_told_and_touch_nothing_else(name: str) -> None:
    settings, figures, backend = dict(mpl.rcParams), plt.get_fignums(), mpl.get_backend()
    figure = Figure()
    ax = figure.add_subplot(projection="3d" if name == "surface_plot" else None)
    assert DRAWN[name](ax) is ax
    assert ax.has_data()
    assert ax.get_xlabel() or name == "trajectory_plot"
    figure.savefig("/dev/null", format="png", dpi=40)
    assert dict(mpl.rcParams) == settings
    assert mpl.get_backend() == backend
    assert plt.get_fignums() == figures


@pytest.mark.parametrize("name", DRAWN)
def test_plots_without_axes_open_a_figure(name: str) -> None:
    ax = DRAWN[name](None)
    assert plt.get_fignums() == [ax.figure.number]
    plt.close(ax.figure)


def test_density_is_logarithmic_and_shows_one_eigenvalue_among_many() -> None:
    values = torch.exp(-50 * GRID**2) + 1e-6 * torch.exp(-500 * (GRID - 1.8) ** 2)
    ax = plot.density_plot(hf.Density(GRID, values), Figure().subplots())
    low, high = ax.get_xlim()
    assert ax.get_yscale() == "log"
    assert ax.get_ylim()[0] < 1e-7
    assert low < -0.5
    assert high > 1.8


def bars(ax: Any, number: int) -> list[list[float]]:
    """The ends of the horizontal bars that were drawn as the n-th."""
    return [segment[:, 0].tolist() for segment in ax.collections[number].get_segments()]


def test_eigenvalues_carry_their_residuals_and_what_other_data_would_give() -> None:
    known = pairs(3.0, -2.0)._replace(rounding=torch.tensor([0.25, 0.0]), data_stderr=torch.tensor([1.0, torch.nan]))
    ax = plot.eigen_plot(known, Figure().subplots())
    assert bars(ax, 1) == [[2.25, 3.75], [1.5, 2.5]]
    assert bars(ax, 0) == [[pytest.approx(3 - 1.96), pytest.approx(3 + 1.96)], [2.0, 2.0]]
    assert ax.get_xscale() == "log" and ax.yaxis_inverted()
    assert ax.get_xlim()[1] >= 3 + 1.96


def test_negative_numbers_are_hollow() -> None:
    for ax in (plot.eigen_plot(pairs(3.0, -2.0)), plot.layer_plot(layers(3.0, -2.0))):
        full, hollow = ax.lines
        assert (full.get_xdata().tolist(), hollow.get_xdata().tolist()) == ([3.0], [2.0])
        assert hollow.get_markerfacecolor() == ax.get_facecolor() != full.get_markerfacecolor()
        plt.close(ax.figure)


def test_layers_stand_in_the_order_of_the_net_with_their_errors() -> None:
    ax = plot.layer_plot(layers(1.0, 5.0, 2.0), Figure().subplots())
    assert [label.get_text() for label in ax.get_yticklabels()] == ["layer0", "layer1", "layer2"]
    assert ax.yaxis_inverted() and ax.get_xscale() == "log"
    assert ax.lines[0].get_xdata().tolist() == [1.0, 5.0, 2.0]
    assert bars(ax, 1)[1] == [4.75, 5.25]


def test_layers_of_two_nets_stand_side_by_side() -> None:
    ax = plot.layer_plot({"A": layers(1.0, 5.0), "B": layers(2.0, 4.0)}, Figure().subplots())
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["A", "B"]
    a, b = (line.get_ydata() for line in ax.lines if len(line.get_ydata()))
    assert (a < b).all() and (b - a < 1).all()


@pytest.mark.parametrize("values", [(1e-30, 1.0), (0.0, 1.0), (torch.nan, 1.0)])
def test_what_is_too_small_for_the_axis_leaves_it_readable(values: tuple[float, float]) -> None:
    figure = Figure()
    ax = plot.layer_plot(layers(*values), figure.subplots())
    figure.draw_without_rendering()
    assert ax.get_xlim()[0] >= 1e-9
    assert ax.lines[0].get_xdata().tolist() == [1.0]


def test_a_band_is_filled_only_where_it_is_on_the_axis() -> None:
    """A band that reaches to zero would be a block down to the floor of the axis."""
    band = hf.Band(GRID, DENSITY.values - 0.01, DENSITY.values + 0.01)
    ax = plot.density_plot(DENSITY, Figure().subplots(), band=band, floor=1e-4)
    edges = np.concatenate([path.vertices for path in ax.collections[0].get_paths()])
    inside = GRID[DENSITY.values - 0.01 > 1e-4]
    assert (edges[:, 0].min(), edges[:, 0].max()) == (
        pytest.approx(float(inside.min())),
        pytest.approx(float(inside.max())),
    )
    dotted = ax.lines[0].get_ydata()
    assert np.isfinite(dotted).sum() == len(GRID) - len(inside)
    assert ax.get_ylim()[0] == 1e-4
    assert len(plot.density_plot(DENSITY, Figure().subplots()).collections) == 0


def test_many_layers_stay_readable() -> None:
    ax = plot.layer_plot(layers(*range(1, 1001)))
    assert len(ax.get_yticks()) <= 80
    assert ax.figure.get_figheight() <= 16
    plt.close(ax.figure)


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([1.0, 2.0, 3.0], "linear"),
        ([1e-3, 1e-2, 9.0], "log"),
        ([-1e-3, 1e-2, 9.0], "symlog"),
        ([0.0, 0.0, 0.0], "linear"),
    ],
)
def test_axes_follow_the_data(values: list[float], scale: str) -> None:
    assert plot.line_plot([0.0, 1.0, 2.0], torch.tensor(values), Figure().subplots()).get_yscale() == scale


def test_lines_are_told_apart_by_more_than_colour() -> None:
    ax = plot.line_plot(STEPS, {"a": STEPS**2, "b": STEPS, "c": 2 * STEPS}, Figure().subplots())
    assert len({line.get_linestyle() for line in ax.lines}) == 3
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b", "c"]


@pytest.mark.parametrize("style", ["default", "dark_background"])
def test_colours_are_seen_on_light_and_on_dark_axes(style: str) -> None:
    with plt.style.context(style):
        figure = Figure()
        curves = plot.line_plot(STEPS, {"a": STEPS, "b": STEPS**2, "c": -STEPS}, figure.add_subplot(2, 2, 1))
        dots = plot.eigen_plot({"A": pairs(3.0, 1.0), "B": pairs(2.0)}, figure.add_subplot(2, 2, 2))
        bars = plot.layer_plot(layers(1.0, -1.0), figure.add_subplot(2, 2, 3))
    background = curves.get_facecolor()
    drawn = [line.get_color() for ax in (curves, dots, bars) for line in ax.lines]
    drawn += [color for ax in (dots, bars) for color in ax.collections[1].get_colors()]
    assert all(contrast(color, background) >= 3 for color in drawn)


def test_several_densities_and_their_bands_share_the_axes() -> None:
    half = hf.Density(GRID / 2, 2 * DENSITY.values)
    bands = {"A": hf.Band(GRID, DENSITY.values / 2, DENSITY.values * 2)}
    ax = plot.density_plot({"A": DENSITY, "B": half}, Figure().subplots(), band=bands)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["A", "B"]
    edges = ax.collections[0].get_paths()[0].vertices
    assert edges[:, 1].max() == pytest.approx(2.0)


def test_a_density_on_a_logarithmic_grid_has_a_symmetric_logarithmic_axis() -> None:
    rule = hf.Quadrature(torch.tensor([[-3.0, 1e-3, 50.0]]), torch.full((1, 3), 1 / 3))
    assert plot.density_plot(hf.density(rule), Figure().subplots()).get_xscale() == "linear"
    ax = plot.density_plot(hf.density(rule, linthresh=1e-2), Figure().subplots())
    assert ax.get_xscale() == "symlog"
    assert ax.xaxis.get_transform().linthresh == pytest.approx(1e-2)


def test_a_trajectory_goes_from_its_first_to_its_last_point() -> None:
    ax = plot.trajectory_plot([[3.0, 2.0], [1.0, 1.0], [0.5, 0.0]], Figure().subplots())
    path, start, end = (line.get_xydata().tolist() for line in ax.lines)
    assert path == [[3.0, 2.0], [1.0, 1.0], [0.5, 0.0]]
    assert (start, end) == ([path[0]], [path[-1]])
    with pytest.raises(ValueError, match=r"\(T, 2\).*not \(3,\)"):
        plot.trajectory_plot([1.0, 2.0, 3.0], Figure().subplots())


def test_surfaces_of_wide_range_are_logarithmic() -> None:
    ax = plot.surface_plot(STEPS, STEPS[:7], LOSSES, Figure().add_subplot(projection="3d"))
    assert ax.get_zlabel() == "loss"
    ax = plot.surface_plot(STEPS, STEPS[:7], LOSSES**5, Figure().add_subplot(projection="3d"))
    assert ax.get_zlabel() == "log10 of the loss"
    assert ax.get_zlim()[1] < 5


def test_losses_that_are_not_finite_leave_gaps() -> None:
    losses = LOSSES.clone()
    losses[0, 0], losses[1, 1] = torch.nan, torch.inf
    figure = Figure()
    plot.plane_plot(STEPS, STEPS[:7], losses, figure.add_subplot(1, 2, 1))
    plot.line_plot(STEPS, losses[:, 0], figure.add_subplot(1, 2, 2))
    figure.savefig("/dev/null", format="png", dpi=40)


def test_planes_have_the_first_direction_along_x() -> None:
    ax = plot.plane_plot(
        [0.0, 1.0, 2.0], [0.0, 5.0], torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]), Figure().subplots()
    )
    assert ax.get_xlim() == (0.0, 2.0)
    assert ax.get_ylim() == (0.0, 5.0)


@pytest.mark.parametrize("power", [0.01, 1.0, 5.0, 40.0])
def test_contours_leave_nothing_out(power: float) -> None:
    heights = (7.3 * LOSSES / LOSSES.max()).double() ** power
    ax = plot.plane_plot(STEPS, STEPS[:7], heights, Figure().subplots())
    levels = ax.collections[0].levels
    assert levels[0] <= heights.min() and heights.max() <= levels[-1]
    assert 5 <= len(levels) <= 40


def test_labels_of_a_symmetric_logarithmic_axis_do_not_lie_on_one_another() -> None:
    nodes = torch.cat([-torch.logspace(-4, 1, 15), torch.logspace(-4, 3, 25)]).double()[None]
    rule = hf.Quadrature(nodes, torch.full_like(nodes, 1 / 40))
    figure = Figure(figsize=(4.0, 3.0))
    ax = plot.density_plot(hf.density(rule, linthresh=1e-3), figure.subplots())
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in ax.get_xticklabels() if label.get_text()]
    assert len(boxes) >= 4
    assert all(one.x1 < other.x0 for one, other in itertools.pairwise(boxes))


def test_a_surface_in_flat_axes_says_how_to_make_them() -> None:
    with pytest.raises(ValueError, match='projection="3d"'):
        plot.surface_plot(STEPS, STEPS[:7], LOSSES, Figure().subplots())
