"""Random trees: the one file that draws random numbers."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.core.arguments import kind, require_vector
from hessfn.core.dtensor import layout, place
from hessfn.core.errors import InvalidInput
from hessfn.core.func import vmap
from hessfn.core.memory import own
from hessfn.core.results import S
from hessfn.core.tree import T

Draw = Callable[[np.random.Generator, list[int]], Iterator[Tensor]]


def rademacher(like: T, num: int, *, seed: int | Tensor = 0) -> Sequence[T]:
    """``num`` random trees with entries +1 or -1, equally likely: the probes with the least variance for a trace.

    Args:
        like: a tree of floating-point tensors; only its shapes, dtypes and devices are used.
        num: how many.
        seed: entry ``i`` is a function of ``(seed, i)`` alone, the same on every device and every rank, and of the
            entries in order, not of how the tree groups them. A whole number, or a tensor of one, ``()``, over which
            ``vmap`` may go. Within ``torch.compile`` the numbers are drawn as outside of it, by an operation of ours.

    Returns:
        A lazy sequence: a tree exists only while you hold it; asking twice gives the same tree; slices are lazy too.

    Raises:
        ValueError: ``num`` or ``seed`` is negative, or ``seed`` not one whole number; a leaf is not a floating-point
            tensor, or there are no entries.

    >>> probes = rademacher(torch.zeros(4), 100)
    >>> len(probes), probes[3].abs()
    (100, tensor([1., 1., 1., 1.]))
    """
    return _Probes("_signs", like, num, seed, "rademacher(like, num)")


def gaussian(like: T, num: int, *, seed: int | Tensor = 0) -> Sequence[T]:
    """``num`` random trees with independent N(0, 1) entries; arguments and result as :func:`rademacher`.

    Use these where the direction must be uniform: starting vectors, Lanczos quadrature.

    >>> gaussian({"w": torch.zeros(2, 3)}, 5, seed=1)[0]["w"].shape
    torch.Size([2, 3])
    """
    return _Probes("_normals", like, num, seed, "gaussian(like, num)")


def each(function: Callable[[T], S], probes: Iterable[T], batch_size: int = 1) -> Iterator[S]:
    """``function(probe)`` for every probe, so many at a time under ``vmap``.

    >>> [float(x) for x in each(torch.sum, [torch.ones(2), torch.zeros(2), torch.ones(2)], batch_size=2)]
    [2.0, 0.0, 2.0]
    """
    if batch_size < 1:
        raise InvalidInput(f"batch_size={batch_size} must be at least 1")
    probes = iter(probes)
    while group := list(itertools.islice(probes, batch_size)):
        if len(group) == 1:
            yield function(group[0])
            continue
        if any(layout(leaf) for leaf in tree.leaves(group[0])):
            raise InvalidInput(f"batch_size={batch_size} is not for DTensors, which vmap does not know: leave it at 1")
        results = vmap(function, tree.map(lambda *leaves: torch.stack(leaves), *group))
        for i in range(len(group)):
            yield tree.map(lambda x: x[i], results)  # noqa: B023


class _Probes(Sequence[T]):
    def __init__(self, draw: str, like: T, num: int, seed: int | Tensor, call: str) -> None:
        require_vector(like, "like", call)
        if not hasattr(num, "__index__"):
            raise InvalidInput(f"{call}: num is {kind(num)}, not a whole number")
        if isinstance(seed, Tensor) and (seed.dim() or seed.is_floating_point() or seed.is_complex()):
            raise InvalidInput(
                f"{call}: seed is {kind(seed)} and {seed.dtype}, not a whole number: of several seeds give "
                "torch.func.vmap one at a time"
            )
        if num < 0 or (not isinstance(seed, Tensor) and seed < 0):
            raise InvalidInput(f"num={num} and seed={seed} must not be negative")
        if tree.numel(like) == 0:
            raise InvalidInput("the tree to draw for has no entries: there must be at least one parameter")
        if any(leaf.is_complex() for leaf in tree.leaves(like)):
            raise InvalidInput(f"{call}: like has complex entries; give a tree like its real and imaginary parts")
        self._draw, self._seed, self._indices = draw, seed, range(num)
        # Shapes only: a lazy sequence must not keep the parameters alive.
        self._specs = [(leaf.shape, leaf.dtype, leaf.device, layout(leaf)) for leaf in tree.leaves(like)]
        self._blank: T = tree.map(lambda leaf: 0, like)

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[T]:
        return map(self.__getitem__, range(len(self)))

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            part = copy.copy(self)
            part._indices = self._indices[index]
            return part
        sizes = [shape.numel() for shape, *_ in self._specs]
        if isinstance(self._seed, Tensor) or torch.compiler.is_compiling():
            seed = torch.as_tensor(self._seed)
            drawn = iter(torch.ops.hessfn.draw(seed, self._indices[index], self._draw, sizes))
        else:
            drawn = _DRAWS[self._draw](_generator(self._seed, self._indices[index], self._draw), sizes)
        specs = zip(drawn, self._specs, strict=True)
        return tree.unflatten(
            [place(x.to(dtype).reshape(shape).to(device), where) for x, (shape, dtype, device, where) in specs],
            self._blank,
        )


def _signs(rng: np.random.Generator, sizes: list[int]) -> Iterator[Tensor]:
    bits = np.frombuffer(rng.bytes(-(-sum(sizes) // 8)), dtype=np.uint8)
    bits = np.unpackbits(bits, count=sum(sizes)).astype(np.int8)
    return iter(torch.from_numpy(2 * bits - 1).split(sizes))


def _normals(rng: np.random.Generator, sizes: list[int]) -> Iterator[Tensor]:
    # Leaf by leaf, which is the same stream: a net's worth of float64 never exists at once.
    return (torch.from_numpy(rng.standard_normal(size)) for size in sizes)


_DRAWS: dict[str, Draw] = {"_signs": _signs, "_normals": _normals}


def _generator(seed: int, index: int, draw: str) -> np.random.Generator:
    # The draw's name is part of the seed: signs and normals of one seed must not come from the same bits.
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, index, *draw.encode()])))


# The same as an operation, for transforms and compilers that do not see into NumPy.


def _draw(seed: Tensor, index: int, draw: str, sizes: list[int]) -> list[Tensor]:
    if int(seed) < 0:
        raise InvalidInput(f"seed={int(seed)} must not be negative")
    return [own(x) for x in _DRAWS[draw](_generator(int(seed), index, draw), sizes)]


def _like_drawn(seed: Tensor, index: int, draw: str, sizes: list[int]) -> list[Tensor]:
    dtype = torch.int8 if draw == "_signs" else torch.float64
    return [torch.empty(size, dtype=dtype) for size in sizes]


def _draw_for_each(
    info: Any, in_dims: Any, seed: Tensor, index: int, draw: str, sizes: list[int]
) -> tuple[list[Tensor], list[int]]:
    rows = [torch.ops.hessfn.draw(one, index, draw, sizes) for one in seed.movedim(in_dims[0], 0)]
    return [torch.stack(leaves) for leaves in zip(*rows, strict=True)], [0] * len(sizes)


_SCHEMA = "(Tensor seed, int index, str draw, SymInt[] sizes) -> Tensor[]"
_operation = torch.library.custom_op("hessfn::draw", _draw, mutates_args=(), schema=_SCHEMA)
_operation.register_fake(_like_drawn)
_operation.register_vmap(_draw_for_each)
