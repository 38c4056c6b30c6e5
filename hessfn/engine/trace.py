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
    is_mutable,
    under_functorch,
    without_onednn,
)
from hessfn.core.tree import Tree
from hessfn.engine import reference
from hessfn.engine.recorder import Recorder
from hessfn.engine.reference import marked

aten = torch.ops.aten
Record = Callable[..., fx.GraphModule]


def tensors(arguments: Any) -> tuple[list[Tensor], list[int]]:
    """The tensors among the leaves, and which leaves they are."""
    flat = tree.leaves(arguments)
    where = [i for i, leaf in enumerate(flat) if isinstance(leaf, Tensor)]
    return [flat[i] for i in where], where


def graph_of(function: Callable[..., list[Tensor]], inputs: list[Tensor], *, lean: bool, rules: Any = None) -> Any:
    """The graph of a function of tensors: by the recorder, or where that cannot do it, by the reference.

    Raises:
        Untraceable: it depends on the values of tensors, or no tracer can follow it.
    """
    try:
        return Recorder(fx.Graph(), rules=rules, lean=lean).run(function, inputs)
    except Untraceable:
        raise
    except Exception as failure:
        try:
            return reference.run(function, inputs, rules)
        except Untraceable:
            raise
        except Exception as error:
            raise Untraceable(f"it cannot be traced: {_explain(failure)}") from error


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

    def flat(*values: Tensor) -> list[Tensor]:
        leaves = list(fixed)
        for i, value in zip(where, values, strict=True):
            leaves[i] = value
        again, rest = tree.unflatten(leaves, (params, args))
        with _Watch(_graph_being_made()):
            return [loss(again, *rest)]

    with _traceable({t.device for t in given if t.is_cuda}):
        function = torch.func.functionalize(flat, remove="mutations")
        module = record(function, given, lean=False, rules=decompositions(_WITHOUT_RULES))
    for node in module.graph.nodes:
        if "cut" in node.meta:
            node.target = aten.detach.default
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
                f"it computes {node.target} from its parameters where derivatives are off (torch.no_grad)"
            )
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            raise Untraceable(f"it draws random numbers ({node.target})")
        if is_mutable(node.target):
            raise Untraceable(f"it changes a tensor that is not its own ({node.target})")


def _graph_being_made() -> fx.Graph | None:
    mode = current_dispatch_mode()
    return mode.graph if isinstance(mode, Recorder) else reference.graph_being_made()


class _Watch(TorchFunctionMode):
    """Marks what a trace forgets: nodes ``switched_off`` (computed without derivatives) and ``cut`` from them."""

    def __init__(self, graph: fx.Graph | None) -> None:
        super().__init__()
        self.graph = graph

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _LEAVES_TORCH:
            raise Untraceable(f"the loss takes the values of a tensor out of torch ({getattr(func, '__name__', func)})")
        off = not torch.is_grad_enabled() or torch.is_inference_mode_enabled()
        marks = ["cut"] if func in _CUTS else ["switched_off"] if off else []
        marking = marked(self.graph, marks) if marks and self.graph is not None else nullcontext()
        with marking, without_onednn() if func in _RECURRENT else nullcontext():
            # functionalize makes an alias of detach, and nothing of .data
            return aten.alias.default(args[0]) if func in _CUTS else func(*args, **(kwargs or {}))


_CUTS = (Tensor.detach, torch.detach, Tensor.data.__get__)  # type: ignore[attr-defined]
_RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)  # oneDNN's kernel of these has no derivative rule
_LEAVES_TORCH = (Tensor.numpy, Tensor.__array__, Tensor.tolist)


@contextmanager
def _traceable(gpus: set[torch.device]) -> Iterator[None]:
    """Kernels that can be differentiated twice, derivatives on, and the user's random state put back."""
    kernels = sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False)
    with kernels[0], kernels[1], torch.enable_grad(), torch.random.fork_rng(devices=list(gpus)):
        yield


def _explain(error: Exception) -> str:
    message = str(error) or type(error).__name__
    for symptom, meaning in {
        "setup_context": "it has an autograd.Function (or re-entrant checkpointing), whose derivative would be lost",
        "custom_function_call": "it has an autograd.Function, whose derivative would be lost",
    }.items():
        if symptom in message:
            return meaning
    return message.splitlines()[0]


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
