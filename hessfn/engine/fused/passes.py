"""Passes over graphs that have fused operations."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from hessfn.engine.fused import attention, chunks, cross_entropy, outputs
from hessfn.engine.fused.logits import Labels, Logits
from hessfn.engine.fused.operation import sees_operations

aten = torch.ops.aten


def fuse_heads(graph: fx.Graph) -> None:
    """Cross-entropy of a matrix product, seen through views and choices of rows, takes the product's factors."""
    for node in graph.find_nodes(op="call_function", target=cross_entropy.losses):
        logits, weight, *rest = node.args
        chain: list[fx.Node] = []
        while weight is None and len(logits.users) == 1 and _keeps_rows(logits):
            chain.append(logits)
            logits = logits.args[0]
        factors = _factors(logits) if weight is None and len(logits.users) == 1 else None
        if factors is None:
            continue
        x, weight, bias = factors
        with graph.inserting_before(node):
            for step in reversed(chain):
                x = x if step.target is outputs.output else _applied(graph, step, x)
            weight = graph.call_function(aten.t.default, (weight,))
            weight.meta["val"] = weight.args[0].meta["val"].t()  # type: ignore[union-attr]
        node.args = (x, weight, bias, *rest[1:])
        if any(step.target is outputs.output for step in chain):
            node.target = outputs.head


def _factors(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    """x, the transposed weight and the bias of a matrix product."""
    args: Any = node.args
    if node.target is aten.mm.default:
        return args[0], args[1], None
    if node.target is aten.addmm.default and not node.kwargs and args[0].meta["val"].dim() == 1:
        return args[1], args[2], args[0]
    return None


def _keeps_rows(node: fx.Node) -> bool:
    """Whether the last axis stays what it is, whole and alone."""
    if node.op != "call_function" or not isinstance(node.args[0], fx.Node):
        return False
    before, after = node.args[0].meta["val"], node.meta["val"]
    if node.target is outputs.output:
        return True
    if node.target in _VIEWS:
        return bool(before.shape[-1] == after.shape[-1])
    if node.target in _COPIES:
        return bool(before.dtype == after.dtype)
    return node.target in _ROWS and node.args[1] % before.dim() != before.dim() - 1


def _applied(graph: fx.Graph, step: fx.Node, x: fx.Node) -> fx.Node:
    """The same step, of x in place of the logits."""
    target, args = step.target, step.args[1:]
    shape = [*step.meta["val"].shape[:-1], x.meta["val"].shape[-1]]
    if target in _VIEWS:
        target, args = aten.reshape.default, (shape,)
    new = graph.call_function(target, (x, *args), step.kwargs)  # type: ignore[arg-type]
    new.meta = {**step.meta, "val": step.meta["val"].new_empty(shape)}
    return new


def only_wanted(graph: fx.Graph) -> None:
    """Gradients of cross-entropy that nobody takes are not computed."""
    for function in (cross_entropy.gradients, cross_entropy.tangents_of_gradients, outputs.curvatures):
        for node in graph.find_nodes(op="call_function", target=function):
            taken = {user.args[1] for user in node.users}
            node.update_arg(7, tuple(i in taken for i in range(3)))


def softmax(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Of the logits of all rows, (c, n)."""
    return chunks.softmax(Logits(x, weight, bias))


def pulled_back(weights: Tensor, weight: Tensor) -> Tensor:
    """The softmax (c, n), transposed, times the head's weight (c, d)."""
    return weights.T @ weight


def tangents_with(weights: Tensor, pulled: Tensor, *args: Any) -> Any:
    """As ``cross_entropy.tangents_of_gradients``, the softmax being known."""
    if sees_operations():
        return cross_entropy.tangents_of_gradients(*args)
    x, weight, bias, target, part, smooth, g, wanted, dx, dweight, dbias, _ = args
    z, labels = Logits(x, weight, bias), Labels(target, part, smooth)
    return tuple(chunks.tangents_with(weights, pulled, z, labels, g, Logits(dx, dweight, dbias), wanted))


def keep_softmax(module: fx.GraphModule) -> fx.GraphModule:
    """A linearized product keeps what no vector changes: the softmax of its classes, and that through the head."""
    graph = module.graph
    for node in graph.find_nodes(op="call_function", target=cross_entropy.tangents_of_gradients):
        x, weight, bias = node.args[:3]
        if weight is None or node.args[-1] is not None:
            continue
        with graph.inserting_before(node):
            kept = graph.call_function(softmax, (x, weight, bias))
            pulled = graph.call_function(pulled_back, (kept, weight))
        shape = weight.meta["val"].shape[0], x.meta["val"].shape[0]  # type: ignore[union-attr]
        kept.meta["val"] = x.meta["val"].new_empty(shape)  # type: ignore[union-attr]
        pulled.meta["val"] = x.meta["val"].new_empty(x.meta["val"].shape)  # type: ignore[union-attr]
        node.target, node.args = tangents_with, (kept, pulled, *node.args)
    return module


def with_tangents(graph: fx.Graph) -> None:
    """A fused operation and its tangent, of the same arguments, are one: what both need is computed once."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for together in _TOGETHER:
        plain = {together.key(node): node for node in graph.find_nodes(op="call_function", target=together.plain)}
        for tangent in graph.find_nodes(op="call_function", target=together.tangent):
            first = plain.get(together.key(tangent))
            users = {user for part in first.users for user in part.users} - {tangent} if first else set()
            if first is None or any(order[user] < order[tangent] for user in users):
                continue
            with graph.inserting_before(tangent):
                both = graph.call_function(together.both, together.args(first, tangent))
            for node, shift in ((first, 0), (tangent, together.results)):
                for part in list(node.users):
                    with graph.inserting_before(tangent):
                        new = graph.call_function(operator.getitem, (both, part.args[1] + shift))  # type: ignore[operator]
                    new.meta = dict(part.meta)
                    part.replace_all_uses_with(new)
                    graph.erase_node(part)
            graph.erase_node(tangent)
            graph.erase_node(first)


class _Together(NamedTuple):
    plain: Any
    tangent: Any
    both: Any
    num_shared: int  # the arguments of the first that the second has as well
    results: int = 3
    known: int = 0  # of the second's arguments, those after the shared ones that are results of the first

    def key(self, node: fx.Node) -> Any:
        return node.args[: self.num_shared]

    def args(self, first: fx.Node, tangent: fx.Node) -> tuple[Any, ...]:
        rest = len(first.args)
        wanted = tangent.args[self.num_shared : rest]  # of the results of each
        return (*first.args, *tangent.args[rest + self.known :], *wanted)


_TOGETHER = (
    _Together(cross_entropy.gradients, cross_entropy.tangents_of_gradients, cross_entropy.gradients_with_tangents, 7),
    _Together(attention.attention, attention.tangent, attention.attention_with_tangent, 6, results=2, known=2),
    _Together(attention.gradient, attention.tangent_of_gradient, attention.gradient_with_tangent, 9),
)
_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
_COPIES = {aten.clone.default, aten._to_copy.default, aten.alias.default}
_ROWS = {aten.slice.Tensor, aten.select.int, aten.index_select.default}
