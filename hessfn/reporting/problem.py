"""The problem of a report: from (model, criterion, batches) to a loss, its parameters and its data, all checked."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hessfn.core import tree
from hessfn.core.arrays import as_tensors
from hessfn.core.errors import InvalidInput
from hessfn.core.fingerprints import fingerprint
from hessfn.core.torch_state import value_of
from hessfn.core.tree import Tree
from hessfn.losses.batches import Weights, deal, mean
from hessfn.losses.functional import functionalize, stateless
from hessfn.losses.model_inputs import pair
from hessfn.losses.samples import length, moved, tensors
from hessfn.losses.skeleton import bare
from hessfn.losses.weights import Weigher, of_loss
from hessfn.parallel.all_reduce import ShardedBatches, gather
from hessfn.products.hessian import mean_hvp
from hessfn.products.loss_checks import check_loss, plain_gradient
from hessfn.reporting.options import Options
from hessfn.reporting.spread import number_of_all, some, spread

Loss = Callable[[Tree, Any], Tensor]


class Prepared(NamedTuple):
    """A problem from which products can be made."""

    model: nn.Module  #: as it was given
    criterion: Callable[..., Any]  #: as it was given
    loss: Loss  #: of parameters and a batch, which it casts and moves to where the parameters are
    finer: Callable[[], tuple[Loss, Tree]] | None  #: makes the loss and params in float64; None where these are finest
    params: Tree  #: by name, those that the Hessian is taken by
    weights: Weights  #: what each batch counts
    batches: Iterable[Any]  #: those that are looked at; a process of several passes over its share of them


class FirstPass(NamedTuple):
    """What one pass over the data has found."""

    loss: Tensor  #: (), the mean over the samples
    gradient: Tree  #: like the parameters, of that mean
    accuracy: Tensor | None  #: (), the share of targets that are the largest output; None where targets are no classes
    sizes: list[int]  #: the number of samples of each batch, of all processes
    fingerprints: dict[str, Any]  #: of the batches and of their losses, by which a journal knows them


def prepare(problem: Any, options: Options) -> Prepared:
    """Checks what the problem consists of, and makes the loss; computes nothing yet.

    Raises:
        ValueError: the problem is something else, or its batches can be passed over only once.
    """
    model, criterion, batches, weights = _parts(problem)
    weights = weights if options.weights is None else options.weights
    loss, theta = _loss(model, criterion, options)
    finer = None if _is_finest(theta) else partial(_loss, model, criterion, replace(options, dtype="float64"))
    if weights is None:
        weights = Weigher(lambda batch: loss(theta, batch), of_loss(loss), loss, theta)
    mean_hvp(loss, theta, batches)  # refuses what cannot be passed over again, before a part of it is taken
    if options.num_batches is not None:
        batches = list(itertools.islice(batches, options.num_batches))
        if len(batches) < options.num_batches:
            raise InvalidInput(
                f"num_batches={options.num_batches} must be at most {len(batches)}, the number of batches there are"
            )
    if options.group is not None:
        batches = deal(batches, (dict(model.named_parameters()), dict(model.named_buffers())), options.group)
    return Prepared(model, criterion, loss, finer, theta, weights, batches)


def some_batches(problem: Prepared, num: int) -> Prepared:
    """The problem of so many of its batches, spread over all of them, with their weights."""
    total, weights = number_of_all(problem.batches), problem.weights
    if total is not None and isinstance(weights, Sequence):
        if len(weights) != total:
            raise InvalidInput(f"there are {len(weights)} weights for {total} batches: give one for each")
        weights = [weights[i] for i in spread(num, total)]
    return problem._replace(batches=some(problem.batches, num), weights=weights)


def _loss(model: nn.Module, criterion: Any, options: Options) -> tuple[Loss, Tree]:
    """The loss of parameters and a batch, in the dtype of the options, and the parameters."""
    of_batch, theta = functionalize(*converted(model, criterion, options), params=options.params)
    fitting = batch_in(options, theta)

    def loss(params: Tree, batch: Any) -> Tensor:
        return of_batch(params, fitting(batch))

    loss.mean_over = of_loss(of_batch)  # type: ignore[attr-defined]
    return loss, theta


def batch_in(options: Options, params: Tree) -> Callable[[Any], Any]:
    """Puts batches where the parameters are, in the dtype of the options."""
    home, dtype = tree.leaves(params)[0].device, options.torch_dtype

    def cast(x: Any) -> Any:
        return x.to(dtype) if dtype and isinstance(x, Tensor) and x.is_floating_point() else x

    return lambda batch: tree.map(cast, moved(as_tensors(batch), home))


def _is_finest(params: Tree) -> bool:
    """Whether nothing finer than the dtype of the parameters can be had where they are."""
    return all(leaf.dtype == torch.float64 or leaf.device.type == "mps" for leaf in tree.leaves(params))


def converted(model: nn.Module, criterion: Any, options: Options) -> tuple[nn.Module, Any]:
    """Copies in another dtype or on another device, where one is asked for."""
    model = bare(model)
    if options.torch_dtype or options.torch_device:
        model = _moved(model, options)
        criterion = _moved(criterion, options) if isinstance(criterion, nn.Module) else criterion
    return model, criterion


def _moved(module: nn.Module, options: Options) -> nn.Module:
    copied, dtype = copy.deepcopy(module).to(device=options.torch_device), options.torch_dtype
    for t in (*copied.parameters(), *copied.buffers()):
        if dtype and (t.is_floating_point() or t.is_complex()):  # module.to would keep the real part of a complex one
            t.data = t.data.to(dtype.to_complex() if t.is_complex() else dtype)
    return copied


def first_pass(problem: Prepared) -> FirstPass:
    """Computes the loss of every batch once. An error names the batch by its index.

    Raises:
        ValueError: there is no batch, or a loss cannot be computed, is not finite, or is no function of its arguments.
    """
    sizes: list[int] = []
    data, losses = [], []

    def computed(params: Tree, batch: Any) -> Tensor:
        try:
            return problem.loss(params, batch)
        except Exception as error:
            first_line = (str(error).strip().splitlines() or [""])[0]
            raise InvalidInput(f"no loss could be computed: {type(error).__name__}: {first_line}") from error

    def checked(batch: Any) -> Tensor:
        value = check_loss(computed, problem.params, (batch,))
        found = tensors(batch)
        sizes.append(length(batch) if any(x.dim() for x in found) else 1)
        data.append(fingerprint(found))
        losses.append(value)
        return value

    value, batches = mean(checked, problem.batches, weights=problem.weights)(), problem.batches
    if isinstance(batches, ShardedBatches):
        sizes = [size for there in gather(sizes, batches.group) for size in there]
    return FirstPass(value, _gradient(problem), _accuracy(problem), sizes, {"data": data, "losses": losses})


def _gradient(problem: Prepared) -> Tree:
    def of_batch(batch: Any) -> Tree:
        gradient = tree.unflatten(plain_gradient(problem.loss, problem.params, (batch,))[1], problem.params)
        return tree.require_finite(gradient, "the gradient")

    return mean(of_batch, problem.batches, weights=problem.weights)()


def _accuracy(problem: Prepared) -> Tensor | None:
    """The share of the samples whose target is the largest of the model's outputs, where targets are classes."""
    forward, params = stateless(problem.model)

    def share(batch: Any) -> Tensor:
        inputs, targets = pair(batch)
        home = tree.leaves(params)[0].device
        outputs = value_of(lambda: forward(params, moved(inputs, home)))
        if outputs.dim() != 2 or targets.shape != outputs.shape[:1] or targets.is_floating_point():
            raise InvalidInput("targets are no classes")
        return (outputs.argmax(1) == targets.to(home)).double().mean()

    try:
        return mean(share, problem.batches)()
    except Exception:  # whatever there is to say of the model, the loss has said
        return None


