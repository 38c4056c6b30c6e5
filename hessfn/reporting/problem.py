"""What a report is about: from a problem to a loss, its parameters and its batches, each of them checked."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hessfn.core import tree
from hessfn.core.errors import InvalidInput
from hessfn.core.fingerprints import fingerprint
from hessfn.core.tree import Tree
from hessfn.losses.batches import mean
from hessfn.losses.functional import Choice, bare, functionalize
from hessfn.parallel.all_reduce import ShardedBatches
from hessfn.products.hessian import mean_hvp
from hessfn.products.loss_checks import check_loss

Loss = Callable[[Tree, Any], Tensor]


def prepare(
    problem: Any, params: Choice, dtype: Any, device: Any, num_batches: int | None
) -> tuple[Loss, Tree, Iterable[Any]]:
    """The loss, which takes batches of any dtype and device to the parameters'; the parameters; the batches."""
    try:
        model, criterion, batches = problem
    except (TypeError, ValueError):
        raise InvalidInput(f"a problem is (model, criterion, batches), not {_brief(problem)}") from None
    if not isinstance(model, nn.Module) or not callable(criterion) or not isinstance(batches, Iterable):
        found = ", ".join(type(part).__name__ for part in problem)
        raise InvalidInput(f"a problem is (a torch.nn.Module, a function, an iterable of batches), not ({found})")
    if num_batches is not None and num_batches < 1:
        raise InvalidInput(f"num_batches={num_batches} must be at least 1")
    model, criterion = converted(model, criterion, dtype, device)
    wanted_dtype = _dtype(dtype)
    of_batch, theta = functionalize(model, criterion, params=params)
    home = tree.leaves(theta)[0].device

    def cast(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to(home, wanted_dtype if wanted_dtype and x.is_floating_point() else x.dtype)

    def loss(params: Tree, batch: Any) -> Tensor:
        return of_batch(params, tree.map(cast, batch))

    mean_hvp(loss, theta, batches)  # refuses what cannot be passed over again, before a part of it is taken
    return loss, theta, batches if num_batches is None else list(itertools.islice(batches, num_batches))


def converted(model: nn.Module, criterion: Any, dtype: Any, device: Any) -> tuple[nn.Module, Any]:
    """Copies in another dtype or on another device, where one is asked for."""
    model, wanted_dtype, wanted_device = bare(model), _dtype(dtype), _device(device)
    if wanted_dtype or wanted_device:
        model = copy.deepcopy(model).to(device=wanted_device, dtype=wanted_dtype)
        if isinstance(criterion, nn.Module):
            criterion = copy.deepcopy(criterion).to(device=wanted_device, dtype=wanted_dtype)
    return model, criterion


def first_pass(loss: Loss, theta: Tree, batches: Iterable[Any]) -> tuple[Tensor, int, dict[str, Any]]:
    """The mean loss, the number of samples, and fingerprints of all of them for the key of a journal.

    What is wrong with a batch is said along with its index.
    """
    sizes: list[int] = []
    seen: dict[str, list[Any]] = {"data": [], "losses": []}

    def computed(params: Tree, batch: Any) -> Tensor:
        try:
            return loss(params, batch)
        except Exception as error:
            raise InvalidInput(f"no loss could be computed: {_brief(error)}") from error

    def checked(batch: Any) -> Tensor:
        value = check_loss(computed, theta, (batch,))
        tensors = [x for x in tree.leaves(batch) if isinstance(x, Tensor)]
        sizes.append(len(tensors[0]))
        seen["data"].append(fingerprint(tensors))
        seen["losses"].append(value)
        return value

    value, num_samples = mean(checked, batches)(), sum(sizes)
    return value, batches.total(num_samples) if isinstance(batches, ShardedBatches) else num_samples, seen


def _dtype(name: torch.dtype | str | None) -> torch.dtype | None:
    dtype = getattr(torch, name, None) if isinstance(name, str) else name
    if name is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InvalidInput(f"dtype={name!r} must be a floating-point type such as 'float32', 'float64', 'bfloat16'")
    return dtype


def _device(name: torch.device | str | None) -> torch.device | None:
    try:
        return None if name is None else torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InvalidInput(f"device={str(name)!r} cannot be used here: {_brief(error)}") from error


def _brief(x: Any) -> str:
    """One line: the kind of a value, or the kind of an exception and the first line of what it says."""
    first_line = (str(x).strip().splitlines() or [""])[0]
    return f"{type(x).__name__}: {first_line}" if isinstance(x, BaseException) else type(x).__name__
