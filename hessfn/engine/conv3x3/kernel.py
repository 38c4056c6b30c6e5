"""The compiled kernel: ``kernel.c`` as machine code, and calls of it."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from hessfn.core.errors import OutOfMemory
from hessfn.engine.native.kernel import Kernel

KERNEL = Kernel("conv3x3", Path(__file__).with_name("kernel.c"))


def is_profitable(
    x: fx.Node, weight: fx.Node, stride: Any, padding: Any, dilation: Any, transposed: bool, _: Any, groups: int
) -> bool:
    """Whether compiled code is faster, going by shapes."""
    image, kernel = x.meta["val"], weight.meta["val"]
    if kernel.shape[2:] != (3, 3) or [*stride, *dilation, groups, transposed] != [1, 1, 1, 1, 1, False]:
        return False
    if {image.dtype, kernel.dtype} != {torch.float32} or len(set(padding)) > 1 or padding[0] > 2:
        return False
    rows, columns = (n + 2 * padding[0] - 2 for n in image.shape[2:])
    tiles, channels = -(-rows // 4) * -(-columns // 4), kernel.shape[:2]
    few = min(channels) >= 16 and max(channels) <= 128 and not any(n % 8 for n in channels)
    return few and image.shape[0] * tiles >= 64 and 16 * tiles <= 1.5 * rows * columns


def call(
    made: ctypes.CDLL, name: str, x: Tensor, y: Tensor, padding: int, *arguments: list[Tensor] | Tensor | None
) -> None:
    """A function of ``kernel.c``, for a convolution of x to y: its shape, how many pairs, and what else it takes."""
    n, inputs, high, wide = x.shape
    outputs = y.shape[1]
    block = max(24, min(96, _CACHE // (36 * x.element_size() * (inputs + outputs)) // 6 * 6))
    shape = (ctypes.c_int64 * 8)(n, high, wide, inputs, outputs, padding, block, torch.get_num_threads())
    count = next(len(a) for a in arguments if isinstance(a, list))
    pointers = [
        (ctypes.c_void_p * count)(*(t.data_ptr() for t in a))
        if isinstance(a, list)
        else ctypes.c_void_p(None if a is None else a.data_ptr())
        for a in arguments
    ]
    if not getattr(made, name)(shape, ctypes.c_int64(count), *pointers):
        raise OutOfMemory(f"no memory for {block} tiles of {inputs} and {outputs} channels in every thread")


_CACHE = 1 << 17  # bytes of the tiles that a thread has at hand
