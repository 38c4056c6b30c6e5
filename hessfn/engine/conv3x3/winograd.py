"""Convolutions by 3 x 3 with a quarter of the multiplications (Winograd 1980; Lavin and Gray 2016, F(4 x 4, 3 x 3)).

The image is cut into tiles of 6 x 6, which overlap by two. In the right basis a tile times a kernel is 36 products, one
an entry, from which the 4 x 4 results of the tile follow by sums; so over channels it is 36 matrix products. All of it
is plain linear operations, so derivatives of any order come from their rules, with the same saving. In float32 a result
is some five times less exact than by the definition, about 1e-6 of its size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from hessfn.engine.conv3x3 import kernel
from hessfn.engine.conv3x3.kernel import is_profitable

aten = torch.ops.aten


def use_winograd(graph: fx.Graph) -> None:
    """Convolutions on the CPU go by tiles where that is faster; the libraries of GPUs see to it themselves.

    Those that the compiled kernel will take are left to it.
    """
    if graph.find_nodes(op="call_function", target=aten.as_strided.default):
        return  # it reads memory as the layout was
    for conv in graph.find_nodes(op="call_function", target=aten.convolution.default):
        if _is_faster(conv) and not (kernel.KERNEL.is_expected() and is_profitable(*conv.args[:2], *conv.args[3:])):
            with graph.inserting_before(conv):
                new = graph.call_function(convolution, (*conv.args[:3], conv.args[4][0]))
            new.meta = dict(conv.meta)
            conv.replace_all_uses_with(new)


def _is_faster(conv: fx.Node) -> bool:
    inputs: Any = conv.args
    x, weight, out = (node.meta["val"] for node in (*inputs[:2], conv))
    stride, padding, dilation, transposed, _, groups = inputs[3:]
    if x.dim() != 4 or weight.shape[2:] != (3, 3) or transposed or groups != 1:
        return False
    if [*stride, *dilation] != [1] * 4 or len(set(padding)) > 1 or out.dtype not in (torch.float32, torch.float64):
        return False
    high, wide = out.shape[2:]
    tiles = -(-high // 4) * -(-wide // 4)
    # With few channels, or few tiles, the changes of basis cost more than is saved.
    return min(weight.shape[:2]) >= 32 and out.shape[0] * tiles >= 64 and 16 * tiles <= 1.5 * high * wide


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    """``conv2d(x, weight, bias, padding=padding)`` of images (N, C, H, W) with kernels (O, C, 3, 3)."""
    n, c, h, w = x.shape
    high, wide = h + 2 * padding - 2, w + 2 * padding - 2
    rows, columns = -(-high // 4), -(-wide // 4)
    groups = groups_of(n, rows * columns, c, weight.shape[0], x.element_size())
    to_tile, to_kernel, to_result = (torch.kron(m, m).to(x) for m in (_TILE, KERNEL, _RESULT))

    x = x.permute(0, 2, 3, 1).contiguous()  # matrix products want the channels innermost
    x = F.pad(x, (0, 0, padding, 4 * columns + 2 - w - padding, padding, 4 * rows + 2 - h - padding))
    tiles = x.unflatten(0, (groups, -1)).unfold(2, 6, 4).unfold(3, 6, 4).permute(0, 5, 6, 1, 2, 3, 4)
    tiles = torch.bmm(to_tile.expand(groups, 36, 36), tiles.reshape(groups, 36, -1))
    kernels = (to_kernel @ weight.permute(2, 3, 1, 0).reshape(9, -1)).view(36, c, -1)
    out = torch.bmm(tiles.view(groups * 36, -1, c), kernels.repeat(groups, 1, 1))
    out = torch.bmm(to_result.expand(groups, 16, 36), out.view(groups, 36, -1))
    out = out.view(groups, 4, 4, -1, rows, columns, weight.shape[0]).permute(0, 3, 4, 1, 5, 2, 6)
    out = out.reshape(n, 4 * rows, 4 * columns, -1)[:, :high, :wide]
    return (out if bias is None else out + bias).permute(0, 3, 1, 2)


def groups_of(images: int, tiles: int, inputs: int, outputs: int, size: int) -> int:
    """Into how many equal parts the images go: a part's tiles fit in the cache, the copies of the kernels are small."""
    most = min(36 * images * tiles * inputs * size >> 20, images * tiles // (2 * max(inputs, outputs)))
    return max(d for d in range(1, max(most, 1) + 1) if images % d == 0)


def add_overlaps(graph: fx.Graph) -> None:
    """The derivative of cutting into tiles, for both directions at once: torch's takes ten times as long."""
    for outer in graph.find_nodes(op="call_function", target=aten.unfold_backward.default):
        inner, size, *outer_cut = outer.args
        both = inner.target is aten.unfold_backward.default and [*outer_cut, *inner.args[2:]] == [2, 6, 4, 3, 6, 4]
        # A model may cut its own tensors in such pieces, of other shapes.
        if both and len(size) == 5 and size[2] % 4 == size[3] % 4 == 2:
            with graph.inserting_before(outer):
                new = graph.call_function(torch.ops.hessfn.joined.default, (inner.args[0],))
                for dim in (2, 3):
                    new = graph.call_function(aten.slice.Tensor, (new, dim, 0, size[dim]))
            new.meta = dict(outer.meta)
            outer.replace_all_uses_with(new)


# An operation of its own, because what a compiler makes of it is slow to make and slow to run.
@torch.library.custom_op("hessfn::joined", mutates_args=())
def joined(tiles: Tensor) -> Tensor:
    """Images (groups, N, 4 rows + 4, 4 columns + 4, C) from tiles (groups, N, rows, columns, C, 6, 6), added up."""
    groups, n, rows, columns, c, _, _ = tiles.shape
    tiles = tiles.permute(0, 1, 2, 5, 3, 6, 4)
    image = tiles.new_empty(groups, n, rows + 1, 4, columns + 1, 4, c)
    image[:, :, -1] = image[:, :, :-1, :, -1] = 0
    image[:, :, :-1, :, :-1] = tiles[:, :, :, :4, :, :4]
    image[:, :, :-1, :, 1:, :2] += tiles[:, :, :, :4, :, 4:]
    image[:, :, 1:, :2, :-1] += tiles[:, :, :, 4:, :, :4]
    image[:, :, 1:, :2, 1:, :2] += tiles[:, :, :, 4:, :, 4:]
    return image.view(groups, n, 4 * rows + 4, 4 * columns + 4, c)


@joined.register_fake
def _(tiles: Tensor) -> Tensor:
    groups, n, rows, columns, c, _, _ = tiles.shape
    return tiles.new_empty(groups, n, 4 * rows + 4, 4 * columns + 4, c)


@joined.register_vmap
def _(info: Any, where: Any, tiles: Tensor) -> tuple[Tensor, int]:
    tiles = tiles.movedim(where[0], 0)
    return joined(tiles.flatten(0, 1)).unflatten(0, (info.batch_size, -1)), 0


def _matrix(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


# Evaluation of polynomials at 0, 1, -1, 2, -2 and infinity, and interpolation from there.
_TILE = _matrix(
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
KERNEL = _matrix((6, 0, 0), (-4, -4, -4), (-4, 4, -4), (1, 2, 4), (1, -2, 4), (0, 0, 24)) / 24
_RESULT = _matrix((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))
