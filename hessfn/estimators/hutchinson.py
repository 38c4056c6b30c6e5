"""Traces and diagonals of a matvec, each with its standard error."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from hessfn.core import tree
from hessfn.core.arguments import require_eigenpairs, require_estimate
from hessfn.core.errors import InvalidInput
from hessfn.core.probes import each
from hessfn.core.projection import complement_of
from hessfn.core.results import EigenPairs, Estimate, S
from hessfn.core.torch_state import carries_derivative
from hessfn.core.tree import MatVec, T, Tree
from hessfn.core.watched import Watched
from hessfn.estimators.control_variate import control_variate, plus, require_kinds, rest_of
from hessfn.estimators.quadratic_forms import Form, Parts, form, mean_form, mean_form_until, per_leaf, per_sample, whole
from hessfn.estimators.running_mean import finished
from hessfn.estimators.through_origin import slopes


def hutchinson(
    matvec: MatVec[T],
    probes: Iterable[T],
    *,
    rtol: float | None = None,
    batch_size: int = 1,
    eigenpairs: EigenPairs[T] | None = None,
) -> Estimate[Tensor]:
    """The trace, as the mean of ``z'Az`` over the probes.

    A Rademacher probe has variance ``2 (||A||_F^2 - sum_i a_ii^2)``, a Gaussian one ``2 ||A||_F^2``.

    Args:
        matvec: products with a symmetric A.
        probes: ``rademacher(params, num)``, or any iterable of independent trees with ``E zz' = I``.
        rtol: stop once half the width of the 95 % confidence interval (Student's t) is at most ``rtol |mean|``, after
            10 probes at least. None takes all probes, and then runs under ``vmap`` and autograd. With a tolerance
            there is no derivative: where the products have one, that is an error.
        batch_size: this many products at a time, under ``vmap``: for a GPU that one product does not fill. On a CPU
            it saves nothing.
        eigenpairs: what ``eigsh`` found, as a control variate: with ``B = sum_i value_i q_i q_i'`` the samples are
            ``tr B + z'(A - B) z``, and the variance is that of A without its outliers. Unbiased for any values and
            vectors that do not depend on the probes, converged or not. Where the products have a derivative, it is
            unbiased too, and the eigenpairs need none.

    Returns:
        ``mean`` and ``stderr``, float64 scalars, and ``num_matvecs``, one for each probe taken.

    Cost: one product a probe; one vector kept. Eigenpairs cost no product, two passes over their vectors a probe.

    Raises:
        ValueError: there is no probe, or a product is not finite.

    Source: Hutchinson (1989).

    >>> import torch
    >>> from hessfn import rademacher
    >>> hutchinson(lambda v: 3 * v, rademacher(torch.zeros(4), 10)).mean
    tensor(12., dtype=torch.float64)
    """
    require_kinds(matvec, probes, "hutchinson(matvec, probes)")
    known = control_variate(eigenpairs, "hutchinson(matvec, probes, eigenpairs=...)")
    product = Watched(matvec, tolerance=rtol is not None)
    inside = None if known is None else known.trace()
    parts: Parts[T, Tensor] = whole()
    samples = each(lambda z: form(z, rest_of(known, z, product(z)), parts), probes, batch_size)
    return finished(product, _mean(samples, parts, rtol, inside))


def hutchinson_per_leaf(
    matvec: MatVec[T], probes: Iterable[T], *, batch_size: int = 1, eigenpairs: EigenPairs[T] | None = None
) -> Estimate[T]:
    """The trace of every leaf's diagonal block, all from the same products.

    The blocks between leaves have mean 0 and add to the variance. For a smaller variance of one leaf, ``restrict`` the
    matvec to it.

    Args:
        matvec, probes, batch_size: as for :func:`hutchinson`.
        eigenpairs: as for :func:`hutchinson`; they also remove variance that comes from the blocks between leaves.

    Returns:
        ``mean`` and ``stderr``, trees of float64 scalars, and ``num_matvecs``.

    Cost: one product a probe; one vector kept.

    Raises:
        ValueError: there is no probe, or a product is not finite.

    >>> import torch
    >>> from hessfn import rademacher
    >>> hutchinson_per_leaf(lambda v: {"a": 2 * v["a"]}, rademacher({"a": torch.zeros(3)}, 2)).mean
    {'a': tensor(6., dtype=torch.float64)}
    """
    require_kinds(matvec, probes, "hutchinson_per_leaf(matvec, probes)")

    known = control_variate(eigenpairs, "hutchinson_per_leaf(matvec, probes, eigenpairs=...)")
    product = Watched(matvec)

    parts: Parts[T, T] = per_leaf()
    samples = each(lambda z: form(z, rest_of(known, z, product(z)), parts), probes, batch_size)
    result = finished(product, mean_form(samples, parts))
    return result if known is None else plus(result, known.traces())


def hutchinson_per_sample(matvec: MatVec[T], probes: Iterable[T]) -> Estimate[T]:
    """The trace of every sample's own matrix ``H_i``, where A is block-diagonal over B samples with blocks ``H_i / B``.

    Activation Hessians in eval mode have this form. The trace of sample i is estimated by B times the sum of ``z * Az``
    over its entries; the mean over the samples is the trace of A.

    Args:
        matvec: on trees whose leaves have the samples along their first axis.
        probes: as for :func:`hutchinson`.

    Returns:
        ``mean`` and ``stderr``, trees of float64 tensors ``(B,)``, and ``num_matvecs``.

    Cost: one product a probe; one vector kept.

    Raises:
        ValueError: there is no probe, a product is not finite, or the leaves differ in the length of their first
            axis.

    >>> import torch
    >>> from hessfn import rademacher
    >>> d = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> hutchinson_per_sample(lambda v: d * v / 2, rademacher(torch.zeros(2, 2), 2)).mean
    tensor([3., 7.], dtype=torch.float64)
    """
    require_kinds(matvec, probes, "hutchinson_per_sample(matvec, probes)")

    product, parts = Watched(matvec), per_sample()

    def samples() -> Iterator[Form[T, T]]:
        for z in probes:
            lengths = {name: tuple(x.shape[:1]) for name, x in zip(tree.names(z), tree.leaves(z), strict=True)}
            if len(set(lengths.values())) > 1 or () in lengths.values():
                raise InvalidInput(f"samples must lie along the first axis of every leaf, but these have {lengths}")
            yield form(z, tree.map(lambda x: len(x) * x, product(z)), parts)

    return finished(product, mean_form(samples(), parts))


def hutchinson_diag(
    matvec: MatVec[T], probes: Iterable[T], *, batch_size: int = 1, eigenpairs: EigenPairs[T] | None = None
) -> Estimate[T]:
    """The diagonal, as the mean of ``z * Az`` over Rademacher probes.

    For any probes it is ``sum z * Az / sum z * z``, with sums over the probes. One Rademacher probe has the variance
    ``sum_{j != i} a_ij^2`` in entry i.

    Args:
        probes: ``rademacher(params, num)``. Others are right too: p Gaussian ones have the variance of p - 2.
        batch_size, eigenpairs: as for :func:`hutchinson`.

    Returns:
        ``mean`` and ``stderr``, trees like the probes, and ``num_matvecs``.

    Cost: one product a probe; three vectors kept.

    Raises:
        ValueError: there is no probe, or a product is not finite.

    Source: Bekas, Kokiopoulou and Saad (2007).

    >>> import torch
    >>> from hessfn import rademacher
    >>> d = torch.tensor([3.0, 1.0])
    >>> hutchinson_diag(lambda v: d * v, rademacher(torch.zeros(2), 4)).mean
    tensor([3., 1.])
    """
    require_kinds(matvec, probes, "hutchinson_diag(matvec, probes)")

    known = control_variate(eigenpairs, "hutchinson_diag(matvec, probes, eigenpairs=...)")
    product = Watched(matvec)

    pairs = each(lambda z: (z, rest_of(known, z, product(z))), probes, batch_size)
    result = finished(product, slopes(pairs))
    return result if known is None else plus(result, known.diagonal())


def mean_traces(traces: Estimate[S], like: Tree) -> Estimate[S]:
    """The trace of every leaf divided by its number of entries: the mean curvature by which HAWQ-V2 gives layers bits.

    Args:
        traces: of :func:`hutchinson_per_leaf` or :func:`hessfn.activation_traces`: a tree of scalars.
        like: the parameters or shifts that the traces belong to: a tree of tensors with the same leaves.

    Returns:
        ``traces`` with its mean and errors divided by the leaf's number of entries; a shift has those of all B samples.

    Cost: no product.

    Raises:
        ValueError: ``traces`` is no estimate, or the leaves of ``like`` are others.

    Source: HAWQ-V2 (Dong et al., 2020).

    >>> import torch
    >>> traces = Estimate({"w": torch.tensor(6.0)}, {"w": torch.tensor(0.3)}, torch.tensor(10))
    >>> mean_traces(traces, {"w": torch.zeros(3)}).mean
    {'w': tensor(2.)}
    """
    require_estimate(traces, "traces", "mean_traces(traces, like)")

    def divided(values: S) -> S:
        return tree.map(lambda value, leaf: value / max(leaf.numel(), 1), values, like)

    return traces._replace(
        mean=divided(traces.mean),
        stderr=divided(traces.stderr),
        rounding=None if traces.rounding is None else divided(traces.rounding),
        data_stderr=None if traces.data_stderr is None else divided(traces.data_stderr),
    )


def deflated_trace(
    matvec: MatVec[T], probes: Iterable[T], eigenpairs: EigenPairs[T], *, rtol: float | None = None
) -> Estimate[Tensor]:
    """The trace from known eigenpairs: the sum of their values, plus Hutchinson's estimate on the complement.

    ``sum_i value_i + E z'(I - QQ') A (I - QQ') z``: unbiased for any symmetric A, as long as the probes and the start
    of the eigenpairs are independent, however well the pairs have converged. Unlike ``hutchinson`` with ``eigenpairs``
    it projects the probe instead of correcting the sample: in half precision the large eigenvalues then add no
    rounding, and unconverged pairs leave less variance. In return the values must be Rayleigh quotients, and
    derivatives must go through the pairs.

    Args:
        probes: as for :func:`hutchinson`.
        eigenpairs: what ``eigsh`` returns: orthonormal vectors with ``values = diag(Q'AQ)``.
        rtol: as for :func:`hutchinson`, of the whole trace.

    Returns:
        ``mean``, ``stderr`` and ``num_matvecs``, without the products that the eigenpairs took.

    Cost: one product a probe; a copy of the k eigenvectors, three of them at first.

    Raises:
        ValueError: there is no probe, a product is not finite, or the products have a derivative and the eigenpairs
            none (those of ``eigsh(..., rtol=None)`` do), since their part of it would be missing.

    Source: deflation as in Hutch++ (Meyer, Musco, Musco and Woodruff, 2021), with Ritz vectors for the sketch.

    >>> import torch
    >>> from hessfn import eigsh, rademacher
    >>> A = torch.diag(torch.tensor([9.0, 1.0, 1.0]))
    >>> pairs = eigsh(lambda v: A @ v, torch.ones(3))
    >>> deflated_trace(lambda v: A @ v, rademacher(torch.zeros(3), 10), pairs).mean.round(decimals=2)
    tensor(11., dtype=torch.float64)
    """
    call = "deflated_trace(matvec, probes, eigenpairs)"
    require_kinds(matvec, probes, call)
    require_eigenpairs(eigenpairs, call)
    outside, inside = complement_of(eigenpairs.vectors), eigenpairs.values.sum()
    product, parts = Watched(matvec, tolerance=rtol is not None), whole()

    def sample(z: T) -> Form[T, Tensor]:
        image = product(outside(z))
        if carries_derivative(image) and not carries_derivative(inside):
            raise InvalidInput(
                "the products of deflated_trace have a derivative and its eigenpairs have none, so that their part of "
                "it would be missing: take them inside, by eigsh(..., rtol=None, max_matvecs=m), or take hutchinson"
            )
        return form(z, outside(image), parts)

    return finished(product, _mean(map(sample, probes), parts, rtol, inside))


def _mean(
    samples: Iterable[Form[T, Tensor]], parts: Parts[T, Tensor], rtol: float | None, inside: Tensor | None
) -> Estimate[Tensor]:
    """The mean of forms, and what is known beside it."""
    if rtol is not None:
        return mean_form_until(samples, parts, rtol, 0.0 if inside is None else inside)
    found = mean_form(samples, parts)
    return found if inside is None else plus(found, inside)
