"""What Adam divides by, as a scale of the curvature: the way to the preconditioned sharpness."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from hessfn.core import tree
from hessfn.core.arguments import kind, require_vector
from hessfn.core.errors import InvalidInput
from hessfn.core.tree import T

_CALL = "adam_scale(optimizer, params)"


def adam_scale(optimizer: Optimizer, params: T) -> T:
    """The preconditioner ``P^(-1/2)`` of Adam's present state, for ``scaled(matvec, scale)``.

    ``P = (sqrt(v / (1 - beta2^t)) + eps) (1 - beta1^t)``, entrywise, with v the running mean of the squared gradient
    (with ``amsgrad`` its running maximum) after t steps. A step of Adam is then ``-lr P^(-1) m``, m the running mean of
    the gradient, and on a quadratic loss with Hessian H it is stable while the largest eigenvalue of
    ``P^(-1/2) H P^(-1/2)``, the preconditioned sharpness, is below ``(2 + 2 beta1) / ((1 - beta1) lr)``.

    Args:
        optimizer: a ``torch.optim.Adam`` or ``AdamW`` after a step, of any implementation and any groups; also one
            within a wrapper that has it as ``.optimizer``, as those of accelerate and Lightning do.
        params: a tree of the optimizer's own tensors, as ``dict(model.named_parameters())``. What ``functionalize``
            returns are other tensors with the same memory.

    Returns:
        A tree like ``params``, detached, in memory of its own, as of this step: call again after the next ones. For a
        complex parameter it is that of the real view ``(..., 2)``, as everywhere in this library. The unit is the
        parameter's over the square root of the step's, so that ``lr`` times the preconditioned sharpness has none.

    The decay of weights is in H, not in P: that of ``Adam`` adds ``weight_decay`` to each diagonal entry of H. With
    ``maximize``, Adam descends on ``-H``.

    Cost: no product; one vector, and some copies of the largest leaf while it runs.

    Raises:
        ValueError: the optimizer is another one, or has a ``step`` of its own; a parameter is not among its tensors, or
            has no state, since it never had a gradient; or an entry of P is zero, as where ``eps`` and v are.

    Source: Cohen et al. (2022).

    >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    >>> optimizer = torch.optim.Adam([w], lr=0.1, betas=(0.9, 0.999), eps=0.0)
    >>> w.square().sum().backward()
    >>> optimizer.step()  # the gradient is (2, -4): P = |g| (1 - beta1)
    >>> adam_scale(optimizer, {"w": w})["w"] ** -2
    tensor([0.2000, 0.4000])
    """
    require_vector(params, "params", _CALL)
    adam = _unwrapped(optimizer)
    groups = {id(p): group for group in adam.param_groups for p in group["params"]}
    found = [
        _scale(p, adam, groups.get(id(p)), _part(name))
        for name, p in zip(tree.names(params), tree.leaves(params), strict=True)
    ]
    return tree.unflatten(found, params)


def _part(name: str) -> str:
    return f"parameter {name!r}" if name else "the parameter"


def _unwrapped(optimizer: Any) -> Optimizer:
    """The Adam that steps. Lightning's wrapper is a subclass of what it wraps, so that a wrapper is asked for first."""
    inner = getattr(optimizer, "optimizer", None)
    if isinstance(inner, Optimizer) and inner is not optimizer:
        return _unwrapped(inner)
    if not isinstance(optimizer, (Adam, AdamW)):
        raise InvalidInput(
            f"{_CALL}: optimizer is {kind(optimizer)}, and P is that of torch.optim.Adam and AdamW; for another "
            "preconditioner give its P^(-1/2) to scaled(matvec, scale)"
        )
    if inspect.unwrap(type(optimizer).step) not in (inspect.unwrap(Adam.step), inspect.unwrap(AdamW.step)):
        raise InvalidInput(
            f"{_CALL}: {type(optimizer).__name__} has a step of its own, which may divide by something else than "
            "Adam's; give its P^(-1/2) to scaled(matvec, scale)"
        )
    return optimizer


@torch.no_grad()
def _scale(p: Tensor, optimizer: Optimizer, group: dict[str, Any] | None, part: str) -> Tensor:
    if group is None:
        raise InvalidInput(
            f"{_CALL}: {part} is none of the optimizer's tensors; give these themselves, as "
            "dict(model.named_parameters()), and only those that it has"
        )
    state = optimizer.state.get(p, {})
    t = int(state["step"]) if "step" in state else 0
    if t == 0:
        raise InvalidInput(
            f"{_CALL}: {part} has no state yet: call it after a step, and leave out parameters that get no gradient, "
            "here and in functionalize(model, criterion, params=...)"
        )
    beta1, beta2 = (float(beta) for beta in group["betas"])
    v = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
    v = torch.view_as_real(v) if v.is_complex() else v
    v = v.to(torch.promote_types(v.dtype, torch.float32))
    root = (v / _bias_correction(beta2, t)).sqrt_().add_(group["eps"])
    scale = root.mul_(_bias_correction(beta1, t)).rsqrt_().to(p.dtype.to_real())
    if not bool(scale.isfinite().all()):
        raise InvalidInput(
            f"{_CALL}: P of {part} has an entry that is zero or not finite, or whose root is beyond {scale.dtype}: "
            f"eps={group['eps']} must be positive where a gradient is always zero, and gradients finite"
        )
    return scale


def _bias_correction(beta: float, t: int) -> float:
    """``1 - beta^t``, to all digits."""
    return -math.expm1(t * math.log(beta)) if beta else 1.0
