"""The compiled kernel: ``kernel.c`` as machine code, and calls of it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from hessfn.core.errors import OutOfMemory, WrongProduct


def is_expected() -> bool:
    """Whether a kernel will be there when one is wanted, as far as can be told without compiling it."""
    return library() is not None


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


def call(name: str, x: Tensor, y: Tensor, padding: int, *arguments: list[Tensor] | Tensor | None) -> None:
    """A function of ``kernel.c``, for a convolution of x to y: its shape, how many pairs, and what else it takes."""
    made = library()
    if made is None:
        raise WrongProduct("the compiled kernel is gone: whoever wrote this operation into a graph had it")
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


@functools.cache
def library() -> ctypes.CDLL | None:
    """``kernel.c`` in machine code, if it can be had."""
    flags = ["-x", "c", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared"]
    for compiler in filter(shutil.which, filter(None, [os.environ.get("CXX"), "g++", "clang++", "c++"])):
        with contextlib.suppress(OSError, subprocess.SubprocessError), tempfile.TemporaryDirectory() as folder:
            made = Path(folder, "kernel.so")
            command = [compiler, *flags, str(Path(__file__).with_name("kernel.c")), "-o", str(made)]
            subprocess.run(command, capture_output=True, check=True, timeout=60)
            return ctypes.CDLL(str(made))
    return None


_CACHE = 1 << 17  # bytes of the tiles that a thread has at hand
