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
    """The Jensen-Shannon divergence of two smoothed spectra: from 0, of equal ones, to log 2, of ones that do not meet.

    ``JS(p, q) = KL(p | m) / 2 + KL(q | m) / 2`` with ``m = (p + q) / 2``, in nats; its root is a metric. Both densities
    are smoothed by one width and lie on one grid: of densities that each has a width of its own the divergence would
    tell the widths apart. It is symmetric, and the same for ``c A`` and ``c B`` as for A and B.

    Args:
        a, b: of :func:`slq`, with probes of their own.
        sigma: the width, in the units of the eigenvalues, or along ``asinh(x / linthresh)``. By default what the rule
            of fewer nodes resolves over the range of both, ``range / ((m - 1) sqrt(8 ln 3))``. What differs by less
            counts as equal, such as two blocks whose eigenvalues are all small beside those of a third.
        linthresh: for a logarithmic axis, as of :func:`density`: eigenvalues below it in size count as near 0, and of
            the others it is ratios that count. It takes the place of the range: two spectra that differ by a factor of
            100 are apart by it, whatever else there is.

    Returns:
        ``mean ()`` and ``stderr ()``. Noise makes two densities look unlike; the jackknife over the probes takes that
        bias off, to first order, so that the mean may be below 0 by some standard errors. The error is the jackknife's
        too, and inf of a single probe. Of the smoothing and the steps of Lanczos it says nothing.

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
    """The Jensen-Shannon divergence of every two of several spectra, such as those of a net's blocks.

    All of them are smoothed by one width, on one grid over the range of all: the numbers can be compared. Where blocks
    differ by orders of magnitude that width is more than the range of most: take ``linthresh``.

    Args:
        quadratures: a dict from name to quadrature, as :func:`slq_per_block` returns.
        sigma, linthresh: as for :func:`jensen_shannon`.

    Returns:
        ``mean (b, b)`` and ``stderr (b, b)`` in the order of the dict, symmetric, with 0 along the diagonal. Pairs
        share their spectra, so that the error of a mean over pairs is not that of independent numbers: it is at most
        the mean of their errors.

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
    same = Estimate(none, none, torch.tensor(0), torch.full_like(none, torch.inf))
    rows = [[same for _ in masses] for _ in masses]
    for i, j in itertools.combinations(range(len(masses)), 2):
        rows[i][j] = rows[j][i] = _estimate(masses[i], masses[j])
    mean, stderr, df = (
        torch.stack([torch.stack([getattr(one, field) for one in row]) for row in rows])
        for field in ("mean", "stderr", "df")
    )
    return Estimate(mean, stderr, torch.tensor(0), df)


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
            return Estimate(value, torch.full_like(value, torch.inf), torch.tensor(0), torch.ones_like(value))
        without = _divergence(own + (own - rows) / (p - 1), other)  # symmetric, so either may come first
        mean = mean + (p - 1) * (value - without.mean())
        spreads.append((without - without.mean()) * math.sqrt((p - 1) / p))
        freedoms.append(p - 1)
    squares = torch.stack([spread.detach().square().sum() for spread in spreads])
    freedom = squares.new_tensor(freedoms)
    shared = (squares.square() / freedom).sum()  # as of Satterthwaite
    df = torch.where(shared > 0, squares.sum().square() / shared, freedom.sum())
    return Estimate(mean, torch.linalg.vector_norm(torch.cat(spreads)), torch.tensor(0), df)


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """Of two densities on the last axis, in nats; the weights of rules with eigenpairs may be negative."""
    p, q = (x / x.sum(-1, keepdim=True) for x in (p.clamp(min=0), q.clamp(min=0)))
    return (_x_log_x(p) / 2 + _x_log_x(q) / 2 - _x_log_x((p + q) / 2)).sum(-1)


def _x_log_x(x: Tensor) -> Tensor:
    inside = torch.where(x > 0, x, 1.0)  # where the logarithm has a derivative
    return inside * inside.log()
