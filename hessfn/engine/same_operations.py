"""What a graph consists of, whatever the sizes: by this, traces for more samples and for fewer are one function."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

from hessfn.engine.memory_plan import call_out


def digest_of(graph: fx.Graph) -> str:
    """A digest of the calls of a graph, in order: of their operations, dtypes, devices, and what each is called with.

    Integers do not count, since the sizes of tensors are among them; other numbers and flags do. So the traces of a
    loss have one digest for all numbers of samples, unless the loss, or some rewrite, looks at how many there are.
    """
    place = {node: i for i, node in enumerate(graph.nodes)}
    calls = [(_called(node), _looks(node), _form((node.args, node.kwargs), place)) for node in graph.nodes]
    return hashlib.sha256(repr(calls).encode()).hexdigest()


def operations_in(graph: fx.Graph) -> frozenset[str]:
    """The names of the operations that a graph calls, wherever their results go."""
    calls = [node for node in graph.nodes if node.op == "call_function"]
    return frozenset(str(node.args[0] if node.target is call_out else node.target) for node in calls)


def _called(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_function" else node.op


def _looks(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return (str(value.dtype), value.device.type) if isinstance(value, Tensor) else None


def _form(x: Any, place: Mapping[fx.Node, int]) -> Any:
    if isinstance(x, fx.Node):
        return place[x]
    if isinstance(x, (list, tuple)):
        return [_form(part, place) for part in x]
    if isinstance(x, dict):
        return [(name, _form(part, place)) for name, part in x.items()]
    return "int" if type(x) is int else repr(x)
