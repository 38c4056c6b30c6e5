"""What makes a traced graph clean: each pass rewrites the graph in place, and leaves it the same function."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from hessfn.shapes import channels_last as is_channels_last

aten = torch.ops.aten


def plain_assignments(graph: fx.Graph) -> None:
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


def is_view(func: Any) -> bool:
    """Whether the result of an operation may be another name for its input's memory."""
    returns = func._schema.returns if isinstance(func, torch._ops.OpOverload) else ()
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def drop_dead(graph: fx.Graph) -> None:
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))


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
    for copy in graph.find_nodes(op="call_function", target=aten.clone.default):
        if copy.kwargs == _NHWC:
            copy.target, copy.kwargs = channels_innermost, {}


def channels_innermost(x: torch.Tensor) -> torch.Tensor:
    """A copy, and so laid out in memory unless ``vmap`` gives the dimensions another place."""
    return x.clone() if torch._C._functorch.peek_interpreter_stack() is not None else x.clone(**_NHWC)


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
