"""Tracing: a loss as a graph of aten operations, or the reason why a graph would not be this loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from hessfn.core import tree
from hessfn.core.errors import Untraceable
from hessfn.core.torch_private import (
    OpOverload,
    current_dispatch_mode,
    decompositions,
    is_all_true,
    is_mutable,
    pad_packed_sequence,
    under_functorch,
    without_cudnn,
    without_onednn,
)
from hessfn.core.tree import Tree
from hessfn.engine import recurrent_cells, reference
from hessfn.engine.explain import READS_VALUES, explain
from hessfn.engine.fused.operation import is_own
from hessfn.engine.recorder import Recorder, Unsupported
from hessfn.engine.reference import marked

aten = torch.ops.aten
Record = Callable[..., fx.GraphModule]


def tensors(arguments: Any) -> tuple[list[Tensor], list[int]]:
    """The tensors among the leaves, and which leaves they are."""
    flat = tree.leaves(arguments)
    where = [i for i, leaf in enumerate(flat) if isinstance(leaf, Tensor)]
    return [flat[i] for i in where], where


class CountedGraph(fx.Graph):
    """A graph that tells of each node that is written, for a bar."""

    on_node: Callable[[], Any] | None = None

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if self.on_node is not None:
            self.on_node()
        return super().create_node(*args, **kwargs)


def graph_of(
    function: Callable[..., list[Tensor]],
    inputs: list[Tensor],
    *,
    lean: bool,
    rules: Any = None,
    on_node: Callable[[], Any] | None = None,
) -> Any:
    """The graph of a function of tensors: by the recorder, or where that cannot do it, by the reference.

    Raises:
        Untraceable: it depends on the values of tensors, or no tracer can follow it.
    """
    graph = CountedGraph()
    graph.on_node = on_node
    try:
        with torch.autograd.set_detect_anomaly(False):  # it asks for values, which a trace has none of
            return _graph_of(function, inputs, graph, lean=lean, rules=rules)
    finally:
        graph.on_node = None


def _graph_of(
    function: Callable[..., list[Tensor]], inputs: list[Tensor], graph: fx.Graph, *, lean: bool, rules: Any
) -> Any:
    try:
        return Recorder(graph, rules=rules, lean=lean).run(function, inputs)
    except Untraceable:
        raise
    except Exception as failure:
        try:
            return reference.run(function, inputs, rules)
        except Untraceable:
            raise
        except Exception as error:
            raise Untraceable(explain(failure)) from error


def trace(
    loss: Callable[..., Tensor], params: Tree, args: tuple[Any, ...], record: Record = graph_of
) -> fx.GraphModule:
    """The loss as a graph from the tensors of ``params`` and ``args``, in a row, to a list of its value alone.

    Attention is its math kernel, and operations without a derivative rule are decomposed. The loss is called once,
    or twice where the reference takes the recorder's place.

    Raises:
        Untraceable: the loss branches on values, draws random numbers, has custom derivatives or switches them off.
    """
    if under_functorch():
        raise Untraceable("it is under a transform of torch.func, which a graph would not see")
    given, where = tensors((params, args))
    fixed = tree.leaves((params, args))

    num_params = len(tree.leaves(params))

    def flat(*values: Tensor) -> list[Tensor]:
        leaves = list(fixed)
        for i, value in zip(where, values, strict=True):
            # A loss may differentiate by its parameters itself, or by an argument from outside.
            by = value.is_floating_point() and (i < num_params or fixed[i].requires_grad)
            leaves[i] = value.requires_grad_() if by else value
        again, rest = tree.unflatten(leaves, (params, args))
        with _Watch(_graph_being_made()):
            value = loss(again, *rest)
        _refuse_custom_derivatives(value)
        return [value]

    with _traceable({t.device for t in given if t.is_cuda}):
        module = record(flat, given, lean=False, rules={**decompositions(_WITHOUT_RULES), **_RULES})
    for node in module.graph.nodes:
        if node.target in (aten.detach.default, aten.alias.default):  # autograd has aliases of its own
            node.target = aten.detach.default if "cut" in node.meta else aten.alias.default
    return module


def refuse_other_functions(graph: fx.Graph, num_params: int) -> None:
    """Raises where the graph of a loss would be another function than the loss, or have other derivatives."""
    params = graph.find_nodes(op="placeholder")[:num_params]
    follows_params = _dependents(params, but_for=aten.detach.default)
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, OpOverload):
            continue
        if "switched_off" in node.meta and node in follows_params:
            raise Untraceable(
                f"it computes {_name(node)} from its parameters where derivatives are off (torch.no_grad, or "
                "torch.autograd.grad without create_graph=True)"
            )
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            raise Untraceable(
                f"it draws random numbers ({_name(node)}): draw them before, and give them with the batch"
            )
        if is_mutable(node.target):
            raise Untraceable(explain(Unsupported(f"it changes a tensor that is not its own ({node.target})")))


def _name(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.").partition(".")[0]


def _refuse_custom_derivatives(value: Tensor) -> None:
    """Raises where autograd has followed an ``autograd.Function``: a graph has its forward, and not its backward."""
    seen, waiting = set(), [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            if isinstance(node, torch.autograd.function.BackwardCFunction) and not is_own(node):
                raise Untraceable(
                    f"it has an autograd.Function ({type(node).__name__.removesuffix('Backward')}), whose own "
                    "derivative a trace would lose"
                )
            seen.add(node)
            waiting.extend(inner for inner, _ in node.next_functions)


def _graph_being_made() -> fx.Graph | None:
    mode = current_dispatch_mode()
    return mode.graph if isinstance(mode, Recorder) else reference.graph_being_made()


class _Watch(TorchFunctionMode):
    """Marks what a trace forgets: nodes ``switched_off`` (computed without derivatives) and ``cut`` from them.

    And notes what is read where no trace sees it: values that leave torch, and lengths of sequences.
    """

    def __init__(self, graph: fx.Graph | None) -> None:
        super().__init__()
        self.graph = graph

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _READ_ALL or func in _READ_INTEGERS:
            _decide([t for t in tensors((args, kwargs))[0] if func in _READ_ALL or not t.is_floating_point()])
        if func in _READ_LISTS:
            _decide(tensors([a for a in (*args, *kwargs.values()) if isinstance(a, (list, tuple))])[0])
        if func is is_all_true and _is_fake(args[0]):
            return torch.ones((), dtype=torch.bool, device="cpu")  # what is asserted was so at the first evaluation
        off = not torch.is_grad_enabled() or torch.is_inference_mode_enabled()
        marks = ["cut"] if func in _CUTS else ["switched_off"] if off else []
        marking = marked(self.graph, marks) if marks and self.graph is not None else nullcontext()
        with marking, without_onednn() if func in _RECURRENT else nullcontext():
            return (
                aten.detach.default(args[0]) if func is _DATA else func(*args, **kwargs)
            )  # of .data there is no trace


def _decide(read: list[Tensor]) -> None:
    mode = current_dispatch_mode()
    for tensor in read:
        if isinstance(mode, Recorder):
            mode.decide_by(tensor)
        elif tensor.is_floating_point():
            raise Untraceable(READS_VALUES)


def _is_fake(tensor: Tensor) -> bool:
    mode = current_dispatch_mode()
    return isinstance(mode, Recorder) and mode.is_fake(tensor)


_DATA = Tensor.data.__get__  # type: ignore[attr-defined]
_CUTS = (Tensor.detach, torch.detach, Tensor.detach_, torch.detach_, _DATA)
_RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)  # oneDNN's kernel of these has no derivative rule
_READ_ALL = (Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.tolist)
_READ_LISTS = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
_READ_INTEGERS = (*_RECURRENT, pad_packed_sequence, torch.ctc_loss, torch.tensor_split, Tensor.tensor_split)


@contextmanager
def _traceable(gpus: set[torch.device]) -> Iterator[None]:
    """Kernels that can be differentiated twice, derivatives on, and the user's random state put back."""
    with sdpa_kernel(SDPBackend.MATH), without_cudnn(), torch.enable_grad(), torch.random.fork_rng(devices=list(gpus)):
        yield


