"""Means over the processes of a ``torch.distributed`` group: each has its share of the data, all get the same bits."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from operator import length_hint
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hessfn.core import tree
from hessfn.core.errors import InvalidInput, RankError
from hessfn.core.fingerprints import checksum
from hessfn.core.tree import Tree

Group = Any  # dist.ProcessGroup, which a torch without distributed does not have
P = ParamSpec("P")
R = TypeVar("R")
Compute = Callable[[], tuple[Tree | None, float | Tensor]]


def all_reduce(matvec: Callable[P, R], weight: float | Tensor, *, group: Group = None) -> Callable[P, R]:
    """The weighted mean over processes of their matvecs: ``sum_r w_r A_r v / sum_r w_r``, the same bits on every rank.

    Each rank holds its shard of the data, and runs the same program on the same vectors (same seeds, same options).

    Args:
        matvec: this rank's, such as :func:`hessfn.hvp` of its shard; or any function from trees to a tree, such as the
            mean loss of the shard.
        weight: this rank's, such as the size of its shard. With 0 its matvec is not called.
        group: as ``torch.distributed`` has it; by default all processes.

    Returns:
        A function like ``matvec``, which every rank of the group must call. It can be put under ``vmap``, and is
        not differentiated through.

    Cost: one reduction a product, of ``n + 2`` numbers in the dtype of the leaves (float32 at least). The first call
    also compares weights and shapes.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialised; another rank failed, died, or came too late.
        ValueError: a weight is negative or not finite, or all are 0, or results differ in shape between ranks, or the
            ranks ask for products of different vectors. Every rank raises.

    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> all_reduce(lambda v: 2 * v, weight=128)(torch.ones(2))
    tensor([2., 2.])
    >>> dist.destroy_process_group()
    """
    average = across(group)

    def reduced(*args: P.args, **kwargs: P.kwargs) -> R:
        def compute() -> tuple[R | None, float]:
            share = float(weight)
            return matvec(*args, **kwargs) if share > 0 else None, share

        return average(compute, (*args, *kwargs.values()))

    return reduced


class ShardedBatches:
    """Batches shared by the processes of a group: rank r takes the batches r, r + size, r + 2 size, ...

    A mean over them, as :func:`hessfn.mean_hvp` computes it, is the mean over all batches, on every rank.

    Args:
        batches: all the batches, the same in the same order on every rank.
        group: as ``torch.distributed`` has it; by default all processes.
        check: whether the ranks compare batches and parameters before the first product.

    Cost: the check takes one pass over the batches.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialised.
        ValueError: at the first product, on every rank: batches or parameters differ between ranks, and which.

    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> list(ShardedBatches([torch.ones(2), torch.zeros(1)]))
    [tensor([1., 1.]), tensor([0.])]
    >>> dist.destroy_process_group()
    """

    def __init__(self, batches: Iterable[Any], group: Group = None, *, check: bool = True) -> None:
        _require_initialized()
        self.batches, self.group, self.check = batches, group, check
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self.batches), self.rank, None, self.size)

    def __length_hint__(self) -> int:
        return len(range(self.rank, length_hint(self.batches), self.size))

    def total(self, number: int) -> int:
        return sum(gather(number, self.group))


def across(group: Group) -> Callable[[Compute, tuple[Any, ...]], Tree]:
    """``average(compute, args)``: the mean over ranks of the values of ``compute() -> (value, weight)``.

    A rank of weight 0 may have None for its value. The weights are those of the first call. ``args`` are what every
    rank must have the same. An exception on one rank is one on all.
    """
    _require_initialized()
    agreed: list[_Agreement] = []

    def average(compute: Compute, args: tuple[Any, ...]) -> Tree:
        value, failure = None, None
        weight: float | Tensor = 0.0
        try:
            value, weight = compute()
            if agreed and value is not None:
                _require_alike(value, agreed[0].like, "this product", "the first one")
        except Exception as error:
            value, failure = None, error
        if not agreed:
            agreed.append(_agree(value, weight, failure, group))
        share, like, device = agreed[0]
        if value is None:
            value = tree.map(lambda x: torch.zeros_like(x, device=device), like)
        flat, unravel = tree.ravel(value)
        flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
        notes = torch.stack([_note(args).to(flat), flat.new_tensor(float(failure is not None))])
        return unravel(_Sum.apply(torch.cat([share * flat, notes]), group, failure)[..., :-2])

    return average


def _require_initialized() -> None:
    if not (dist.is_available() and dist.is_initialized()):
        raise RankError(
            "torch.distributed is not initialised: start the processes with torchrun and call "
            "torch.distributed.init_process_group() in each"
        )


class _Agreement(NamedTuple):
    share: float  # of this rank, in the weight of all
    like: Tree  # what results look like, on the meta device
    device: str  # the kind they are on


def _agree(value: Tree | None, weight: float | Tensor, failure: Exception | None, group: Group) -> _Agreement:
    like, device = None, ""
    if value is not None:
        like = tree.map(lambda x: torch.empty(x.shape, dtype=x.dtype, device="meta"), value)
        device = tree.leaves(value)[0].device.type
    said = gather((float(weight), like, device, failure and f"{type(failure).__name__}: {failure}"), group)
    if failure is not None:
        raise failure
    for rank, (weight_there, *_, failure_there) in enumerate(said):
        if failure_there is not None:
            raise RankError(f"rank {rank} failed: {failure_there}")
        if not 0 <= weight_there < math.inf:
            raise InvalidInput(f"the weight of rank {rank} is {weight_there}: it must be finite and not negative")
    total = math.fsum(weight_there for weight_there, *_ in said)
    known = [(rank, like, device) for rank, (_, like, device, _) in enumerate(said) if like is not None]
    if total == 0 or not known:
        raise InvalidInput("the weights of all ranks are 0: there is no data")
    first, like, device = known[0]
    for rank, like_there, _ in known[1:]:
        _require_alike(like_there, like, f"the result of rank {rank}", f"that of rank {first}")
    return _Agreement(float(weight) / total, like, device)


def _require_alike(x: Tree, y: Tree, what: str, other: str) -> None:
    kinds = [
        [(name, tuple(leaf.shape), leaf.dtype) for name, leaf in zip(tree.names(t), tree.leaves(t), strict=True)]
        for t in (x, y)
    ]
    for a, b in itertools.zip_longest(*kinds):
        if a != b:
            raise InvalidInput(f"{what} is not like {other}: {_kind(a)} against {_kind(b)}")


def _kind(kind: tuple[str, tuple[int, ...], torch.dtype] | None) -> str:
    return "nothing" if kind is None else f"leaf {kind[0]!r} of shape {kind[1]} and {kind[2]}"


class _Sum(torch.autograd.Function):
    """The sum over ranks of ``(..., n + 2)`` numbers, of which the last two are notes that are read here."""

    @staticmethod
    def forward(buffer: Tensor, group: Group, failure: Exception | None) -> Tensor:
        total = buffer.detach().clone(memory_format=torch.contiguous_format)
        with _explained(group):
            dist.all_reduce(total, group=group)
        if failure is not None:
            raise failure
        if total[..., -1].any():
            raise RankError("another rank failed in this product: see its own message")
        # Numbers that differ have a mean that is not all of theirs: some rank says so, and then all fail.
        if (total[..., -2] != dist.get_world_size(group) * buffer[..., -2]).any():
            raise InvalidInput(
                "the ranks do not ask for products of the same vector: every rank must run the same program, with the "
                "same parameters, seeds, options and number of threads"
            )
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, buffer: Tensor, group: Group, failure: Exception | None) -> tuple[Tensor, int]:
        return _Sum.apply(buffer.movedim(in_dims[0], 0), group, failure), 0


def require_same(x: Any, what: str, group: Group) -> None:
    """Raises ``ValueError`` on every rank unless all have equal ``x``, a small thing."""
    said = gather(x, group)
    differing = [rank for rank, y in enumerate(said) if y != said[0]]
    if differing:
        raise InvalidInput(f"rank {differing[0]} has {what} than rank 0: they must be the same on every rank")


def _note(args: Any) -> Tensor:
    """A small number made of all bits, exact in float32 also when summed over 16 thousand ranks."""
    return checksum(args).sum() % 1021


def gather(x: Any, group: Group) -> list[Any]:
    said: list[Any] = [None] * dist.get_world_size(group)
    with _explained(group):
        dist.all_gather_object(said, x, group=group)
    return said


@contextlib.contextmanager
def _explained(group: Group) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RankError(
            f"rank {dist.get_rank(group)} could not reach the others: one has died, hangs or does something else; see "
            f"its own message ({str(error).splitlines()[0].partition('. ')[0]})"
        ) from error
