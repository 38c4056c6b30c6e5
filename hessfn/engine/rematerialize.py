"""Rematerialization: what is cheap is computed again where it is needed, instead of being kept over the peak.

The way up to the peak of memory leaves behind what the way down needs. Part of that follows entry by entry from what is
kept as well: an activation from what it is applied to, a normalised layer from the centred one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx

from hessfn.engine import rewrites
from hessfn.engine.liveness import bytes_of, live_bytes, owners_of
from hessfn.engine.memory_plan import source_of

aten = torch.ops.aten

WORTH = 1 << 20  # bytes of a result
MULTIPLICATIONS = 1000  # of matrix products, for each entry that is computed again: then it takes a percent of the time
_ROUNDS = 3  # the peak moves
_LONGEST = 4  # of the operations for one result


def rematerialize(graph: fx.Graph) -> None:
    """Pointwise results that live over the peak are computed again behind it, if what they follow from lives, too."""
    budget = _multiplications(graph) // MULTIPLICATIONS
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

    def lives(at: float, node: fx.Node) -> bool:
        return until[owners[node]] >= at

    spent = 0
    for node in reversed(nodes[: peak + 1]):  # what follows from others comes before them
        if owners[node] is not node or not _is_cheap(node) or until.get(node, 0) in (0, float("inf")):
            continue
        late = [(alias, user) for alias in aliases[node] for user in alias.users if position[user] > peak]
        first = min((user for _, user in late), key=position.__getitem__, default=None)
        if first is None:
            continue
        again = _chain(node, partial(lives, position[first]))
        entries = sum(i.meta["val"].numel() for i in again or ())
        if again is None or spent + entries > budget:
            continue
        spent += entries
        copies = _copied(graph, [*again, *aliases[node][1:]], first)
        for copy in copies.values():
            position[copy] = (position[copy.prev] + position[first]) / 2
        for alias, user in late:
            user.replace_input_with(alias, copies[alias])
    return spent


def _chain(node: fx.Node, lives: Callable[[fx.Node], bool]) -> list[fx.Node] | None:
    """What has to be computed again for a result, itself last, given what lives; None if that is much."""
    found: list[fx.Node] = []

    def add(x: fx.Node) -> bool:
        for i in x.all_input_nodes:
            if i.op == "call_function" and i not in found and not lives(i) and not add(i):
                return False
        found.append(x)
        return len(found) <= _LONGEST and (_is_cheap(x) or source_of(x) is not None)

    return found if add(node) else None


def _copied(graph: fx.Graph, chain: list[fx.Node], place: fx.Node) -> dict[fx.Node, fx.Node]:
    copies: dict[fx.Node, fx.Node] = {}
    with graph.inserting_before(place):
        for node in chain:
            copies[node] = graph.node_copy(node, lambda x: copies.get(x, x))
    return copies


def _is_cheap(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags and bytes_of(node) >= WORTH


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