def state_of(problem: Prepared) -> dict[str, Any]:
    """What products depend on besides the data, as far as it can be seen from outside."""
    wholes = [part for part in (problem.model, problem.criterion) if isinstance(part, nn.Module)]
    modules = [module for whole in wholes for module in whole.modules()]
    return {
        "parameters or buffers": [dict(whole.named_parameters()) | dict(whole.named_buffers()) for whole in wholes],
        "train or eval mode": [module.training for module in modules],
        "code": sorted(map(_source, {id(code): code for code in (problem.criterion, *map(type, modules))}.values())),
        "weights": _source(problem.weights) if callable(problem.weights) else list(problem.weights or ()),
        "device": str(tree.leaves(problem.params)[0].device),
    }


def _source(code: Any) -> str:
    try:
        return inspect.getsource(code)
    except (OSError, TypeError):  # it was typed in, or is no Python function
        return type(code).__qualname__


def _parts(problem: Any) -> tuple[nn.Module, Callable[..., Any], Iterable[Any], Weights]:
    try:
        model, criterion, batches, *rest = problem
        (weights,) = rest or [None]
    except (TypeError, ValueError):
        raise InvalidInput(f"a problem is (model, criterion, batches), not {type(problem).__name__}") from None
    if not isinstance(model, nn.Module) or not callable(criterion) or not isinstance(batches, Iterable):
        found = ", ".join(type(part).__name__ for part in (model, criterion, batches))
        raise InvalidInput(f"a problem is (a torch.nn.Module, a function, an iterable of batches), not ({found})")
    return model, criterion, batches, weights
