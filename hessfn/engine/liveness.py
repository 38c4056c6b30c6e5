"""Liveness: how many bytes the results of a graph take at each of its operations."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx

from hessfn.engine.memory_plan import source_of


def owners_of(nodes: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Which node has made the memory that each result is in."""
    owners: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        source = source_of(node)
        owners[node] = node if source is None or "val" not in source.meta else owners[source]
    return owners


def bytes_of(node: fx.Node) -> int:
    """Of a result; constants and inputs are there anyway."""
    value = node.meta.get("val")
    return value.nbytes if node.op == "call_function" and isinstance(value, Tensor) else 0


def live_bytes(nodes: Sequence[fx.Node], owners: dict[fx.Node, fx.Node]) -> tuple[list[int], dict[fx.Node, int]]:
    """What is alive at each operation, its result with it; and what dies at some."""
    last = {owners[i]: node for node in nodes for i in node.all_input_nodes}
    dying: dict[fx.Node, int] = {}
    for owner, node in last.items():
        dying[node] = dying.get(node, 0) + bytes_of(owner)
    sizes, live = [], 0
    for node in nodes:
        live += bytes_of(node) if owners[node] is node else 0
        sizes.append(live)
        live -= dying.get(node, 0)
    return sizes, dying
