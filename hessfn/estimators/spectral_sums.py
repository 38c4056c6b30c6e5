"""Sums over the eigenvalues of a function of them, from a quadrature."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hessfn.core.arguments import require_function, require_quadrature
from hessfn.core.results import Estimate, Quadrature
from hessfn.estimators.quadratic_forms import degrees
from hessfn.estimators.running_mean import estimate


def trace_of(quadrature: Quadrature, fn: Callable[[Tensor], Tensor], n: int) -> Estimate[Tensor]:
    """``tr fn(A)``, the sum of a function over the eigenvalues, from a quadrature.

    Args:
        quadrature: of :func:`hessfn.slq`.
        fn: elementwise, ``(p, m) -> (p, m)``. ``lambda x: (x + shift).log()`` gives the log-determinant of
            ``A + shift I``, ``lambda x: x / (x + alpha)`` the effective dimension, and ``lambda x: -x.clamp(max=0)``
            over ``torch.abs`` the fraction of curvature that is negative. Functions with a kink where most eigenvalues
            lie, as these two at 0, converge slowly: on ResNet20 either is off by a factor of 3 at 30 steps, their ratio
            by a tenth.
        n: the number of entries of a probe.

    Returns:
        ``mean`` and ``stderr``, scalars in the unit of ``fn``, and ``num_matvecs``. ``stderr`` is the error by the
        probes; for the error of the rule itself, take more steps and compare. Differentiable.

    Cost: no product; two calls of ``fn`` on the p m nodes.

    Raises:
        ValueError: ``quadrature`` or ``fn`` is of another kind.

    Source: Ubaru, Chen and Saad (2017).

    >>> rule = Quadrature(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.5, 0.5]]))
    >>> trace_of(rule, torch.log, 2).mean
    tensor(1.0986)
    """
    call = "trace_of(quadrature, fn, n)"
    require_quadrature(quadrature, call)
    require_function(fn, "fn", call)
    nodes, weights = quadrature
    found = estimate(n * (weights * fn(nodes)).sum(-1))._replace(num_matvecs=torch.tensor(nodes.numel(), device="cpu"))
    alone, values = own_part(quadrature, n).weights, fn(nodes)
    return from_own(found, (alone * values).sum(-1), (alone * values.square()).sum(-1), n)


def own_part(quadrature: Quadrature, n: int) -> Quadrature:
    """The rules without what eigenpairs add to every row alike: of ``u'f(A)u - sum_i f(theta_i) (q_i'u)^2``.

    The nodes of eigenpairs are the same in all rows, and only with them weights are negative.
    """
    nodes, weights = quadrature
    known = (nodes == nodes[:1]).all(0) & (weights < 0).any()
    last = torch.cat([torch.zeros_like(weights[0, :-1]), known.sum()[None].to(weights)])
    return Quadrature(nodes, weights - (known.to(weights) - last) / n)


def from_own(found: Estimate[Tensor], first: Tensor, second: Tensor, n: int) -> Estimate[Tensor]:
    """The estimate with the error that the rules know.

    With u a probe of unit norm, ``2 n (||Bu||^2 - (u'Bu)^2)`` has the variance of ``n u'Bu`` as its mean; ``first`` and
    ``second (p, ...)`` are ``u'Bu`` and ``||Bu||^2``.
    """
    if len(first) == 1:
        return found
    variances = 2 * n * (second - first.square()).clamp(min=0)
    return found._replace(stderr=(variances.mean(0) / len(first)).sqrt(), df=degrees(variances.detach()))


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
    return spread._replace(mean=share, num_matvecs=torch.tensor(nodes.numel(), device="cpu"))
