"""The compiled kernel: ``kernel.c`` as machine code, and calls of it."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from hessfn.core.errors import OutOfMemory
from hessfn.engine.native.kernel import Kernel

KERNEL = Kernel("flash attention", Path(__file__).with_name("kernel.c"))
_NAMES = ["q", "k", "v", "mask", "out", "lse", "dq", "dk", "dv", "dout", "dlse", "g", "dg"]  # the order of kernel.c
_NAMES += ["gq", "gk", "gv", "dgq", "dgk", "dgv"]
_LANES = 16


class _Given(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("sample", "head", "row", "column"))]


def is_profitable(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether the kernel does it, and faster: going by dtypes and shapes.

    A thread takes a head: of a few alone, most threads would have none.
    """
    given = [x for x in (q, k, v, mask) if x is not None]
    if any(x.dtype != torch.float32 for x in given) or k.shape[-2] == 0:
        return False
    return q.shape[-1] % _LANES == v.shape[-1] % _LANES == 0 and 2 * q.shape[:-2].numel() >= torch.get_num_threads()


def call(made: ctypes.CDLL, causal: bool, scale: float, known: bool, tensors: dict[str, Tensor | None]) -> None:
    """The function of ``kernel.c``, of tensors (..., rows, columns) by their names there; results are given, too.

    Args:
        known: whether the output and the log-sum-exp are known; else they are computed.
    """
    kept = {name: _four(x, name) for name, x in tensors.items() if x is not None}
    q, k, v = (kept[name] for name in "qkv")
    shape = (ctypes.c_int64 * 8)(*q.shape[:3], k.shape[2], q.shape[3], v.shape[3], causal, torch.get_num_threads())
    given = (_Given * len(_NAMES))(*(_described(kept.get(name)) for name in _NAMES))
    if not made.attention(shape, ctypes.c_float(scale), ctypes.c_int(known), given):
        raise OutOfMemory(f"no memory for the tiles of {k.shape[2]} columns in every thread")


def _four(x: Tensor, name: str) -> Tensor:
    """As (samples, heads, rows, columns), the last of them side by side, but in a mask; expanded axes stay."""
    x = x[(None,) * (4 - x.dim())] if x.dim() < 4 else x.flatten(0, -4)
    return x if name == "mask" or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _described(x: Tensor | None) -> _Given:
    return _Given() if x is None else _Given(x.data_ptr(), *x.stride())
