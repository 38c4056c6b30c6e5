"""Means over batches of data: each weighed by its size, one in memory at a time, the same ones at every pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import RandomSampler

from hessfn.core import tree
from hessfn.core.errors import InvalidInput
from hessfn.core.fingerprints import checksum, fingerprint
from hessfn.core.torch_state import known, on_cpu, torch_state_lock
from hessfn.core.tree import Tree
from hessfn.losses.samples import length, moved, refuse_uneven, rows, tensors
from hessfn.losses.weights import Weigher
from hessfn.parallel.all_reduce import Group, ShardedBatches, across, all_reduce, gather, require_same
from hessfn.parallel.same_problem import require_same_problem

Weights = Sequence[float] | Callable[[Any], float | Tensor] | None

_SAME_DATA = (
    "every product needs the same data in the same order, or there is no matrix. Use DataLoader(..., shuffle=False) "
    "without random augmentation, or batches = list(loader) once"
)


def mean(
    function: Callable[..., Tree],
    batches: Iterable[Any],
    *,
    weights: Weights = None,
    microbatch: int | None = None,
    device: torch.device | None = None,
    state: Tree = None,
) -> Callable[..., Tree]:
    """The weighted mean of ``function(*args, batch)`` over batches, as a function of ``args``.

    Args:
        function: to a tensor or a tree of tensors.
        batches: an iterable that gives the same batches each time; more than one pass must be possible. Of
            :class:`hessfn.ShardedBatches` each process takes its own, and all get the mean over all.
        weights: one number a batch, or a function of the batch; by default the length of its first tensor. A batch of
            weight 0 is left out.
        microbatch: cut each batch, along the first axis of its tensors, into parts of at most this many samples.
        device: where to move the batches.
        state: what else the function depends on; processes that share the batches must have the same.

    Returns:
        A function of ``args`` to what ``function`` returns.

    Cost: one pass over the batches at each call; one batch and one result in memory at a time.

    Raises:
        ValueError: at a call, there is no batch, only one pass is possible, two passes differ, or processes differ.

    >>> mean(lambda c, x: c * x.mean(), [torch.ones(3), torch.tensor([5.0])])(2.0)
    tensor(4.)
    """
    return weighted_mean(
        lambda args, part, _: function(*args, part),
        batches,
        weights=weights,
        microbatch=microbatch,
        device=device,
        state=state,
    )


def weighted_mean(
    function: Callable[[tuple[Any, ...], Any, float | Tensor], Tree],
    batches: Iterable[Any],
    *,
    weights: Weights,
    microbatch: int | None,
    device: torch.device | Callable[..., torch.device | None] | None = None,
    state: Tree = None,
    passes: int | None = None,
) -> Callable[..., Tree]:
    """As :func:`mean`, of ``function(args, part of a batch, its weight)``; of one pass alone if ``passes`` is 1.

    To ask a device is to wait for it: from the third pass on none is asked whether the data are those of before. Where
    they are not, the mean is NaN there.
    """
    dealt = batches if isinstance(batches, ShardedBatches) else None
    rank, size = share_of(batches)
    batches = dealt.batches if dealt else batches
    if passes != 1 and isinstance(batches, Iterator):
        raise InvalidInput("batches can be run through only once, and every product is a pass: give list(batches)")
    if number_of(batches) == 0:
        raise InvalidInput("there is no batch: the iterable of batches is empty")
    if passes != 1 and isinstance(getattr(batches, "sampler", None), RandomSampler):
        raise InvalidInput(f"this DataLoader shuffles: {_SAME_DATA}")
    if microbatch is not None and microbatch < 1:
        raise InvalidInput(f"microbatch={microbatch} must be at least 1")
    weigher = weights if isinstance(weights, Weigher) else None
    if weigher and microbatch is None and number_of(batches) == 1:  # the weight does not count
        weigher, weights = None, lambda batch: 1.0
    first_pass: list[Tensor] = []
    left_out: set[tuple[int, int]] = set()  # which parts of which batches have weight 0
    seen: list[bool] = []  # once two passes were found to be the same

    def is_left_out(weight: float | Tensor, place: tuple[int, int]) -> bool:
        if seen and not on_cpu(weight):
            return place in left_out
        if known(weight == 0) if isinstance(weight, Tensor) else weight == 0:
            left_out.add(place)
            return True
        return False

    def averaged(*args: Any) -> tuple[Tree | None, float | Tensor]:
        total: Tree = None
        total_weight: float | Tensor = 0.0
        this_pass: list[Tensor] = []
        home = device(*args) if callable(device) else device
        for index, batch in enumerate(_iterate(batches)):
            if index % size != rank:
                continue
            batch = moved(batch, home)
            this_pass.append(checksum(batch))
            if weigher:
                weigher.look_at(batch, microbatch)
            for number, (weight, part) in enumerate(_parts(batch, index, weights, microbatch)):
                if is_left_out(weight, (index, number)):
                    continue  # a mean over nothing is 0 / 0
                try:
                    value = function(args, part, weight)
                except ValueError as error:
                    raise InvalidInput(f"batch {index}: {error}") from error
                total = tree.scale(weight, value) if total is None else tree.add(total, value, weight)
                total_weight = total_weight + weight
        if total is None:
            if dealt:
                return None, 0.0  # fewer batches than processes
            if this_pass:
                raise InvalidInput("the weights of all batches are 0: there is no data")
            if first_pass:
                raise InvalidInput(f"the batches can be run through only once: {_SAME_DATA}")
            raise InvalidInput("there is no batch: the iterable of batches is empty")
        result = tree.scale(1 / total_weight, total)
        if not first_pass:
            first_pass.extend(this_pass)
        elif (same := _are_same(first_pass, this_pass)) is not None:
            if seen and not on_cpu(same):
                return tree.map(lambda x: torch.where(same.to(x.device), x, torch.nan), result), total_weight
            agreed = known(same)
            if agreed is False:
                raise InvalidInput(_OTHER_DATA)
            if agreed:
                seen[:] = [True]
        return result, total_weight

    if not dealt:
        return lambda *args: averaged(*args)[0]
    average = across(dealt.group)
    agreed: list[bool] = []

    def shared(*args: Any) -> Tree:
        if dealt.check and not agreed:
            require_same_problem(state, lambda: map(fingerprint, map(tensors, _iterate(batches))), dealt.group)
            agreed.append(True)
        return average(lambda: averaged(*args), args)

    return shared


def mean_of_kept(
    functions: Sequence[Callable[..., Tree]], weights: Sequence[float], batches: Iterable[Any]
) -> Callable[..., Tree]:
    """The mean of what a pass over batches has left of each; over all processes where these share the batches."""
    own = mean(lambda *args: args[-1](*args[:-1]), functions, weights=weights) if functions else _nothing
    return all_reduce(own, sum(weights), group=batches.group) if isinstance(batches, ShardedBatches) else own


def _nothing(*args: Any) -> Tree:
    raise InvalidInput("there is no batch: the iterable of batches is empty")


def number_of(batches: Iterable[Any]) -> int | None:
    """None where nobody knows, as of a ``DataLoader`` over an ``IterableDataset``, whose length is an error."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


