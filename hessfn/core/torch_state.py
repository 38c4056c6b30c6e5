"""What torch is doing now (which transform, which trace, which compiler), and the lock around what it has only once."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

from hessfn.core.flatten import leaves
from hessfn.core.locks import TORCH
from hessfn.core.torch_private import (
    current_dispatch_mode,
    is_functorch_wrapped_tensor,
    levels,
    under_derivative,
    under_dual_level,
    under_forward_derivative,
    under_functorch,
)


def torch_state_lock() -> AbstractContextManager[Any]:
    """Held while a loss is traced or differentiated, and while a loader draws from the global generator.

    The level of forward-mode derivatives, the rules of a trace and the choice of kernels belong to the process: the
    tangents of one thread would be cleared by another's end, and what a thread puts back may not be what it found. So
    does the random state, by which a loss is found to be random. Nothing that waits for another process is done under
    it. A thread may take it twice, and a fork waits for it.
    """
    return nullcontext() if torch.compiler.is_compiling() else TORCH


def is_differentiated(*arguments: Any) -> bool:
    """Whether what is computed from these trees is to be differentiated, by ``torch.func`` or by plain autograd."""
    if under_derivative():
        return True
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in leaves(arguments))


def carries_derivative(*results: Any) -> bool:
    """Whether these have a derivative by something, in any mode, also where a ``vmap`` hides it.

    In forward mode under ``torch.func`` a tensor does not tell, so that all that a transform has seen may have one.
    """
    tensors = [x for x in leaves(results) if isinstance(x, Tensor)]
    if torch.is_grad_enabled() and any(level.requires_grad for x in tensors for level in levels(x)):
        return True
    if under_forward_derivative():
        return any(is_functorch_wrapped_tensor(x) for x in tensors)
    return any(fwAD.unpack_dual(x).tangent is not None for x in tensors)


def is_observed(*inputs: Any) -> bool:
    """Whether autograd, a transform of ``torch.func`` or a trace is to see what is computed from these tensors."""
    if under_functorch() or under_dual_level() or current_dispatch_mode() is not None:
        return True
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs)


def known(flag: Tensor) -> bool | None:
    """The truth of a boolean tensor, or None where it must not be asked: under ``vmap``, ``torch.compile``, on meta."""
    if torch.compiler.is_compiling() or flag.is_meta:
        return None
    try:
        return bool(flag)
    except RuntimeError:  # vmap refuses data-dependent control flow
        return None
