"""Convolutions by tiles as machine code, for products on the CPU: a tile stays in the cache through all its steps.

``winograd.py`` says the same in operations of torch, each of which passes over all tiles in memory. This is faster, and
with few channels too. ``tiles.c`` is compiled when it is first wanted, in under a second; where there is no C compiler,
nothing changes. Where others want to see operations of torch (autograd, ``torch.func``, traces), they do.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import operator
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils._python_dispatch import _get_current_dispatch_mode

from hessfn import passes, winograd
from hessfn.passes import aten


def by_tiles(module: fx.GraphModule) -> fx.GraphModule:
    """The same function, with convolutions and their derivatives by tiles where that is faster."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for rewritten in (_by_tiles, _joined):
        for node in list(graph.nodes):
            with graph.inserting_before(node):
                new = rewritten(graph, node)
            if new is not None:
                new.meta = dict(node.meta)
                node.replace_all_uses_with(new)
        passes.only_used_gradients(graph)
    return fx.GraphModule(module, graph)


def _by_tiles(graph: fx.Graph, node: Any) -> fx.Node | None:
    if node.target is aten.convolution.default:
        x, weight, bias, *how = node.args
        if suits(x, weight, *how) and _channels_last(node):
            return graph.call_function(convolutions, ([x], [weight], bias, how[1][0], False))
    elif node.target is operator.getitem and node.args[0].target is aten.convolution_backward.default:
        given, x, weight, _, *how, _ = node.args[0].args
        padding = how[1][0]
        if node.args[1] == 0 and suits(x, weight, *how) and _channels_last(node):
            return graph.call_function(convolutions, ([given], [weight], None, 2 - padding, True))
        if node.args[1] == 1 and suits(x, weight, *how):
            return graph.call_function(correlations, ([x], [given], padding, _channels_last(node)))
    return None


def suits(
    x: fx.Node, weight: fx.Node, stride: Any, padding: Any, dilation: Any, transposed: bool, _: Any, groups: int
) -> bool:
    """Whether a convolution by tiles is faster, and there is a compiler for it."""
    image, kernel = x.meta["val"], weight.meta["val"]
    if kernel.shape[2:] != (3, 3) or [*stride, *dilation, groups, transposed] != [1, 1, 1, 1, 1, False]:
        return False
    if {image.dtype, kernel.dtype} != {torch.float32} or len(set(padding)) > 1 or padding[0] > 2:
        return False
    rows, columns = (n + 2 * padding[0] - 2 for n in image.shape[2:])
    tiles, channels = -(-rows // 4) * -(-columns // 4), kernel.shape[:2]
    few = min(channels) >= 16 and max(channels) <= 128 and not any(n % 8 for n in channels)
    return few and image.shape[0] * tiles >= 64 and 16 * tiles <= 1.5 * rows * columns and _library() is not None


def _channels_last(node: fx.Node) -> bool:
    return node.meta["val"].is_contiguous(memory_format=torch.channels_last)


def _joined(graph: fx.Graph, total: Any) -> fx.Node | None:
    """A sum of convolutions is one: what they share is not written, read again and added."""
    parts = total.args
    if total.target is not aten.add.Tensor or total.kwargs:
        return None
    if not all(isinstance(part, fx.Node) and len(part.users) == 1 for part in parts):
        return None
    first, second = parts
    if first.target not in (convolutions, correlations) or first.target is not second.target:
        return None
    shapes = [[given[0].meta["val"].shape for given in part.args[:2]] for part in parts]
    biases = [part.args[2] for part in parts if part.target is convolutions and part.args[2] is not None]
    if shapes[0] != shapes[1] or first.args[3:] != second.args[3:] or len(biases) > 1:
        return None
    pairs = [list(a) + list(b) for a, b in zip(first.args[:2], second.args[:2], strict=True)]
    bias = biases[:1] or first.args[2:3]  # of correlations, the padding
    return graph.call_function(first.target, (*pairs, *bias, *first.args[3:]))


def convolutions(
    xs: list[Tensor], weights: list[Tensor], bias: Tensor | None, padding: int, turned: bool, out: Tensor | None = None
) -> Tensor:
    """The sum of ``conv2d(x, weight, padding=padding)``, and the bias.

    Args:
        xs: images (N, C, H, W) of one shape, float32, with the channels innermost or copied to be so.
        weights: as many kernels (O, C, 3, 3).
        bias: (O,), or none.
        padding: 0, 1 or 2.
        turned: whether the kernels are (C, O, 3, 3) and to be turned round, as in the derivative by an image.
        out: where the result may go.
    """
    if torch.compiler.is_compiling():
        return torch.ops.hessfn.convolutions(xs, weights, bias, padding, turned)
    if watched(*xs, *weights, bias):
        conv, padding = (F.conv_transpose2d, 2 - padding) if turned else (F.conv2d, padding)
        total: Any = sum(conv(x, w, padding=padding) for x, w in zip(xs, weights, strict=True))
        return total if bias is None else total + bias[:, None, None]
    return _convolutions(xs, weights, bias, padding, turned, out)


def correlations(xs: list[Tensor], ys: list[Tensor], padding: int, channels_last: bool) -> Tensor:
    """The derivative of the sum of ``<y, conv2d(x, weight, padding=padding)>`` by the weight.

    Args:
        xs, ys: images (N, C, H, W), and what is of the form of the results (N, O, H', W'); float32.
        padding: 0, 1 or 2.
        channels_last: whether the result (O, C, 3, 3) has the channels innermost.
    """
    if torch.compiler.is_compiling():
        return torch.ops.hessfn.correlations(xs, ys, padding, channels_last)
    if watched(*xs, *ys):
        weight = xs[0].new_empty(ys[0].shape[1], xs[0].shape[1], 3, 3)
        how = None, [1, 1], [padding] * 2, [1, 1], False, [0, 0], 1, [False, True, False]
        return sum(aten.convolution_backward(y, x, weight, *how)[1] for x, y in zip(xs, ys, strict=True))
    return _correlations(xs, ys, padding, channels_last)


def watched(*inputs: Any) -> bool:
    """Whether autograd, a transform of ``torch.func`` or a trace is to see what is computed from these."""
    if torch._C._functorch.peek_interpreter_stack() is not None or _get_current_dispatch_mode() is not None:
        return True
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs)


