"""A model's structure without its storage, from which a model with given tensors is made for every call."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from hessfn.core.errors import InvalidInput, NoDerivative
from hessfn.core.torch_private import BatchStatistics, current_dispatch_mode, uncompiled_part, under_functorch
from hessfn.losses.casting import leads_to, mould


class Skeleton(NamedTuple):
    """The structure of a model, which nobody else has."""

    module: nn.Module  # on the meta device, to look at
    second: str  # a place where it keeps a tensor that it has registered, or empty
    slots: dict[str, str]  # every place of a tensor that is registered, and the tensor's first name
    constants: list[Tensor]  # tensors that the model keeps without registering them
    with_tensors: Callable[[Mapping[str, Tensor]], nn.Module]  # from name to tensor, to a module of its own


def bare(model: nn.Module) -> nn.Module:
    """What wrappers wrap: the same function, with its own tensors, under the names that the model itself gives.

    Wrappers are those for data-parallel training and for averaged weights, and what ``torch.compile`` returns; of the
    latter also those within a model, of which it is then another copy with the same tensors.
    """
    model = unwrapped(model)
    if any(uncompiled_part(module) is not None for module in model.modules()):
        return mould(model).cast({})
    return model


def unwrapped(model: nn.Module) -> nn.Module:
    """A model without the wrappers around it."""
    while isinstance(model, _WRAPPERS) or uncompiled_part(model) is not None:
        model = model.module if isinstance(model, _WRAPPERS) else uncompiled_part(model)
    return model


_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def skeleton(model: nn.Module) -> Skeleton:
    """The skeleton of a model as it is now.

    Raises:
        InvalidInput: a parameter is not initialised yet; or the model keeps something that cannot be copied.
    """
    names = {id(t): name for name, t in registered(model)}
    for name, tensor in registered(model):
        if torch.nn.parameter.is_lazy(tensor):
            raise InvalidInput(f"{name!r} has no shape yet: call the model once, on any batch, before")
    places = {name: t.detach().to("meta") for name, t in registered(model)}
    whole = mould(model, whole=True)
    constants = {key: x.detach() for key, x in whole.objects.items() if isinstance(x, Tensor) and key not in names}
    values: dict[int, Any] = {**constants, **{key: places[name] for key, name in names.items()}}
    values.update({key: _differentiable(x) for key, x in whole.objects.items() if _is_checkpoint(x)})
    own = whole.cast(values, lambda x, memo: _copy_of(x, memo, model))
    _prepare(own)
    pattern = mould(own, list(places.values()))
    scripted = next((f"{type(m).__name__} {n!r}" for n, m in own.named_modules() if _is_scripted(m)), "")

    def with_tensors(values: Mapping[str, Tensor]) -> nn.Module:
        if scripted and (under_functorch() or current_dispatch_mode() is not None):
            raise NoDerivative(
                f"{scripted} is run by TorchScript, which neither traces nor transforms of torch.func see into: "
                "mode='double_backward' is right; the Python model that it was made from has all modes"
            )
        return pattern.cast({id(t): values[name] for name, t in places.items()})

    return Skeleton(
        own,
        _second_place(own, set(map(id, places.values()))),
        _slots(model, names),
        list(constants.values()),
        with_tensors,
    )


def registered(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def empty(module: nn.Module) -> None:
    """Takes everything out of a module, which may refer to itself and then would keep its tensors for a long time."""
    for part in list(module.modules()):
        if not _is_scripted(part):
            vars(part).clear()


def _slots(model: nn.Module, names: Mapping[int, str]) -> dict[str, str]:
    """Every place of a tensor once, with the tensor's first name.

    torch's own tying swaps a module of two names twice, puts it back wrongly, and the next call is of another net.
    """
    return {
        f"{path}.{local}" if path else local: names[id(t)]
        for path, module in model.named_modules()
        for local, t in (
            *module.named_parameters(recurse=False, remove_duplicate=False),
            *module.named_buffers(recurse=False, remove_duplicate=False),
        )
    }


def _second_place(own: nn.Module, tensors: Container[int]) -> str:
    for path, module in own.named_modules():
        known = _REGISTERED + _OF_RECURRENT * isinstance(module, nn.RNNBase)
        for name, value in () if _is_scripted(module) else vars(module).items():
            if name not in known and leads_to(value, tensors):
                return f"{path}.{name}" if path else name
    return ""


_REGISTERED = ("_parameters", "_buffers", "_modules")
_OF_RECURRENT = ("_flat_weights", "_flat_weight_refs")  # which torch itself keeps up to date


def _prepare(own: nn.Module) -> None:
    """Switches off what makes a module another function, or one without derivatives, than the one it is written as."""
    for module in own.modules():
        if _is_scripted(module):
            continue
        if isinstance(module, BatchStatistics) and module.training and module.track_running_stats:
            # The output depends on the batch alone; without the running buffers there is nothing to write to.
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            module.sparse = False  # as dense gradients, which vectors are
        # Where nothing asks for a gradient, or torch.func does, torch takes kernels that have no derivatives; and what
        # is padded is packed away, which is another function, 0 there.
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # read by the choice of kernels alone
        if isinstance(module, nn.MultiheadAttention) and not module.training:
            module.training, module.dropout = True, 0.0  # the same function, as training mode takes the plain kernels


def _is_checkpoint(x: Any) -> bool:
    return isinstance(x, functools.partial) and x.func is checkpoint


def _differentiable(x: functools.partial[Any]) -> functools.partial[Any]:
    """Checkpointing, as a model keeps it, of the kind that has gradients by parameters, and second derivatives."""
    return functools.partial(x.func, *x.args, **{**x.keywords, "use_reentrant": False})


def _is_scripted(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule)


def _copy_of(x: Any, memo: dict[int, Any], model: nn.Module) -> Any:
    try:
        return copy.deepcopy(x, memo)
    except Exception as error:
        kind = type(x)
        if kind.__module__.partition(".")[0] in _SHARED:
            return x
        raise InvalidInput(
            f"{_place(x, model)} of the model, a {kind.__name__}, cannot be copied ({error}), and the loss runs a "
            "copy: make it within forward, or write the loss yourself, with torch.func.functional_call"
        ) from error


_SHARED = ("_thread", "torch", "_io", "_queue", "_weakref", "weakref")  # locks, groups of processes, streams, files


def _place(x: Any, model: nn.Module) -> str:
    """Where a model keeps an object."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name != "_modules" and id(x) in mould(value, whole=True).objects:
                return repr(f"{path}.{name}" if path else name)
    return "an attribute"
