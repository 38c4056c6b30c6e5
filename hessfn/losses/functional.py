"""From an ``nn.Module`` to pure functions of its parameters."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hessfn.core import tree
from hessfn.core.errors import InvalidInput
from hessfn.core.torch_private import Dropout, uncompiled
from hessfn.core.torch_state import carries_derivative, recorded_as
from hessfn.losses.fsdp import is_fully_sharded, sharded_loss
from hessfn.losses.model_inputs import arguments, pair, signature_of
from hessfn.losses.recurrent import WithoutCudnn
from hessfn.losses.samples import length
from hessfn.losses.skeleton import bare, empty, registered, skeleton, unwrapped
from hessfn.losses.weights import MeanOver, mean_over, sum_refused

Params = dict[str, Tensor]
Choice = str | Iterable[str] | Callable[[str, Tensor], bool]


def functionalize(
    model: nn.Module, criterion: Callable[[Any, Any], Tensor], *, params: Choice = "*"
) -> tuple[Callable[[Params, Any], Tensor], Params]:
    """A model and its criterion as a pure function ``loss(params, batch)``, with the parameters to call it with.

    Args:
        model: any module, also within ``DataParallel``, ``DistributedDataParallel``, ``AveragedModel`` or
            ``torch.compile``: names are those of the model itself, and nothing runs compiled. It is never changed, not
            even while the loss runs: every call copies its structure, and puts the tensors of the call where the model
            keeps its own. The mode is that of the model now: call ``model.eval()`` before. In training mode BatchNorm
            uses the statistics of the batch and does not update its running ones. TorchScript models have products by
            plain autograd only. There is one exception, a model under ``fully_shard``: it is overwritten
            while the loss runs, and restored to the bit. Each rank gives its own batch, and the loss is the mean over
            all. A product needs memory for all parameters on every rank, except in ``mode="difference"``.
        criterion: ``criterion(outputs, targets)`` to a scalar, a mean over the batch if batches are to be averaged. For
            torch's own criteria hessfn knows what they divide by, such as the class weights of targets that are not
            ignored: ``loss.mean_over.weight_of(batch)`` is the weight of a batch.
        params: which parameters the loss is a function of: a glob pattern or several (``"features.*"``), or a
            predicate ``(name, tensor) -> bool`` such as ``lambda name, p: p.requires_grad``. The others are constants.

    Returns:
        ``(loss, params)``. ``loss(params, (inputs, targets))``, with ``inputs`` a tensor, a tuple (``*args``), a
        mapping (``**kwargs``; or the one argument, of a ``forward`` without such names) or an object. A batch that is
        one mapping or object, as Hugging Face's collators make, goes to both sides: ``criterion(model(**batch),
        batch)``. ``params``: dict from name to detached tensor. The tensors share memory
        with the model's, so they follow an optimiser that steps in place; clone them to keep their present values. A
        complex parameter is its real view ``(..., 2)``. Buffers may be given in the same dict, in place of the model's,
        which are constants; several models under ``vmap`` need this.

    Cost: nothing is copied here. Each call of the loss copies the structure of the model, not its tensors: 0.8 ms for
    ResNet20.

    Raises:
        ValueError: nothing matches, a chosen parameter is not floating-point, they lie on more than one device, one is
            not initialised yet, dropout is in training mode, which is not a function of the parameters, or the model
            keeps something that cannot be copied, such as a generator. The loss: a name in its dict is unknown.

    >>> model = nn.Linear(3, 2)
    >>> loss, params = functionalize(model, nn.MSELoss(), params="weight")
    >>> {name: tuple(p.shape) for name, p in params.items()}
    {'weight': (2, 3)}
    >>> loss(params, (torch.ones(4, 3), torch.zeros(4, 2))).shape
    torch.Size([])
    """
    if is_fully_sharded(model):
        return _of_parts(unwrapped(model), criterion, params)
    forward, chosen = stateless(model, params=params)

    def loss(params: Params, batch: Any) -> Tensor:
        inputs, targets = pair(batch)
        with uncompiled():
            return criterion(forward(params, inputs), targets)

    loss.mean_over = about(model, criterion)  # type: ignore[attr-defined]
    return loss, chosen


def about(model: nn.Module, criterion: Callable[[Any, Any], Tensor]) -> MeanOver:
    """What the loss of a model and a criterion is a mean over, as far as that is known."""
    model = bare(model)
    tensors = {name: x.detach() for name, x in (*model.named_parameters(), *model.named_buffers())}
    return mean_over(model, criterion, lambda batch: pair(batch)[1], tensors)


def _of_parts(
    model: nn.Module, criterion: Callable[[Any, Any], Tensor], params: Choice
) -> tuple[Callable[[Params, Any], Tensor], Params]:
    _refuse_randomness(model)
    originals: Params = dict(model.named_parameters())
    chosen = _choose({name: p.detach() for name, p in originals.items()}, originals, params)

    signature = signature_of(model)

    def of_batch(model: Callable[..., Any], batch: Any) -> Tensor:
        inputs, targets = pair(batch)
        args, kwargs = arguments(inputs, signature)
        return criterion(model(*args, **kwargs), targets)

    known = about(model, criterion)
    if known.summed:
        raise sum_refused(known.summed)
    return sharded_loss(model, list(chosen), of_batch, known.weight_of or length), chosen


def stateless(model: nn.Module, *, params: Choice = "*") -> tuple[Callable[[Params, Any], Any], Params]:
    """A model as ``forward(params, inputs)``, a pure function of its parameters, without a criterion.

    Args:
        model, params: as for :func:`functionalize`.

    Returns:
        ``(forward, params)``: ``forward(params, inputs)`` returns what the model returns; ``params`` is a dict from
        name to detached tensor, which shares memory with the model.

    Cost: nothing is copied here; each call copies the structure of the model, not its tensors.

    Raises:
        ValueError: as for :func:`functionalize`.

    >>> forward, params = stateless(nn.Linear(3, 2))
    >>> forward(params, torch.ones(4, 3)).shape
    torch.Size([4, 2])
    """
    model = bare(model)
    everything, run = private(model)
    chosen = _choose(everything, dict(model.named_parameters()), params)
    return run, chosen


def private(model: nn.Module) -> tuple[Params, Callable[..., Any]]:
    """The model's parameters and ``run(params, inputs)``, each time on a model that nobody else has.

    ``run(params, inputs, within)`` holds the context ``within(module)`` meanwhile. What runs the model again, as
    checkpoints do in a backward pass, meets the same tensors, since they are put in for good.
    """
    model = bare(model)
    _refuse_randomness(model)
    own, signature = skeleton(model), signature_of(model)
    tensors = {name: recorded_as(t.detach()) for name, t in registered(model)}
    parameters = [name for name, _ in model.named_parameters()]
    buffers = [name for name in tensors if name not in set(parameters)]
    everything = {name: as_real(tensors[name]) for name in parameters}
    is_recurrent = any(isinstance(part, nn.RNNBase) for part in own.module.modules())

    def run(
        params: Params, inputs: Any, within: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext
    ) -> Any:
        unknown = params.keys() - tensors.keys()
        if unknown:
            raise InvalidInput(f"{sorted(unknown)[0]!r} is no parameter or buffer of the model; {_known(tensors)}")
        args, kwargs = arguments(inputs, signature)
        values = {**tensors, **{name: like(params[name], tensors[name]) for name in params}}
        for name in buffers:  # a module may write to them: it writes to copies
            values[name] = values[name].clone()
        if torch.compiler.is_compiling():
            if own.second:
                raise InvalidInput(
                    f"the model keeps a parameter a second time, in {own.second!r}, which torch.compile cannot follow: "
                    "call the loss outside of what is compiled"
                )
            state = {slot: values[name] for slot, name in own.slots.items()}
            with within(own.module):
                return torch.func.functional_call(own.module, state, args, kwargs, tie_weights=False)
        module = own.with_tensors(values)
        with uncompiled(), within(module), WithoutCudnn() if is_recurrent else nullcontext():
            outputs = module(*args, **kwargs)
        if all(isinstance(x, Tensor) for x in tree.leaves(outputs)) and not carries_derivative(outputs):
            empty(module)  # nothing will run it again
        return outputs

    def closes_over(params: Params) -> list[Any]:
        """What a trace takes for constants: the skeleton is ours alone, and the parameters are given."""
        return [*own.constants, *(t for name, t in tensors.items() if name not in params)]

    run.closes_over = closes_over  # type: ignore[attr-defined]
    return everything, run


def as_real(x: Tensor) -> Tensor:
    """A complex tensor as its real and imaginary parts, ``(..., 2)``, in the same memory; others as they are."""
    return torch.view_as_real(x) if x.is_complex() else x


def like(x: Tensor, tensor: Tensor) -> Tensor:
    """What ``as_real`` gave for a tensor, or would have, as that tensor was."""
    return torch.complex(*x.unbind(-1)) if tensor.is_complex() and not x.is_complex() else x


def _choose(everything: Params, originals: Params, choice: Choice) -> Params:
    if callable(choice):
        chosen = {name: p for name, p in everything.items() if choice(name, originals[name])}
    else:
        patterns = [choice] if isinstance(choice, str) else list(choice)
        chosen = {name: p for name, p in everything.items() if any(fnmatch.fnmatchcase(name, pat) for pat in patterns)}
    if not chosen:
        raise InvalidInput(f"no parameter matches params={choice!r}; {_known(everything)}")
    for name, p in chosen.items():
        if not p.is_floating_point():
            raise InvalidInput(
                f"parameter {name!r} is {p.dtype}, which has no derivatives; leave it out with params=..."
            )
    devices = {p.device: name for name, p in chosen.items()}
    if len(devices) > 1:
        where = ", ".join(f"{name!r} on {device}" for device, name in devices.items())
        raise InvalidInput(
            f"the parameters lie on {len(devices)} devices ({where}); choose those of one with params=..."
        )
    return chosen


def _known(names: Iterable[str]) -> str:
    known = list(names)
    return f"the model has: {', '.join(known[:12]) or 'none'}" + ", ..." * (len(known) > 12)


def _refuse_randomness(model: nn.Module) -> None:
    for name, module in model.named_modules():
        # What the module itself keeps: asked for a name of its config, a model of diffusers warns.
        rate = module.p if isinstance(module, Dropout) else vars(module).get("dropout", 0.0)
        if module.training and isinstance(rate, float) and rate > 0:
            kind = type(module).__name__
            raise InvalidInput(
                f"{kind} {name!r} drops out at random (p={rate}, training mode), so the loss is not a function of the "
                "parameters: call model.eval() first"
            )
