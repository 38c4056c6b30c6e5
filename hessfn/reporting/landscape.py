"""The landscape of a report: the loss along three directions, and over the plane of the top two eigenvectors."""

from __future__ import annotations

import math
from operator import length_hint
from typing import Any

import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.core.results import EigenPairs
from hessfn.core.tree import Tree
from hessfn.landscape import slices
from hessfn.landscape.directions import random_direction
from hessfn.losses.batches import mean
from hessfn.products.loss_checks import plain_gradient
from hessfn.reporting.analysis import Landscape, Plane
from hessfn.reporting.options import Options
from hessfn.reporting.problem import Prepared
from hessfn.reporting.progress import progress_bar
from hessfn.reporting.text import number

_LINE_POINTS = 31


def analyse_landscape(problem: Prepared, value: Tensor, eigen: EigenPairs, options: Options) -> Landscape:
    """The loss around the parameters, where it is ``value``; every batch is read once."""
    first, *others = eigen.values.abs().argsort(descending=True).tolist()
    top = tree.map(lambda leaf: leaf[first], eigen.vectors)
    directions = {"top eigenvector": top, "random": random_direction(problem.params, seed=options.seed)}
    directions |= _gradient_direction(problem)
    radius = options.radius or _default_radius(value, eigen.values[first], problem.params)
    num_points = options.num_plane_points if others else 0
    steps, grid = (torch.linspace(-radius, radius, num, dtype=torch.float64) for num in (_LINE_POINTS, num_points))
    second = tree.map(lambda leaf: leaf[others[0]], eigen.vectors) if num_points else None
    losses = _losses(problem, directions, steps, second, grid, options)
    if not num_points:
        return Landscape(steps, losses["lines"], None)
    names = [f"eigenvector of {number(float(eigen.values[i]))}" for i in (first, others[0])]
    return Landscape(steps, losses["lines"], Plane(grid, losses["plane"], names))


def _gradient_direction(problem: Prepared) -> dict[str, Tree]:
    """The gradient of the mean loss, scaled to unit norm; nothing where it is zero."""
    loss, theta = problem.loss, problem.params

    def gradient_of(batch: Any) -> Tree:
        return tree.require_finite(tree.unflatten(plain_gradient(loss, theta, (batch,))[1], theta), "the gradient")

    gradient = mean(gradient_of, problem.batches, weights=problem.weights)()
    norm = tree.norm(gradient)
    return {"gradient": tree.scale(1 / norm, gradient)} if norm > 0 else {}


def _default_radius(value: Tensor, curvature: Tensor, theta: Tree) -> float:
    """Where the quadratic model has risen by ten times the loss, but at most a tenth of the norm of the parameters."""
    tenfold = float((20 * value.abs() / curvature.abs()).sqrt())
    return min((r for r in (tenfold, 0.1 * float(tree.norm(theta))) if 0 < r < math.inf), default=1.0)


def _losses(
    problem: Prepared, directions: dict[str, Tree], steps: Tensor, second: Tree | None, grid: Tensor, options: Options
) -> dict[str, Any]:
    """The mean loss along lines; and over the plane of the first and a second direction, if there is one."""
    num_points = len(directions) * len(steps) + (0 if second is None else len(grid) ** 2)
    with progress_bar(options, num_points * length_hint(problem.batches), "point", "landscape") as bar:

        def point(params: Tree, batch: Any) -> Tensor:
            bar.update()
            return problem.loss(params, batch)

        def of_batch(batch: Any) -> dict[str, Any]:
            theta = problem.params
            lines = {name: slices.line(point, theta, along, steps, batch) for name, along in directions.items()}
            if second is None:
                return {"lines": lines}
            plane = slices.plane(point, theta, (directions["top eigenvector"], second), grid, grid, batch)
            return {"lines": lines, "plane": plane}

        return mean(of_batch, problem.batches, weights=problem.weights)()
