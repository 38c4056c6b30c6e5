"""Rewrites: passes that change a graph in place and leave it the same function; ``pipeline.py`` has their order."""

from __future__ import annotations

import math
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, fx

from hessfn.core.torch_private import is_view, under_functorch
from hessfn.engine.meta_shapes import channels_last as is_channels_last

aten = torch.ops.aten


def functional_copies(graph: fx.Graph) -> None:
    """An assignment to a slice leaves a ``copy``, which has no derivative rule: it is its source, cast and expanded.

    Or a ``zero``, the rule of which sets the derivative of its argument to zero in place: it is zeros.
    """
    for copy in graph.find_nodes(op="call_function", target=aten.copy.default):
        result = copy.meta["val"]
        with graph.inserting_before(copy):
            cast = graph.call_function(aten.to.dtype, (copy.args[1], result.dtype))
            new = graph.call_function(aten.expand.default, (cast, list(result.shape)))
        new.meta = dict(copy.meta)
        copy.replace_all_uses_with(new)
    for zero in graph.find_nodes(op="call_function", target=aten.zero.default):
        zero.target = aten.zeros_like.default


def drop_same_views(graph: fx.Graph) -> None:
    """Pooling to one pixel sets the strides of dimensions of one entry, where no stride is ever used."""
    for view in graph.find_nodes(op="call_function", target=aten.as_strided.default):
        x, shape, strides, *offset = view.args
        own = x.op == "call_function" and not is_view(x.target) and offset in ([], [0], [None])
        dims = zip(shape, strides, x.meta["val"].stride(), strict=False)
        if own and x.meta["val"].shape == tuple(shape) and all(n == 1 or new == old for n, new, old in dims):
            view.replace_all_uses_with(x)


def drop_dead(graph: fx.Graph) -> None:
    """Dead code elimination: what no result depends on goes."""
    for node in reversed(list(graph.nodes)):  # torch's own looks whether the graph is well formed, which takes longer
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)


def own_results(graph: fx.Graph) -> None:
    """A result shares its memory with no other, and with no input."""
    (output,) = graph.find_nodes(op="output")
    with graph.inserting_before(output):
        results = list(output.args[0])
        for i, node in enumerate(results):
            while node.target is aten.t.default and node.args[0].target is aten.t.default:
                node = results[i] = node.args[0].args[0]
            if node.op != "call_function" or node in results[:i] or is_view(node.target):
                results[i] = graph.call_function(aten.clone.default, (node,))
                results[i].meta = dict(node.meta)
    output.args = (results,)


def copies_under_vmap(graph: fx.Graph) -> None:
    """``vmap`` has no rule for copies with the channels innermost, nor for copies onto another tensor."""
    for copy in graph.find_nodes(op="call_function", target=aten.copy.default):
        source, wanted = copy.args[1], copy.meta["val"]
        given = source.meta["val"]
        layout = _NHWC if is_channels_last(wanted) else {"memory_format": torch.contiguous_format}
        if (given.shape, given.dtype) == (wanted.shape, wanted.dtype) and wanted.is_contiguous(**layout):
            copy.target, copy.args, copy.kwargs = aten.clone.default, (source,), layout
        elif (given.shape, given.dtype) == (wanted.shape, wanted.dtype):
            order = sorted(range(wanted.dim()), key=lambda d: -wanted.stride(d))
            if wanted.permute(order).is_contiguous():
                copy.target, copy.args = laid_out, (source, tuple(order))
    for copy in graph.find_nodes(op="call_function", target=aten.clone.default):
        if copy.kwargs == _NHWC:
            copy.target, copy.kwargs = channels_innermost, {}


