"""How far apart spectra are: the Jensen-Shannon divergence of smoothed densities, with its error by the probes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from hessfn.core.arguments import kind, require_quadrature
from hessfn.core.errors import InvalidInput
from hessfn.core.results import Estimate, Quadrature
from hessfn.core.torch_state import known

_MOST_POINTS = 1e6


def jensen_shannon(
    a: Quadrature, b: Quadrature, *, sigma: float | None = None, linthresh: float | None = None
) -> Estimate[Tensor]:
    """The Jensen-Shannon divergence of two smoothed spectra: 0 for equal ones, log 2 for ones that do not overlap.

    ``JS(p, q) = KL(p | m) / 2 + KL(q | m) / 2`` with ``m = (p + q) / 2``, in nats; its square root is a metric. Both
    densities are smoothed with the same width on the same grid; otherwise the divergence would measure the difference
    of the widths. It is symmetric, and the same for ``c A`` and ``c B`` as for A and B.

    Args:
        a, b: quadratures of :func:`slq`, with independent probes.
        sigma: the width, in the units of the eigenvalues, or along ``asinh(x / linthresh)``. By default the resolution
            of the rule with fewer nodes over the range of both, ``range / ((m - 1) sqrt(8 ln 3))``. Spectra that differ
            by less count as equal, such as two blocks whose eigenvalues are small beside those of a third.
        linthresh: for a logarithmic axis, as for :func:`density`: eigenvalues of smaller magnitude count as near 0; for
            larger ones ratios count, for any range of the spectra.

    Returns:
        ``mean ()`` and ``stderr ()``. Noise of the probes makes two densities differ; the jackknife over the probes
        subtracts this bias to first order, so the mean may be slightly negative. The error is the jackknife's as well,
        inf for a single probe; it does not contain the errors of smoothing and of few steps.

    Cost: no product.

    Raises:
        ValueError: ``sigma`` or ``linthresh`` is not positive, or ``sigma`` so small that its grid is too long.

    Source: Lin (1991); for spectra of blocks Zhang et al. (2024); the jackknife as of Efron and Stein (1981).

    >>> one, other = (Quadrature(torch.tensor([[x, x + 1.0]]), torch.full((1, 2), 0.5)) for x in (0.0, 50.0))
    >>> round(float(jensen_shannon(one, other, sigma=0.1).mean), 4)
    0.6931
    """
    call = "jensen_shannon(a, b)"
    require_quadrature(a, call)
    require_quadrature(b, call)
    first, second = _masses([a, b], sigma, linthresh, call)
    return _estimate(first, second)


def jensen_shannon_per_pair(
    quadratures: Mapping[str, Quadrature], *, sigma: float | None = None, linthresh: float | None = None
) -> Estimate[Tensor]:
    """The Jensen-Shannon divergence of every pair of several spectra, such as those of the blocks of a net.

    All are smoothed with one width on one grid over the range of all, so that the numbers can be compared. If blocks
    differ by orders of magnitude, this width is larger than the range of most of them: use ``linthresh``.

    Args:
        quadratures: a dict from name to quadrature, as :func:`slq_per_block` returns.
        sigma, linthresh: as for :func:`jensen_shannon`.

    Returns:
        ``mean (b, b)`` and ``stderr (b, b)`` in the order of the dict, symmetric, with 0 along the diagonal. Pairs
        share spectra, so their errors are not independent: the error of a mean over pairs is at most the mean error.

    Cost: no product; b (b - 1) / 2 times the number of probes passes over a grid of 1024 points, or two points a width.

    Raises:
        ValueError: ``quadratures`` is no dict of quadratures, or as :func:`jensen_shannon` does.

    Source: as :func:`jensen_shannon`.

    >>> rule = lambda x: Quadrature(torch.tensor([[x, x + 1.0], [x, x + 1.0]]), torch.full((2, 2), 0.5))
    >>> jensen_shannon_per_pair({"a": rule(0.0), "b": rule(50.0)}, sigma=0.1).mean
    tensor([[0.0000, 0.6931],
            [0.6931, 0.0000]])
    """
    call = "jensen_shannon_per_pair(quadratures)"
    if not isinstance(quadratures, Mapping) or not quadratures:
        raise InvalidInput(f"{call}: quadratures is {kind(quadratures)}, not a dict of what slq(...) returns")
    for rule in quadratures.values():
        require_quadrature(rule, call)
    masses = _masses(list(quadratures.values()), sigma, linthresh, call)
    none = torch.zeros_like(masses[0][0, 0])
    same = Estimate(none, none, torch.tensor(0, device="cpu"), torch.full_like(none, torch.inf))
    rows = [[same for _ in masses] for _ in masses]
    for i, j in itertools.combinations(range(len(masses)), 2):
        rows[i][j] = rows[j][i] = _estimate(masses[i], masses[j])
    mean, stderr, df = (
        torch.stack([torch.stack([getattr(one, field) for one in row]) for row in rows])
        for field in ("mean", "stderr", "df")
    )
    return Estimate(mean, stderr, torch.tensor(0, device="cpu"), df)


def _masses(rules: list[Quadrature], sigma: float | None, linthresh: float | None, call: str) -> list[Tensor]:
    """What every probe of every rule has in each cell of one grid: ``(p, g)`` each, of sum 1 or nearly so."""
    for name, value in (("sigma", sigma), ("linthresh", linthresh)):
        if value is not None and not value > 0:
            raise InvalidInput(f"{call}: {name}={value} must be positive: it is a width on the axis of the eigenvalues")
    nodes = [rule.nodes if linthresh is None else (rule.nodes / linthresh).asinh() for rule in rules]
    low = torch.stack([x.min() for x in nodes]).min()
    high = torch.stack([x.max() for x in nodes]).max()
    resolved = max(min(x.shape[-1] for x in nodes) - 1, 1) * math.sqrt(8 * math.log(3))
    if sigma is None:
        # Nodes that differ by rounding have no range of their own: their size is the only scale there is.
        size = torch.maximum(low.abs(), high.abs())
        span = torch.where(high - low > 1e-6 * size, high - low, torch.where(size > 0, 1e-3 * size, 1.0))
        width = span / resolved
    else:
        if known(high > low) is None:
            raise InvalidInput(
                f"{call}: how many points sigma takes depends on the range, which vmap hides: leave it out"
            )
        width = torch.as_tensor(sigma, dtype=low.dtype, device=low.device)
        resolved = float((high - low) / width)
        if resolved > _MOST_POINTS:
            raise InvalidInput(
                f"{call}: sigma={sigma:.3g} is {resolved:.1g} times within the range of the nodes, more than "
                f"{_MOST_POINTS:.0e}: a grid over all of it takes too many points; widen sigma, or give linthresh"
            )
    unit = torch.linspace(0, 1, max(1024, math.ceil(2 * resolved) + 20), dtype=low.dtype, device=low.device)
    grid = low - 5 * width + (high - low + 10 * width) * unit
    step = (high - low + 10 * width) / (len(unit) - 1) / (width * math.sqrt(2 * math.pi))

    def rows(x: Tensor, weights: Tensor) -> Tensor:
        return torch.stack(
            [
                (-0.5 * ((grid[:, None] - at) / width).square()).exp() @ w * step
                for at, w in zip(x, weights, strict=True)
            ]
        )

    return [rows(x, rule.weights) for x, rule in zip(nodes, rules, strict=True)]


def _estimate(first: Tensor, second: Tensor) -> Estimate[Tensor]:
    """The divergence of two means over rows, less its bias, with the error of the jackknife over the rows of both."""
    whole = [rows.mean(0) for rows in (first, second)]
    value = mean = _divergence(*whole)
    spreads, freedoms = [], []
    for rows, own, other in ((first, *whole), (second, *whole[::-1])):
        p = len(rows)
        if p < 2:
            return Estimate(
                value, torch.full_like(value, torch.inf), torch.tensor(0, device="cpu"), torch.ones_like(value)
            )
        without = _divergence(own + (own - rows) / (p - 1), other)  # symmetric, so either may come first
        mean = mean + (p - 1) * (value - without.mean())
        spreads.append((without - without.mean()) * math.sqrt((p - 1) / p))
        freedoms.append(p - 1)
    squares = torch.stack([spread.detach().square().sum() for spread in spreads])
    freedom = squares.new_tensor(freedoms)
    shared = (squares.square() / freedom).sum()  # as of Satterthwaite
    df = torch.where(shared > 0, squares.sum().square() / shared, freedom.sum())
    return Estimate(mean, torch.linalg.vector_norm(torch.cat(spreads)), torch.tensor(0, device="cpu"), df)


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """Of two densities on the last axis, in nats; the weights of rules with eigenpairs may be negative."""
    p, q = (x / x.sum(-1, keepdim=True) for x in (p.clamp(min=0), q.clamp(min=0)))
    return (_x_log_x(p) / 2 + _x_log_x(q) / 2 - _x_log_x((p + q) / 2)).sum(-1)


def _x_log_x(x: Tensor) -> Tensor:
    inside = torch.where(x > 0, x, 1.0)  # where the logarithm has a derivative
    return inside * inside.log()
