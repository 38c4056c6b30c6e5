"""Arrays of NumPy as tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hessfn.core import tree


def as_tensor(x: Any) -> Any:
    """An array of numbers as a tensor, which shares its memory where it can; anything else as it is.

    >>> as_tensor(np.ones(2, dtype=np.float32))
    tensor([1., 1.])
    """
    if not _is_array(x):
        return x
    array = np.asarray(x)
    shared = array.flags.writeable and all(stride >= 0 for stride in array.strides)
    return torch.from_numpy(array if shared else array.copy())


def as_tensors(x: Any) -> Any:
    """A tree with its arrays as tensors; the tree itself where it has none."""
    return tree.map(as_tensor, x) if any(map(_is_array, tree.leaves(x))) else x


def _is_array(x: Any) -> bool:
    return isinstance(x, (np.ndarray, np.generic)) and x.dtype.kind in "biufc" and not isinstance(x, float)
