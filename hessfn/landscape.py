"""The loss along lines and over planes through the parameters, and the directions worth looking along."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hessfn import tree
from hessfn.probes import each, gaussian
from hessfn.tree import MatVec, Tree
from hessfn.ways import is_differentiated

Loss = Callable[..., Tensor]


class Curvature(NamedTuple):
    value: Tensor
    error: Tensor


def line(
    loss: Loss, params: Tree, direction: Tree, steps: Iterable[float] | Tensor, *args: Any, batch_size: int = 1
) -> Tensor:
    """The losses ``loss(params + s direction, *args)`` for every ``s`` in ``steps``: a tensor ``(len(steps),)``.

    Args:
        direction: any tree like ``params``. At unit norm, as eigenvectors, random and gradient directions here have
            it, a step is a distance in parameter space.
        args: what else the loss takes. Over a data set, each batch read once:
            ``batches.mean(lambda batch: line(loss, params, direction, steps, batch), loader)()``.
        batch_size: so many points at once, under ``vmap`` over the parameters: for small nets (a tanh net of 600
            parameters on 50 samples: 64 at once take an eighth of the time) and for GPUs. Large ones on a CPU lose by
            it (ResNet20: two at once take half as long again).

    Cost: one forward pass a point; ``batch_size`` copies of the parameters. ``progress(loss, total=len(steps))`` in
    place of the loss shows how far it is and the time left.

    Raises:
        ValueError: the direction is not a tree like ``params``, or there is no step.

    >>> line(lambda w: w.square().sum(), torch.ones(2), torch.tensor([1.0, 0.0]), [-1.0, 0.0, 1.0])
    tensor([1., 2., 5.])
    """
    direction = tree.aligned(direction, params, "the direction")
    return _losses(loss, params, [direction], _numbers(steps, params)[:, None], args, batch_size)


def plane(
    loss: Loss,
    params: Tree,
    directions: tuple[Tree, Tree],
    steps_x: Iterable[float] | Tensor,
    steps_y: Iterable[float] | Tensor,
    *args: Any,
    batch_size: int = 1,
) -> Tensor:
    """The losses ``loss(params + x directions[0] + y directions[1], *args)``: ``(len(steps_x), len(steps_y))``.

    Arguments, cost and errors as for :func:`line`.

    >>> flat = torch.eye(2)
    >>> plane(lambda w: w.square().sum(), torch.zeros(2), (flat[0], flat[1]), [0.0, 1.0], [0.0, 1.0, 2.0])
    tensor([[0., 1., 4.],
            [1., 2., 5.]])
    """
    names = ("the first direction", "the second direction")
    along = [tree.aligned(d, params, name) for d, name in zip(directions, names, strict=True)]
    x, y = _numbers(steps_x, params), _numbers(steps_y, params)
    return _losses(loss, params, along, torch.cartesian_prod(x, y), args, batch_size).reshape(len(x), len(y))


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


def direction_to(params: Tree, other: Tree) -> Tree:
    """What leads from the parameters (step 0) to another checkpoint's (step 1), at its full length.

    Only parameters are interpolated. Buffers, such as the running statistics of BatchNorm, stay those of the model the
    loss was made from, and need not suit the parameters in between.

    Raises:
        ValueError: ``other`` is not a tree like ``params``.

    Source: Goodfellow, Vinyals and Saxe (2015).

    >>> start, end = torch.tensor([1.0]), torch.tensor([3.0])
    >>> line(lambda w: w.square().sum(), start, direction_to(start, end), [0.0, 0.5, 1.0])
    tensor([1., 4., 9.])
    """
    return tree.add(tree.aligned(other, params, "the other checkpoint"), params, -1.0)


def filter_normalized(direction: Tree, params: Tree, *, keep_vectors: bool = False) -> Tree:
    """The direction with every filter as long as the same filter of ``params``, so that nets of unlike scale compare.

    A filter is a slice along the first axis: of a convolution what makes one channel, of a matrix one row.

    Args:
        keep_vectors: scale leaves of fewer than two axes (biases, norm parameters) too, each as one filter: entry by
            entry nothing of the direction would remain but its signs. By default they become zero.

    Raises:
        ValueError: the direction is not a tree like ``params``.

    Source: Li, Xu, Taylor, Studer and Goldstein (2018).

    >>> filter_normalized(torch.ones(2, 4), 3 * torch.eye(2, 4))
    tensor([[1.5000, 1.5000, 1.5000, 1.5000],
            [1.5000, 1.5000, 1.5000, 1.5000]])
    """

    def rescale(d: Tensor, p: Tensor) -> Tensor:
        if p.dim() < 2 and not keep_vectors:
            return torch.zeros_like(d)
        rows = p.shape[0] if p.dim() > 1 else 1
        width = p.numel() // max(rows, 1)
        ours, theirs = (torch.linalg.vector_norm(tree.wide(x.reshape(rows, width)), dim=1) for x in (d, p))
        ratio = torch.where(ours > 0, theirs / ours, 0.0).to(d.dtype)
        return d * ratio.reshape(-1, *[1] * (d.dim() - 1)) if p.dim() else d * ratio[0]

    return tree.map(rescale, tree.aligned(direction, params, "the direction"), params)


def slice_curvature(loss: Loss, params: Tree, direction: Tree, *args: Any) -> Curvature:
    """The second derivative of the loss along a direction, from its values alone: what ``v'Hv`` must be equal to.

    ``(f(h) - 2 f(0) + f(-h)) / h^2`` at the step h, between 0.1 and 0.1 sqrt(eps) of the parameters' norm, that is most
    accurate: the largest one that no smaller one contradicts by more than its rounding.

    Returns:
        ``value`` and ``error``. A loss with kinks (ReLU) bends at them too, where no Hessian sees it: over steps that
        cross many the value is another one. Steps small enough to cross none take float64.

    Cost: 39 forward passes.

    Source: the choice of the step is Lepski's (1991).

    >>> value, error = slice_curvature(lambda w: w.exp().sum(), torch.zeros(1).double(), torch.ones(1).double())
    >>> round(float(value), 6), bool(error < 1e-6)
    (1.0, True)
    """
    size, length = tree.norm(params), tree.norm(direction)
    first = 0.1 * torch.where(size > 0, size, 1.0) / torch.where(length > 0, length, 1.0)
    eps = tree.eps(params)
    steps = first * eps ** torch.linspace(0, 0.5, 19, dtype=first.dtype, device=first.device)
    losses = line(loss, params, direction, torch.cat([steps, -steps, torch.zeros_like(steps[:1])]), *args)
    above, below, middle = (tree.wide(part) for part in losses.split([len(steps), len(steps), 1]))
    bends = ((above - middle) + (below - middle)) / steps.square()
    # What the smallest steps see is rounding, which grows as 1/h^2.
    noise = (bends.diff().abs() * steps[1:].square())[-4:].amax() + eps * middle.abs()
    rounding = 3 * noise / steps.square()
    contradicted = ((bends[:, None] - bends).abs() - rounding).triu(1).clamp(min=0).amax(1)
    best = (contradicted + rounding).nan_to_num(nan=torch.inf).argmin(0, keepdim=True)
    return Curvature(bends.gather(0, best)[0], (contradicted + rounding).gather(0, best)[0])


def check_slice(
    matvec: MatVec, loss: Loss, params: Tree, direction: Tree, *args: Any, rtol: float | None = None
) -> None:
    """Asks whether a matvec is the Hessian of this loss here, along one direction: ``v'Hv`` against the slice's bend.

    Args:
        rtol: how much relative error is rounding; by default the cube root of the dtype's resolution.

    Cost: one product and 39 forward passes.

    Raises:
        ValueError: it is not, or the loss has kinks within the smallest steps of its dtype (ReLU in float32); or the
            slice is too flat, beside the error of differences, to tell.

    >>> w = torch.ones(2).double()
    >>> check_slice(lambda v: 6 * v, lambda w: (w**3).sum(), w, w)
    >>> check_slice(lambda v: 5 * v, lambda w: (w**3).sum(), w, w)
    Traceback (most recent call last):
    ValueError: v'Av = 10 along this direction, but the loss curves by 12 +- ...
    """
    value, error = slice_curvature(loss, params, direction, *args)
    product = tree.dot(direction, matvec(direction))
    if rtol is None:
        rtol = tree.eps(params) ** (1 / 3)
    curve = f"{float(value):.6g} +- {float(error):.1g}"
    found = f"v'Av = {float(product):.6g} along this direction, but the loss curves by {curve}"
    if not (value - product).abs() <= torch.maximum(4 * error, rtol * product.abs()):
        raise ValueError(
            f"{found}: the matvec is not the Hessian of this loss at these parameters and data; or the loss has kinks "
            "(ReLU), whose bend is in no Hessian: then ask in float64, where steps can be small enough to cross none"
        )
    if 4 * error > product.abs():
        raise ValueError(f"{found}, too inexact to tell: take a direction of more curvature, or float64")


def _losses(
    loss: Loss, params: Tree, directions: Sequence[Tree], points: Tensor, args: tuple[Any, ...], batch_size: int
) -> Tensor:
    def at(point: Tensor) -> Tensor:
        where = params
        for direction, step in zip(directions, point, strict=True):
            where = tree.add(where, direction, step)
        return loss(where, *args)

    # A loss that closes over live parameters would leave a graph behind for every point.
    wanted = torch.is_grad_enabled() and is_differentiated(params, (directions, points, args))
    # Under vmap the other attention kernels fall back to a loop.
    with torch.set_grad_enabled(wanted), nullcontext() if batch_size == 1 else sdpa_kernel(SDPBackend.MATH):
        return torch.stack(list(each(at, points, batch_size)))


def _unit(direction: Tree) -> Tree:
    length = tree.norm(tree.require_finite(direction, "the direction"))
    if tree.known((length > 0) & length.isfinite()) is False:
        raise ValueError(f"a direction of norm {float(length)} cannot be scaled to norm 1")
    return tree.scale(1 / length, direction)


def _numbers(steps: Iterable[float] | Tensor, params: Tree) -> Tensor:
    numbers = torch.as_tensor(steps, dtype=torch.float64, device="cpu")
    if numbers.dim() != 1 or len(numbers) == 0:
        raise ValueError(f"steps must be numbers in a row, at least one, not of shape {tuple(numbers.shape)}")
    return numbers.to(tree.wide(tree.leaves(params)[0].new_zeros(())))
