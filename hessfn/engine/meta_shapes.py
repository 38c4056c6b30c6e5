"""What the result of an operation looks like: its shape, strides and dtype, without computing it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hessfn.core.torch_private import TorchDispatchMode, is_composite, python_meta_kernel

aten = torch.ops.aten


def result(func: Any, args: Any, kwargs: Any) -> Any:
    """What looks like the operation's result, on the meta device.

    Torch's own meta functions are made of entrywise operations, each of which would import torch's compiler: three
    seconds and 150 MB. So these are told here.
    """
    if func in _BY_DEVICE:
        return with_tensors(python_meta_kernel(func)(*with_tensors(args, _apart), **kwargs), on_meta)  # type: ignore[misc]
    options = {**kwargs, "device": "meta"} if "device" in kwargs else kwargs
    try:
        with _Entrywise():
            out = func(*with_tensors(args, on_meta), **with_tensors(options, on_meta))
    except NotImplementedError:
        out = func(*args, **kwargs)
    if func is aten.convolution.default and channels_last(args[0]):
        out = out.to(memory_format=torch.channels_last)  # as its kernels do, which only its meta function does not know
    if func is aten.convolution_backward.default and any(map(channels_last, args[1:3])):  # nor this one's, in torch 2.9
        out = with_tensors(out, lambda t: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t)
    return with_tensors(out, on_meta)


class _Entrywise(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # this too would import the compiler

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.pointwise in func.tags and torch.Tag.nondeterministic_seeded not in func.tags:
            return _entrywise(func, args, kwargs)
        if func in _MEANS and not args[0].is_complex():
            mean = _sum(*args, **kwargs)
            return (mean, mean.clone()) if func is aten.var_mean.correction else mean
        if func is aten.cat.default and _fit(*args):
            return _cat(*args)
        parts = func.decompose if is_composite(func) else python_meta_kernel(func)
        if parts is None or func.is_view or func in _NATIVE:
            return func(*args, **kwargs)
        with self:
            return parts(*args, **kwargs)


# What these look like depends on the device, and torch takes meta for a GPU.
_BY_DEVICE = {
    aten._linalg_svd.default,
    aten.linalg_eig.default,
    aten._fft_c2c.default,
    aten._fft_c2r.default,
    aten._fft_r2c.default,
    aten.max_pool2d_with_indices.default,
}


def _sum(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, correction: Any = None) -> Tensor:
    return aten.sum.dim_IntList(x, dim, keepdim, dtype=dtype)


_MEANS = {aten.mean.default, aten.mean.dim, aten.var.correction, aten.var_mean.correction}


# Torch too keeps to its native functions for these.
_NATIVE = {aten.empty_strided.default, aten._to_copy.default, aten.constant_pad_nd.default, aten.stack.default}


def _entrywise(func: Any, args: Any, kwargs: Any) -> Tensor:
    """The operation in small, with no dimension above two: strides of any result of this broadcast have its order."""
    shape = torch.broadcast_shapes(*(t.shape for t in tensors((args, kwargs))))
    small = func(*with_tensors(args, _small), **with_tensors(kwargs, _small))
    return _strided(shape, small.stride(), dtype=small.dtype, device="meta")


def _small(t: Tensor) -> Tensor:
    # Also of dimensions of one entry the order counts.
    order = sorted({stride for stride in t.stride() if stride})
    strides = [2 ** order.index(stride) if stride else 0 for stride in t.stride()]
    return torch.empty_strided([min(n, 2) for n in t.shape], strides, dtype=t.dtype, device="cpu").fill_(1)


def _strided(shape: Any, order: Any, **options: Any) -> Tensor:
    """A tensor with its dimensions one inside the other as strides elsewhere have them; where one is 0 it stays so."""
    dims = list(zip(shape, order, strict=True))
    strides = [math.prod(n for n, inner in dims if n > 1 and 0 < inner < outer) if outer else 0 for _, outer in dims]
    return torch.empty_strided(shape, strides, **options)


def _fit(parts: list[Tensor], dim: int = 0) -> bool:
    """Whether the parts are alike but for this dimension."""
    return len({(t.dtype, t.dim(), *t.shape[:dim], *t.shape[dim:][1:]) for t in parts}) == 1


def _cat(parts: list[Tensor], dim: int = 0) -> Tensor:
    shape = list(parts[0].shape)
    shape[dim] = sum(t.shape[dim] for t in parts)
    layout = torch.channels_last if all(map(channels_last, parts)) else torch.contiguous_format
    return parts[0].new_empty(shape).contiguous(memory_format=layout)


def looks(t: Tensor) -> Any:
    return t.shape, t.stride(), t.dtype, t.device


def channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def like(t: Tensor, *, device: Any) -> Tensor:
    return torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=device)


on_meta = partial(like, device="meta")


def _apart(t: Tensor) -> Tensor:
    return like(t, device=t.device)


MASKS = (torch.bool, torch.uint8)  # what an index of these dtypes selects is known from its values alone


# An operation's arguments, which are simpler than trees and many.


def with_tensors(x: Any, function: Callable[[Tensor], Any]) -> Any:
    kind = type(x)
    if kind in _NO_TENSORS:
        return x
    if isinstance(x, Tensor):
        return function(x)
    if isinstance(x, (tuple, list)):
        if kind is list and x and type(x[0]) is int:  # a shape, say: an operation has no lists of both
            return x
        parts = [with_tensors(part, function) for part in x]
        return parts if isinstance(x, list) else tuple(parts)
    return {name: with_tensors(part, function) for name, part in x.items()} if kind is dict and x else x


_NO_TENSORS = {int, float, bool, type(None), str, complex, torch.dtype, torch.device, torch.layout, torch.memory_format}


def tensors(x: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _collect((x,), found)
    return found


def _collect(parts: Any, found: list[Tensor]) -> None:
    for part in parts:
        if type(part) in _NO_TENSORS:
            continue
        if isinstance(part, Tensor):
            found.append(part)
        elif isinstance(part, (tuple, list)):
            _collect(part, found)
        elif type(part) is dict and part:
            _collect(part.values(), found)


def key_of(x: Any) -> Any:
    """Arguments by which a result looks the same: tensors by how they look, all else by type and value."""
    kind = type(x)
    if kind is tuple or kind is list:
        if x and {*map(type, x)} == _INT:
            return ("ints", *x)
        return tuple([key_of(part) for part in x])
    if kind is dict:
        return tuple([(name, key_of(part)) for name, part in x.items()])
    if isinstance(x, Tensor):
        return looks(x)
    return tuple(map(key_of, x)) if isinstance(x, (tuple, list)) else (kind, x)


_INT = {int}
