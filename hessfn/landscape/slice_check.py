"""A product held against the bend of the loss itself, along one direction."""

from __future__ import annotations

from typing import Any

import torch

from hessfn.core import tree
from hessfn.core.arguments import require_matvec, require_vector
from hessfn.core.errors import InvalidInput
from hessfn.core.results import Curvature
from hessfn.core.torch_state import carries_derivative
from hessfn.core.tree import MatVec, T
from hessfn.core.watched import Watched
from hessfn.landscape.slices import Loss, line, require_kinds


def slice_curvature(loss: Loss, params: T, direction: T, *args: Any) -> Curvature:
    """The second derivative of the loss along a direction, from values of the loss alone: it must equal ``v'Hv``.

    ``(f(h) - 2 f(0) + f(-h)) / h^2`` at the most accurate step h between 0.1 and 0.1 sqrt(eps) of the parameters' norm:
    the largest one that no smaller one contradicts by more than its rounding.

    Args:
        loss: ``loss(params, *args)`` to a scalar.
        params: a tree of tensors.
        direction: a tree like ``params``.
        args: what else the loss takes.

    Returns:
        ``value`` and ``error``, in the unit of the loss over that of the step squared. A loss with kinks (ReLU) also
        bends at the kinks, which a Hessian does not contain: over a step that crosses many of them the value is
        different. Steps that cross none need float64.

    It has no derivative, since errors of the differences that cancel here would not cancel there.

    Cost: 39 forward passes.

    Raises:
        ValueError: the loss, the parameters or the direction are being differentiated.

    Source: the choice of the step is Lepski's (1991).

    >>> value, error = slice_curvature(lambda w: w.exp().sum(), torch.zeros(1).double(), torch.ones(1).double())
    >>> round(float(value), 6), bool(error < 1e-6)
    (1.0, True)
    """
    call = "slice_curvature(loss, params, direction)"
    require_kinds(loss, params, call, floating=True)
    require_vector(direction, "direction", call)
    size, length = tree.norm(params), tree.norm(direction)
    first = 0.1 * torch.where(size > 0, size, 1.0) / torch.where(length > 0, length, 1.0)
    eps = tree.eps(params)
    steps = first * eps ** torch.linspace(0, 0.5, 19, dtype=first.dtype, device=first.device)
    losses = line(loss, params, direction, torch.cat([steps, -steps, torch.zeros_like(steps[:1])]), *args)
    if carries_derivative(losses):
        raise InvalidInput(
            f"{call} has no derivative, since its differences would be of rounding: differentiate v'Hv with "
            "hvp(loss, params, batch); or, where no derivative is wanted, use torch.no_grad()"
        )
    above, below, middle = (tree.wide(part) for part in losses.split([len(steps), len(steps), 1]))
    bends = ((above - middle) + (below - middle)) / steps.square()
    # What the smallest steps see is rounding, which grows as 1/h^2.
    noise = (bends.diff().abs() * steps[1:].square())[-4:].amax() + eps * middle.abs()
    rounding = 3 * noise / steps.square()
    contradicted = ((bends[:, None] - bends).abs() - rounding).triu(1).clamp(min=0).amax(1)
    best = (contradicted + rounding).nan_to_num(nan=torch.inf).argmin(0, keepdim=True)
    return Curvature(bends.gather(0, best)[0], (contradicted + rounding).gather(0, best)[0])


def check_slice(matvec: MatVec[T], loss: Loss, params: T, direction: T, *args: Any, rtol: float | None = None) -> None:
    """Checks a matvec against the loss along one direction: ``v'Hv`` against :func:`slice_curvature`.

    Args:
        matvec: products with the Hessian of the loss at ``params``.
        loss, params, direction, args: as for :func:`slice_curvature`.
        rtol: the largest relative error that counts as rounding; by default the cube root of the dtype's resolution.

    Returns:
        None, if the two agree.

    Cost: one product and 39 forward passes.

    Raises:
        ValueError: the two differ; or the loss has kinks within the smallest steps of its dtype (ReLU in float32); or
            the error of the differences is too large beside the curvature to tell.

    Source: as for :func:`slice_curvature`.

    >>> w = torch.ones(2).double()
    >>> check_slice(lambda v: 6 * v, lambda w: (w**3).sum(), w, w)
    >>> check_slice(lambda v: 5 * v, lambda w: (w**3).sum(), w, w)
    Traceback (most recent call last):
    hessfn.core.errors.InvalidInput: v'Av = 10 along this direction, but the loss curves by 12 +- ...
    """
    call = "check_slice(matvec, loss, params, direction)"
    require_matvec(matvec, call)
    require_kinds(loss, params, call)
    direction = tree.aligned(direction, params, "the direction")
    with torch.no_grad():
        value, error = slice_curvature(loss, params, direction, *args)
    product = tree.dot(direction, Watched(matvec)(direction)).detach()
    if not product.isfinite():
        tree.require_finite(product, "a product of the matvec")
    if rtol is None:
        rtol = tree.eps(params) ** (1 / 3)
    curve = f"{float(value):.6g} +- {float(error):.1g}"
    found = f"v'Av = {float(product):.6g} along this direction, but the loss curves by {curve}"
    if not (value - product).abs() <= torch.maximum(4 * error, rtol * product.abs()):
        raise InvalidInput(
            f"{found}: the matvec is not the Hessian of this loss at these parameters and data; or the loss has kinks "
            "(ReLU), whose bend is in no Hessian: then ask in float64, where steps can be small enough to cross none"
        )
    if 4 * error > product.abs():
        raise InvalidInput(f"{found}, too inexact to tell: take a direction of more curvature, or float64")
