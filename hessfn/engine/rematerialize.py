"""Rematerialization: what is cheap is computed again where it is needed, instead of being kept over the peak.

The way up to the peak of memory leaves behind what the way down needs. Part of that follows entry by entry from what is
kept as well: an activation from what it is applied to, a normalised layer from the centred one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from hessfn.engine import rewrites
from hessfn.engine.liveness import bytes_of, live_bytes, owners_of

aten = torch.ops.aten

_WORTH = 1 << 20  # bytes of a result
_MULTIPLICATIONS = (
    1000  # of matrix products, for each entry that is computed again: then it takes a percent of the time
)
_ROUNDS = 3  # the peak moves


def rematerialize(graph: fx.Graph) -> None:
    """Pointwise results that live over the peak are computed again behind it, where what they follow from lives, too."""
    budget = _multiplications(graph) // _MULTIPLICATIONS
    for _ in range(_ROUNDS):
        spent = _at_peak(graph, budget)
        if not spent:
            break
        budget -= spent
    rewrites.drop_dead(graph)


def _at_peak(graph: fx.Graph, budget: int) -> int:
    """How many entries are computed again."""
    nodes = list(graph.nodes)
    owners = owners_of(nodes)
    sizes, _ = live_bytes(nodes, owners)
    peak = max(range(len(nodes)), key=sizes.__getitem__)
    position: dict[fx.Node, float] = {node: i for i, node in enumerate(nodes)}
    until: dict[fx.Node, float] = {}
    for node in nodes:
        for i in node.all_input_nodes:
            until[owners[i]] = float("inf") if node.op == "output" else position[node]
    aliases: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes[: peak + 1]:
        aliases.setdefault(owners[node], []).append(node)
    spent = 0
    for node in reversed(nodes[: peak + 1]):  # what follows from others comes before them
        if owners[node] is not node or not _is_cheap(node) or until.get(node, 0) in (0, float("inf")):
            continue
        late = [(alias, user) for alias in aliases[node] for user in alias.users if position[user] > peak]
        first = min((user for _, user in late), key=position.__getitem__, default=None)
        entries = node.meta["val"].numel()
        if (
            first is None
            or spent + entries > budget
            or not all(i.op != "call_function" or until[owners[i]] >= position[first] for i in node.all_input_nodes)
        ):
            continue
        spent += entries
        _compute_again(graph, node, late, first, position)
    return spent


def _compute_again(graph: fx.Graph, node: fx.Node, late: Any, first: fx.Node, position: dict[fx.Node, float]) -> None:
    copies: dict[fx.Node, fx.Node] = {}

    def copy(alias: fx.Node) -> fx.Node:
        if alias not in copies:
            of = None if alias is node else alias.args[0]
            new = graph.node_copy(alias, lambda i: copy(i) if i is of else i)
            position[new] = (position[new.prev] + position[first]) / 2
            copies[alias] = new
        return copies[alias]

    with graph.inserting_before(first):
        for alias, user in late:
            user.replace_input_with(alias, copy(alias))


def _is_cheap(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags and bytes_of(node) >= _WORTH


def _multiplications(graph: fx.Graph) -> int:
    """Of matrix products and convolutions."""
    total = 0
    for node in graph.nodes:
        inner = _INNER.get(node.target)
        if inner is not None:
            total += node.meta["val"].numel() * inner(*node.args)
    return total


def _channels(_: Any, weight: fx.Node, *__: Any) -> int:
    shape = weight.meta["val"].shape
    return shape.numel() // shape[0]


_INNER: dict[Any, Any] = {
    aten.mm.default: lambda x, y: x.meta["val"].shape[-1],
    aten.bmm.default: lambda x, y: x.meta["val"].shape[-1],
    aten.addmm.default: lambda _, x, y: x.meta["val"].shape[-1],
    aten.baddbmm.default: lambda _, x, y: x.meta["val"].shape[-1],
    aten.convolution.default: _channels,
}
