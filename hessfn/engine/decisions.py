"""Decisions: what a loss has read from its integer arguments while it was traced, and whether others decide alike.

Masks, indices, lengths and labels are known while a loss is traced: code may branch on them. A graph is that of the
branch that was taken, so that it comes with a *guard*: the decisions, each with what was seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from hessfn.core.errors import Untraceable
from hessfn.engine.meta_shapes import tensors


class Decision(NamedTuple):
    """A call whose result, or the shape of it, has decided something."""

    function: Callable[..., Any]
    args: Any  # nodes in place of tensors
    kwargs: Any
    seen: Any


def seen(result: Any) -> Any:
    """What a decision is made by: a number, or the shapes of results."""
    return tuple(tuple(t.shape) for t in tensors(result)) if tensors(result) else result


def contents(x: Tensor) -> list[Any]:
    """All of a tensor, for what is read outside of torch."""
    return [x.dtype, tuple(x.shape), x.detach().flatten().tolist()]


def is_known(x: Tensor) -> bool:
    """Whether a trace takes the values of an argument as they are: nothing is differentiated by integers."""
    return type(x) is Tensor and not x.is_meta and not (x.is_floating_point() or x.is_complex())


class Guard:
    """Holds for arguments with which all decisions fall out as they did in the trace."""

    def __init__(self, decisions: Sequence[Decision], constants: Mapping[str, Tensor], inputs: Sequence[fx.Node]):
        moving = varying(inputs)
        decisive = [d for d in decisions if any(n in moving for n in _nodes((d.args, d.kwargs)))]
        needed = _ancestors([n for d in decisive for n in _nodes((d.args, d.kwargs))])
        graph, own = fx.Graph(), dict[fx.Node, fx.Node]()  # of its own: passes will rewrite the other
        for node in inputs[0].graph.nodes if needed else ():
            if node in needed:
                own[node] = graph.node_copy(node, own.__getitem__)
        self.constants = {str(n.target): constants[str(n.target)] for n in needed if n.op == "get_attr"}
        self.given = [(i, own[node]) for i, node in enumerate(inputs) if node in needed]
        self.steps = [n for n in graph.nodes if n.op != "placeholder"]
        self.decisions = [
            Decision(d.function, *fx.map_arg((d.args, d.kwargs), own.__getitem__), d.seen) for d in decisive
        ]

    def __bool__(self) -> bool:
        return bool(self.decisions)

    @torch.no_grad()
    def holds(self, given: Sequence[Tensor]) -> bool:
        """Whether it holds for these arguments, tensors in a row as the graph takes them."""
        value: dict[fx.Node, Any] = {node: given[i] for i, node in self.given}
        for node in self.steps:
            if node.op == "get_attr":
                value[node] = self.constants[str(node.target)]
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), value.__getitem__)
                value[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        for function, args, kwargs, expected in self.decisions:
            args, kwargs = fx.map_arg((args, kwargs), value.__getitem__)
            if seen(function(*args, **kwargs)) != expected:
                return False
        return True


class Contents:
    """The guard of a graph that is good for these very integer arguments."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        self.expected = {i: contents(x) for i, x in enumerate(given) if is_known(x)}

    def __bool__(self) -> bool:
        return bool(self.expected)

    def holds(self, given: Sequence[Tensor]) -> bool:
        """Whether the integer arguments are these."""
        return all(contents(given[i]) == expected for i, expected in self.expected.items())


def holds(module: fx.GraphModule, given: Sequence[Tensor]) -> bool:
    """Whether a graph is that of its loss for these arguments too, of which the shapes and dtypes are those it has."""
    return all(guard.holds(given) for guard in module.meta.get("guards", ()))


def require(module: fx.GraphModule, given: Sequence[Tensor]) -> None:
    """Raises where a graph is not that of its loss for these arguments."""
    if not holds(module, given):
        raise Untraceable("it branches on integers or masks, and for these it would take another branch: trace it anew")


def _nodes(x: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(x, found.append)  # type: ignore[arg-type]
    return found


def varying(inputs: Sequence[fx.Node]) -> set[fx.Node]:
    """What depends on an input."""
    found = set(inputs)
    for node in inputs[0].graph.nodes if inputs else ():
        if any(i in found for i in node.all_input_nodes):
            found.add(node)
    return found


def _ancestors(roots: Sequence[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = list(roots)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(node.all_input_nodes)
    return found
