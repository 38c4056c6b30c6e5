"""The loss along lines and over planes through the parameters, and the directions worth looking along."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hessfn.core import tree
from hessfn.core.arguments import require_loss, require_pair, require_vector
from hessfn.core.errors import InvalidInput
from hessfn.core.probes import each
from hessfn.core.torch_state import is_differentiated, value_of
from hessfn.core.tree import T, Tree

Loss = Callable[..., Tensor]


def line(
    loss: Loss, params: T, direction: T, steps: Iterable[float] | Tensor, *args: Any, batch_size: int = 1
) -> Tensor:
    """The losses ``loss(params + s direction, *args)`` along a line, for every ``s`` in ``steps``.

    Args:
        loss: ``loss(params, *args)`` to a scalar.
        params: a tree of tensors, where the line begins.
        direction: any tree like ``params``. If its norm is 1, as for eigenvectors, :func:`random_direction` and
            :func:`gradient_direction`, a step is a distance in parameter space.
        steps: numbers, in any order.
        args: what else the loss takes. Over a data set, each batch read once:
            ``batches.mean(lambda batch: line(loss, params, direction, steps, batch), loader)()``.
        batch_size: this many points at once, under ``vmap`` over the parameters: for small nets (a tanh net of 600
            parameters on 50 samples: 64 at once take an eighth of the time) and for GPUs. On a CPU large nets become
            slower (ResNet20: two at once take half as long again).

    Returns:
        A tensor ``(len(steps),)``, in the unit and dtype of the loss.

    Cost: one forward pass a point; ``batch_size`` copies of the parameters. ``progress(loss, total=len(steps))`` in
    place of the loss shows the time left.

    Raises:
        ValueError: the direction is not a tree like ``params``, or there is no step.

    >>> line(lambda w: w.square().sum(), torch.ones(2), torch.tensor([1.0, 0.0]), [-1.0, 0.0, 1.0])
    tensor([1., 2., 5.])
    """
    require_kinds(loss, params, "line(loss, params, direction, steps)")
    direction = tree.aligned(direction, params, "the direction")
    return losses_at(loss, params, [direction], _numbers(steps, params)[:, None], args, batch_size)


def plane(
    loss: Loss,
    params: T,
    directions: Sequence[T],
    steps_x: Iterable[float] | Tensor,
    steps_y: Iterable[float] | Tensor,
    *args: Any,
    batch_size: int = 1,
) -> Tensor:
    """The losses ``loss(params + x directions[0] + y directions[1], *args)`` over a plane.

    Args:
        loss, params, args, batch_size: as for :func:`line`.
        directions: two trees like ``params``.
        steps_x, steps_y: the steps along the first and the second direction.

    Returns:
        A tensor ``(len(steps_x), len(steps_y))``, in the unit and dtype of the loss.

    Cost: one forward pass a point; ``batch_size`` copies of the parameters.

    Raises:
        ValueError: a direction is not a tree like ``params``, there are not two, or there is no step.

    Source: Li, Xu, Taylor, Studer and Goldstein (2018).

    >>> flat = torch.eye(2)
    >>> plane(lambda w: w.square().sum(), torch.zeros(2), (flat[0], flat[1]), [0.0, 1.0], [0.0, 1.0, 2.0])
    tensor([[0., 1., 4.],
            [1., 2., 5.]])
    """
    call = "plane(loss, params, directions, steps_x, steps_y)"
    require_kinds(loss, params, call)
    pair = require_pair(directions, "directions", call)
    names = ("the first direction", "the second direction")
    along = [tree.aligned(d, params, name) for d, name in zip(pair, names, strict=True)]
    x, y = _numbers(steps_x, params), _numbers(steps_y, params)
    return losses_at(loss, params, along, torch.cartesian_prod(x, y), args, batch_size).reshape(len(x), len(y))


def require_kinds(loss: Loss, params: Tree, call: str, *, floating: bool = False) -> None:
    require_loss(loss, params, call)
    require_vector(params, "params", call, floating=floating)


def losses_at(
    loss: Loss, params: Tree, directions: Sequence[Tree], points: Tensor, args: tuple[Any, ...], batch_size: int = 1
) -> Tensor:
    """The losses ``(len(points),)`` at ``params + sum_i points[:, i] directions[i]``."""

    def at(point: Tensor) -> Tensor:
        where = params
        for direction, step in zip(directions, point, strict=True):
            where = tree.add(where, direction, step)
        # A loss that closes over live parameters would leave a graph behind for every point.
        return loss(where, *args) if wanted else value_of(lambda: loss(where, *args))

    wanted = torch.is_grad_enabled() and is_differentiated(params, (directions, points, args))
    # Under vmap the other attention kernels fall back to a loop.
    with nullcontext() if batch_size == 1 else sdpa_kernel(SDPBackend.MATH):
        return torch.stack(list(each(at, points, batch_size)))


def _numbers(steps: Iterable[float] | Tensor, params: Tree) -> Tensor:
    numbers = torch.as_tensor(steps, dtype=torch.float64, device="cpu")
    if numbers.dim() != 1 or len(numbers) == 0:
        raise InvalidInput(f"steps must be numbers in a row, at least one, not of shape {tuple(numbers.shape)}")
    return numbers.to(tree.wide(tree.leaves(params)[0].new_zeros(())))
