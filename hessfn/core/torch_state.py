"""What torch is doing now (which transform, which trace, which compiler), and the lock around what it has only once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

from hessfn.core.flatten import flatten, leaves
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

P = ParamSpec("P")
R = TypeVar("R")


def torch_state_lock() -> AbstractContextManager[Any]:
    """Held while a loss is traced or differentiated, and while a loader draws from the global generator.

    The level of forward-mode derivatives, the rules of a trace and the choice of kernels belong to the process: the
    tangents of one thread would be cleared by another's end, and what a thread puts back may not be what it found. So
    does the random state, by which a loss is found to be random. Nothing that waits for another process is done under
    it. A thread may take it twice, and a fork waits for it.
    """
    return nullcontext() if torch.compiler.is_compiling() else TORCH


def recorded(function: Callable[P, R]) -> Callable[P, R]:
    """A function that differentiates, for callers within ``torch.inference_mode()`` too.

    There autograd records nothing, and tensors that were made there it never takes: the function runs outside of that
    mode, with copies of such tensors.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            flat, structure = flatten((args, kwargs))
            recordable = [recorded_as(x) for x in flat]
            if any(a is not b for a, b in zip(recordable, flat, strict=True)):
                args, kwargs = structure.unflatten(recordable)
            return function(*args, **kwargs)

    return run


def recorded_as(x: Any) -> Any:
    """What autograd takes for it: of a tensor that was made in inference mode a copy, outside of that mode."""
    if not isinstance(x, Tensor) or not x.is_inference():
        return x
    with torch.inference_mode(False):
        return x.clone()


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
    if torch.compiler.is_compiling():  # which sees into no transform
        return any(x.requires_grad for x in tensors)
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


def value_of(loss: Callable[[], Tensor]) -> Tensor:
    """The value of a loss, without derivatives. Not under no_grad: a loss may take some itself, by its inputs say."""
    with torch.enable_grad():
        found = loss()
    return found if under_functorch() or under_dual_level() else found.detach()  # which would drop tangents as well


def on_cpu(x: Any) -> bool:
    """Whether the numbers of a tree are read without waiting for a device."""
    return all(not isinstance(leaf, Tensor) or leaf.device.type == "cpu" for leaf in leaves(x))


def known(flag: Tensor) -> bool | None:
    """The truth of a boolean tensor, or None where it must not be asked: under ``vmap``, ``torch.compile``, on meta."""
    if torch.compiler.is_compiling() or flag.is_meta:
        return None
    try:
        return bool(flag)
    except RuntimeError:  # vmap refuses data-dependent control flow
        return None
