"""What the kernel computes, as operations: sums of convolutions, and their derivative by the weight.

Where others are to see operations of torch (autograd, ``torch.func``, traces), they do: then these are torch's own.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hessfn.core.torch_state import is_observed
from hessfn.engine.conv3x3 import kernel
from hessfn.engine.conv3x3.winograd import KERNEL

aten = torch.ops.aten


def convolutions(
    xs: list[Tensor], weights: list[Tensor], bias: Tensor | None, padding: int, flipped: bool, out: Tensor | None = None
) -> Tensor:
    """The sum of ``conv2d(x, weight, padding=padding)``, and the bias.

    Args:
        xs: images (N, C, H, W) of one shape, float32, with the channels innermost or copied to be so.
        weights: as many kernels (O, C, 3, 3).
        bias: (O,), or none.
        padding: 0, 1 or 2.
        flipped: whether the kernels are (C, O, 3, 3) and to be turned by 180 degrees, as in the derivative by an image.
        out: where the result may go.
    """
    if torch.compiler.is_compiling():
        return torch.ops.hessfn.convolutions(xs, weights, bias, padding, flipped)
    if is_observed(*xs, *weights, bias):
        return _plain_convolutions(xs, weights, bias, padding, flipped)
    return _convolutions(xs, weights, bias, padding, flipped, out)


def correlations(xs: list[Tensor], ys: list[Tensor], padding: int, channels_last: bool) -> Tensor:
    """The derivative of the sum of ``<y, conv2d(x, weight, padding=padding)>`` by the weight.

    Args:
        xs, ys: images (N, C, H, W), and what is of the form of the results (N, O, H', W'); float32.
        padding: 0, 1 or 2.
        channels_last: whether the result (O, C, 3, 3) has the channels innermost.
    """
    if torch.compiler.is_compiling():
        return torch.ops.hessfn.correlations(xs, ys, padding, channels_last)
    if is_observed(*xs, *ys):
        return _plain_correlations(xs, ys, padding)
    return _correlations(xs, ys, padding, channels_last)


def _convolutions(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    bias: Tensor | None,
    padding: int,
    flipped: bool,
    out: Tensor | None,
) -> Tensor:
    made = kernel.KERNEL.library()
    if made is None:  # since the graph was made, the kernel was switched off
        plain = _plain_convolutions(xs, weights, bias, padding, flipped)
        return plain.contiguous(memory_format=torch.channels_last) if out is None else out.copy_(plain)
    images = [x.contiguous(memory_format=torch.channels_last) for x in xs]
    if flipped:
        weights = [w.flip(2, 3).transpose(0, 1) for w in weights]
    out = _result(images[0], weights[0], padding) if out is None else out
    kernels = [_change_of_basis() @ w.permute(2, 3, 1, 0).reshape(9, -1) for w in weights]  # (36, C O)
    shift = None if bias is None else bias.contiguous()
    kernel.call(made, "convolve", images[0], out, padding, images, kernels, shift, out)
    return out


def _correlations(xs: Sequence[Tensor], ys: Sequence[Tensor], padding: int, channels_last: bool) -> Tensor:
    made = kernel.KERNEL.library()
    if made is None:
        return _laid_out(_plain_correlations(xs, ys, padding), channels_last)
    images, results = ([t.contiguous(memory_format=torch.channels_last) for t in ts] for ts in (xs, ys))
    inputs, outputs = images[0].shape[1], results[0].shape[1]
    sums = images[0].new_empty(torch.get_num_threads(), 36, inputs, outputs)
    kernel.call(made, "correlate", images[0], results[0], padding, images, results, sums)
    weight = _change_of_basis().T @ sums.sum(0).view(36, -1)
    return _laid_out(weight.view(3, 3, inputs, outputs).permute(3, 2, 0, 1), channels_last)


def _plain_convolutions(
    xs: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor | None, padding: int, flipped: bool
) -> Tensor:
    conv, padding = (F.conv_transpose2d, 2 - padding) if flipped else (F.conv2d, padding)
    total: Any = sum(conv(x, w, padding=padding) for x, w in zip(xs, weights, strict=True))
    return total if bias is None else total + bias[:, None, None]


def _plain_correlations(xs: Sequence[Tensor], ys: Sequence[Tensor], padding: int) -> Any:
    weight = xs[0].new_empty(ys[0].shape[1], xs[0].shape[1], 3, 3)
    how = None, [1, 1], [padding] * 2, [1, 1], False, [0, 0], 1, [False, True, False]
    return sum(aten.convolution_backward(y, x, weight, *how)[1] for x, y in zip(xs, ys, strict=True))


@torch.library.custom_op("hessfn::convolutions", mutates_args=())
def _convolutions_op(
    xs: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor | None, padding: int, flipped: bool
) -> Tensor:
    return _convolutions(xs, weights, bias, padding, flipped, None)


@_convolutions_op.register_fake
def _(xs: Any, weights: Any, bias: Any, padding: int, flipped: bool) -> Tensor:
    return _result(xs[0], weights[0].transpose(0, 1) if flipped else weights[0], padding)


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
def _change_of_basis() -> Tensor:
    """The matrix (36, 9) that brings kernels into the basis of the tiles."""
    return torch.kron(KERNEL, KERNEL).float()


convolutions.takes_out = True  # type: ignore[attr-defined]  # the memory plan may give it a place
