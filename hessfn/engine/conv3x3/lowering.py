"""Lowering: in the graph of a product, convolutions by 3 x 3 become calls of the compiled kernel."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from hessfn.engine import rewrites
from hessfn.engine.conv3x3 import kernel
from hessfn.engine.conv3x3.kernel import is_profitable
from hessfn.engine.conv3x3.operations import convolutions, correlations
from hessfn.engine.graph_module import GraphModule

aten = torch.ops.aten


def lower_to_kernel(module: fx.GraphModule) -> fx.GraphModule:
    """The same function, with convolutions and their derivatives in compiled code where that is faster.

    It may wait for the compiler, once on a machine, if there is something to compile for.
    """
    if not any(map(_is_profitable, module.graph.nodes)) or kernel.KERNEL.library() is None:
        return module
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for rewritten in (_lowered, _fuse_add):
        for node in list(graph.nodes):
            with graph.inserting_before(node):
                new = rewritten(graph, node)
            if new is not None:
                new.meta = dict(node.meta)
                node.replace_all_uses_with(new)
        rewrites.only_used_gradients(graph)
    return GraphModule(module, graph)


def _is_profitable(node: Any) -> bool:
    if node.target is aten.convolution.default:
        x, weight, _, *how = node.args
    elif node.target is aten.convolution_backward.default:
        _, x, weight, _, *how, _ = node.args
    else:
        return False
    return is_profitable(x, weight, *how)


def _lowered(graph: fx.Graph, node: Any) -> fx.Node | None:
    if node.target is aten.convolution.default:
        x, weight, bias, *how = node.args
        if _is_profitable(node) and _channels_last(node):
            return graph.call_function(convolutions, ([x], [weight], bias, how[1][0], False))
    elif node.target is operator.getitem and node.args[0].target is aten.convolution_backward.default:
        given, x, weight, _, *how, _ = node.args[0].args
        padding = how[1][0]
        if not _is_profitable(node.args[0]):
            return None
        if node.args[1] == 0 and _channels_last(node):
            return graph.call_function(convolutions, ([given], [weight], None, 2 - padding, True))
        if node.args[1] == 1:
            return graph.call_function(correlations, ([x], [given], padding, _channels_last(node)))
    return None


def _channels_last(node: fx.Node) -> bool:
    return node.meta["val"].is_contiguous(memory_format=torch.channels_last)


def _fuse_add(graph: fx.Graph, total: Any) -> fx.Node | None:
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
