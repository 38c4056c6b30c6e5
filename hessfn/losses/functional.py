"""From an ``nn.Module`` to pure functions of its parameters."""

from __future__ import annotations

import copy
import fnmatch
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hessfn.core.errors import InvalidInput
from hessfn.core.torch_private import BatchStatistics, Dropout
from hessfn.losses.fsdp import is_fully_sharded, sharded_loss
from hessfn.losses.model_inputs import arguments, pair, signature_of
from hessfn.losses.samples import length
from hessfn.losses.weights import MeanOver, mean_over, sum_refused

Params = dict[str, Tensor]
Choice = str | Iterable[str] | Callable[[str, Tensor], bool]


def functionalize(
    model: nn.Module, criterion: Callable[[Any, Any], Tensor], *, params: Choice = "*"
) -> tuple[Callable[[Params, Any], Tensor], Params]:
    """A model and its criterion as ``loss(params, batch)``, a pure function, with the parameters to call it with.

    Args:
        model: any module, also within ``DataParallel`` or ``DistributedDataParallel``. It is never touched, also not
            while the loss runs: the loss owns a skeleton of it without storage. Its mode counts as it is now: call
            ``model.eval()`` before. In training mode BatchNorm uses the statistics of the batch and leaves its running
            ones alone. A model under ``fully_shard`` is the exception: it is written over while the loss runs, and
            restored to the bit; each rank gives its own batch, the loss is the mean over all, and products are
            differences of gradients.
        criterion: ``criterion(outputs, targets)`` to a scalar, a mean over the batch if batches are to be averaged. Of
            torch's own it is known what they are means over, such as the class weights of targets that are not
            ignored: ``loss.mean_over.weight_of(batch)`` is what a batch weighs.
        params: which parameters the loss is a function of: a glob pattern or several (``"features.*"``), or a
            predicate ``(name, tensor) -> bool`` such as ``lambda name, p: p.requires_grad``. The rest are constants.

    Returns:
        ``(loss, params)``. ``loss(params, (inputs, targets))``, with ``inputs`` a tensor, a tuple (``*args``) or a
        mapping (``**kwargs``). A batch that is one mapping, as Hugging Face's collators make, goes to both sides:
        ``criterion(model(**batch), batch)``. ``params``: dict from name to detached tensor. The tensors share memory
        with the model's, so they follow an optimiser that steps in place; clone them to keep a moment.

    Raises:
        ValueError: nothing matches, a chosen parameter is not floating-point, they lie on more than one device, or
            dropout is in training mode, which is not a function of the parameters.

    >>> model = nn.Linear(3, 2)
    >>> loss, params = functionalize(model, nn.MSELoss(), params="weight")
    >>> {name: tuple(p.shape) for name, p in params.items()}
    {'weight': (2, 3)}
    >>> loss(params, (torch.ones(4, 3), torch.zeros(4, 2))).shape
    torch.Size([])
    """
    if is_fully_sharded(model):
        return _of_parts(model, criterion, params)
    forward, chosen = stateless(model, params=params)

    def loss(params: Params, batch: Any) -> Tensor:
        inputs, targets = pair(batch)
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

    def of_batch(model: nn.Module, batch: Any) -> Tensor:
        inputs, targets = pair(batch)
        args, kwargs = arguments(inputs, signature)
        return criterion(model(*args, **kwargs), targets)

    known = about(model, criterion)
    if known.summed:
        raise sum_refused(known.summed)
    return sharded_loss(model, list(chosen), of_batch, known.weight_of or length), chosen


def stateless(model: nn.Module, *, params: Choice = "*") -> tuple[Callable[[Params, Any], Any], Params]:
    """A model as ``forward(params, inputs)``, a pure function, with its parameters; see :func:`functionalize`.

    >>> forward, params = stateless(nn.Linear(3, 2))
    >>> forward(params, torch.ones(4, 3)).shape
    torch.Size([4, 2])
    """
    model = bare(model)
    everything, run = private(model)
    chosen = _choose(everything, dict(model.named_parameters()), params)
    return run, chosen


