"""A graph as a module, whose code lives as long as the module."""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx


class GraphModule(fx.GraphModule):
    """A graph that is compiled when it is first called.

    ``fx.GraphModule`` compiles whenever its graph is given or changed, and enters its source in caches of the process,
    where it stays for ever: a graph that passes through twenty stages would do so twenty times.
    """

    _run: Callable[..., Any] | None

    def recompile(self) -> Any:
        """Says that the graph has changed."""
        self._run = None

    @property
    def code(self) -> str:
        return self.graph.python_code(root_module="self").src

    def compiled(self) -> Callable[..., Any]:
        """What the graph does, as a function of the module and the graph's inputs."""
        if self._run is None:
            with without_collections():
                code = self.graph.python_code(root_module="self")
                found = dict(code.globals)
                exec(compile(code.src, "<graph of hessfn>", "exec"), found)
            self._run = found["forward"]
        return self._run

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        """The graph's results."""
        return self.compiled()(self, *inputs)


def compiled(module: fx.GraphModule) -> fx.GraphModule:
    """The same module, compiled now and not at its first call, into which ``torch.compile`` could not look."""
    if isinstance(module, GraphModule):
        module.compiled()
    return module


def with_tensors(graph: fx.Graph, code: Callable[..., Any], tensors: dict[str, Any]) -> GraphModule:
    """The module of a graph, compiled already, with other tensors for its constants."""
    module = GraphModule(tensors, graph)
    module._run = code
    graph.owning_module = None  # or it would keep the tensors as long as it lives itself
    return module


@contextmanager
def without_collections() -> Iterator[None]:
    """A graph is many small objects that all stay: to look for garbage among them takes a third of a trace."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def interpreted(module: fx.GraphModule, *inputs: Tensor, instead: Mapping[Any, Any] | None = None) -> list[Tensor]:
    """The results of a graph, node by node: faster than its code, which has to be compiled, for what is run once.

    Args:
        instead: functions to be called in place of those of the graph.
    """
    values: dict[fx.Node, Any] = {}
    instead = instead or {}
    given = iter(inputs)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(given)
        elif node.op == "get_attr":
            values[node] = functools.reduce(getattr, node.target.split("."), module)
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            if node.op == "output":
                values[node] = list(args[0])
            else:
                values[node] = instead.get(node.target, node.target)(*args, **kwargs)
    results: list[Tensor] = values[node]
    return results


def copied(module: fx.GraphModule) -> GraphModule:
    """Another module of the same graph, to be changed: the constants are shared."""
    graph, nodes = fx.Graph(), dict[fx.Node, fx.Node]()
    with without_collections():
        for node in module.graph.nodes:
            # Given its arguments, create_node would look into each of them first, which takes most of its time.
            new = nodes[node] = graph.create_node(node.op, node.target, name=node.name)
            new.args, new.kwargs = fx.map_arg((node.args, node.kwargs), nodes.__getitem__)
            new.meta = copy.copy(node.meta)
        return GraphModule(module, graph)