def laid_out(x: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """A copy whose dimensions lie in memory in this order, the outermost first."""
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return x.permute(order).clone(memory_format=torch.contiguous_format).permute(inverse)


def channels_innermost(x: torch.Tensor) -> torch.Tensor:
    """A copy, and so laid out in memory unless ``vmap`` gives the dimensions another place."""
    return x.clone() if under_functorch() else x.clone(**_NHWC)


def only_used_gradients(graph: fx.Graph) -> None:
    """What nobody takes is not computed, also not by a convolution's backward pass."""
    drop_dead(graph)
    for backward in graph.find_nodes(op="call_function", target=aten.convolution_backward.default):
        used = {user.args[1] for user in backward.users}
        *others, mask = backward.args
        backward.args = (*others, [wanted and i in used for i, wanted in enumerate(mask)])
    drop_dead(graph)


def fold_batch_norm(graph: fx.Graph) -> None:
    """BatchNorm in eval mode is affine: it goes into the convolution's weight, or else is a multiply-add per channel.

    No work of the size of the activations is left of it, neither in the loss nor in its derivatives.
    """
    for norm in list(graph.nodes):
        if norm.target not in (aten.native_batch_norm.default, aten.cudnn_batch_norm.default) or norm.args[5]:
            continue
        x, gamma, beta, mean, var, _, _, eps = norm.args
        outputs = [user for user in norm.users if user.args[1] == 0]
        with graph.inserting_before(norm):
            scale = graph.call_function(aten.rsqrt.default, (graph.call_function(aten.add.Scalar, (var, eps)),))
            if gamma is not None:
                scale = graph.call_function(aten.mul.Tensor, (scale, gamma))
            shift = graph.call_function(aten.neg.default, (graph.call_function(aten.mul.Tensor, (mean, scale)),))
            if beta is not None:
                shift = graph.call_function(aten.add.Tensor, (shift, beta))
            dtype = x.meta["val"].dtype
            of_one_dtype = dtype == var.meta["val"].dtype  # not so under autocast
            if x.target is aten.convolution.default and len(x.users) == 1 and not x.args[6] and of_one_dtype:
                weight, bias = x.args[1:3]
                scaled = graph.call_function(aten.mul.Tensor, (weight, _column(graph, scale, _ndim(weight) - 1)))
                scaled.meta, weight = dict(weight.meta), scaled
                if bias is not None:
                    shift = graph.call_function(aten.addcmul.default, (shift, bias, scale))
                new = graph.call_function(x.target, (x.args[0], weight, shift, *x.args[3:]))
            else:
                wide = _ndim(x) - 2
                scaled = graph.call_function(aten.mul.Tensor, (x, _column(graph, scale, wide)))
                new = graph.call_function(aten.add.Tensor, (scaled, _column(graph, shift, wide)))
                if not of_one_dtype:
                    new = graph.call_function(aten.to.dtype, (new, dtype))
            new.meta = dict(x.meta)
        for output in outputs:
            output.replace_all_uses_with(new)


def channels_last(graph: fx.Graph) -> None:
    """Convolutions of images run faster with the channels innermost, and what follows keeps the layout."""
    convs = [n for n in graph.find_nodes(op="call_function", target=aten.convolution.default) if _ndim(n) == 4]
    if graph.find_nodes(op="call_function", target=aten.as_strided.default):
        return  # it reads memory as the layout was
    for conv in (c for c in convs if c.meta["val"].dtype != torch.float64):
        with graph.inserting_before(conv):
            x, weight = (graph.call_function(aten.contiguous.default, (i,), _NHWC) for i in conv.args[:2])
        conv.args = (x, weight, *conv.args[2:])
    for target in (aten.view.default, aten._unsafe_view.default):
        for view in graph.find_nodes(op="call_function", target=target):
            view.target = aten.reshape.default  # a view copies where the layout is no longer its own


_NHWC: dict[str, Any] = {"memory_format": torch.channels_last}


def _column(graph: fx.Graph, vector: fx.Node, trailing: int) -> fx.Node:
    return graph.call_function(aten.view.default, (vector, [-1] + [1] * trailing))


def _ndim(node: fx.Node) -> int:
    return node.meta["val"].dim()


def fixed_nodes(graph: fx.Graph, num_fixed: int) -> set[fx.Node]:
    """The first inputs, and all that depends on nothing else."""
    fixed = set(graph.find_nodes(op="placeholder")[:num_fixed])
    for node in graph.nodes:
        if node.op in ("get_attr", "call_function") and all(i in fixed for i in node.all_input_nodes):
            fixed.add(node)
    return fixed


def reassociate_constants(graph: fx.Graph, num_fixed: int) -> None:
    """Reassociation in a linear graph: ``(x * a) * b`` becomes ``x * (a * b)``, where ``a`` and ``b`` are fixed.

    And GELU's derivative, which computes the slope anew each time, becomes a product with the slope.

    Args:
        num_fixed: how many of the graph's first inputs have one value for all calls; what follows from these alone is
            fixed too, and a constant once it is folded.
    """
    fixed = fixed_nodes(graph, num_fixed)
    slopes: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.target is aten.gelu_backward.default and node not in fixed and node.args[1] in fixed:
            at = node.args[1:], tuple(node.kwargs.items())
            if at not in slopes:
                ones = _before(node, aten.ones_like.default, node.args[1])
                slopes[at] = _before(node, node.target, ones, *node.args[1:], **node.kwargs)
                fixed.update((ones, slopes[at]))
            node.target, node.args, node.kwargs = aten.mul.Tensor, (node.args[0], slopes[at]), {}
        b, product = _split(node, fixed)
        a, x = _split(product, fixed)
        if a is not None and len(product.users) == 1 and _is_no_larger(a, b, product, node, fixed):
            joint = _before(node, aten.mul.Tensor, a, b)
            fixed.add(joint)
            node.args = x, joint
            graph.erase_node(product)


def _split(node: Any, fixed: Container[fx.Node]) -> tuple[Any, Any]:
    """What is fixed of a product, and what is not."""
    if isinstance(node, fx.Node) and node.target is aten.mul.Tensor and node not in fixed:
        for a, x in (node.args, node.args[::-1]):
            if a in fixed and isinstance(x, fx.Node) and x not in fixed:
                return a, x
    return None, None


def _is_no_larger(a: fx.Node, b: fx.Node, product: fx.Node, node: fx.Node, fixed: Container[fx.Node]) -> bool:
    """Whether the joint constant takes no more memory than those that it makes superfluous."""
    values = [i.meta["val"] for i in (a, b, product, node)]
    superfluous = [i for i in (a, b) if all(user in fixed or user in (product, node) for user in i.users)]
    joint = torch.broadcast_shapes(*(v.shape for v in values[:2])).numel()
    return len({v.dtype for v in values}) == 1 and joint <= sum(_entries(i.meta["val"]) for i in superfluous)


def _entries(x: Tensor) -> int:
    """That it has in memory."""
    return math.prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride)


def _before(node: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    with node.graph.inserting_before(node):
        new = node.graph.call_function(target, args, kwargs)
    fixed = [i.meta["val"] for i in new.all_input_nodes]
    new.meta["val"] = fixed[0].new_empty(torch.broadcast_shapes(*(v.shape for v in fixed)))
    return new
