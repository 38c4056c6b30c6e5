"""Directions worth looking along: random, along the gradient, to another checkpoint, scaled filter by filter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.core.arguments import require_vector
from hessfn.core.errors import InvalidInput
from hessfn.core.func import gradient as gradient_of
from hessfn.core.func import gradients
from hessfn.core.probes import gaussian
from hessfn.core.torch_state import is_observed, known, recorded
from hessfn.core.tree import T
from hessfn.landscape.slices import Loss, require_kinds


def random_direction(params: T, *, seed: int = 0) -> T:
    """A random direction of unit norm, uniform on the sphere.

    Args:
        params: a tree of floating-point tensors.
        seed: of the direction, which is ``gaussian(params, 1, seed=seed)[0]`` divided by its norm.

    Returns:
        A tree like ``params``.

    Cost: no loss; one vector.

    Raises:
        ValueError: as for :func:`hessfn.gaussian`.

    >>> round(float(tree.norm(random_direction(torch.zeros(5)))), 6)
    1.0
    """
    require_vector(params, "params", "random_direction(params)")
    return _unit(gaussian(params, 1, seed=seed)[0])


@recorded
def gradient_direction(loss: Loss, params: T, *args: Any) -> T:
    """The gradient of the loss, divided by its norm: the direction of steepest ascent.

    Args:
        loss: ``loss(params, *args)`` to a scalar.
        params: a tree of floating-point tensors.
        args: what else the loss takes, such as a batch.

    Returns:
        A tree like ``params``, of unit norm.

    Cost: one gradient.

    Raises:
        ValueError: an argument is of another kind, or the gradient is zero or not finite.

    >>> gradient_direction(lambda w: w.square().sum(), torch.tensor([3.0, 4.0]))
    tensor([0.6000, 0.8000])
    """
    require_kinds(loss, params, "gradient_direction(loss, params, ...)", floating=True)
    gradient = _gradient(loss, params, args)
    return _unit(tree.map(lambda g: g.to_dense() if g.is_sparse else g, gradient))


def _gradient(loss: Loss, params: T, args: tuple[Any, ...]) -> T:
    flat = tree.leaves(params)
    if is_observed(*flat, *tree.leaves(args)):
        return gradient_of(lambda p: loss(p, *args), params)
    # A loss may take derivatives by its inputs, which torch.func refuses.
    by = [x.detach().requires_grad_() for x in flat]
    with torch.enable_grad():
        value = loss(tree.unflatten(by, params), *args)
    found = gradients(value, by) if value.requires_grad else list(map(torch.zeros_like, flat))
    return tree.unflatten(found, params)


def direction_to(params: T, other: T) -> T:
    """The difference ``other - params``: along it, step 0 is ``params`` and step 1 is another checkpoint.

    Only parameters are interpolated. Buffers, such as the running statistics of BatchNorm, stay those of the model that
    the loss was made from, and may not fit the parameters in between.

    Args:
        params: a tree of tensors.
        other: another tree with the same leaves.

    Returns:
        A tree like ``params``, not normalised.

    Cost: no loss; one vector.

    Raises:
        ValueError: ``other`` is not a tree like ``params``.

    Source: Goodfellow, Vinyals and Saxe (2015).

    >>> from hessfn import line
    >>> start, end = torch.tensor([1.0]), torch.tensor([3.0])
    >>> line(lambda w: w.square().sum(), start, direction_to(start, end), [0.0, 0.5, 1.0])
    tensor([1., 4., 9.])
    """
    require_vector(params, "params", "direction_to(params, other)", floating=False)
    return tree.owned(tree.add(tree.aligned(other, params, "the other checkpoint"), params, -1.0))


def filter_normalized(direction: T, params: T, *, keep_vectors: bool = False) -> T:
    """The direction with every filter scaled to the norm of the same filter of ``params``.

    Slices of the loss along such directions can be compared between nets whose weights differ in scale. A filter is a
    slice along the first axis: one output channel of a convolution, one row of a matrix.

    Args:
        direction: a tree like ``params``, such as :func:`random_direction` returns.
        params: a tree of tensors.
        keep_vectors: scale leaves of fewer than two axes (biases, parameters of norms) too, each as one filter. By
            default they become zero.

    Returns:
        A tree like ``params``. A filter of the direction that is zero stays zero.

    Cost: no loss; one vector.

    Raises:
        ValueError: the direction is not a tree like ``params``.

    Source: Li, Xu, Taylor, Studer and Goldstein (2018).

    >>> filter_normalized(torch.ones(2, 4), 3 * torch.eye(2, 4))
    tensor([[1.5000, 1.5000, 1.5000, 1.5000],
            [1.5000, 1.5000, 1.5000, 1.5000]])
    """
    require_vector(params, "params", "filter_normalized(direction, params)", floating=False)

    def rescale(d: Tensor, p: Tensor) -> Tensor:
        if p.dim() < 2 and not keep_vectors:
            return torch.zeros_like(d)
        rows = p.shape[0] if p.dim() > 1 else 1
        width = p.numel() // max(rows, 1)
        ours, theirs = (torch.linalg.vector_norm(tree.wide(x.reshape(rows, width)), dim=1) for x in (d, p))
        ratio = torch.where(ours > 0, theirs / ours, 0.0).to(d.dtype)
        return d * ratio.reshape(-1, *[1] * (d.dim() - 1)) if p.dim() else d * ratio[0]

    return tree.owned(tree.map(rescale, tree.aligned(direction, params, "the direction"), params))


def _unit(direction: T) -> T:
    length = tree.norm(tree.require_finite(direction, "the direction"))
    if known((length > 0) & length.isfinite()) is False:
        raise InvalidInput(f"a direction of norm {float(length)} cannot be scaled to norm 1")
    return tree.owned(tree.scale(1 / length, direction))
