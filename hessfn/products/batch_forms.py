"""The quadratic forms of every batch's own matrix, whose spread is the data's own error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.core.arguments import require_batches, require_function, require_probes, require_vectors
from hessfn.core.errors import InvalidInput
from hessfn.core.probes import gaussian
from hessfn.core.results import Forms
from hessfn.core.tree import MatVec, T
from hessfn.losses.batches import Weights, of_all, weighted_mean
from hessfn.products.batch_mean import home_of, product_of_batch, weighed


def batch_forms(
    make: Callable[[Any], MatVec[T]],
    batches: Iterable[Any],
    vectors: T,
    *,
    weights: Weights = None,
    microbatch: int | None = None,
) -> Forms[Tensor]:
    """The quadratic forms ``v'A_b v`` of every batch's matrix, for several vectors, such as eigenvectors.

    Their weighted mean over the batches is ``v'Av``. Their spread is its error by the data: :func:`data_stderr` and
    :func:`data_interval` compute it, for constant vectors. :func:`cross_fitted` takes into account that another sample
    has other eigenvectors.

    Args:
        make: from a batch to its matvec, as for :func:`batch_mean`: ``lambda batch: hvp(loss, params, batch)``.
        batches: of independent samples, in random order; they are read in one pass.
        vectors: a tree whose leaves carry a leading axis of k vectors, as ``eigsh(...).vectors``.
        weights: as for :func:`batch_mean`.
        microbatch: cuts batches into parts of at most this many samples, each with its own forms. If there are few
            batches, choose it so that there are ten or twenty parts. 1 gives the forms of every sample.

    Returns:
        ``values (b, k)``, float64, and ``weights (b,)``; batches of weight 0 are left out. For
        :class:`hessfn.ShardedBatches` every process gets those of all, in the order of the ranks.

    Cost: k products with the mean over all batches, in one pass; one vector besides the k.

    Raises:
        ValueError: as for :func:`batch_mean`.

    >>> batches = [torch.ones(3, 1), torch.zeros(1, 1)]
    >>> batch_forms(lambda x: lambda v: x.T @ (x @ v) / len(x), batches, torch.ones(1, 1)).values
    tensor([[1.],
            [0.]], dtype=torch.float64)
    """
    call = "batch_forms(make, batches, vectors)"
    require_vectors(vectors, "vectors", call)
    count = len(tree.leaves(vectors)[0])
    rows = [tree.map(lambda x, i=i: x[i], vectors) for i in range(count)]
    return _forms(make, batches, rows, weights, microbatch, call, tree.dot)


def batch_traces(
    make: Callable[[Any], MatVec[T]],
    batches: Iterable[Any],
    probes: Iterable[T],
    *,
    weights: Weights = None,
    microbatch: int | None = None,
) -> Forms[T]:
    """The samples ``z_l'(A_b z)_l`` of the traces of diagonal blocks, for every batch, leaf and probe.

    Their weighted means over the batches are the samples of :func:`hutchinson_per_leaf` for the same probes; summed
    over the leaves, those of :func:`hutchinson`. :func:`trace_data_stderr` computes the error by the data.

    Args:
        make, batches, weights, microbatch: as for :func:`batch_forms`.
        probes: ``rademacher(params, num)``, or any iterable of independent trees with ``E zz' = I``.

    Returns:
        ``values``, a tree of ``(b, p)`` tensors in float64, and ``weights (b,)``.

    Cost: one product with the mean over all batches a probe, in one pass.

    Raises:
        ValueError: there is no probe, or as for :func:`batch_mean`.

    >>> from hessfn import rademacher
    >>> batches = [torch.ones(3, 1), torch.zeros(1, 1)]
    >>> make = lambda x: lambda v: {"w": x.T @ (x @ v["w"]) / len(x)}
    >>> batch_traces(make, batches, rademacher({"w": torch.zeros(1)}, 2)).values["w"]
    tensor([[1., 1.],
            [0., 0.]], dtype=torch.float64)
    """
    call = "batch_traces(make, batches, probes)"
    require_probes(probes, call)
    return _forms(make, batches, probes, weights, microbatch, call, lambda z, image: tree.map(tree.dot, z, image))


def _forms(
    make: Callable[[Any], MatVec[T]],
    batches: Iterable[Any],
    vectors: Iterable[T],
    weights: Weights,
    microbatch: int | None,
    call: str,
    form: Callable[[T, T], Any],
) -> Forms[Any]:
    require_function(make, "make", call)
    require_batches(batches, call)
    vectors = list(vectors) if isinstance(vectors, Iterator) else vectors  # every batch has them all
    like = next(iter(vectors), None)
    if like is None:
        raise InvalidInput(f"{call}: there is no vector; rademacher(params, num) needs num >= 1")
    probe: list[T] = []
    made = make
    if weights is None:
        probe.append(gaussian(like, 1)[0])
        made, weights = weighed(make, probe)
    found: list[tuple[Any, float]] = []

    def of_batch(_: tuple[Any, ...], part: Any, weight: float | Tensor) -> Tensor:
        matvec = made(part)
        # On a device the numbers of all vectors are looked at together.
        rows = [form(v, product_of_batch(matvec, v, is_checked=True)) for v in vectors]
        values = tree.map(lambda *row: torch.stack(row).detach().cpu(), *rows)
        found.append((tree.require_finite(values, "the product"), float(weight)))
        return torch.zeros((), device="cpu")  # the mean itself is not asked for

    averaged = weighted_mean(of_batch, batches, weights=weights, microbatch=microbatch, device=home_of, passes=1)
    averaged(like)
    found = of_all(found, batches)
    values = tree.map(lambda *rows: torch.stack(rows), *[row for row, _ in found])
    return Forms(values, torch.tensor([weight for _, weight in found], dtype=torch.float64, device="cpu"))
