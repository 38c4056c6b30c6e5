"""Squared norms of a matrix and of its rows, each with its standard error."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.core.dtensor import layout, place
from hessfn.core.results import EigenPairs, Estimate, S
from hessfn.core.tree import MatVec, T
from hessfn.core.watched import Watched
from hessfn.estimators.control_variate import control_variate, plus, require_kinds
from hessfn.estimators.quadratic_forms import TELLING, kurtosis
from hessfn.estimators.running_mean import estimate, finished


def squared_row_norms(
    matvec: MatVec[T], probes: Iterable[T], *, eigenpairs: EigenPairs[T] | None = None
) -> Estimate[T]:
    """The squared norm of every row, ``sum_j a_ij^2``, as the mean of ``(Az)^2``; no estimate of a squared diagonal.

    Args:
        eigenpairs: as for :func:`hutchinson`: the samples are ``(Az)^2 - (Bz)^2``, those of B being known.

    Returns:
        ``mean`` and ``stderr``, trees like the probes but in float64, which has room for squares, and ``num_matvecs``.

    Cost: one product a probe; two vectors kept, in float64.

    Raises:
        ValueError: there is no probe, or a product is not finite.

    Source: Bekas, Kokiopoulou and Saad (2007), for the diagonal of ``A^2``.

    >>> from hessfn import rademacher
    >>> d = torch.tensor([3.0, 1.0])
    >>> squared_row_norms(lambda v: d * v, rademacher(torch.zeros(2), 4)).mean
    tensor([9., 1.], dtype=torch.float64)
    """
    require_kinds(matvec, probes, "squared_row_norms(matvec, probes)")

    known = control_variate(eigenpairs, "squared_row_norms(matvec, probes, eigenpairs=...)")
    product = Watched(matvec, square=known is not None)

    def squares(z: T) -> T:
        image = tree.map(lambda x: tree.wide(x).square(), product(z))
        return image if known is None else tree.map(lambda x, b: x - tree.wide(b).square(), image, known.image(z))

    kurtoses: list[Tensor] = []
    result = finished(product, estimate(squares(z) for z in _watched(probes, kurtoses)))
    result = _squares(result, kurtoses)
    return result if known is None else _above(plus(result, known.squared_row_norms()), known.squared_row_norms())


def squared_frobenius(
    matvec: MatVec[T], probes: Iterable[T], *, eigenpairs: EigenPairs[T] | None = None
) -> Estimate[Tensor]:
    """The squared Frobenius norm, ``sum_ij a_ij^2``, the sum of the squared eigenvalues, as the mean of ``||Az||^2``.

    Args:
        eigenpairs: as for :func:`hutchinson`: the samples are ``||Az||^2 - ||Bz||^2 + ||B||_F^2``.

    Returns:
        ``mean`` and ``stderr``, float64 scalars, and ``num_matvecs``.

    Cost: one product a probe; one vector kept.

    Raises:
        ValueError: there is no probe, or a product is not finite.

    Source: Hutchinson (1989), for ``A^2``.

    >>> from hessfn import rademacher
    >>> squared_frobenius(lambda v: 3 * v, rademacher(torch.zeros(4), 2)).mean
    tensor(36., dtype=torch.float64)
    """
    require_kinds(matvec, probes, "squared_frobenius(matvec, probes)")
    known = control_variate(eigenpairs, "squared_frobenius(matvec, probes, eigenpairs=...)")
    product = Watched(matvec, square=known is not None)

    def sample(z: T) -> Tensor:
        square = tree.norm(product(z)).square()
        return square if known is None else square - tree.norm(known.image(z)).square()

    kurtoses: list[Tensor] = []
    result = finished(product, estimate(map(sample, _watched(probes, kurtoses))))
    result = _squares(result, kurtoses)
    return result if known is None else _above(plus(result, known.squared_frobenius()), known.squared_frobenius())


def _watched(probes: Iterable[T], kurtoses: list[Tensor]) -> Iterator[T]:
    for z in probes:
        kurtoses.append(kurtosis(z))
        yield z


def _squares(result: Estimate[S], kurtoses: list[Tensor]) -> Estimate[S]:
    """A mean of squares, which knows that it is one: of few probes with signs for entries nothing more is known."""
    p = len(kurtoses)
    result = result._replace(least=tree.map(torch.zeros_like, result.mean))
    if not 1 < p < TELLING:
        return result
    signs = ((3 - torch.stack(kurtoses).mean()) / 2).clamp(0, 1)

    def wider(mean: Tensor, stderr: Tensor) -> Tensor:
        return torch.maximum(stderr, (signs * 2 / p).sqrt() * mean.abs())

    return result._replace(stderr=tree.map(wider, result.mean, result.stderr))


def _above(result: Estimate[S], least: S) -> Estimate[S]:
    return result._replace(least=tree.map(lambda m, x: place(x.to(m), layout(m)), result.mean, least))
