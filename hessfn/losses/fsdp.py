"""The loss of a model that ``fully_shard`` has spread over processes, as a function of its sharded parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

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
    of_batch: Callable[[nn.Module, Any], Tensor],
    weight_of: Callable[[Any], float | Tensor],
) -> Callable[[dict[str, Tensor], Any], Tensor]:
    """``loss(params, batch)``: the mean over ranks, each with a batch of its own, weighed by ``weight_of`` it.

    The model gathers a layer at a time by hooks of its own, which know no parameters but its own. So these are written
    over while the loss runs, and written back, to the bit; there is a gradient, and no second derivative.
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

    def gathered_anew() -> None:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

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
                value, weight = of_batch(model, batch), weight_of(batch)
                both = torch.stack(
                    [weight * value.detach().double(), torch.as_tensor(weight).to(value.device).double()]
                )
                total = DTensor.from_local(both, mesh, [Partial()] * mesh.ndim, run_check=False).full_tensor()
                if with_gradient:  # the hooks take the plain mean over ranks
                    (value * (weight * mesh.size() / total[1]).to(value.dtype)).backward()
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params] if with_gradient else []
            return (total[0] / total[1]).to(value.dtype), [g.detach() for g in grads]
        finally:
            _write(tensors, before)
            gathered_anew()
            for p, gradient in zip(everything.values(), gradients, strict=True):
                p.grad = gradient

    def loss(params: dict[str, Tensor], batch: Any) -> Tensor:
        leaves = [params[name] for name in chosen]
        if any(is_functorch_wrapped_tensor(x) for x in leaves) or not all(layout(x) for x in leaves):
            raise NoDerivative("a model under fully_shard has neither traces nor torch.func transforms")
        with_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in leaves)
        with torch_state_lock():
            if not with_gradient:
                return evaluate(leaves, batch, False)[0]
            return _Once.apply(lambda: evaluate([x.detach() for x in leaves], batch, True), *leaves)

    return loss


def _write(targets: list[Any], values: list[Tensor]) -> None:
    with torch.no_grad():
        for target, value in zip(targets, values, strict=True):
            target.copy_(value)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, evaluate: Callable[[], tuple[Tensor, list[Tensor]]], *leaves: Tensor) -> Tensor:
        value, ctx.gradients = evaluate()
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # create_graph: else these gradients would pass for constants
            raise NoDerivative("the gradient of a model under fully_shard has no derivative")
        return None, *(upstream * g for g in ctx.gradients)
