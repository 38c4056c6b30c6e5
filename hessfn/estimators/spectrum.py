"""Spectral densities by stochastic Lanczos quadrature, and traces of functions of the matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.core.arguments import require_function, require_matvec, require_probes, require_quadrature
from hessfn.core.errors import InvalidInput
from hessfn.core.memory import own
from hessfn.core.probes import each
from hessfn.core.results import Band, Cumulative, Density, Estimate, Quadrature
from hessfn.core.tree import MatVec, T
from hessfn.estimators import krylov
from hessfn.estimators.running_mean import estimate, half_width
from hessfn.estimators.smoothing import smoothed


def slq(
    matvec: MatVec[T], probes: Iterable[T], num_matvecs: int, *, orthogonalize: bool = False, batch_size: int = 1
) -> Quadrature:
    """Stochastic Lanczos quadrature: a Gauss rule for the spectrum as every probe sees it.

    ``tr f(A) / n ~ mean over probes of sum_j weights_j f(nodes_j)``; for one probe z the rule is exact for
    ``z'f(A)z / z'z`` and polynomials f of degree up to 2m - 1.

    Args:
        probes: ``gaussian(params, num)``: directions must be uniform.
        num_matvecs: the number m of Lanczos steps for each probe; 90 is usual. More steps before more probes.
        orthogonalize: keep the basis and stay orthogonal to it. Without, copies of converged nodes come up and share
            their weight: the same rule to the accuracy of the method.
        batch_size: so many probes at a time, under ``vmap``: for GPUs that one product leaves idle.

    Returns:
        ``nodes (p, m)``, ascending, and ``weights (p, m)``, each row summing to 1, both float64. Where a Krylov space
        ends early the surplus nodes have weight 0. All runs under ``vmap`` and autograd.

    Cost: p m products; three vectors kept, or m with ``orthogonalize``.

    Raises:
        ValueError: there is no probe, a product is not finite, or m is not between 1 and n.

    Source: Lin, Saad and Yang (2016), Ubaru, Chen and Saad (2017); without orthogonalisation Chen, Trogdon and Ubaru
    (2021).

    >>> from hessfn import gaussian
    >>> A = torch.diag(torch.tensor([3.0, 1.0]))
    >>> slq(lambda v: A @ v, gaussian(torch.zeros(2), 1), 2).nodes.round(decimals=4)
    tensor([[1., 3.]], dtype=torch.float64)
    """
    call = "slq(matvec, probes, num_matvecs)"
    require_matvec(matvec, call)
    require_probes(probes, call)

    def recurrence(probe: T) -> tuple[Tensor, Tensor]:
        n = tree.numel(probe)
        if not 1 <= num_matvecs <= n:
            raise InvalidInput(f"num_matvecs={num_matvecs} must be between 1 and {n}, the number of entries in a probe")
        space = krylov.flatten(matvec, probe)
        steps = krylov.expand if orthogonalize else krylov.recur
        alpha, beta = steps(space.matvec, space.ravel(probe), num_matvecs, space.eps)[:2]
        space.finished(alpha)
        return alpha, beta[:-1]

    def rule(alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        theta, vectors = krylov.decompose(alpha, beta)
        return theta, vectors[0].square()

    # Not under the vmap of a group, which hides what is not finite.
    rules = [rule(alpha, beta) for alpha, beta in each(recurrence, probes, batch_size)]
    if not rules:
        raise InvalidInput("there is no probe: gaussian(params, num) needs num >= 1")
    nodes, weights = (torch.stack(rows) for rows in zip(*rules, strict=True))
    return Quadrature(nodes, weights)


def density(
    quadrature: Quadrature, grid: Tensor | None = None, *, sigma: float | None = None, linthresh: float | None = None
) -> Density:
    """The spectral density, smoothed by a Gaussian of width ``sigma``; it integrates to 1.

    ``values(x) = mean over probes of sum_j weights_j N(x; nodes_j, sigma^2)``.

    Args:
        grid: where to evaluate ``(g,)``; by default evenly over all nodes and five widths beyond.
        sigma: in the units of the eigenvalues; by default ``range / ((m - 1) sqrt(8 ln 3))``, what m nodes resolve.
        linthresh: for a logarithmic axis. The smoothing is done, the grid laid and ``sigma`` measured along
            ``asinh(x / linthresh)``, which is linear for eigenvalues below ``linthresh`` in size, logarithmic beyond.

    Returns:
        ``grid (g,)`` and ``values (g,)``, per unit of eigenvalue on either axis. All runs under ``vmap`` and autograd.

    Raises:
        ValueError: ``sigma`` or ``linthresh`` is not positive, or ``sigma`` too small for a grid over all nodes;
            ``vmap`` with a ``sigma`` and no ``grid``.

    Source: Lin, Saad and Yang (2016), which also gives the width.

    >>> rule = Quadrature(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]]))
    >>> x, y = density(rule, sigma=0.1)
    >>> round(float(torch.trapezoid(y, x)), 6)
    1.0
    """
    require_quadrature(quadrature, "density(quadrature)")
    grid, rows = smoothed(quadrature, grid, sigma, linthresh)
    return Density(grid, rows.mean(0))


def density_band(
    quadrature: Quadrature,
    grid: Tensor | None = None,
    *,
    sigma: float | None = None,
    linthresh: float | None = None,
    level: float = 0.95,
) -> Band:
    """Where the smoothed density lies, point by point, as the spread over the probes has it (Student's t).

    Args:
        level: of confidence; the others are those of :func:`density`.

    Returns:
        ``grid``, ``lower`` and ``upper``, each ``(g,)``.

    Raises:
        ValueError: there are fewer than two probes.

    >>> rule = Quadrature(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.full((2, 2), 0.5))
    >>> grid, lower, upper = density_band(rule)
    >>> bool((lower == upper).all())
    True
    """
    require_quadrature(quadrature, "density_band(quadrature)")
    if len(quadrature.nodes) < 2:
        raise InvalidInput("one probe has no spread: a band takes the quadrature of two or more")
    grid, rows = smoothed(quadrature, grid, sigma, linthresh)
    mean, stderr, _ = estimate(rows)
    half = half_width(stderr, len(rows), level)
    return Band(grid, (mean - half).clamp(min=0), mean + half)


def cumulative(quadrature: Quadrature, grid: Tensor | None = None) -> Cumulative:
    """The fraction of the eigenvalues up to x, with no smoothing: the sum of the weights of the nodes up to x.

    Args:
        grid: where to evaluate ``(g,)``; by default at all nodes, where it steps.

    Returns:
        ``grid (g,)``, ascending by default, and ``values (g,)`` between 0 and 1.

    >>> cumulative(Quadrature(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.3, 0.7]]))).values
    tensor([0.3000, 1.0000])
    """
    require_quadrature(quadrature, "cumulative(quadrature)")
    nodes, order = quadrature.nodes.flatten().sort()
    steps = (quadrature.weights.flatten()[order] / len(quadrature.nodes)).cumsum(0)
    if grid is None:
        return Cumulative(nodes, steps)
    # The zero takes the grid along under vmap, which would else hand on a view that searchsorted warns of.
    count = torch.searchsorted(nodes, grid.to(nodes) + torch.zeros_like(nodes[:1]), right=True)
    return Cumulative(own(grid), torch.cat([torch.zeros_like(steps[:1]), steps])[count])


def wasserstein(a: Quadrature, b: Quadrature | Tensor) -> Tensor:
    """The Wasserstein-1 distance of two spectra, ``int |F_a - F_b| dx``, in the units of the eigenvalues.

    Args:
        b: another quadrature, or all eigenvalues ``(n,)``.

    >>> float(wasserstein(Quadrature(torch.tensor([[1.0]]), torch.tensor([[1.0]])), torch.tensor([3.0, 3.0])))
    2.0
    """
    require_quadrature(a, "wasserstein(a, b)")
    if isinstance(b, Tensor):
        b = Quadrature(b[None], torch.full_like(b[None], 1 / len(b)))
    require_quadrature(b, "wasserstein(a, b)")
    at = torch.cat([a.nodes.flatten(), b.nodes.flatten().to(a.nodes)]).sort().values
    gap = (cumulative(a, at).values - cumulative(b, at.to(b.nodes)).values.to(at)).abs()
    return (gap[:-1] * at.diff()).sum()


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
    return Estimate(share, spread.stderr, torch.tensor(nodes.numel()))