def _dependents(roots: list[fx.Node], but_for: Any = None) -> dict[fx.Node, None]:
    """All that is computed from the roots, in order; not by way of the operation ``but_for``."""
    found = dict.fromkeys(roots)
    for node in roots[0].graph.nodes if roots else ():
        if node.target is not but_for and any(i in found for i in node.all_input_nodes):
            found[node] = None
    return found


_WITHOUT_RULES = [
    aten.mse_loss,
    aten.huber_loss,
    aten.smooth_l1_loss,
    aten.soft_margin_loss,
    aten.binary_cross_entropy,
    aten.hardsigmoid,
    aten.hardswish,
    aten._weight_norm_interface,
    aten.multi_margin_loss,
    aten.multilabel_margin_loss_forward,
]


def _masked_select(x: Tensor, mask: Tensor) -> Tensor:
    x, mask = torch.broadcast_tensors(x, mask)
    return x[mask]


def _pack_padded_sequence(x: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    x = x.transpose(0, 1) if batch_first else x
    longest = int(lengths[0])  # they are sorted
    present = torch.arange(longest, device=lengths.device)[:, None] < lengths
    return x[:longest][present.to(x.device)], present.sum(1)


_RULES = {
    aten.masked_select.default: _masked_select,
    aten._pack_padded_sequence.default: _pack_padded_sequence,
    aten._thnn_fused_lstm_cell.default: recurrent_cells.lstm_cell,  # of GPUs, without a rule in forward mode
    aten._thnn_fused_gru_cell.default: recurrent_cells.gru_cell,
}
