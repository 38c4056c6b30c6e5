"""The reference that the recorder is held against: the same graph by ``make_fx``, torch's own tracer.

It knows every operation and builds four to five times more slowly. Tests compare the two on the whole table of
operations; where the recorder fails for a reason of its own, this one takes its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, make_fx
from torch.utils.weak import WeakTensorKeyDictionary

from hessfn.core.errors import Untraceable
from hessfn.core.torch_private import OpOverload, TorchDispatchMode, forget_source, is_mutable
from hessfn.engine.decisions import Contents, is_known, varying
from hessfn.engine.explain import SHAPED_BY_VALUES
from hessfn.engine.graph_module import GraphModule
from hessfn.engine.meta_shapes import MASKS, on_meta, tensors


def run(
    function: Callable[..., list[Tensor]], inputs: list[Tensor], rules: Mapping[Any, Callable[..., Any]] | None = None
) -> fx.GraphModule:
    """The graph of a function of tensors, in the form of the recorder's: constants are buffers, results a list.

    The function is run on these inputs. Where its graph has operations in place, that graph is traced once more,
    functionalized.

    Raises:
        Untraceable: the shape of a result depends on values.
    """
    moving = [i for i, t in enumerate(inputs) if not is_known(t)]
    fixed = {i: t.detach().clone() for i, t in enumerate(inputs) if is_known(t)}

    def of_moving(*given: Tensor) -> list[Tensor]:
        values = {**fixed, **dict(zip(moving, given, strict=True))}
        with _Known(fixed.values()):
            return list(function(*(values[i] for i in range(len(inputs)))))

    def traced(function: Callable[..., Any]) -> fx.GraphModule:
        copies = [inputs[i].detach().clone() for i in moving]
        module = make_fx(function, decomposition_table=dict(rules or {}))(*copies)
        forget_source(module)
        return module

    module = traced(of_moving)
    if any(isinstance(node.target, OpOverload) and is_mutable(node.target) for node in module.graph.nodes):
        module = traced(torch.func.functionalize(_Again(module).run, remove="mutations_and_views"))
    _refuse_shapes_by_values(module.graph)
    module = _in_form(module, inputs)
    module.meta["guards"] = [Contents(inputs)] if fixed else []
    return module


class _Known(TorchDispatchMode):
    """Computes what follows from integer arguments alone unseen by ``make_fx``, which shows no value it has seen."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.known = WeakTensorKeyDictionary(dict.fromkeys(known, True))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tensors((args, kwargs or {}))
        if not given or not all(t in self.known for t in given):
            for t in given[:1] if is_mutable(func) else ():
                self.known.pop(t, None)
            return func(*args, **(kwargs or {}))
        with disable_proxy_modes_tracing():
            out = func(*args, **(kwargs or {}))
        for t in tensors(out):
            self.known[t] = True
        return out


def _refuse_shapes_by_values(graph: fx.Graph) -> None:
    """``make_fx`` writes down the shapes that these values have, which others need not."""
    moving = varying(graph.find_nodes(op="placeholder"))
    for node in graph.nodes:
        if isinstance(node.target, OpOverload) and torch.Tag.dynamic_output_shape in node.target.tags:
            decisive = node.all_input_nodes
            if node.target is torch.ops.aten.index.Tensor:  # by numbers the shape is known, by a mask it is not
                decisive = [i for i in node.args[1] if i is not None and i.meta["val"].dtype in MASKS]
            if any(i in moving for i in decisive):
                raise Untraceable(SHAPED_BY_VALUES)


def graph_being_made() -> fx.Graph | None:
    """The graph that ``make_fx`` is writing."""
    mode = get_proxy_mode()
    return None if mode is None else mode.tracer.graph


@contextmanager
def marked(graph: fx.Graph, marks: Iterable[str]) -> Iterator[None]:
    """Meanwhile every node that is written gets these marks in its ``meta``."""
    last = next(iter(reversed(graph.nodes)), None)
    yield
    for node in reversed(graph.nodes):
        if node is last:
            return
        node.meta.update(dict.fromkeys(marks, True))


class _Again(fx.Interpreter):
    """Runs a graph under a trace; what a node was marked with goes over to the nodes that are written for it."""

    def run_node(self, n: fx.Node) -> Any:
        graph = graph_being_made()
        marks = [mark for mark in ("cut", "switched_off") if mark in n.meta]
        if graph is None or not marks:
            return super().run_node(n)
        with marked(graph, marks):
            return super().run_node(n)


def _in_form(module: fx.GraphModule, inputs: list[Tensor]) -> fx.GraphModule:
    moving = module.graph.find_nodes(op="placeholder")
    waiting = iter(moving)
    with module.graph.inserting_before(next(iter(module.graph.nodes))):
        for i, tensor in enumerate(inputs):
            node = module.graph.placeholder(f"in{i}")
            node.meta["val"] = tensor
            if not is_known(tensor):
                next(waiting).replace_all_uses_with(node)
    for node in moving:
        module.graph.erase_node(node)
    constants: dict[str, Tensor] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            constants[node.target] = node.meta["val"] = getattr(module, node.target).detach()
        if isinstance(node.meta.get("val"), Tensor):
            node.meta["val"] = on_meta(node.meta["val"])
    (output,) = module.graph.find_nodes(op="output")
    output.args = (list(output.args[0]),)
    return GraphModule(constants, module.graph)
