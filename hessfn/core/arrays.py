"""Arrays of NumPy as tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def as_tensor(x: Any) -> Any:
    """An array of numbers as a tensor, which shares its memory where it can; anything else as it is.

    >>> as_tensor(np.ones(2, dtype=np.float32))
    tensor([1., 1.])
    """
    if not isinstance(x, np.ndarray | np.generic) or x.dtype.kind not in "biufc" or isinstance(x, float):
        return x
    array = np.asarray(x)
    shared = array.flags.writeable and all(stride >= 0 for stride in array.strides)
    return torch.from_numpy(array if shared else array.copy())
