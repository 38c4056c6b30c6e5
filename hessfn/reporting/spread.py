"""Some of the batches, spread over all of them: data are often sorted, and then the first ones are no sample."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from hessfn.core.errors import InvalidInput
from hessfn.losses.batches import number_of
from hessfn.parallel.all_reduce import ShardedBatches


def spread(num: int, total: int) -> list[int]:
    """``num`` of the numbers below ``total``, ascending and evenly apart; all where there are no more.

    >>> spread(3, 12)
    [2, 6, 10]
    """
    num = min(num, total)
    return [(2 * i + 1) * total // (2 * num) for i in range(num)]


def number_of_all(batches: Iterable[Any]) -> int | None:
    """How many there are on all processes together; None where nobody knows."""
    return number_of(batches.batches if isinstance(batches, ShardedBatches) else batches)


def some(batches: Iterable[Any], num: int) -> Iterable[Any]:
    """``num`` batches, spread over all of them; the first ones where nobody knows how many there are.

    Those of several processes are chosen from all, and dealt out after that.
    """
    if isinstance(batches, ShardedBatches):
        return ShardedBatches(some(batches.batches, num), batches.group, check=False)
    total = number_of(batches)
    return list(islice(batches, num)) if total is None else _at(batches, spread(num, total))


def _at(batches: Iterable[Any], numbers: list[int]) -> list[Any]:
    """Of a sequence, and of a DataLoader over one, no other batches are loaded."""
    if isinstance(batches, Sequence):
        return [batches[i] for i in numbers]
    # An iterable data set has no numbers, and its sampler no end.
    is_map = isinstance(batches, DataLoader) and not isinstance(batches.dataset, IterableDataset)
    if isinstance(batches, DataLoader) and is_map and isinstance(batches.batch_sampler, Iterable):
        return list(_chosen(batches, numbers))
    wanted = set(numbers)
    found = [batch for i, batch in enumerate(islice(batches, numbers[-1] + 1)) if i in wanted]
    if len(found) < len(numbers):
        raise InvalidInput(f"batches say that there are more than {numbers[-1]} of them, and end before")
    return found


def _chosen(loader: DataLoader[Any], numbers: list[int]) -> DataLoader[Any]:
    samples = list(loader.batch_sampler or ())
    return DataLoader(
        loader.dataset,
        batch_sampler=[samples[i] for i in numbers],
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
    )