def _convolutions(
    xs: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor | None, padding: int, turned: bool, out: Tensor | None
) -> Tensor:
    images = [x.contiguous(memory_format=torch.channels_last) for x in xs]
    if turned:
        weights = [w.flip(2, 3).transpose(0, 1) for w in weights]
    out = _result(images[0], weights[0], padding) if out is None else out
    kernels = [_change() @ w.permute(2, 3, 1, 0).reshape(9, -1) for w in weights]  # (36, C O)
    _call("convolve", images[0], out, padding, images, kernels, None if bias is None else bias.contiguous(), out)
    return out


def _correlations(xs: Sequence[Tensor], ys: Sequence[Tensor], padding: int, channels_last: bool) -> Tensor:
    images, results = ([t.contiguous(memory_format=torch.channels_last) for t in ts] for ts in (xs, ys))
    inputs, outputs = images[0].shape[1], results[0].shape[1]
    sums = images[0].new_empty(torch.get_num_threads(), 36, inputs, outputs)
    _call("correlate", images[0], results[0], padding, images, results, sums)
    kernel = _change().T @ sums.sum(0).view(36, -1)
    return _laid_out(kernel.view(3, 3, inputs, outputs).permute(3, 2, 0, 1), channels_last)


@torch.library.custom_op("hessfn::convolutions", mutates_args=())
def _convolutions_op(
    xs: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor | None, padding: int, turned: bool
) -> Tensor:
    return _convolutions(xs, weights, bias, padding, turned, None)


@_convolutions_op.register_fake
def _(xs: Any, weights: Any, bias: Any, padding: int, turned: bool) -> Tensor:
    return _result(xs[0], weights[0].transpose(0, 1) if turned else weights[0], padding)


@torch.library.custom_op("hessfn::correlations", mutates_args=())
def _correlations_op(xs: Sequence[Tensor], ys: Sequence[Tensor], padding: int, channels_last: bool) -> Tensor:
    return _correlations(xs, ys, padding, channels_last)


@_correlations_op.register_fake
def _(xs: Any, ys: Any, padding: int, channels_last: bool) -> Tensor:
    return _laid_out(xs[0].new_empty(ys[0].shape[1], xs[0].shape[1], 3, 3), channels_last)


def _result(x: Tensor, weight: Tensor, padding: int) -> Tensor:
    n, _, high, wide = x.shape
    shape = n, weight.shape[0], high + 2 * padding - 2, wide + 2 * padding - 2
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _laid_out(weight: Any, channels_last: bool) -> Tensor:
    return weight.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@functools.cache
def _change() -> Tensor:
    """The matrix (36, 9) that brings kernels into the basis of the tiles."""
    return torch.kron(winograd.KERNEL, winograd.KERNEL).float()


def _call(name: str, x: Tensor, y: Tensor, padding: int, *arguments: list[Tensor] | Tensor | None) -> None:
    """A function of ``tiles.c``, for a convolution of x to y: its shape, how many pairs, and what else it takes."""
    library = _library()
    assert library is not None, "whoever writes this operation into a graph has seen that there is a compiler"
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
    if not getattr(library, name)(shape, ctypes.c_int64(count), *pointers):
        raise MemoryError(f"no memory for {block} tiles of {inputs} and {outputs} channels in every thread")


@functools.cache
def _library() -> ctypes.CDLL | None:
    """``tiles.c`` in machine code, if it can be had."""
    flags = ["-x", "c", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared"]
    for compiler in filter(shutil.which, filter(None, [os.environ.get("CXX"), "g++", "clang++", "c++"])):
        with contextlib.suppress(OSError, subprocess.SubprocessError), tempfile.TemporaryDirectory() as folder:
            made = Path(folder, "tiles.so")
            command = [compiler, *flags, str(Path(__file__).with_name("tiles.c")), "-o", str(made)]
            subprocess.run(command, capture_output=True, check=True, timeout=60)
            return ctypes.CDLL(str(made))
    return None


_CACHE = 1 << 17  # bytes of the tiles that a thread has at hand
