"""The landscape of a report: the loss along three directions, and over the plane of the top two eigenvectors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from operator import length_hint
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.core.results import EigenPairs
from hessfn.core.tree import Tree
from hessfn.landscape import slices
from hessfn.landscape.directions import random_direction
from hessfn.landscape.refinement import Refined, refinement, side_by_side
from hessfn.losses.batches import mean
from hessfn.parallel.all_reduce import ShardedBatches, gather
from hessfn.reporting.analysis import Landscape, Plane
from hessfn.reporting.options import Options
from hessfn.reporting.problem import Prepared
from hessfn.reporting.progress import progress_bar
from hessfn.reporting.text import number

_LINE_POINTS = 31
_COARSE = 5  # points that are measured before others are chosen, each way
_AT_ONCE = {1: 1, 2: 4}  # of each grid in a round, by its dimensions
_RTOL = 0.02  # of the range drawn: a third of the way from contour to contour
_NEAR = 1 / 60  # of the radius: so far from the middle the quadratic model counts as known
_USUAL_POINTS = 50  # so many were measured of the loss of a ResNet20

Wanted = dict[str, list[int]]
Known = tuple[Any, Any]  # points (m, d) and their losses (m,)


def analyse_landscape(
    problem: Prepared, value: Tensor, gradient: Tree, eigen: EigenPairs, options: Options
) -> Landscape:
    """The loss around the parameters, where it is ``value``: measured where it bends, and interpolated in between.

    At the middle the loss, its gradient and its curvature along the eigenvectors are known. The batches are read once
    for each round of points, about ten times. Eigenvectors point to where the loss rises.
    """
    first, *others = eigen.values.abs().argsort(descending=True).tolist()
    top, norm = _uphill(eigen, first, gradient), tree.norm(gradient)
    directions = {"top eigenvector": top, "random": random_direction(problem.params, seed=options.seed)}
    directions |= {"gradient": tree.scale(1 / norm, gradient)} if norm > 0 else {}
    radius = options.radius or _default_radius(value, eigen.values[first], problem.params)
    num_points = options.num_plane_points if others else 0
    steps, axis = (np.linspace(-radius, radius, num) for num in (_LINE_POINTS, num_points))
    with progress_bar(options, _USUAL_POINTS * length_hint(problem.batches), "point", "landscape") as bar:
        along = {name: [direction] for name, direction in directions.items()}
        middles = {name: _middle(value, gradient, eigen, one, _NEAR * radius) for name, one in along.items()}
        lines = _losses(problem, along, dict.fromkeys(along, steps[:, None]), middles, bar)
        curves = {name: torch.from_numpy(line.losses) for name, line in lines.items()}
        measured = {name: torch.from_numpy(line.measured) for name, line in lines.items()}
        plane = None
        if num_points:
            both = [top, _uphill(eigen, others[0], gradient)]
            middle = _middle(value, gradient, eigen, both, _NEAR * radius)
            known = _joined(middle, _in_plane(steps, lines["top eigenvector"]))
            names = [f"eigenvector of {number(float(eigen.values[i]))}" for i in (first, others[0])]
            plane = _plane(problem, both, names, axis, known, bar)
        bar.total = bar.n
    return Landscape(torch.from_numpy(steps), curves, plane, measured)


def _plane(problem: Prepared, directions: list[Tree], names: list[str], axis: Any, known: Known, bar: Any) -> Plane:
    """The loss over a plane, of which some points are known."""
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    found = _losses(problem, {"plane": directions}, {"plane": grid}, {"plane": known}, bar)["plane"]
    losses, measured = (torch.from_numpy(x).reshape(len(axis), len(axis)) for x in (found.losses, found.measured))
    return Plane(torch.from_numpy(axis), losses, measured, names)


def _middle(value: Tensor, gradient: Tree, eigen: EigenPairs, directions: list[Tree], size: float) -> Known:
    """The quadratic model of the loss at the middle and ``size`` beside it, along one direction or over two.

    Of the Hessian it has the eigenpairs: along their vectors it is exact, and so near that the rest is not seen.
    """
    beside = np.array([-size, 0.0, size])
    points = np.stack(np.meshgrid(*[beside] * len(directions), indexing="ij"), -1).reshape(-1, len(directions))
    slopes = np.array([float(tree.dot(gradient, direction)) for direction in directions])
    vectors = [tree.map(lambda leaf, i=i: leaf[i], eigen.vectors) for i in range(len(eigen.values))]
    parts = points @ np.array([[float(tree.dot(direction, v)) for v in vectors] for direction in directions])
    return points, float(value) + points @ slopes + parts**2 @ eigen.values.double().cpu().numpy() / 2


def _in_plane(steps: Any, line: Refined) -> Known:
    """The points of a line along the first direction that were measured, but for the middle, and their losses."""
    there = line.measured & (steps != 0)
    return np.stack([steps[there], np.zeros(there.sum())], -1), line.losses[there]


def _joined(first: Known, second: Known) -> Known:
    return np.concatenate([first[0], second[0]]), np.concatenate([first[1], second[1]])


def _uphill(eigen: EigenPairs, index: int, gradient: Tree) -> Tree:
    """An eigenvector, whose sign is rounding's, in the sense in which the loss rises at first."""
    vector = tree.map(lambda leaf: leaf[index], eigen.vectors)
    return tree.scale(-1.0, vector) if tree.dot(gradient, vector) < 0 else vector


