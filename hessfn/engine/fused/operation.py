"""Fused operations: a function of our own that a graph holds as one node.

Where others are to see operations of torch (``torch.func``, a compiler, ``make_fx``) it is its definition.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor, fx

from hessfn.core.torch_private import current_dispatch_mode, under_dual_level, under_functorch
from hessfn.engine.meta_shapes import like, on_meta, tensors, with_tensors
from hessfn.engine.recorder import Recorder
from hessfn.engine.views import Alias


def sees_operations() -> bool:
    """Whether a transform, a compiler or a tracer other than the recorder is to see operations of torch."""
    if torch.compiler.is_compiling() or under_functorch():
        return True
    mode = current_dispatch_mode()
    return mode is not None and not isinstance(mode, Recorder)


def is_followed(*inputs: Any) -> bool:
    """Whether plain autograd, in reverse or forward mode, follows what is computed from these."""
    given = [x for x in inputs if isinstance(x, Tensor)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return True
    return under_dual_level() and any(fwAD.unpack_dual(x).tangent is not None for x in given)


def of_tangents() -> AbstractContextManager[Any]:
    """Within it tangents are computed. Of those of a product that is being recorded nobody takes a gradient."""
    mode = current_dispatch_mode()
    return torch.no_grad() if isinstance(mode, Recorder) and mode.lean else nullcontext()


class Fused(torch.autograd.Function):
    """The derivatives of a fused operation."""


def is_own(node: Any) -> bool:
    """Whether a node of autograd's graph is that of a fused operation, which traces know by its own node."""
    return issubclass(getattr(node, "_forward_cls", type(None)), Fused)


def call(function: Callable[..., Any], kernel: Callable[..., Any], look: Callable[..., Any], *args: Any) -> Any:
    """What the kernel computes; where the recorder is at work, one node of the function in its place.

    Args:
        function: what a graph holds. It is called again wherever the graph is run, traced or differentiated.
        look: from the arguments to tensors on the meta device that look like the results; None for what is none.
    """
    mode = current_dispatch_mode()
    if not isinstance(mode, Recorder):
        return kernel(*args)
    node = mode.call(function, with_tensors(args, mode.node_of), {})
    home = tensors(args)[0].device

    def kept(part: Tensor, node: fx.Node) -> Tensor:
        node.meta.setdefault("val", on_meta(part))
        out = like(part, device=home)
        mode.keep(out, Alias(mode, node, is_fake=True))
        return out

    found = look(*args)
    if isinstance(found, Tensor):
        return kept(found, node)
    return tuple(
        None if part is None else kept(part, mode.call(operator.getitem, (node, i), {})) for i, part in enumerate(found)
    )
