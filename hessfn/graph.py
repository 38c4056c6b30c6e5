"""A loss as one cleaned aten graph, in which forward-over-reverse is right and cheap on nearly every net."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import get_decompositions
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from hessfn import passes, tree
from hessfn.native import suits
from hessfn.record import Recorder, Untraceable
from hessfn.tree import Tree
from hessfn.winograd import fewer_multiplications

aten = torch.ops.aten


def clean(loss: Callable[..., Tensor], params: Tree, *args: Any) -> Callable[..., Tensor]:
    """The loss as one pure aten graph: the same function of the same trees, twice differentiable in any mode.

    In-place operations are out of place, operations without a derivative rule are decomposed, attention is its math
    kernel, BatchNorm in eval mode is folded into the convolution before it (the parameters stay what they are, so
    derivatives by all of them stay exact), wide convolutions by 3 x 3 take fewer multiplications on the CPU, and what
    the loss does not depend on is gone.

    Args:
        loss: ``loss(params, *args)`` to a scalar tensor; it is called once.
        params: a tree of tensors.
        args: what else the loss takes. Tensors in it are inputs of the graph, all else is fixed.

    Returns:
        ``graph(params, *args)``, for arguments of these shapes and dtypes only.

    Raises:
        Untraceable: the loss branches on values, draws random numbers, has custom derivatives or switches them off.

    >>> graph = clean(lambda w, x: (w * x).relu_().sum(), torch.ones(2), torch.ones(2))
    >>> graph(torch.tensor([2.0, -1.0]), torch.ones(2))
    tensor(2.)
    """
    given, where = tensors((params, args))
    num_params = len(tree.leaves(params))
    module = _trace(loss, (params, args), given, where, num_params)
    tiles = (partial(fewer_multiplications, leave=suits),) if on_cpu((params, args)) else ()
    for improve in (passes.fold_batch_norm, *tiles, passes.channels_last, passes.drop_dead):
        improve(module.graph)
    module.recompile()

    def graph(params: Tree, *args: Any) -> Tensor:
        return module(*tensors((params, args))[0])[0]

    graph.module = module  # type: ignore[attr-defined]
    return graph


def tensors(arguments: Any) -> tuple[list[Tensor], list[int]]:
    """The tensors among the leaves, and which leaves they are."""
    flat = tree.leaves(arguments)
    where = [i for i, leaf in enumerate(flat) if isinstance(leaf, Tensor)]
    return [flat[i] for i in where], where


def on_cpu(arguments: Any) -> bool:
    return all(t.device.type == "cpu" for t in tensors(arguments)[0])


# Tracing


class _Watch(TorchFunctionMode):
    """Notes what a trace forgets: what was computed where derivatives are off, and what was cut from them."""

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__()
        self.nodes = graph.nodes
        self.switched_off: set[fx.Node] = set()
        self.cut: set[fx.Node] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _LEAVES_TORCH:
            raise Untraceable(f"the loss takes the values of a tensor out of torch ({getattr(func, '__name__', func)})")
        last = next(iter(reversed(self.nodes)), None)
        off = not torch.is_grad_enabled() or torch.is_inference_mode_enabled()
        if func in _CUTS:
            # functionalize makes an alias of detach, and nothing of .data
            out, notes = aten.alias.default(args[0]), self.cut
        else:
            with _without_onednn() if func in _RECURRENT else nullcontext():
                out, notes = func(*args, **(kwargs or {})), self.switched_off
        if off or notes is self.cut:
            for node in reversed(self.nodes):
                if node is last:
                    break
                notes.add(node)
        return out


_CUTS = (Tensor.detach, torch.detach, Tensor.data.__get__)  # type: ignore[attr-defined]
_RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)  # oneDNN's kernel of these has no derivative rule
_LEAVES_TORCH = (Tensor.numpy, Tensor.__array__, Tensor.tolist)


def _trace(
    loss: Callable[..., Tensor], like: Any, given: list[Tensor], where: list[int], num_params: int
) -> fx.GraphModule:
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise Untraceable("it is under a transform of torch.func, which a graph would not see")
    fixed = tree.leaves(like)

    def flat(*tensors: Tensor) -> list[Tensor]:
        leaves = list(fixed)
        for i, tensor in zip(where, tensors, strict=True):
            leaves[i] = tensor
        params, args = tree.unflatten(leaves, like)
        with watch:
            return [loss(params, *args)]

    graph = fx.Graph()
    watch, recorder = _Watch(graph), Recorder(graph, rules=get_decompositions(_WITHOUT_RULES), lean=False)
    try:
        with _traceable({t.device for t in given if t.is_cuda}):
            module = recorder.run(torch.func.functionalize(flat, remove="mutations"), given)
    except Untraceable:
        raise
    except Exception as error:  # an error of the loss itself will show again without the trace
        raise Untraceable(f"the loss cannot be traced: {_explain(str(error))}") from error
    for node in watch.cut:
        node.target = aten.detach.default
    passes.plain_assignments(module.graph)
    passes.drop_same_views(module.graph)
    passes.drop_dead(module.graph)
    _refuse(module.graph, watch.switched_off, num_params)
    return module


@contextmanager
def _traceable(gpus: set[torch.device]) -> Iterator[None]:
    """Kernels that can be differentiated twice, derivatives on, and the user's random state put back."""
    kernels = sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False)
    with kernels[0], kernels[1], torch.enable_grad(), torch.random.fork_rng(devices=list(gpus)):
        yield


@contextmanager
def _without_onednn() -> Iterator[None]:
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)  # torch.backends.mkldnn.flags also sets what warns where there is no Intel GPU
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


def _explain(message: str) -> str:
    for symptom, meaning in {
        "setup_context": "it has an autograd.Function (or re-entrant checkpointing), whose derivative would be lost",
        "custom_function_call": "it has an autograd.Function, whose derivative would be lost",
    }.items():
        if symptom in message:
            return meaning
    return message.splitlines()[0]


def _refuse(graph: fx.Graph, switched_off: set[fx.Node], num_params: int) -> None:
    """Raises where the graph would be another function than the loss, or have other derivatives."""
    params = graph.find_nodes(op="placeholder")[:num_params]
    follows_params = _dependents(params, but_for=aten.detach.default)
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if node in switched_off and node in follows_params:
            raise Untraceable(
                f"it computes {node.target} from its parameters where derivatives are off (torch.no_grad)"
            )
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            raise Untraceable(f"it draws random numbers ({node.target})")
        if node.target._schema.is_mutable:
            raise Untraceable(f"it changes a tensor that is not its own ({node.target})")


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
