"""A loss in float64, with what it takes for constants held fast: what differences of its gradients are taken of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hessfn.core import tree
from hessfn.core.containers import PLAIN
from hessfn.core.torch_private import uncompiled


def widened(x: Any) -> Any:
    """A tensor or a dtype in double precision; anything else as it is."""
    if isinstance(x, Tensor) and x.dtype in _WIDE:
        return x.to(_WIDE[x.dtype])
    return _WIDE.get(x, x) if isinstance(x, torch.dtype) else x


def _all_widened(x: Any) -> Any:
    """A tree of such; most are leaves."""
    return widened(x) if isinstance(x, (Tensor, *PLAIN)) else tree.map(widened, x)


class Tape:
    """Records what a loss detaches, or computes where derivatives are off, and plays it back at other parameters.

    A derivative takes these for constants; differences would see them move.

    Args:
        wide: whether every tensor is in float64, also those that the loss closes over or makes on the way.
        all_without_grad: whether what is computed where derivatives are off is held fast, not only what is detached.
            Not so where a custom ``autograd.Function`` has a forward, which is computed there too.
    """

    def __init__(self, wide: bool, all_without_grad: bool = True) -> None:
        self.wide, self.all_without_grad = wide, all_without_grad
        self.constants: list[Any] = []
        self.loss: Tensor | None = None  # what is differentiated from outside

    @contextmanager
    def recording(self) -> Iterator[None]:
        self.constants.clear()
        with uncompiled(), _Mode(self, None):
            yield

    @contextmanager
    def playing(self) -> Iterator[None]:
        with uncompiled(), _Mode(self, iter(self.constants)):
            yield


class _Mode(TorchFunctionMode):
    def __init__(self, tape: Tape, kept: Iterator[Any] | None) -> None:
        super().__init__()
        self.tape, self.kept = tape, kept

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tuple(args), dict(kwargs or {})
        if self.tape.wide:
            if func in _CASTS:
                return args[0]
            if func in _COMPLEX_CASTS or (func is Tensor.type and args[1:]):
                return args[0].cdouble() if func in _COMPLEX_CASTS or args[0].is_complex() else self._type(*args)
            args, kwargs = tuple(map(_all_widened, args)), {name: _all_widened(x) for name, x in kwargs.items()}
        if func is F.embedding and (args[2:3] or (kwargs.get("padding_idx"),))[0] is not None:
            args, kwargs = self._with_padding(*args, **kwargs)
        if func is torch.autograd.grad and not self._has_derivative(*args, **kwargs):
            return self._constant(func, args, kwargs)
        if self._is_cut(func):
            return self._constant(func, args, kwargs)
        return self._wide(func(*args, **kwargs))

    def _is_cut(self, func: Any) -> bool:
        if torch.is_grad_enabled():
            return func in _CUTS
        # Within the forward of a custom Function nothing is cut off; what asks for data there writes to the tensor.
        return self.tape.all_without_grad or (func in _CUTS and func != _DATA)

    def _has_derivative(self, outputs: Any, *args: Any, create_graph: bool = False, **_: Any) -> bool:
        """Of a gradient within the loss, which is a constant where it has no graph; not of that of the loss."""
        return create_graph or args[3:4] == (True,) or any(x is self.tape.loss for x in tree.leaves(outputs))

    def _type(self, x: Tensor, kind: Any) -> Any:
        narrow = isinstance(kind, str) and kind.split(".")[-1] in ("FloatTensor", "HalfTensor", "BFloat16Tensor")
        return x.double() if narrow else x.type(widened(kind))

    def _wide(self, out: Any) -> Any:
        return _all_widened(out) if self.tape.wide else out

    def _constant(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = self._wide(func(*args, **kwargs))  # run in any case: what switches derivatives on again is a call too
        if not any(isinstance(x, Tensor) for x in tree.leaves(out)):
            return out
        if self.kept is not None:
            return next(self.kept)
        self.tape.constants.append(tree.map(lambda x: x.clone() if isinstance(x, Tensor) else x, out))
        return out

    def _with_padding(self, input: Tensor, weight: Tensor, padding_idx: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The row of the padding is a constant, as torch's gradient has it."""
        padding = torch.arange(len(weight), device=weight.device) == padding_idx % len(weight)
        fixed = self._constant(Tensor.detach, (weight,), {})
        return (input, torch.where(padding[:, None], fixed, weight), None, *args), kwargs


_DATA = Tensor.data.__get__  # type: ignore[attr-defined]
_CUTS = (Tensor.detach, torch.detach, _DATA)
_CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)
_COMPLEX_CASTS = (Tensor.cfloat, Tensor.chalf)  # type: ignore[attr-defined]
_WIDE = {
    **dict.fromkeys([torch.float16, torch.bfloat16, torch.float32], torch.float64),
    torch.complex64: torch.complex128,
}
