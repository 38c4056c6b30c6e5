"""What is asked of a loss before its products are trusted, and its plain gradients, which ask for nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import CheckpointFunction

from hessfn.core import tree
from hessfn.core.dtensor import layout
from hessfn.core.errors import InvalidInput, NoDerivative
from hessfn.core.func import gradients
from hessfn.core.torch_private import under_functorch
from hessfn.core.torch_state import is_differentiated, known
from hessfn.core.tree import Tree
from hessfn.engine.fused.operation import is_own

Loss = Callable[..., Tensor]


def check_loss(loss: Loss, params: Tree, args: tuple[Any, ...]) -> Tensor:
    """The loss at these parameters, once it is found to be a function of them: one finite real number, not random."""
    return inspect(loss, params, args).value


class Graph(NamedTuple):
    """A loss with its autograd graph, and the leaves that it was computed from."""

    value: Tensor
    leaves: list[Tensor]

    def gradient(self, create_graph: bool = False) -> list[Tensor]:
        return gradients(self.value, self.leaves, create_graph=create_graph)


class Inspected(NamedTuple):
    """What one evaluation of a loss has shown."""

    value: Tensor
    has_custom_backward: bool  # an autograd.Function, which means what its backward says, whatever its forward does
    graph: Graph | None = None  # none where a transform of ``torch.func`` is under way


def inspect(loss: Loss, params: Tree, args: tuple[Any, ...]) -> Inspected:
    """As :func:`check_loss`. The loss is computed once, with a graph, whose leaves show what else it depends on."""
    if tree.numel(params) == 0:
        raise InvalidInput("the parameters have no entries: there must be at least one to differentiate by")
    before = _random_states((params, args))
    value, leaves = _with_graph(loss, params, args)
    after = _random_states((params, args))
    if not all(torch.equal(state, after[device]) for device, state in before.items()):
        torch.set_rng_state(before.pop("cpu"))
        for device, state in before.items():
            getattr(torch, torch.device(device).type).set_rng_state(state, device)
        raise InvalidInput(
            "the loss draws random numbers, so it is not a function of its parameters: call model.eval(), or draw "
            "the numbers beforehand and pass them in the batch"
        )
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        found = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise InvalidInput(f"the loss must be one real number, not {found}: reduce it, for example by its mean")
    if known(value.isfinite().all()) is False:
        raise InvalidInput(f"the loss is {value.item()} at these parameters: curvature needs a finite one")
    if leaves:
        _require_dependence(value, leaves, tree.names(params))
    customs = [n for n in _nodes(value) if isinstance(n, torch.autograd.function.BackwardCFunction) and not is_own(n)]
    if any(_function_of(node) is CheckpointFunction for node in customs):
        raise InvalidInput(
            "the loss is checkpointed with use_reentrant=True, and torch.autograd.grad has no gradients of that, or "
            "zeros: call torch.utils.checkpoint.checkpoint with use_reentrant=False, which computes the same"
        )
    return Inspected(value.detach(), bool(customs), Graph(value, leaves) if leaves else None)


def _with_graph(loss: Loss, params: Tree, args: tuple[Any, ...]) -> tuple[Any, list[Tensor]]:
    """The loss, and the leaves that it was computed from; none where a transform of ``torch.func`` is under way."""
    if under_functorch():
        with torch.no_grad():
            return loss(params, *args), []
    return plain_graph(loss, params, args)


def _require_dependence(value: Tensor, leaves: list[Tensor], names: list[str]) -> None:
    """Raises where the loss is no function of its parameters, or reads them at a second place."""
    # What AccumulateGrad, the node of a leaf, has; of a constant loss there is no node at all.
    found = [node.variable for node in _nodes(value) if hasattr(node, "variable")]
    own = {id(leaf) for leaf in leaves}
    if not any(id(leaf) in own for leaf in found):
        raise InvalidInput(
            "the loss does not depend on its parameters, or only where derivatives are off: does it call the model "
            "itself, in place of torch.func.functional_call(model, params, inputs)? Or use .item(), .detach() or "
            "torch.no_grad()? hf.functionalize(model, criterion) makes a loss of its parameters"
        )
    name_of = {(leaf.data_ptr(), leaf.numel()): name for leaf, name in zip(leaves, names, strict=True) if leaf.numel()}
    for other in found:
        name = None if id(other) in own or layout(other) else name_of.get((other.data_ptr(), other.numel()))
        if name is not None:
            raise InvalidInput(
                f"the loss reads its parameter {name!r} a second time, from outside of its arguments (a criterion that "
                "uses model.parameters(), or what forward has stored on the model), and what it adds there would be "
                "taken for a constant: compute it from params, as in lambda params, batch: loss(params, batch) + "
                "decay * sum(p.square().sum() for p in params.values())"
            )


def _nodes(value: Tensor) -> Iterator[Any]:
    """All nodes of the autograd graph that a tensor was computed by."""
    seen: set[Any] = set()
    waiting = [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting.extend(inner for inner, _ in node.next_functions)


def refuse_once_differentiable(loss: Loss, params: Tree, args: tuple[Any, ...]) -> None:
    """Raises where a custom backward has no derivative: plain autograd takes what it computes for a constant.

    All other custom backwards mean what their formula says, as all of torch takes them: of a straight-through estimator
    the Hessian is the derivative of its backward, not of its forward.
    """
    value, leaves = _with_graph(loss, params, args)
    customs = [(node, function) for node in _nodes(value) if (function := _function_of(node))]
    for _, function in customs:
        code = getattr(getattr(function, "backward", None), "__code__", None)
        if code is not None and code.co_filename == once_differentiable.__code__.co_filename:
            raise NoDerivative(f"the backward of {_called(function)} has no derivative: it is once_differentiable")
    cut: list[Any] = []

    def watching(function: Any) -> Callable[[Any, Any], None]:
        def hook(results: tuple[Tensor | None, ...], upstream: tuple[Tensor | None, ...]) -> None:
            # What is linear in something with a derivative, and has none itself, is zero; or it was cut.
            if any(g is not None and g.requires_grad for g in upstream):
                parts = [g for g in results if g is not None and g.is_floating_point() and not g.requires_grad]
                cut.extend(function for g in parts if bool(g.detach().any()))

        return hook

    for node, function in customs:
        node.register_hook(watching(function))
    if customs and leaves:
        torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
    if cut:
        raise NoDerivative(
            f"the backward of {_called(cut[0])} has no derivative: it computes where derivatives are off"
        )


def _function_of(node: Any) -> Any:
    """The ``autograd.Function`` that a node of a graph is of, if it is of one."""
    return getattr(type(node), "_forward_cls", None)


def _called(function: Any) -> str:
    return getattr(function, "__name__", "it")


def _random_states(arguments: Any) -> dict[str, Tensor]:
    """What a loss may draw from: the generators of the CPU and of the devices in use, by device."""
    states = {"cpu": torch.get_rng_state()}
    for device in {x.device for x in tree.leaves(arguments) if isinstance(x, Tensor)}:
        module: Any = getattr(torch, device.type, None)
        if hasattr(module, "get_rng_state"):
            states[str(device)] = module.get_rng_state(device)
    return states


def plain_gradient(loss: Loss, params: Tree, args: tuple[Any, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """The leaves and the gradient by them, by plain autograd, which also does what ``torch.func`` refuses."""
    graph = plain_graph(loss, params, args)
    return graph.leaves, graph.gradient()


def plain_graph(loss: Loss, params: Tree, args: tuple[Any, ...]) -> Graph:
    leaves = [leaf.detach().requires_grad_() for leaf in tree.leaves(params)]
    with torch.enable_grad():
        return Graph(loss(tree.unflatten(leaves, params), *args), leaves)


def two_differences(loss: Loss, params: Tree, args: tuple[Any, ...], v: Tree) -> tuple[Tree, Tensor]:
    """Central differences with steps h and h/2, extrapolated; and how far apart they were, relative to the product."""
    if is_differentiated(v):
        raise NoDerivative("differences of gradients have no derivative by the vector: detach it")
    eps = tree.eps(params)
    size, length = tree.norm(params), tree.norm(v)
    # Relative to the parameters, between what truncation (h^4) and rounding (eps / h) would like.
    step = eps**0.25 * torch.where(size > 0, size, 1.0) / torch.where(length > 0, length, 1.0)

    def central(h: Tensor) -> Tree:
        plus, minus = (plain_gradient(loss, tree.add(params, v, c), args)[1] for c in (h, -h))
        return tree.unflatten([(p - m) / (2 * h).to(p.dtype) for p, m in zip(plus, minus, strict=True)], params)

    coarse, fine = central(step), central(step / 2)
    apart = tree.add(fine, coarse, -1.0)
    size = tree.norm(fine)
    return tree.add(fine, apart, 1 / 3), torch.where(size > 0, tree.norm(apart) / size, 0.0)
