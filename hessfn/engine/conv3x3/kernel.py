"""The compiled kernel: ``kernel.c`` as machine code, and calls of it."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from hessfn.core.config import announce_kernel
from hessfn.core.errors import OutOfMemory
from hessfn.core.locks import Lock
from hessfn.engine.conv3x3.build import Built, build, can_be_had, compilers

_SOURCE = Path(__file__).with_name("kernel.c")
_BUILT: list[Built | None] = []  # once in a process, also if it failed
_BUILDING = Lock()


def is_off() -> bool:
    """Whether the user has switched compiled code off."""
    return os.environ.get("HESSFN_NATIVE") == "0"


def is_expected() -> bool:
    """Whether a kernel will be there when one is wanted, as far as can be told without compiling it.

    It may be asked under ``torch_state_lock``, for which others wait.
    """
    return not is_off() and (_BUILT[0] is not None if _BUILT else can_be_had(_SOURCE))


def library() -> ctypes.CDLL | None:
    """``kernel.c`` in machine code, if it can be had and is not switched off.

    It may wait for a compiler, the first time on a machine: not to be asked under ``torch_state_lock``.
    """
    built = None if is_off() else _built()
    return None if built is None else built.library


def identity() -> str:
    """Which machine code it is: a hash of the library's bytes, or "" where there is none."""
    built = None if is_off() else _built()
    return "" if built is None else built.digest


def _built() -> Built | None:
    if not _BUILT:
        with _BUILDING:
            if not _BUILT:
                _BUILT.append(build(_SOURCE))
    return _BUILT[0]


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


def describe() -> dict[str, str]:
    """For :func:`hessfn.show_config`: which kernel is in use and what compiled it, or why none is."""
    if is_off():
        return {"kernel": "off (HESSFN_NATIVE=0)"}
    made = library()
    if made is None:
        return {"kernel": "none: no compiler that works" if compilers() else "none: no compiler"}
    compiler = ctypes.c_char_p.in_dll(made, "compiled_by").value or b""
    return {"kernel": identity(), "compiler": compiler.decode()}


announce_kernel("conv3x3", describe)

_CACHE = 1 << 17  # bytes of the tiles that a thread has at hand