def private(model: nn.Module) -> tuple[Params, Callable[..., Any]]:
    """The model's parameters and ``run(params, inputs)`` on a skeleton of it that nobody else has.

    ``run(params, inputs, within)`` holds the context ``within(skeleton)`` meanwhile, alone in it also among threads.
    """
    model = bare(model)
    _refuse_randomness(model)
    everything = {name: p.detach() for name, p in model.named_parameters()}
    buffers = {name: b.detach() for name, b in model.named_buffers()}
    name_of = _slots(model)
    skeleton, signature = _skeleton(model), signature_of(model)
    one_at_a_time = threading.RLock()  # functional_call swaps tensors on the skeleton while it runs

    def run(
        params: Params, inputs: Any, within: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext
    ) -> Any:
        args, kwargs = arguments(inputs, signature)
        # A module may write to its buffers: it writes to copies.
        values = {**{name: b.clone() for name, b in buffers.items()}, **everything, **params}
        state = {slot: values[name] for slot, name in name_of.items()}
        with nullcontext() if torch.compiler.is_compiling() else one_at_a_time, within(skeleton):
            return torch.func.functional_call(skeleton, state, args, kwargs, tie_weights=False)

    def closes_over(params: Params) -> list[Any]:
        """What a trace takes for constants: the skeleton is ours alone, and the parameters are given."""
        return [*buffers.values(), *(p for name, p in everything.items() if name not in params)]

    run.closes_over = closes_over  # type: ignore[attr-defined]
    return everything, run


def bare(model: nn.Module) -> nn.Module:
    """What data-parallel wrappers wrap: the same function, under the names that the model itself gives."""
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    return model


def _choose(everything: Params, originals: Params, choice: Choice) -> Params:
    if callable(choice):
        chosen = {name: p for name, p in everything.items() if choice(name, originals[name])}
    else:
        patterns = [choice] if isinstance(choice, str) else list(choice)
        chosen = {name: p for name, p in everything.items() if any(fnmatch.fnmatchcase(name, pat) for pat in patterns)}
    if not chosen:
        known = ", ".join(list(everything)[:12]) + ", ..." * (len(everything) > 12)
        raise InvalidInput(f"no parameter matches params={choice!r}; the model has: {known or 'none'}")
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


def _slots(model: nn.Module) -> dict[str, str]:
    """Every place of a tensor once, with the tensor's first name.

    torch's own tying swaps a module of two names twice, puts it back wrongly, and the next call is of another net.
    """
    first = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
    return {
        f"{path}.{local}" if path else local: first[id(t)]
        for path, module in model.named_modules()
        for local, t in (
            *module.named_parameters(recurse=False, remove_duplicate=False),
            *module.named_buffers(recurse=False, remove_duplicate=False),
        )
    }


def _skeleton(model: nn.Module) -> nn.Module:
    """A copy of the module tree with storage for nothing: parameters and buffers are on the meta device."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        memo[id(tensor)] = tensor.detach().to("meta")
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor):  # a plain attribute: no deepcopy where it has a graph, no copy where not
                memo[id(value)] = value.detach()
    skeleton = copy.deepcopy(model, memo)
    for module in skeleton.modules():
        if isinstance(module, BatchStatistics) and module.training and module.track_running_stats:
            # The output depends on the batch alone; without the running buffers there is nothing to write to.
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
        if isinstance(module, nn.TransformerEncoder):
            # Where nothing asks for a gradient, torch packs away what is padded: another function, 0 there.
            module.use_nested_tensor = False
    return skeleton


def _refuse_randomness(model: nn.Module) -> None:
    for name, module in model.named_modules():
        rate = module.p if isinstance(module, Dropout) else getattr(module, "dropout", 0.0)
        if module.training and isinstance(rate, float) and rate > 0:
            kind = type(module).__name__
            raise InvalidInput(
                f"{kind} {name!r} drops out at random (p={rate}, training mode), so the loss is not a function of the "
                "parameters: call model.eval() first"
            )
