"""A loss as one cleaned aten graph, in which forward-over-reverse is right and cheap on nearly every net."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import get_decompositions
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from hessfn import tree
from hessfn.tree import Tree

aten = torch.ops.aten


class Untraceable(RuntimeError):
    """A graph of this loss would not be this loss; the message says why. Products of the loss itself still can be had."""


def clean(loss: Callable[..., Tensor], params: Tree, *args: Any) -> Callable[..., Tensor]:
    """The loss as one pure aten graph: the same function of the same trees, which can be differentiated twice by any mode.

    In-place operations are out of place, operations without a derivative rule are decomposed, attention is its math
    kernel, BatchNorm in eval mode is folded into the convolution before it (the parameters stay the same, so derivatives
    by all of them stay exact), and what the loss does not depend on is gone.

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
    given, where = _tensors((params, args))
    num_params = len(tree.leaves(params))
    module = _trace(loss, (params, args), given, where, num_params)
    for improve in (_fold_batch_norm, _channels_last, _drop_dead):
        improve(module.graph)
    module.recompile()

    def graph(params: Tree, *args: Any) -> Tensor:
        return module(*_tensors((params, args))[0])

    graph.module = module  # type: ignore[attr-defined]
    return graph


def _tensors(arguments: Any) -> tuple[list[Tensor], list[int]]:
    """The tensors among the leaves, and which leaves they are."""
    flat = tree.leaves(arguments)
    where = [i for i, leaf in enumerate(flat) if isinstance(leaf, Tensor)]
    return [flat[i] for i in where], where


# Tracing


class _Watch(TorchFunctionMode):
    """Notes what a trace forgets: what was computed where derivatives are off, and what was cut from them."""

    def __init__(self) -> None:
        self.switched_off: set[fx.Node] = set()
        self.cut: set[fx.Node] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _LEAVES_TORCH:
            raise Untraceable(f"the loss takes the values of a tensor out of torch ({getattr(func, '__name__', func)})")
        nodes = get_proxy_mode().tracer.graph.nodes
        last = next(iter(reversed(nodes)), None)
        off = not torch.is_grad_enabled() or torch.is_inference_mode_enabled()
        if func in _CUTS:
            # functionalize makes an alias of detach, and nothing of .data
            out, notes = aten.alias.default(args[0]), self.cut
        else:
            out, notes = func(*args, **(kwargs or {})), self.switched_off
        if off or notes is self.cut:
            for node in reversed(nodes):
                if node is last:
                    break
                notes.add(node)
        return out


_CUTS = (Tensor.detach, torch.detach, Tensor.data.__get__)
_LEAVES_TORCH = (Tensor.numpy, Tensor.__array__, Tensor.tolist)


def _trace(
    loss: Callable[..., Tensor], like: Any, given: list[Tensor], where: list[int], num_params: int
) -> fx.GraphModule:
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise Untraceable("it is under a transform of torch.func, which a graph would not see")
    fixed = tree.leaves(like)

    def flat(*tensors: Tensor) -> Tensor:
        leaves = list(fixed)
        for i, tensor in zip(where, tensors, strict=True):
            leaves[i] = tensor
        params, args = tree.unflatten(leaves, like)
        with watch:
            return loss(params, *args)

    watch = _Watch()
    pure = torch.func.functionalize(flat, remove="mutations")
    try:
        with _traceable():
            module = make_fx(pure, decomposition_table=get_decompositions(_WITHOUT_RULES))(*(t.detach() for t in given))
    except Untraceable:
        raise
    except Exception as error:  # an error of the loss itself will show again without the trace
        raise Untraceable(f"the loss cannot be traced: {_explain(str(error))}") from error
    for node in watch.cut:
        node.target = aten.detach.default
    _out_of_place(module.graph)
    _drop_dead(module.graph)
    _refuse(module, watch.switched_off, num_params)
    for name, constant in (*module.named_parameters(), *module.named_buffers()):
        delattr(module, name)
        module.register_buffer(name, constant.detach())
    return module


@contextmanager
def _traceable() -> Iterator[None]:
    """Kernels that can be differentiated twice, derivatives on, and the user's random state put back."""
    with sdpa_kernel(SDPBackend.MATH), _without_onednn(), torch.backends.cudnn.flags(enabled=False):
        with torch.enable_grad(), torch.random.fork_rng():
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
        "get value out of a tracing tensor": "it branches on, or takes out, the value of a tensor",
        "setup_context": "it has an autograd.Function (or re-entrant checkpointing), whose own derivative a graph would lose",
        "custom_function_call": "it has an autograd.Function, whose own derivative a graph would lose",
    }.items():
        if symptom in message:
            return meaning
    return message.splitlines()[0]


