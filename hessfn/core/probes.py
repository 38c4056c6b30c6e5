"""Random trees: the one file that draws random numbers."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from hessfn.core import philox, tree
from hessfn.core.arguments import kind, require_vector
from hessfn.core.dtensor import Layout, layout, place
from hessfn.core.errors import InvalidInput
from hessfn.core.func import vmap
from hessfn.core.results import S
from hessfn.core.tree import T


class _Draw(NamedTuple):
    entries: Callable[[Tensor], Tensor]  #: of words
    per_block: int  #: so many of them


# The name is part of the seed: signs and normals of one seed must not come from the same bits.
_DRAWS = {
    "_signs": _Draw(philox.signs, 256),
    "_normals": _Draw(philox.normals, 8),
    "_uniforms": _Draw(philox.uniforms, 4),
}

# So many entries at a time: few enough for a CPU's cache, enough to be worth the launches elsewhere.
_CHUNK, _CHUNK_ELSEWHERE = 2**17, 2**22


def rademacher(like: T, num: int, *, seed: int | Tensor = 0) -> Sequence[T]:
    """``num`` random trees with entries +1 or -1, equally likely: the probes with the least variance for a trace.

    Args:
        like: a tree of floating-point tensors; only its shapes, dtypes and devices are used.
        num: how many.
        seed: entry ``j`` of tree ``i`` is a function of ``(seed, i, j)`` alone, the same on every device and rank,
            however the tree groups its entries. An integer, or an integer tensor ``()``, over which ``vmap`` may
            go. Within ``torch.compile`` the numbers are the same.

    Returns:
        A lazy sequence: a tree is drawn when it is asked for, the same one each time; slices are lazy too.

    Cost: no product; 2 ms per million entries on one core of a CPU; memory: the tree, and a chunk of 1 MB. On a CUDA
    device the numbers are drawn there, without a transfer or a synchronisation (with a chunk of 20 MB); for other
    devices they are drawn on the CPU.

    Raises:
        ValueError: ``num`` or ``seed`` is negative, or ``seed`` is not one integer; a leaf is not a floating-point
            tensor, or there are no entries.

    Source: Salmon, Moraes, Dror and Shaw (2011): the counter-based generator Philox4x64-10 of Random123, as in NumPy.

    >>> probes = rademacher(torch.zeros(4), 100)
    >>> len(probes), probes[3].abs()
    (100, tensor([1., 1., 1., 1.]))
    """
    return _probes("_signs", like, num, seed, "rademacher(like, num)")


def gaussian(like: T, num: int, *, seed: int | Tensor = 0) -> Sequence[T]:
    """``num`` random trees with independent N(0, 1) entries, whose directions are uniform.

    Use them as starting vectors and for Lanczos quadrature. An entry is computed in float64 and rounded to the dtype of
    its leaf; none is larger than 6.8 in magnitude.

    Args:
        like, num, seed: as for :func:`rademacher`.

    Returns:
        A lazy sequence, as of :func:`rademacher`.

    Cost: no product; 15 ms per million entries on one core of a CPU, and a chunk of 6 MB. On a CUDA device the numbers
    are drawn there, with a chunk of 0.2 GB. Before the release of 0.1.0 a seed gave other numbers.

    Raises:
        ValueError: as for :func:`rademacher`.

    Source: Philox as for :func:`rademacher`; Box and Muller (1958), with own polynomials for logarithm, sine and
    cosine.

    >>> gaussian({"w": torch.zeros(2, 3)}, 5, seed=1)[0]["w"].shape
    torch.Size([2, 3])
    """
    return _probes("_normals", like, num, seed, "gaussian(like, num)")


def uniform(like: T, num: int, *, seed: int | Tensor = 0) -> Sequence[T]:
    """``num`` random trees with independent entries, uniform in [0, 1): otherwise as :func:`gaussian`."""
    return _probes("_uniforms", like, num, seed, "uniform(like, num)")


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


# Shapes of leaves side by side, and what they have in common.
Run = tuple[list[torch.Size], tuple[torch.dtype, torch.device, Layout | None]]


def _probes(draw: str, like: T, num: int, seed: int | Tensor, call: str) -> Sequence[T]:
    require_vector(like, "like", call)
    if not hasattr(num, "__index__"):
        raise InvalidInput(f"{call}: num is {kind(num)}, not a whole number")
    require_seed(seed, call)
    if num < 0 or (not isinstance(seed, Tensor) and seed < 0):
        raise InvalidInput(f"num={num} and seed={seed} must not be negative")
    if tree.numel(like) == 0:
        raise InvalidInput("the tree to draw for has no entries: there must be at least one parameter")
    if any(leaf.is_complex() for leaf in tree.leaves(like)):
        raise InvalidInput(f"{call}: like has complex entries; give a tree like its real and imaginary parts")
    # Shapes only: a lazy sequence must not keep the parameters alive. Leaves side by side are drawn together, for
    # small ones cost launches. One that lies in parts is whole while it is drawn: it comes alone.
    runs: list[Run] = []
    for leaf in tree.leaves(like):
        kinds = leaf.dtype, leaf.device, layout(leaf)
        if runs and kinds[2] is None and kinds == runs[-1][1]:
            runs[-1][0].append(leaf.shape)
        else:
            runs.append(([leaf.shape], kinds))
    blank: T = tree.map(lambda leaf: 0, like)
    return _Probes(draw, seed, range(num), runs, blank)


def require_seed(seed: int | Tensor, call: str) -> None:
    if isinstance(seed, Tensor) and (seed.dim() or seed.is_floating_point() or seed.is_complex()):
        raise InvalidInput(
            f"{call}: seed is {kind(seed)} and {seed.dtype}, not a whole number: of several seeds give "
            "torch.func.vmap one at a time"
        )


class _Probes(Sequence[T]):
    def __init__(self, draw: str, seed: int | Tensor, indices: range, runs: list[Run], blank: T) -> None:
        self._draw, self._seed, self._indices, self._runs, self._blank = draw, seed, indices, runs, blank

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[T]:
        return (self[i] for i in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return _Probes(self._draw, self._seed, self._indices[index], self._runs, self._blank)
        index, leaves, start = self._indices[index], [], 0
        opaque = isinstance(self._seed, Tensor) or torch.compiler.is_compiling()
        draw = torch.ops.hessfn.draw if opaque else _draw
        seed = self._seed if isinstance(self._seed, Tensor) or not opaque else torch.tensor(self._seed, device="cpu")
        for shapes, (dtype, device, where) in self._runs:
            sizes = [shape.numel() for shape in shapes]
            drawn = draw(seed, index, self._draw, start, sizes, dtype, device)
            leaves += [place(x.reshape(shape), where) for x, shape in zip(drawn, shapes, strict=True)]
            start += sum(sizes)
        return tree.unflatten(leaves, self._blank)


def _draw(
    seed: int | Tensor, index: int, name: str, start: int, sizes: list[int], dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Leaves of these sizes, whose first entry is number ``start`` of the tree."""
    if int(seed) < 0:
        raise InvalidInput(f"seed={int(seed)} must not be negative")
    entries, per_block = _DRAWS[name]
    leaves = [torch.empty(size, dtype=dtype, device=device) for size in sizes]
    if device.type == "meta":
        return leaves
    home = device if _draws_the_same(device.type) else torch.device("cpu")
    chunk = (_CHUNK if home.type == "cpu" else _CHUNK_ELSEWHERE) // per_block
    key = philox.key_of([int(seed), index, *name.encode()])
    ends = list(itertools.accumulate(sizes, initial=start))
    last, leaf = -(-ends[-1] // per_block), 0
    for block in range(start // per_block, last, chunk):
        until = min(block + chunk, last)
        drawn, offset = entries(philox.words(key, block, until, home)), block * per_block
        if home != device:
            drawn = drawn.to(dtype)
        while leaf < len(leaves):
            begin, end = max(offset, ends[leaf]), min(until * per_block, ends[leaf + 1])
            leaves[leaf][begin - ends[leaf] : end - ends[leaf]] = drawn[begin - offset : end - offset]
            if end < ends[leaf + 1]:
                break  # the rest of it is in the next chunk
            leaf += 1
    return leaves


@functools.cache
def _draws_the_same(kind: str) -> bool:
    """Whether a device of this kind draws the bits of the CPU: some have no float64, or round in ways of their own."""
    if kind in ("cpu", "cuda"):
        return True
    try:
        there, here = (philox.computed_words((1, 2), 0, 256, torch.device(home)) for home in (kind, "cpu"))
        return all(torch.equal(f(there).cpu(), f(here)) for f in (philox.signs, philox.normals))
    except (RuntimeError, TypeError):  # NotImplementedError among them
        return False


# The same as an operation, for transforms and compilers that do not see into NumPy.


def _like_drawn(
    seed: Tensor, index: int, name: str, start: int, sizes: list[int], dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    return [torch.empty(size, dtype=dtype, device=device) for size in sizes]


def _draw_for_each(info: Any, in_dims: Any, seed: Tensor, *arguments: Any) -> tuple[list[Tensor], list[int]]:
    rows = [torch.ops.hessfn.draw(one, *arguments) for one in seed.movedim(in_dims[0], 0)]
    return [torch.stack(leaves) for leaves in zip(*rows, strict=True)], [0] * len(rows[0])


_SCHEMA = (
    "(Tensor seed, int index, str name, SymInt start, SymInt[] sizes, ScalarType dtype, Device device) -> Tensor[]"
)
_operation = torch.library.custom_op("hessfn::draw", _draw, mutates_args=(), schema=_SCHEMA)
_operation.register_fake(_like_drawn)
_operation.register_vmap(_draw_for_each)
