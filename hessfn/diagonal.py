"""Diagonals and norms of rows of a matvec, with a standard error for every entry."""

from __future__ import annotations

from collections.abc import Iterable

from hessfn import tree
from hessfn.trace import Estimate, estimate
from hessfn.tree import MatVec, Tree


def hutchinson_diag(matvec: MatVec, probes: Iterable[Tree]) -> Estimate:
    """The diagonal, as the mean of ``z * Az`` over Rademacher probes.

    A probe has variance ``sum_{j != i} a_ij^2`` in entry i.

    Args:
        probes: ``rademacher(params, num)``. Gaussian probes are right too, with the variance ``2 a_ii^2`` on top.

    Returns:
        ``mean`` and ``stderr``, trees like the probes, and ``num_matvecs``.

    Cost: one product a probe; two vectors kept.

    Raises:
        ValueError: there is no probe.

    Source: Bekas, Kokiopoulou and Saad (2007).

    >>> import torch
    >>> from hessfn import rademacher
    >>> d = torch.tensor([3.0, 1.0])
    >>> hutchinson_diag(lambda v: d * v, rademacher(torch.zeros(2), 4)).mean
    tensor([3., 1.])
    """
    return estimate(tree.map(lambda a, b: a * b, z, matvec(z)) for z in probes)
