"""Tensors in memory of their own, as those of results are: what is saved of one is what it shows."""

from __future__ import annotations

import torch
from torch import Tensor

from hessfn.core.dtensor import layout
from hessfn.core.torch_private import is_functorch_wrapped_tensor


def own(x: Tensor) -> Tensor:
    """A tensor, contiguous, whose memory holds nothing else: itself, or where it is a part of more, a copy.

    >>> own(torch.zeros(1000)[:2]).untyped_storage().nbytes()
    8
    """
    if layout(x) or (_is_plain(x) and x.is_contiguous() and x.untyped_storage().nbytes() == x.nbytes):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _is_plain(x: Tensor) -> bool:
    """Whether there is a memory to ask for: a transform hides it, and a compiler has none yet."""
    return not torch.compiler.is_compiling() and not is_functorch_wrapped_tensor(x)
