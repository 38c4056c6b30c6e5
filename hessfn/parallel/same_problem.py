"""Processes that share a mean must have one problem: the same parameters, and the same batches in the same order."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor

from hessfn.core import tree
from hessfn.core.dtensor import layout
from hessfn.core.errors import InvalidInput, RankError
from hessfn.core.fingerprints import fingerprint
from hessfn.core.tree import Tree
from hessfn.parallel.all_reduce import Group, gather


class _Seen(NamedTuple):
    """What one process has, in a few bytes for each tensor."""

    state: list[tuple[str, str]]  # names and fingerprints
    data: list[str]
    failure: str


def require_same_problem(state: Tree, data: Callable[[], Iterable[str]], group: Group) -> None:
    """Raises on every rank, unless all have equal tensors in ``state`` and equal fingerprints of their batches.

    Args:
        data: computes the fingerprints. What it raises on one rank is an error on all.
    """
    failure = None
    try:
        seen = _Seen(_fingerprints(state), list(data()), "")
    except Exception as error:
        failure, seen = error, _Seen([], [], f"{type(error).__name__}: {error}")
    everyone: list[Any] = gather(seen, group)
    if failure is not None:
        raise failure
    for rank, other in enumerate(everyone):
        if other.failure:
            raise RankError(f"rank {rank} failed: {other.failure}")
    for rank, other in enumerate(everyone):
        difference = _difference(other, everyone[0])
        if difference:
            raise InvalidInput(
                f"rank {rank} {difference}: every rank must have the same parameters, and all batches in the same "
                "order, of which it takes its share. Load or seed them alike; for data of its own on each rank take "
                "all_reduce(matvec, weight)"
            )


def _fingerprints(state: Tree) -> list[tuple[str, str]]:
    """A parameter in parts has another one on each process, and is left out."""
    named = zip(tree.names(state), tree.leaves(state), strict=True)
    return [(name, fingerprint(x)) for name, x in named if isinstance(x, Tensor) and not layout(x)]


def _difference(seen: _Seen, first: _Seen) -> str:
    if len(seen.state) != len(first.state):
        return f"has {len(seen.state)} parameters and buffers, where rank 0 has {len(first.state)}"
    for ours, theirs in zip(seen.state, first.state, strict=True):
        if ours != theirs:
            # The path begins with the place in a tuple of parameters and constants.
            return f"has another tensor {ours[0].partition('.')[2] or ours[0]!r} than rank 0"
    if len(seen.data) != len(first.data):
        return f"has {len(seen.data)} batches, where rank 0 has {len(first.data)}"
    if seen.data != first.data and sorted(seen.data) == sorted(first.data):
        return "has the batches of rank 0 in another order"
    for index, (mine, other) in enumerate(zip(seen.data, first.data, strict=True)):
        if mine != other:
            return f"has another batch {index} than rank 0"
    return ""
