"""In a linear graph, what is multiplied by one constant after another is multiplied once."""

from __future__ import annotations

import math
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten


def multiply_once(graph: fx.Graph, fixed: set[fx.Node]) -> None:
    """Makes of ``(x * a) * b`` the product ``x * (a * b)``, where ``a`` and ``b`` are fixed.

    And of GELU's derivative, which computes the slope anew each time, a product with the slope.
    """
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