def _default_radius(value: Tensor, curvature: Tensor, theta: Tree) -> float:
    """Where the quadratic model has risen by ten times the loss, but at most a tenth of the norm of the parameters."""
    tenfold = float((20 * value.abs() / curvature.abs()).sqrt())
    return min((r for r in (tenfold, 0.1 * float(tree.norm(theta))) if 0 < r < math.inf), default=1.0)


def _start(grid: Any) -> list[int]:
    """A coarse grid with the ends."""
    is_line = grid.shape[1] == 1
    width = len(grid) if is_line else math.isqrt(len(grid))
    axis = sorted({round(i) for i in np.linspace(0, width - 1, min(width, _COARSE))})
    return axis if is_line else [i * width + j for i in axis for j in axis]


def _losses(
    problem: Prepared,
    directions: Mapping[str, list[Tree]],
    grids: Mapping[str, Any],
    known: Mapping[str, Known],
    bar: Any,
) -> dict[str, Refined]:
    """The mean loss on grids, each over its directions, which one axis shows; one pass measures a round of points."""
    batches = problem.batches

    def point(params: Tree, batch: Any) -> Tensor:
        bar.update()
        return problem.loss(params, batch)

    def losses_at(wanted: Wanted) -> dict[str, dict[int, float]]:
        some = {name: indices for name, indices in wanted.items() if indices}
        where = {name: torch.from_numpy(grids[name][indices]) for name, indices in some.items()}

        def of_batch(batch: Any) -> dict[str, Tensor]:
            return {
                name: slices.losses_at(point, problem.params, directions[name], points, (batch,)).double()
                for name, points in where.items()
            }

        bar.total = max(bar.total or 0, bar.n + sum(map(len, some.values())) * length_hint(batches))
        found = mean(of_batch, batches, weights=problem.weights)() if some else {}
        return {
            name: dict(zip(indices, found[name].tolist(), strict=True)) if indices else {}
            for name, indices in wanted.items()
        }

    def agree(decision: Any) -> Any:
        return gather(decision, batches.group)[0] if isinstance(batches, ShardedBatches) else decision

    dialogues = {
        name: refinement(grid, _start(grid), known=known[name], rtol=_RTOL, at_once=_AT_ONCE[grid.shape[1]])
        for name, grid in grids.items()
    }
    return side_by_side(dialogues, losses_at, agree)
