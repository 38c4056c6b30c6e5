"""The loss of a model in training, on a fixed batch, as it is at this moment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hessfn.core import tree
from hessfn.core.dtensor import layout
from hessfn.core.errors import InvalidInput, Untraceable
from hessfn.core.torch_private import BatchStatistics
from hessfn.core.torch_state import value_of
from hessfn.core.tree import MatVec
from hessfn.losses.functional import Choice, Params, stateless
from hessfn.losses.model_inputs import pair
from hessfn.losses.skeleton import bare
from hessfn.products.hessian import hvp, linearized_hvp

Criterion = Callable[[Any, Any], Tensor]


def is_trained(name: str, p: Tensor) -> bool:
    return p.requires_grad and p.is_floating_point()


class PresentLoss:
    """The loss of a batch, of a model that changes between the calls.

    A trace belongs to a loss, and costs as much as many products. So the loss of the first time is kept as long as it
    is that of the model: each time one value of it is held against that of a fresh copy of the model's structure, to
    the bit. Parameters and buffers are arguments, and change nothing about it.
    """

    def __init__(self, batch: Any, criterion: Criterion, params: Choice = is_trained) -> None:
        self._batch = tree.map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, batch)
        self._criterion, self._choice = criterion, params
        self._kept: Callable[..., Tensor] | None = None
        self._is_traceable = True

    @property
    def batch(self) -> Any:
        return self._batch

    def at(self, model: nn.Module) -> tuple[Tensor, Params, MatVec[Params], Params]:
        """The loss and its trained parameters, products with its Hessian there, and the live parameters by name.

        In evaluation mode, without dropout, but for BatchNorm: it uses the statistics of the batch if the training
        does, since the Hessian is another one without. The products are linearized, of the values as they are now,
        where one trace can stand for the loss.
        """
        refuse_parts(model)
        model = bare(model)
        live: Params = dict(model.named_parameters())
        with evaluating(model):
            forward, params = stateless(model, params=self._choice)
        buffers = {name: x.detach() for name, x in model.named_buffers()}
        batch = beside(params, self._batch)
        fresh = loss_of(forward, self._criterion, buffers)
        value = value_of(lambda: fresh(params, batch, buffers))
        if self._kept is None or not self._is_same(value, params, batch, buffers):
            self._kept = fresh
        return value, params, self._product(self._kept, params, batch, buffers), {name: live[name] for name in params}

    def _is_same(self, value: Tensor, *arguments: Any) -> bool:
        assert self._kept is not None
        kept = self._kept
        try:
            return torch.equal(value_of(lambda: kept(*arguments)), value)
        except Exception:  # the model is another one
            return False

    def _product(self, loss: Callable[..., Tensor], params: Params, batch: Any, buffers: Params) -> MatVec[Params]:
        if self._is_traceable:
            try:
                return linearized_hvp(loss, params, batch, buffers)
            except Untraceable:
                self._is_traceable = False
        return hvp(loss, params, batch, buffers)


def loss_of(forward: Callable[..., Any], criterion: Criterion, buffers: Params) -> Callable[..., Tensor]:
    def loss(params: Params, batch: Any, buffers: Params) -> Tensor:
        inputs, targets = pair(batch)
        return criterion(forward({**params, **buffers}, inputs), targets)

    def closes_over(params: Params) -> list[Any]:
        return [criterion, *forward.closes_over({**params, **buffers})]  # type: ignore[attr-defined]

    loss.closes_over = closes_over  # type: ignore[attr-defined]
    return loss


def beside(params: Params, batch: Any) -> Any:
    """The batch where the parameters are and, as trainers do, in their floating-point type if they have one."""
    device = next(iter(params.values())).device
    dtypes = {p.dtype for p in params.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else None

    def moved(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to(device, dtype) if x.is_floating_point() else x.to(device)

    return tree.map(moved, batch)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode meanwhile, but for BatchNorm. No module's own ``train()``, which may do more, is run."""
    training = [module for module in model.modules() if module.training and not isinstance(module, BatchStatistics)]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def refuse_parts(model: nn.Module) -> None:
    """Raises for a model of which this process has but a part: every process would have to measure at once."""
    parted = any(layout(p) or hasattr(p, "ds_id") for p in model.parameters()) or any(
        type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()
    )
    if parted:
        raise InvalidInput(
            "the parameters are sharded over processes, of which one measures alone: load a checkpoint into a model "
            "that is whole, and use follow(...) there"
        )
