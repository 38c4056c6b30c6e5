"""The reference that the recorder is held against: the same graph by ``make_fx``, torch's own tracer.

It knows every operation and builds four to five times more slowly. Tests compare the two on the whole table of
operations; where the recorder fails for a reason of its own, this one takes its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from hessfn.engine.meta_shapes import on_meta


def run(
    function: Callable[..., list[Tensor]], inputs: list[Tensor], rules: Mapping[Any, Callable[..., Any]] | None = None
) -> fx.GraphModule:
    """The graph of a function of tensors, in the form of the recorder's: constants are buffers, results a list.

    The function is run, once, on these inputs.
    """
    inputs = [t.detach().clone() for t in inputs]
    traced = make_fx(lambda *given: list(function(*given)), decomposition_table=dict(rules or {}))(*inputs)
    graph = traced.graph
    constants: dict[str, Tensor] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            constants[node.target] = getattr(traced, node.target).detach()
            node.meta["val"] = constants[node.target]
        if isinstance(node.meta.get("val"), Tensor):
            node.meta["val"] = on_meta(node.meta["val"])
    (output,) = graph.find_nodes(op="output")
    output.args = (list(output.args[0]),)
    return fx.GraphModule(constants, graph)


def graph_being_made(mode: Any) -> fx.Graph | None:
    """The graph that a tracer's dispatch mode is writing."""
    return getattr(getattr(mode, "tracer", None), "graph", None)
