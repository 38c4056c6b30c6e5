"""The loss along lines and over planes through the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hessfn import tree
from hessfn.probes import gaussian
from hessfn.tree import Tree

Loss = Callable[..., Tensor]


def line(loss: Loss, params: Tree, direction: Tree, steps: Iterable[float] | Tensor, *args: Any) -> Tensor:
    """The losses ``loss(params + s direction, *args)`` for every ``s`` in ``steps``: a tensor ``(len(steps),)``.

    The step is a distance in parameter space when the direction has unit norm, as eigenvectors, random and gradient
    directions here have. Costs one forward pass a step. The second difference at 0 is the curvature ``v'Hv``.

    Raises:
        ValueError: the direction is not a tree like ``params``.

    >>> line(lambda w: w.square().sum(), torch.ones(2), torch.tensor([1.0, 0.0]), [-1.0, 0.0, 1.0])
    tensor([1., 2., 5.])
    """
    direction = tree.aligned(direction, params, "the direction")
    with torch.no_grad():
        return torch.stack([loss(tree.add(params, direction, step), *args) for step in _numbers(steps)])


def plane(
    loss: Loss,
    params: Tree,
    directions: tuple[Tree, Tree],
    steps_x: Iterable[float] | Tensor,
    steps_y: Iterable[float] | Tensor,
    *args: Any,
) -> Tensor:
    """The losses ``loss(params + x directions[0] + y directions[1], *args)``: ``(len(steps_x), len(steps_y))``.

    >>> flat = torch.eye(2)
    >>> plane(lambda w: w.square().sum(), torch.zeros(2), (flat[0], flat[1]), [0.0, 1.0], [0.0, 1.0, 2.0])
    tensor([[0., 1., 4.],
            [1., 2., 5.]])
    """
    along_x = tree.aligned(directions[0], params, "the first direction")
    rows = [line(loss, tree.add(params, along_x, x), directions[1], steps_y, *args) for x in _numbers(steps_x)]
    return torch.stack(rows)


def random_direction(params: Tree, *, seed: int = 0) -> Tree:
    """A direction of unit norm, uniform on the sphere, in the shape of ``params``; the same for the same seed.

    >>> round(float(tree.norm(random_direction(torch.zeros(5)))), 6)
    1.0
    """
    return _unit(gaussian(params, 1, seed=seed)[0])


def gradient_direction(loss: Loss, params: Tree, *args: Any) -> Tree:
    """The gradient of the loss, at unit norm: the direction of steepest ascent.

    Raises:
        ValueError: the gradient is zero or not finite, so there is no such direction.

    >>> gradient_direction(lambda w: w.square().sum(), torch.tensor([3.0, 4.0]))
    tensor([0.6000, 0.8000])
    """
    return _unit(torch.func.grad(loss)(params, *args))


def filter_normalized(direction: Tree, params: Tree) -> Tree:
    """The direction with every filter as long as the same filter of ``params``, so that nets of unlike scale compare.

    A filter is a slice along the first axis; leaves of fewer than two axes (biases, norm parameters) become zero.

    Source: Li, Xu, Taylor, Studer, Goldstein (2018).

    >>> filter_normalized(torch.ones(2, 4), 3 * torch.eye(2, 4))
    tensor([[1.5000, 1.5000, 1.5000, 1.5000],
            [1.5000, 1.5000, 1.5000, 1.5000]])
    """

    def rescale(d: Tensor, p: Tensor) -> Tensor:
        if p.dim() < 2:
            return torch.zeros_like(d)
        lengths = [torch.linalg.vector_norm(x.flatten(1), dim=1) for x in (p, d)]
        ratio = torch.where(lengths[1] > 0, lengths[0] / lengths[1], 0.0)
        return d * ratio.reshape(-1, *[1] * (d.dim() - 1))

    return tree.map(rescale, tree.aligned(direction, params, "the direction"), params)


def _unit(direction: Tree) -> Tree:
    length = tree.norm(direction)
    if tree.known((length > 0) & length.isfinite()) is False:
        raise ValueError(f"a direction of norm {float(length)} cannot be scaled to norm 1")
    return tree.scale(1 / length, direction)


def _numbers(steps: Iterable[float] | Tensor) -> list[float]:
    return torch.as_tensor(steps, dtype=torch.float64).tolist()
