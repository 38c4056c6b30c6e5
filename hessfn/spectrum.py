"""Spectral densities by stochastic Lanczos quadrature, and traces of functions of the matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from hessfn import krylov, tree
from hessfn.trace import Estimate, estimate
from hessfn.tree import MatVec, Tree


class Quadrature(NamedTuple):
    nodes: Tensor
    weights: Tensor


class Density(NamedTuple):
    grid: Tensor
    values: Tensor


def slq(matvec: MatVec, probes: Iterable[Tree], num_matvecs: int, *, orthogonalize: bool = False) -> Quadrature:
    """Stochastic Lanczos quadrature: a Gauss rule for the spectrum as every probe sees it.

    ``tr f(A) / n ~ mean over probes of sum_j weights_j f(nodes_j)``; for one probe z the rule is exact for
    ``z'f(A)z / z'z`` and polynomials f of degree up to 2m - 1.

    Args:
        probes: ``gaussian(params, num)``: directions must be uniform.
        num_matvecs: the number m of Lanczos steps for each probe; 90 is usual. More steps before more probes.
        orthogonalize: keep the basis and stay orthogonal to it. Without, copies of converged nodes come up and share
            their weight: the same rule to the accuracy of the method.

    Returns:
        ``nodes (p, m)``, ascending, and ``weights (p, m)``, each row summing to 1, both float64. Where a Krylov space
        ends early the surplus nodes have weight 0. All runs under ``vmap`` and autograd.

    Cost: p m products; three vectors kept, or m with ``orthogonalize``.

    Raises:
        ValueError: there is no probe, or m is not between 1 and n.

    Source: Lin, Saad and Yang (2016), Ubaru, Chen and Saad (2017); without orthogonalisation Chen, Trogdon and Ubaru
    (2021).

    >>> from hessfn import gaussian
    >>> A = torch.diag(torch.tensor([3.0, 1.0]))
    >>> slq(lambda v: A @ v, gaussian(torch.zeros(2), 1), 2).nodes.round(decimals=4)
    tensor([[1., 3.]], dtype=torch.float64)
    """
    nodes, weights = [], []
    for probe in probes:
        n = tree.numel(probe)
        if not 1 <= num_matvecs <= n:
            raise ValueError(f"num_matvecs={num_matvecs} must be between 1 and {n}, the number of entries in a probe")
        space = krylov.flatten(matvec, probe)
        steps = krylov.expand if orthogonalize else krylov.recur
        alpha, beta = steps(space.matvec, space.ravel(probe), num_matvecs, space.eps)[:2]
        theta, vectors = torch.linalg.eigh(krylov.tridiagonal(alpha, beta[:-1]))
        nodes.append(theta)
        weights.append(vectors[0].square())
    if not nodes:
        raise ValueError("there is no probe: gaussian(params, num) needs num >= 1")
    return Quadrature(torch.stack(nodes), torch.stack(weights))


def density(quadrature: Quadrature, grid: Tensor | None = None, *, sigma: float | None = None) -> Density:
    """The spectral density, smoothed by a Gaussian of width ``sigma``; it integrates to 1.

    ``values(x) = mean over probes of sum_j weights_j N(x; nodes_j, sigma^2)``.

    Args:
        grid: where to evaluate ``(g,)``; by default evenly over all nodes and five widths beyond.
        sigma: in the units of the eigenvalues; by default ``range / ((m - 1) sqrt(8 ln 3))``, what m nodes resolve.

    Returns:
        ``grid (g,)`` and ``values (g,)``, per unit of eigenvalue.

    Source: Lin, Saad and Yang (2016), which also gives the width.

    >>> rule = Quadrature(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]]))
    >>> x, y = density(rule, sigma=0.1)
    >>> round(float(torch.trapezoid(y, x)), 6)
    1.0
    """
    nodes, weights = quadrature
    low, high = float(nodes.min()), float(nodes.max())
    if sigma is None:
        # A single point has no range of its own: its size is the only scale there is.
        span = high - low if high > low else abs(high) or 1.0
        sigma = span / (max(nodes.shape[-1] - 1, 1) * math.sqrt(8 * math.log(3)))
    if sigma <= 0:
        raise ValueError(f"sigma={sigma} must be positive; it is in the units of the eigenvalues")
    if grid is None:
        steps = max(1024, math.ceil(2 * (high - low) / sigma) + 20)
        grid = torch.linspace(low - 5 * sigma, high + 5 * sigma, steps, dtype=nodes.dtype, device=nodes.device)
    rows = [_smoothed(grid, n, w, sigma) for n, w in zip(nodes, weights, strict=True)]
    return Density(grid, torch.stack(rows).mean(0))


def trace_of(quadrature: Quadrature, fn: Callable[[Tensor], Tensor], n: int) -> Estimate:
    """``tr fn(A)`` for a function of the eigenvalues, from a quadrature.

    Args:
        fn: elementwise, ``(p, m) -> (p, m)``: ``lambda x: (x + shift).log()`` for the log-determinant of
            ``A + shift I``, ``lambda x: x / (x + alpha)`` for the effective dimension.
        n: the number of entries of a probe.

    Returns:
        ``mean``; ``stderr``, the spread over the probes, which does not know the error of the rule itself; and
        ``num_matvecs``.

    >>> rule = Quadrature(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.5, 0.5]]))
    >>> trace_of(rule, torch.log, 2).mean
    tensor(1.0986)
    """
    nodes, weights = quadrature
    result = estimate(n * (weights * fn(nodes)).sum(-1))
    return result._replace(num_matvecs=torch.tensor(nodes.numel()))


def _smoothed(grid: Tensor, nodes: Tensor, weights: Tensor, sigma: float) -> Tensor:
    z = (grid[:, None] - nodes) / sigma
    return (-0.5 * z.square()).exp() @ weights / (sigma * math.sqrt(2 * math.pi))
