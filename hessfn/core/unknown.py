"""Fields of results that nobody has measured."""

from __future__ import annotations

import torch
from torch import Tensor

from hessfn.core.torch_private import under_functorch


def unknown(like: Tensor) -> Tensor | None:
    """What stands in a field that was not measured: None, or where a transform hands on tensors alone, NaN.

    ``torch.func.vmap`` refuses a result with a None in it, also one in a named tuple.

    >>> unknown(torch.ones(2))
    >>> torch.func.vmap(unknown)(torch.ones(2))
    tensor([nan, nan])
    """
    if not torch.compiler.is_compiling() and under_functorch():  # a compiler always sees a transform
        return torch.full_like(like.detach(), torch.nan)
    return None
