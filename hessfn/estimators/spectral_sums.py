"""Sums over the eigenvalues of a function of them, from a quadrature."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hessfn.core.arguments import require_function, require_quadrature
from hessfn.core.results import Estimate, Quadrature
from hessfn.estimators.running_mean import estimate


def trace_of(quadrature: Quadrature, fn: Callable[[Tensor], Tensor], n: int) -> Estimate[Tensor]:
    """``tr fn(A)`` for a function of the eigenvalues, from a quadrature.

    Args:
        fn: elementwise, ``(p, m) -> (p, m)``. ``lambda x: (x + shift).log()`` gives the log-determinant of
            ``A + shift I``, ``lambda x: x / (x + alpha)`` the effective dimension, and ``lambda x: -x.clamp(max=0)``
            over ``torch.abs`` the fraction of curvature that is negative. Functions with a kink where most eigenvalues
            lie, as these two at 0, converge slowly: on ResNet20 either is off by a factor of 3 at 30 steps, their ratio
            by a tenth.
        n: the number of entries of a probe.

    Returns:
        ``mean``; ``stderr``, the spread over the probes, which knows nothing of the error of the rule itself (take more
        steps and compare); and ``num_matvecs``. Differentiable.

    Source: Ubaru, Chen and Saad (2017).

    >>> rule = Quadrature(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.5, 0.5]]))
    >>> trace_of(rule, torch.log, 2).mean
    tensor(1.0986)
    """
    call = "trace_of(quadrature, fn, n)"
    require_quadrature(quadrature, call)
    require_function(fn, "fn", call)
    nodes, weights = quadrature
    result = estimate(n * (weights * fn(nodes)).sum(-1))
    return result._replace(num_matvecs=torch.tensor(nodes.numel()))


def negative_share(quadrature: Quadrature) -> Estimate[Tensor]:
    """The share of the sum of all |eigenvalues| that is below zero: a ratio of means over the probes.

    Returns:
        ``mean``, from 0 to 1, and ``stderr``, the spread over the probes (inf of a single one), which knows nothing of
        the error of the rule itself; ``num_matvecs``.

    >>> float(negative_share(Quadrature(torch.tensor([[-1.0, 3.0]]), torch.tensor([[0.5, 0.5]]))).mean)
    0.25
    """
    nodes, weights = quadrature
    below, total = ((weights * x).sum(-1) for x in (-nodes.clamp(max=0), nodes.abs()))
    share = below.mean() / total.mean()
    spread = estimate((below - share * total) / total.mean())
    return spread._replace(mean=share, num_matvecs=torch.tensor(nodes.numel()))
