"""The head of a classifier goes into its cross-entropy: then its logits are never all there."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from hessfn.engine.fused.cross_entropy import losses

aten = torch.ops.aten


def fuse_heads(graph: fx.Graph) -> None:
    """Cross-entropy of a matrix product, seen through views and choices of rows, takes the product's factors."""
    for node in graph.find_nodes(op="call_function", target=losses):
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
                x = _applied(graph, step, x)
            weight = graph.call_function(aten.t.default, (weight,))
            weight.meta["val"] = weight.args[0].meta["val"].t()  # type: ignore[union-attr]
        node.args = (x, weight, bias, *rest[1:])


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


_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
_COPIES = {aten.clone.default, aten._to_copy.default, aten.alias.default}
_ROWS = {aten.slice.Tensor, aten.select.int, aten.index_select.default}