def _refuse(module: fx.GraphModule, switched_off: set[fx.Node], num_params: int) -> None:
    """Raises where the graph would be another function than the loss, or have other derivatives."""
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    follows_params, follows_inputs = _dependents(inputs[:num_params]), _dependents(inputs)
    for node in module.graph.nodes:
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
        if node in follows_inputs and (torch.Tag.dynamic_output_shape in node.target.tags or _masks(node)):
            raise Untraceable(f"the shape of a result depends on values ({node.target})")


def _masks(node: fx.Node) -> bool:
    indices = node.args[1] if node.target is aten.index.Tensor else ()
    return any(index is not None and index.meta["val"].dtype in (torch.bool, torch.uint8) for index in indices)


def _dependents(roots: list[fx.Node]) -> set[fx.Node]:
    """All that is computed from the roots, a detach ending the way."""
    found = set(roots)
    for node in roots[0].graph.nodes if roots else ():
        if node.target is not aten.detach.default and any(i in found for i in node.all_input_nodes):
            found.add(node)
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


# Passes


def _out_of_place(graph: fx.Graph) -> None:
    """Composite operations work in place on their own results, below what functionalize sees; where nothing else shares
    the memory, the plain operation does the same."""
    for node in graph.nodes:
        name, overload = _name(node).rpartition(".")[::2]
        base = node.args[0] if name.endswith("_") and node.args else None
        if (
            not isinstance(base, fx.Node)
            or base.op != "call_function"
            or _shares(base)
            or any(map(_shares, base.users))
        ):
            continue
        plain = getattr(getattr(aten, name[:-1], None), overload, None)
        if plain is not None:
            node.target = plain
            base.replace_all_uses_with(node, delete_user_cb=lambda user, node=node: user > node)


def _name(node: fx.Node) -> str:
    """Such as ``add_.Tensor``; empty where it is no aten operation."""
    return str(node.target).removeprefix("aten.") if isinstance(node.target, torch._ops.OpOverload) else ""


def _shares(node: fx.Node) -> bool:
    """Whether the node's result may be another name for its input's memory."""
    returns = node.target._schema.returns if isinstance(node.target, torch._ops.OpOverload) else ()
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _drop_dead(graph: fx.Graph) -> None:
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))


def _fold_batch_norm(graph: fx.Graph) -> None:
    """BatchNorm in eval mode is affine: it goes into the convolution's weight, or else is a multiply-add per channel.

    No work of the size of the activations is left of it, neither in the loss nor in its derivatives.
    """
    for norm in list(graph.nodes):
        if norm.target not in (aten.native_batch_norm.default, aten.cudnn_batch_norm.default) or norm.args[5]:
            continue
        x, gamma, beta, mean, var, _, _, eps = norm.args
        outputs = [user for user in norm.users if user.args[1] == 0]
        with graph.inserting_before(norm):
            scale = graph.call_function(aten.rsqrt.default, (graph.call_function(aten.add.Scalar, (var, eps)),))
            if gamma is not None:
                scale = graph.call_function(aten.mul.Tensor, (scale, gamma))
            shift = graph.call_function(aten.neg.default, (graph.call_function(aten.mul.Tensor, (mean, scale)),))
            if beta is not None:
                shift = graph.call_function(aten.add.Tensor, (shift, beta))
            if x.target is aten.convolution.default and len(x.users) == 1 and not x.args[6]:
                weight, bias = x.args[1:3]
                weight = graph.call_function(aten.mul.Tensor, (weight, _column(graph, scale, _ndim(weight) - 1)))
                if bias is not None:
                    shift = graph.call_function(aten.addcmul.default, (shift, bias, scale))
                new = graph.call_function(x.target, (x.args[0], weight, shift, *x.args[3:]))
                new.meta = dict(x.meta)
            else:
                wide = _ndim(x) - 2
                scaled = graph.call_function(aten.mul.Tensor, (x, _column(graph, scale, wide)))
                new = graph.call_function(aten.add.Tensor, (scaled, _column(graph, shift, wide)))
        for output in outputs:
            output.replace_all_uses_with(new)


def _channels_last(graph: fx.Graph) -> None:
    """Convolutions of images run faster with the channels innermost, and what follows keeps the layout."""
    for conv in graph.find_nodes(op="call_function", target=aten.convolution.default):
        if _ndim(conv) == 4 and conv.meta["val"].dtype != torch.float64:
            with graph.inserting_before(conv):
                x, weight = (graph.call_function(aten.contiguous.default, (i,), _NHWC) for i in conv.args[:2])
            conv.args = (x, weight, *conv.args[2:])


_NHWC = {"memory_format": torch.channels_last}


def _column(graph: fx.Graph, vector: fx.Node, trailing: int) -> fx.Node:
    return graph.call_function(aten.view.default, (vector, [-1] + [1] * trailing))


def _ndim(node: fx.Node) -> int:
    return node.meta["val"].dim()
