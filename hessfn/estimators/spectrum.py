"""Spectral densities by stochastic Lanczos quadrature."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.core.arguments import require_matvec, require_probes, require_quadrature, require_vector
from hessfn.core.errors import InvalidInput
from hessfn.core.memory import own
from hessfn.core.probes import each
from hessfn.core.results import Band, Cumulative, Density, EigenPairs, Quadrature
from hessfn.core.tree import MatVec, T
from hessfn.core.watched import Watched
from hessfn.estimators import krylov
from hessfn.estimators.control_variate import ControlVariate
from hessfn.estimators.running_mean import estimate
from hessfn.estimators.smoothing import smoothed
from hessfn.estimators.spectral_sums import from_own, own_part


def slq(
    matvec: MatVec[T],
    probes: Iterable[T],
    num_matvecs: int,
    *,
    orthogonalize: bool = False,
    batch_size: int = 1,
    eigenpairs: EigenPairs[T] | None = None,
) -> Quadrature:
    """Stochastic Lanczos quadrature: for every probe a Gauss rule of the spectrum.

    ``tr f(A) / n ~ mean over probes of sum_j weights_j f(nodes_j)``; for one probe z the rule is exact for
    ``z'f(A)z / z'z`` and polynomials f of degree up to 2m - 1.

    Args:
        probes: ``gaussian(params, num)``: directions must be uniform.
        num_matvecs: the number m of Lanczos steps for each probe; 90 is usual. More steps before more probes.
        orthogonalize: keep the basis and stay orthogonal to it. Without it, copies of converged nodes appear and share
            their weight: the same rule to the accuracy of the method.
        batch_size: this many probes at a time, under ``vmap``: for a GPU that one product does not fill.
        eigenpairs: k pairs of ``eigsh``, as a control variate. Each row gets their values as further nodes, with the
            weights ``1/n - (q_i'u)^2``, u the probe of unit norm, which correct the weight of a known eigenvalue. One
            more node, at the mean of the other eigenvalues according to the other probes, makes the weights sum to 1.
            Means over the probes stay unbiased for any values and vectors that do not depend on the probes.

    Returns:
        ``nodes (p, m)``, ascending, and ``weights (p, m)``, each row summing to 1, both float64. Where a Krylov space
        ends early, the surplus nodes have weight 0. All runs under ``vmap`` and autograd. With eigenpairs they are
        ``(p, m + k + 1)``, those of the pairs last, and weights may be negative; for a single probe the sum is then 1
        up to a random number of mean 0 and size ``sqrt(2k) / n``.

    Cost: p m products; four vectors at the peak, including the product, or m + 2 with ``orthogonalize``. Eigenpairs
    cost no product.

    Raises:
        ValueError: there is no probe, a product is not finite, or m is not between 1 and n.

    Source: Lin, Saad and Yang (2016), Ubaru, Chen and Saad (2017); without orthogonalisation Chen, Trogdon and Ubaru
    (2021); eigenpairs as in VR-SLQ (arXiv 2410.21690, 2024).

    >>> from hessfn import gaussian
    >>> A = torch.diag(torch.tensor([3.0, 1.0]))
    >>> slq(lambda v: A @ v, gaussian(torch.zeros(2), 1), 2).nodes.round(decimals=4)
    tensor([[1., 3.]], dtype=torch.float64)
    """
    call = "slq(matvec, probes, num_matvecs)"
    require_matvec(matvec, call)
    require_probes(probes, call)
    known = None if eigenpairs is None else ControlVariate(eigenpairs, call)
    product = Watched(matvec)

    def recurrence(probe: T) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        n = tree.numel(probe)
        if not 1 <= num_matvecs <= n:
            raise InvalidInput(f"num_matvecs={num_matvecs} must be between 1 and {n}, the number of entries in a probe")
        space = krylov.flatten(product, probe)
        size = tree.norm(probe)
        krylov.require_norms(size, "a probe", if_known=True)
        steps = krylov.expand if orthogonalize else krylov.recur
        alpha, beta = steps(space.matvec, space.ravel(probe) / size, num_matvecs, space.eps)[:2]
        seen = alpha[:0] if known is None else (known.components(probe) / size).square()
        return alpha, beta[:-1], seen, size

    # Not under the vmap of a group, which hides what is not finite.
    found = list(each(recurrence, probes, batch_size))
    if not found:
        raise InvalidInput("there is no probe: gaussian(params, num) needs num >= 1")
    alpha, beta, seen, sizes = (torch.stack(rows) for rows in zip(*found, strict=True))
    krylov.require_norms(sizes, "a probe")
    nodes, vectors = krylov.decompose(product.finished(alpha), beta)
    weights = vectors[..., 0, :].square()
    if known is None:
        return Quadrature(nodes, weights)
    expected = known.squares().to(weights) / known.numel
    return _corrected(nodes, weights, known.values.to(nodes), seen.to(weights), expected)


def _corrected(nodes: Tensor, weights: Tensor, values: Tensor, seen: Tensor, expected: Tensor) -> Quadrature:
    """Gauss rules ``(p, m)``, of which each has ``seen (p, k)`` of known eigenvalues in place of ``expected (k,)``."""
    p = len(nodes)
    mass = 1 - seen.sum(1, keepdim=True)
    moment = (nodes * weights).sum(1, keepdim=True) - (values * seen).sum(1, keepdim=True)
    # At a point that does not depend on the probe of the row, a weight of mean 0 leaves no bias.
    others = (moment.sum() - moment) / torch.where(mass.sum() - mass > 0, mass.sum() - mass, 1.0)
    others = others.clamp(nodes.min(), nodes.max())  # within the spectrum, where every function of it is defined
    missing = expected - seen
    rest = -missing.sum(1, keepdim=True) * min(p - 1, 1)
    return Quadrature(torch.cat([nodes, values.expand(p, -1), others], 1), torch.cat([weights, missing, rest], 1))


def quadrature_of(eigenpairs: EigenPairs[T], v0: T) -> Quadrature:
    """The quadrature of a Lanczos run, from its Ritz pairs and its start.

    ``weights_i = (q_i'v0)^2 / ||v0||^2``. With all pairs of a run that was not restarted,
    ``eigsh(matvec, v0, keep_all=True)``, it is the rule of ``slq(matvec, [v0], num_matvecs)``.

    Args:
        eigenpairs: k orthonormal vectors with their values.
        v0: the start of that run. Its direction must be uniform, as one of ``gaussian(params, 1)``.

    Returns:
        ``nodes (1, k)``, ascending, and ``weights (1, k)``; they sum to 1 where the vectors span the start.

    Cost: no product; one pass over the vectors.

    Raises:
        ValueError: ``eigenpairs`` is of another kind, or ``v0`` has other leaves than their vectors.

    Source: Golub and Meurant (2010).

    >>> from hessfn import eigsh
    >>> pairs = eigsh(lambda v: torch.tensor([3.0, 1.0]) * v, torch.ones(2), k=2)
    >>> quadrature_of(pairs, torch.ones(2)).weights.round(decimals=4)
    tensor([[0.5000, 0.5000]], dtype=torch.float64)
    """
    call = "quadrature_of(eigenpairs, v0)"
    require_vector(v0, "v0", call)
    known = ControlVariate(eigenpairs, call)
    order = known.values.detach().argsort(stable=True)
    weights = (known.components(v0) / tree.norm(v0)).square()
    return Quadrature(known.values[order][None], weights[order][None])


def density(
    quadrature: Quadrature, grid: Tensor | None = None, *, sigma: float | None = None, linthresh: float | None = None
) -> Density:
    """The spectral density, smoothed by a Gaussian of width ``sigma``; it integrates to 1.

    ``values(x) = mean over probes of sum_j weights_j N(x; nodes_j, sigma^2)``.

    Args:
        quadrature: of :func:`slq`.
        grid: where to evaluate ``(g,)``; by default evenly over all nodes and five widths beyond.
        sigma: in the units of the eigenvalues; by default ``range / ((m - 1) sqrt(8 ln 3))``, what m nodes resolve.
        linthresh: for a logarithmic axis. The smoothing is done, the grid laid and ``sigma`` measured along
            ``asinh(x / linthresh)``, which is linear for eigenvalues below ``linthresh`` in size, logarithmic beyond.

    Returns:
        ``grid (g,)`` and ``values (g,)``, per unit of eigenvalue on either axis. All runs under ``vmap`` and autograd.

    Cost: no product; p m g exponentials.

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
    n: int | None = None,
) -> Band:
    """A pointwise confidence band of the smoothed density, by the spread over the probes; without the smoothing's bias.

    Args:
        quadrature, grid, sigma, linthresh: as for :func:`density`.
        level: of confidence.
        n: the number of entries of a probe. With it the variance comes from the rules themselves, as in
            :func:`trace_of`, and the band is right for few probes too. Without it the spread is used, which near a
            single eigenvalue is too small for fewer than about 30 probes.

    Returns:
        ``grid``, ``lower`` and ``upper``, each ``(g,)``.

    Cost: no product; up to three times what :func:`density` costs.

    Raises:
        ValueError: there are fewer than two probes, or as for :func:`density`.

    >>> rule = Quadrature(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.full((2, 2), 0.5))
    >>> grid, lower, upper = density_band(rule)
    >>> bool((lower == upper).all())
    True
    """
    require_quadrature(quadrature, "density_band(quadrature)")
    if len(quadrature.nodes) < 2:
        raise InvalidInput("one probe has no spread: a band takes the quadrature of two or more")
    grid, rows = smoothed(quadrature, grid, sigma, linthresh)
    found = estimate(rows)
    if n is not None:
        alone = own_part(quadrature, n)
        first, second = (smoothed(alone, grid, sigma, linthresh, squared=x)[1] for x in (False, True))
        found = from_own(found, first / n, second / n**2, n)
    lower, upper = found.interval(level)
    return Band(grid, lower.clamp(min=0), upper)


def cumulative(quadrature: Quadrature, grid: Tensor | None = None) -> Cumulative:
    """The cumulative distribution of the eigenvalues, without smoothing: the sum of the weights of the nodes up to x.

    Args:
        quadrature: of :func:`slq`.
        grid: where to evaluate ``(g,)``; by default at all p m nodes, where it steps.

    Returns:
        ``grid (g,)``, ascending by default, and ``values (g,)`` between 0 and 1.

    Cost: no product; p m numbers are sorted.

    Raises:
        ValueError: ``quadrature`` is of another kind.

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
    """The Wasserstein-1 distance of two spectra, ``int |F_a - F_b| dx``, with F as :func:`cumulative` returns it.

    Args:
        a, b: quadratures of :func:`slq`; b may also be a tensor ``(n,)`` of all eigenvalues.

    Returns:
        A scalar ``()``, at least 0, in the unit of the eigenvalues. Differentiable.

    Cost: no product; all nodes of both are sorted.

    Raises:
        ValueError: ``a`` or ``b`` is of another kind.

    Source: Chen, Trogdon and Ubaru (2021), who bound the error of a quadrature in this distance.

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