def share_of(batches: Iterable[Any]) -> tuple[int, int]:
    """Which process this is and of how many: of n processes the r-th one takes the batches r, r + n, ...."""
    return (batches.rank, batches.size) if isinstance(batches, ShardedBatches) else (0, 1)


def of_all(mine: list[Any], batches: Iterable[Any]) -> list[Any]:
    """What the processes that share batches have of them, one list on all: that of rank 0 first."""
    if not isinstance(batches, ShardedBatches):
        return mine
    return [each for rank in gather(mine, batches.group) for each in rank]


def deal(batches: Iterable[Any], state: Tree, group: Group) -> ShardedBatches:
    """Batches dealt out to the processes of a group, once all are found to have the same ones, and the same state.

    Costs one pass over the batches.
    """
    require_same(fingerprint(state), "other parameters", group)
    require_same([fingerprint(tensors(batch)) for batch in _iterate(batches)], "other data", group)
    return ShardedBatches(batches, group, check=False)


def _iterate(batches: Iterable[Any]) -> Iterator[Any]:
    if isinstance(batches, Sequence):
        return iter(batches)
    # A DataLoader draws a seed for its workers from the global generator.
    with torch_state_lock(), torch.random.fork_rng(devices=[]):
        return iter(batches)


def _parts(batch: Any, index: int, weights: Weights, microbatch: int | None) -> Iterator[tuple[float | Tensor, Any]]:
    if microbatch is None:
        yield _weight(batch, index, weights), batch
        return
    refuse_uneven(batch)
    size = length(batch)
    for start in range(0, size, microbatch):
        part = rows(batch, start, start + microbatch)
        share = 1.0 if weights is None or callable(weights) else length(part) / size
        yield _weight(part, index, weights) * share, part


def _weight(batch: Any, index: int, weights: Weights) -> float | Tensor:
    if callable(weights):
        weight = weights(batch)  # a count of tokens is an integer tensor, whose inverse would be float32
        return tree.wide(weight) if isinstance(weight, Tensor) else weight
    if weights is None:
        return length(batch)
    if index < len(weights):
        return weights[index]
    raise InvalidInput(f"weights has {len(weights)} entries, but there is a batch {index}: give one for each")


def _are_same(first_pass: list[Tensor], this_pass: list[Tensor]) -> Tensor | None:
    """Whether two passes have the same checksums; None where they have none."""
    pairs = list(zip(first_pass, this_pass, strict=False))
    if len(first_pass) != len(this_pass) or any(a.shape != b.shape for a, b in pairs):
        raise InvalidInput(_OTHER_DATA)
    flags = [(a == b).all() for a, b in pairs]
    return torch.stack([flag.to(flags[0].device) for flag in flags]).all() if flags else None


_OTHER_DATA = f"the batches of this pass are not those of the first one: {_SAME_DATA}"
