"""Eigenpairs and densities of every layer's diagonal block, each from products of that block alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from hessfn.core import tree
from hessfn.core.arguments import kind, require_function, require_matvec, require_probes, require_vector
from hessfn.core.errors import InvalidInput
from hessfn.core.results import EigenPairs, Quadrature
from hessfn.core.tree import MatVec
from hessfn.estimators.eigen import eigsh
from hessfn.estimators.krylov import Which
from hessfn.estimators.spectrum import slq

Part = dict[str, Tensor]
Blocks = str | Iterable[str] | Mapping[str, str | Iterable[str]] | None


def eigsh_per_block(
    make: Callable[[Part], MatVec[Part]],
    params: Any,
    v0: Any,
    k: int = 1,
    *,
    blocks: Blocks = None,
    which: Which = "LM",
    rtol: float | None = 1e-3,
    max_matvecs: int | None = None,
    basis_size: int | None = None,
    second_start: Any = None,
) -> dict[str, EigenPairs[Part]]:
    """The k eigenpairs of every layer's diagonal block, as :func:`eigsh` finds those of the whole.

    Args:
        make: a function from the parameters of a block, a dict by dotted name, to the matvec of that block. A loss of
            :func:`functionalize` accepts some of the parameters and holds the others constant: ``lambda part: hvp(loss,
            part, batch)``; likewise for :func:`linearized_hvp`, :func:`mean_hvp` and :func:`ggnvp`. From a matvec of
            the whole, ``lambda part: restrict(matvec, params, list(part))``.
        params: a tree of tensors, where the matrix is taken.
        v0: where to start, a tree like ``params``, as ``gaussian(params, 1)[0]``: each block starts from its part.
        k: the number of pairs for each block, at most its number of entries.
        blocks: which leaves form a block. By default the parameters of one module: the block has the dotted name
            without its last part; a leaf without a dot is a block. Or glob patterns, one block each, named by the
            pattern; or a dict from names to patterns. Blocks may share leaves.
        which, rtol, max_matvecs, basis_size: as for :func:`eigsh`, of each block.
        second_start: as for :func:`eigsh`: another tree like ``v0``.

    Returns:
        A dict from the block's name to its :class:`EigenPairs`, residuals and all; the vectors are dicts by leaf name.

    Cost: for each block that of :func:`eigsh`; the product and basis of one block in memory at a time. A product of the
    block alone costs less the nearer to the output it is: on ResNet20 0.36 of a whole product at the first layer, 0.015
    at the last convolution, on a GPT of four layers 0.5 to 0.005; ``restrict`` costs a whole one. A linearized product
    is made for each block, which takes as long as some whole products: if these are costly (ResNet20, from four
    products a block on) it is the fastest; for small nets ``restrict`` is.

    Raises:
        ValueError: a pattern matches no leaf, ``make`` returns no matvec, or as :func:`eigsh` does; with the block's
            name.

    Source: as :func:`eigsh`; Zhang et al. (2024) for what the blocks of transformers and convolutional nets tell.

    >>> import torch
    >>> scale = {"a.weight": 2.0, "a.bias": 5.0, "b.weight": 3.0}
    >>> make = lambda part: lambda v: {name: scale[name] * v[name] for name in part}
    >>> params = {name: torch.ones(1) for name in scale}
    >>> found = eigsh_per_block(make, params, params)
    >>> {name: round(float(pairs.values[0]), 6) for name, pairs in found.items()}
    {'a': 5.0, 'b': 3.0}
    """
    call = "eigsh_per_block(make, params, v0, k)"
    _require_kinds(make, params, call)
    require_vector(v0, "v0", call)
    if k < 1:
        raise InvalidInput(f"{call}: k={k} must be at least 1")
    start = _by_name(v0, params, "v0")
    second = None if second_start is None else _by_name(second_start, params, "second_start")
    found = {}
    for name, part, matvec in _each(make, params, blocks, call):
        size = tree.numel(part)
        other = None if second is None else {leaf: second[leaf] for leaf in part}
        with _naming(name):
            found[name] = eigsh(
                matvec,
                {leaf: start[leaf] for leaf in part},
                min(k, size),
                which=which,
                rtol=rtol,
                max_matvecs=max_matvecs,
                basis_size=basis_size,
                second_start=other,
            )
    return found


def slq_per_block(
    make: Callable[[Part], MatVec[Part]],
    params: Any,
    probes: Iterable[Any],
    num_matvecs: int,
    *,
    blocks: Blocks = None,
    orthogonalize: bool = False,
    batch_size: int = 1,
) -> dict[str, Quadrature]:
    """Stochastic Lanczos quadrature of every layer's diagonal block, as :func:`slq` of the whole.

    Args:
        make, params, blocks: as for :func:`eigsh_per_block`.
        probes: ``gaussian(params, num)``: every block takes its part of each; the parts are independent.
        num_matvecs: m steps for each probe of each block, at most the number of entries of the block.
        orthogonalize, batch_size: as for :func:`slq`.

    Returns:
        A dict from the block's name to its :class:`Quadrature`, for :func:`density`, :func:`density_band`,
        :func:`trace_of` and :func:`jensen_shannon`.

    Cost: for each block p m products, whose cost :func:`eigsh_per_block` states; in memory, the product of one block
    and four vectors like it.

    Raises:
        ValueError: a pattern matches no leaf, ``make`` returns no matvec, or as :func:`slq` does; with the block's
            name.

    Source: as :func:`slq`; Zhang et al. (2024) for the blocks.

    >>> import torch
    >>> from hessfn import gaussian
    >>> params = {"a.weight": torch.zeros(2), "b.weight": torch.zeros(2)}
    >>> make = lambda part: lambda v: {name: torch.tensor([1.0, 3.0]) * v[name] for name in part}
    >>> slq_per_block(make, params, gaussian(params, 1), 2)["b"].nodes.round(decimals=4)
    tensor([[1., 3.]], dtype=torch.float64)
    """
    call = "slq_per_block(make, params, probes, num_matvecs)"
    _require_kinds(make, params, call)
    require_probes(probes, call)
    if num_matvecs < 1:
        raise InvalidInput(f"{call}: num_matvecs={num_matvecs} must be at least 1")
    probes = list(probes) if isinstance(probes, Iterator) else probes  # every block has them all
    found = {}
    for name, part, matvec in _each(make, params, blocks, call):
        steps = min(num_matvecs, tree.numel(part))
        with _naming(name):
            parts = _Parts(probes, params, list(part))
            found[name] = slq(matvec, parts, steps, orthogonalize=orthogonalize, batch_size=batch_size)
    return found


class _Parts:
    """One block's part of each probe: one at a time, however large the whole."""

    def __init__(self, probes: Iterable[Any], params: Any, leaves: list[str]) -> None:
        self.probes, self.params, self.leaves = probes, params, leaves

    def __iter__(self) -> Iterator[Part]:
        for probe in self.probes:
            whole = _by_name(probe, self.params, "a probe")
            yield {leaf: whole[leaf] for leaf in self.leaves}


