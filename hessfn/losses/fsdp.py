"""The loss of a model that ``fully_shard`` has spread over processes, as a function of its sharded parameters."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hessfn.core import tree
from hessfn.core.dtensor import layout
from hessfn.core.errors import InvalidInput, NoDerivative
from hessfn.core.torch_private import is_functorch_wrapped_tensor
from hessfn.core.torch_state import torch_state_lock

Evaluate = Callable[[list[Tensor], bool], tuple[Tensor, list[Tensor]]]


def is_fully_sharded(model: nn.Module) -> bool:
    if not any(layout(p) for p in model.parameters()):
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def sharded_loss(
    model: nn.Module,
    chosen: list[str],
    of_batch: Callable[[Callable[..., Any], Any], Tensor],
    weight_of: Callable[[Any], float | Tensor],
) -> Callable[[dict[str, Tensor], Any], Tensor]:
    """``loss(params, batch)``: the mean over ranks, each with a batch of its own, weighed by ``weight_of`` it.

    The model gathers a layer at a time by hooks of its own, which know no parameters but its own. So these are written
    over while the loss runs, and written back, to the bit. The hooks have a gradient and no second derivative. Where
    one is wanted, the gradient is that of the model without its hooks, and every rank holds all parameters meanwhile.
    """
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, Partial

    everything = dict(model.named_parameters())
    unsharded = [name for name, p in everything.items() if layout(p) is None]
    if unsharded:
        raise InvalidInput(
            f"parameters {unsharded[:4]} are not sharded: call fully_shard(model) on the whole model too"
        )
    mesh = next(iter(everything.values())).device_mesh  # type: ignore[attr-defined]
    to_all = [Partial()] * mesh.ndim

    def gathered_anew() -> None:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def shares(value: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        """The loss of all ranks, and what that of this one counts in it."""
        weight = weight_of(batch)
        both = torch.stack([weight * value.detach().double(), torch.as_tensor(weight, device=value.device).double()])
        total = DTensor.from_local(both, mesh, to_all, run_check=False).full_tensor()
        return (total[0] / total[1]).to(value.dtype), (weight / total[1]).to(value.dtype)

    def evaluate(leaves: list[Tensor], batch: Any, with_gradient: bool) -> tuple[Tensor, list[Tensor]]:
        params = [everything[name] for name in chosen]
        tensors = [*everything.values(), *model.buffers()]
        before = [t.detach().clone() for t in tensors]
        gradients = [p.grad for p in everything.values()]
        try:
            for p in everything.values():
                p.grad = None
            _write(params, leaves)
            gathered_anew()
            with torch.set_grad_enabled(with_gradient):
                value = of_batch(model, batch)
                mean, share = shares(value, batch)
                if with_gradient:  # the hooks take the plain mean over ranks
                    (value * (share * mesh.size())).backward()
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params] if with_gradient else []
            return mean, [g.detach() for g in grads]
        finally:
            _write(tensors, before)
            gathered_anew()
            for p, gradient in zip(everything.values(), gradients, strict=True):
                p.grad = gradient

    def gradient_with_graph(batch: Any, leaves: list[Tensor], expected: Tensor) -> list[Tensor]:
        whole = {name: p.detach().full_tensor() for name, p in everything.items() if name not in chosen}  # type: ignore[attr-defined]
        for name, leaf in zip(chosen, leaves, strict=True):
            whole[name] = leaf.full_tensor(grad_placements=to_all)  # type: ignore[attr-defined]
        whole.update((name, b.clone()) for name, b in model.named_buffers())

        def without_hooks(*args: Any, **kwargs: Any) -> Any:
            with _without_hooks(model):
                return torch.func.functional_call(model, whole, args, kwargs)

        value = of_batch(without_hooks, batch)
        mean, share = shares(value, batch)
        if not torch.isclose(mean, expected, rtol=1000 * tree.eps(leaves), atol=0.0):
            raise NoDerivative(
                f"the model is another function without the hooks of fully_shard ({float(mean):.6g}, not "
                f"{float(expected):.6g}), as with a mixed-precision policy"
            )
        options: dict[str, Any] = {"create_graph": True, "allow_unused": True, "materialize_grads": True}
        return list(torch.autograd.grad(value * share, leaves, **options))

    def loss(params: dict[str, Tensor], batch: Any) -> Tensor:
        leaves = [params[name] for name in chosen]
        if any(is_functorch_wrapped_tensor(x) for x in leaves) or not all(layout(x) for x in leaves):
            raise NoDerivative("a model under fully_shard has neither traces nor torch.func transforms")
        with_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in leaves)
        with torch_state_lock():
            if not with_gradient:
                return evaluate(leaves, batch, False)[0]
            first = partial(evaluate, [x.detach() for x in leaves], batch, True)
            return _Loss.apply(first, partial(gradient_with_graph, batch), *leaves)

    return loss


def _write(targets: list[Any], values: list[Tensor]) -> None:
    with torch.no_grad():
        for target, value in zip(targets, values, strict=True):
            target.copy_(value)


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """The model as it was before ``fully_shard``; its parameters are to be given."""
    kept = []
    for module in model.modules():
        for name in ("_forward_pre_hooks", "_forward_hooks"):
            hooks = vars(module)[name]
            others = OrderedDict((key, hook) for key, hook in hooks.items() if not _is_of_torch(hook))
            if len(others) < len(hooks):
                kept.append((module, name, hooks))
                vars(module)[name] = others
    try:
        yield
    finally:
        for module, name, hooks in kept:
            vars(module)[name] = hooks


def _is_of_torch(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.")


class _Loss(torch.autograd.Function):
    """The loss with the gradient that came with it; with the other one where that is to be differentiated."""

    @staticmethod
    def forward(ctx: Any, first: Any, gradient_with_graph: Any, *leaves: Tensor) -> Tensor:
        value, ctx.gradients = first()
        ctx.gradient_with_graph, ctx.value = gradient_with_graph, value.detach()
        ctx.leaves = list(
            leaves
        )  # not saved as torch saves: another loss may write over them meanwhile, and restore them
        return value  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        gradients = ctx.gradients
        if torch.is_grad_enabled():  # create_graph
            gradients = ctx.gradient_with_graph(ctx.leaves, ctx.value)
        return None, None, *(upstream * g for g in gradients)
