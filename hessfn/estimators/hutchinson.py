"""Traces and diagonals of a matvec, each with its standard error."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.core.arguments import require_eigenpairs, require_estimate, require_matvec, require_probes
from hessfn.core.errors import InvalidInput
from hessfn.core.probes import each
from hessfn.core.projection import complement_of
from hessfn.core.results import EigenPairs, Estimate, S
from hessfn.core.torch_state import carries_derivative
from hessfn.core.tree import MatVec, T, Tree
from hessfn.core.watched import Watched
from hessfn.estimators.running_mean import estimate, estimate_until


def hutchinson(
    matvec: MatVec[T], probes: Iterable[T], *, rtol: float | None = None, batch_size: int = 1
) -> Estimate[Tensor]:
    """The trace, as the mean of ``z'Az`` over the probes.

    A Rademacher probe has variance ``2 (||A||_F^2 - sum_i a_ii^2)``, a Gaussian one ``2 ||A||_F^2``.

    Args:
        probes: ``rademacher(params, num)``, or any iterable of independent trees with ``E zz' = I``.
        rtol: stop once half the width of the 95 % confidence interval (Student's t) is at most ``rtol |mean|``, after
            10 probes at least. None takes all probes, and then runs under ``vmap`` and autograd. With a tolerance
            there is no derivative: where the products have one, that is an error.
        batch_size: so many products at a time, under ``vmap``: for GPUs that one product leaves idle. On a CPU nothing
            is won by it.

    Returns:
        ``mean`` and ``stderr``, float64 scalars, and ``num_matvecs``, one for each probe taken.

    Cost: one product a probe; one vector kept.

    Raises:
        ValueError: there is no probe, or a product is not finite.

    Source: Hutchinson (1989).

    >>> from hessfn import rademacher
    >>> hutchinson(lambda v: 3 * v, rademacher(torch.zeros(4), 10)).mean
    tensor(12., dtype=torch.float64)
    """
    _require_kinds(matvec, probes, "hutchinson(matvec, probes)")
    product = Watched(matvec, tolerance=rtol is not None)
    samples = each(lambda z: tree.dot(z, product(z)), probes, batch_size)
    return _finished(product, estimate(samples) if rtol is None else estimate_until(samples, rtol))


def hutchinson_per_leaf(matvec: MatVec[T], probes: Iterable[T], *, batch_size: int = 1) -> Estimate[T]:
    """The trace of every leaf's diagonal block, all from the same products.

    The blocks between leaves drop out in the mean, yet add to the variance: ``restrict`` the matvec to one leaf
    where its own variance matters. Arguments as for :func:`hutchinson`.

    Returns:
        ``mean`` and ``stderr``, trees of float64 scalars, and ``num_matvecs``.

    Cost: one product a probe; one vector kept.

    Raises:
        ValueError: there is no probe, or a product is not finite.

    >>> from hessfn import rademacher
    >>> hutchinson_per_leaf(lambda v: {"a": 2 * v["a"]}, rademacher({"a": torch.zeros(3)}, 2)).mean
    {'a': tensor(6., dtype=torch.float64)}
    """
    _require_kinds(matvec, probes, "hutchinson_per_leaf(matvec, probes)")

    product = Watched(matvec)

    def blocks(z: T) -> T:
        return tree.map(tree.dot, z, product(z))

    return _finished(product, estimate(each(blocks, probes, batch_size)))


def hutchinson_per_sample(matvec: MatVec[T], probes: Iterable[T]) -> Estimate[T]:
    """The trace of every sample's own matrix ``H_i``, where the matrix is their mean: block-diagonal, with ``H_i / B``.

    Such are activation Hessians in eval mode: ``B`` times the sum of ``z * Az`` over the entries of sample i. The mean
    over the samples is the trace of the whole.

    Args:
        matvec: on trees whose leaves have the samples along their first axis.
        probes: as for :func:`hutchinson`.

    Returns:
        ``mean`` and ``stderr``, trees of float64 tensors ``(B,)``, and ``num_matvecs``.

    Cost: one product a probe; one vector kept.

    Raises:
        ValueError: there is no probe, a product is not finite, or the leaves differ in the length of their first
            axis.

    >>> from hessfn import rademacher
    >>> d = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> hutchinson_per_sample(lambda v: d * v / 2, rademacher(torch.zeros(2, 2), 2)).mean
    tensor([3., 7.], dtype=torch.float64)
    """
    _require_kinds(matvec, probes, "hutchinson_per_sample(matvec, probes)")

    product = Watched(matvec)

    def sums(z: Tensor, image: Tensor) -> Tensor:
        return len(z) * (tree.wide(z) * tree.wide(image))[:, None].flatten(1).sum(1)

    def samples() -> Iterator[T]:
        for z in probes:
            lengths = {name: tuple(x.shape[:1]) for name, x in zip(tree.names(z), tree.leaves(z), strict=True)}
            if len(set(lengths.values())) > 1 or () in lengths.values():
                raise InvalidInput(f"samples must lie along the first axis of every leaf, but these have {lengths}")
            yield tree.map(sums, z, product(z))

    return _finished(product, estimate(samples()))


def hutchinson_diag(matvec: MatVec[T], probes: Iterable[T], *, batch_size: int = 1) -> Estimate[T]:
    """The diagonal, as the mean of ``z * Az`` over Rademacher probes.

    A probe has variance ``sum_{j != i} a_ij^2`` in entry i.

    Args:
        probes: ``rademacher(params, num)``. Gaussian probes are right too, with the variance ``2 a_ii^2`` on top.
        batch_size: as for :func:`hutchinson`.

    Returns:
        ``mean`` and ``stderr``, trees like the probes, and ``num_matvecs``.

    Cost: one product a probe; two vectors kept.

    Raises:
        ValueError: there is no probe, or a product is not finite.

    Source: Bekas, Kokiopoulou and Saad (2007).

    >>> from hessfn import rademacher
    >>> d = torch.tensor([3.0, 1.0])
    >>> hutchinson_diag(lambda v: d * v, rademacher(torch.zeros(2), 4)).mean
    tensor([3., 1.])
    """
    _require_kinds(matvec, probes, "hutchinson_diag(matvec, probes)")

    product = Watched(matvec)

    def diagonal(z: T) -> T:
        return tree.map(torch.mul, z, product(z))

    return _finished(product, estimate(each(diagonal, probes, batch_size)))


def squared_row_norms(matvec: MatVec[T], probes: Iterable[T]) -> Estimate[T]:
    """The squared norm of every row, ``sum_j a_ij^2``, as the mean of ``(Az)^2``; no estimate of a squared diagonal.

    Returns:
        ``mean`` and ``stderr``, trees like the probes but in float64, which has room for squares, and ``num_matvecs``.

    Cost: one product a probe; two vectors kept, in float64.

    Raises:
        ValueError: there is no probe, or a product is not finite.

    >>> from hessfn import rademacher
    >>> d = torch.tensor([3.0, 1.0])
    >>> squared_row_norms(lambda v: d * v, rademacher(torch.zeros(2), 4)).mean
    tensor([9., 1.], dtype=torch.float64)
    """
    _require_kinds(matvec, probes, "squared_row_norms(matvec, probes)")

    product = Watched(matvec, square=False)

    def squares(image: T) -> T:
        return tree.map(lambda x: tree.wide(x).square(), image)

    return _finished(product, estimate(squares(product(z)) for z in probes))


def squared_frobenius(matvec: MatVec[T], probes: Iterable[T]) -> Estimate[Tensor]:
    """The squared Frobenius norm, ``sum_ij a_ij^2``, the sum of the squared eigenvalues, as the mean of ``||Az||^2``.

    Returns:
        ``mean`` and ``stderr``, float64 scalars, and ``num_matvecs``.

    Cost: one product a probe; one vector kept.

    Raises:
        ValueError: there is no probe, or a product is not finite.

    >>> from hessfn import rademacher
    >>> squared_frobenius(lambda v: 3 * v, rademacher(torch.zeros(4), 2)).mean
    tensor(36., dtype=torch.float64)
    """
    _require_kinds(matvec, probes, "squared_frobenius(matvec, probes)")
    product = Watched(matvec, square=False)
    return _finished(product, estimate(tree.norm(product(z)).square() for z in probes))


def mean_traces(traces: Estimate[S], like: Tree) -> Estimate[S]:
    """Traces per leaf divided by the leaf's number of entries: the mean curvature by which layers are given bits.

    Source: HAWQ-V2 (Dong et al., 2020).
    """
    require_estimate(traces, "traces", "mean_traces(traces, like)")

    def divided(values: S) -> S:
        return tree.map(lambda value, leaf: value / max(leaf.numel(), 1), values, like)

    return Estimate(divided(traces.mean), divided(traces.stderr), traces.num_matvecs)


def deflated_trace(
    matvec: MatVec[T], probes: Iterable[T], eigenpairs: EigenPairs[T], *, rtol: float | None = None
) -> Estimate[Tensor]:
    """The trace from eigenpairs one has already: their sum, plus Hutchinson on what they leave.

    ``sum_i value_i + E z'(I - QQ') A (I - QQ') z``: unbiased for any symmetric A, as long as the probes and the start
    of the eigenpairs are independent, however well the pairs have converged.

    Args:
        probes: as for :func:`hutchinson`.
        eigenpairs: what ``eigsh`` returns: orthonormal vectors with ``values = diag(Q'AQ)``.
        rtol: as for :func:`hutchinson`, of the whole trace.

    Returns:
        ``mean``, ``stderr`` and ``num_matvecs``, which leaves out the products the eigenpairs took.

    Cost: one product a probe; the k eigenvectors, once more as a matrix.

    Raises:
        ValueError: there is no probe, a product is not finite, or the products have a derivative and the eigenpairs
            none (those of ``eigsh(..., rtol=None)`` do), since their part of it would be missing.

    Source: deflation as in Hutch++ (Meyer, Musco, Musco and Woodruff, 2021), with Ritz vectors for the sketch.

    >>> from hessfn import eigsh, rademacher
    >>> A = torch.diag(torch.tensor([9.0, 1.0, 1.0]))
    >>> pairs = eigsh(lambda v: A @ v, torch.ones(3))
    >>> deflated_trace(lambda v: A @ v, rademacher(torch.zeros(3), 10), pairs).mean.round(decimals=2)
    tensor(11., dtype=torch.float64)
    """
    call = "deflated_trace(matvec, probes, eigenpairs)"
    _require_kinds(matvec, probes, call)
    require_eigenpairs(eigenpairs, call)
    outside, inside = complement_of(eigenpairs.vectors), eigenpairs.values.sum()
    product = Watched(matvec, tolerance=rtol is not None)

    def sample(z: T) -> Tensor:
        rest = outside(z)
        image = product(rest)
        if carries_derivative(image) and not carries_derivative(inside):
            raise InvalidInput(
                "the products of deflated_trace have a derivative and its eigenpairs have none, so that their part of "
                "it would be missing: take them inside, by eigsh(..., rtol=None, max_matvecs=m), or take hutchinson"
            )
        return inside + tree.dot(rest, image)

    samples = map(sample, probes)
    return _finished(product, estimate(samples) if rtol is None else estimate_until(samples, rtol))


def _require_kinds(matvec: MatVec[T], probes: Iterable[T], call: str) -> None:
    require_matvec(matvec, call)
    require_probes(probes, call)


def _finished(product: Watched[T], result: Estimate[S]) -> Estimate[S]:
    """The estimate, when all products are finite; the error of a single probe is infinite, and is not asked."""
    product.finished(result.mean)
    return result