def _each(
    make: Callable[[Part], MatVec[Part]], params: Any, blocks: Blocks, call: str
) -> Iterator[tuple[str, Part, MatVec[Part]]]:
    """Name, parameters and matvec of every block: made one after another, so that one is in memory at a time."""
    for name, part in _parts(params, blocks, call).items():
        with _naming(name):
            matvec = make(part)
            require_matvec(matvec, f"{call}: make(part)")
        yield name, part, matvec


def _parts(params: Any, blocks: Blocks, call: str) -> dict[str, Part]:
    if blocks is None:
        found: dict[str, Part] = {}
        for name, leaf in _by_name(params, params, "params").items():
            found.setdefault(name.rpartition(".")[0] or name, {})[name] = leaf
        return found
    if isinstance(blocks, str):
        blocks = [blocks]
    if not isinstance(blocks, Mapping):
        patterns = list(blocks)
        if not all(isinstance(pattern, str) for pattern in patterns):
            raise InvalidInput(f"{call}: blocks is {kind(blocks)}, not patterns of names, such as '*.weight'")
        blocks = {pattern: pattern for pattern in patterns}
    if not blocks:
        raise InvalidInput(f"{call}: blocks is empty: give a pattern, or None for a block of each module")
    return {name: tree.select(params, pattern) for name, pattern in blocks.items()}


def _by_name(x: Any, params: Any, what: str) -> Part:
    x = tree.matched(x, params, what, "params")
    return dict(zip(tree.names(x), tree.leaves(x), strict=True))


@contextlib.contextmanager
def _naming(block: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise InvalidInput(f"block {block!r}: {error}") from error


def _require_kinds(make: Any, params: Any, call: str) -> None:
    require_function(make, "make", call)
    require_vector(params, "params", call)
