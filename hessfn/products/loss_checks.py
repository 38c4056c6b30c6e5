"""What is asked of a loss before its products are trusted, and its plain gradients, which ask for nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.core.errors import InvalidInput, NoDerivative
from hessfn.core.torch_state import known
from hessfn.core.tree import Tree

Loss = Callable[..., Tensor]


def check_loss(loss: Loss, params: Tree, args: tuple[Any, ...]) -> Tensor:
    """The loss at these parameters, once it is found to be one finite real number, and no random one."""
    if tree.numel(params) == 0:
        raise InvalidInput("the parameters have no entries: there must be at least one to differentiate by")
    before = _random_states((params, args))
    with torch.no_grad():
        value = loss(params, *args)
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
    return value


def _random_states(arguments: Any) -> dict[str, Tensor]:
    """What a loss may draw from: the generators of the CPU and of the devices in use, by device."""
    states = {"cpu": torch.get_rng_state()}
    for device in {x.device for x in tree.leaves(arguments) if isinstance(x, Tensor)}:
        module: Any = getattr(torch, device.type, None)
        if hasattr(module, "get_rng_state"):
            states[str(device)] = module.get_rng_state(device)
    return states


def plain_gradient(
    loss: Loss, params: Tree, args: tuple[Any, ...], create_graph: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """The leaves and the gradient by them, by plain autograd, which also does what ``torch.func`` refuses."""
    leaves = [leaf.detach().requires_grad_() for leaf in tree.leaves(params)]
    with torch.enable_grad():
        value = loss(tree.unflatten(leaves, params), *args)
        options: dict[str, Any] = {"create_graph": create_graph, "allow_unused": True, "materialize_grads": True}
        return leaves, list(torch.autograd.grad(value, leaves, **options))


def two_differences(loss: Loss, params: Tree, args: tuple[Any, ...], v: Tree) -> tuple[Tree, Tensor]:
    """Central differences with steps h and h/2, extrapolated; and how far apart they were, relative to the product."""
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


def require_derivative(loss: Loss, params: Tree, args: tuple[Any, ...], v: Tree, product: Tree) -> None:
    """Plain autograd takes for constants what a ``once_differentiable`` backward computes, and says nothing."""
    if not _has_custom_backward(loss, params, args):
        return
    difference, apart = two_differences(loss, params, args, v)
    gap, size = tree.norm(tree.add(product, difference, -1.0)), tree.norm(difference)
    if known(gap > (0.01 + 10 * apart) * size):
        raise NoDerivative(
            f"second derivatives are not those of differences ({float(gap / size):.1g} of them apart): an "
            "autograd.Function whose backward has no derivative, such as a once_differentiable one?"
        )


def _has_custom_backward(loss: Loss, params: Tree, args: tuple[Any, ...]) -> bool:
    with torch.enable_grad():
        params = tree.map(lambda p: p.detach().requires_grad_(), params)
        waiting = [loss(params, *args).grad_fn]
    seen = set()
    while waiting:
        node = waiting.pop()
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return True
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(inner for inner, _ in node.next_functions)
    return False
