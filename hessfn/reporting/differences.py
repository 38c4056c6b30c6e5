"""How far two numbers of two reports are apart, against what the errors of both allow.

Reports of nets with the same parameters and the same seed have the same probes. Sample for sample, what a probe says of
both nets differs by far less than the two estimates err, so the error of the difference is that of paired samples,
``d_i = b_i - a_i``. Each report has taken out of its samples a control variate of its own, made of its own eigenpairs,
which pairs do not cancel: so the plain samples are paired, and both control variates, whose means are 0, are
regressors. The intercept is the difference, and its error that of least squares.

Reports of the same data are paired by batch, for what other data would say.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from scipy import stats
from torch import Tensor

from hessfn.estimators.data_error import data_interval
from hessfn.estimators.data_error import data_stderr as data_stderr_of

_LEAST_FREEDOM = 5  # of a regression; fewer probes are compared as they are
_SURE = 0.05  # the chance that a comparison, or a table of layers as a whole, marks what is equal


class Difference(NamedTuple):
    """How far B is from A."""

    mean: float  #: B's less A's
    stderr: float  #: the standard error of that by the probes; 0 of numbers without probes, NaN where unknown
    bound: float  #: what else it may be off by: residuals and rounding of both
    units: float  #: the mean over the standard error; NaN where there is none
    differs: bool  #: whether the two matrices differ in this: the mean is beyond the bound, and beyond chance
    data_stderr: float  #: the standard error of the mean by the choice of the data; NaN where unknown
    generalizes: bool | None  #: whether it is beyond chance in the choice of the data, too; None where unknown
    paired: bool  #: whether the probes are the same, and the standard error is that of their differences


class Measured(NamedTuple):
    """A number and its errors; NaN where one is not known."""

    mean: float
    stderr: float = 0.0  #: by probes
    bound: float = 0.0  #: residual and rounding
    data_stderr: float = math.nan


class Shared(NamedTuple):
    """What the estimates of a number have in common."""

    samples: tuple[list[float], list[float]] | None = None  #: of A and B, by the same probes
    plain: tuple[list[float], list[float]] | None = None  #: the same without the control variate of either
    batches: tuple[list[float], list[float]] | None = None  #: of A and B, by the same batches
    weights: list[float] | None = None  #: of the batches


def difference(
    a: Measured, b: Measured, shared: Shared, *, num_probes: int, num_batches: int, comparisons: int = 1
) -> Difference:
    """B less A, where ``num_probes`` and ``num_batches`` are those of the smaller sample, if they are not shared.

    The levels are 95 % for all ``comparisons`` together (Bonferroni).
    """
    mean, stderr, df = b.mean - a.mean, math.hypot(a.stderr, b.stderr), num_probes - 1.0
    paired = shared.samples is not None and not (a.stderr == b.stderr == 0)
    if shared.samples is not None and paired:
        found = _by_probes(shared.samples, shared.plain)
        mean, stderr, df = (found[0] if math.isfinite(found[1]) else mean), found[1], found[2]
    data_stderr = math.hypot(a.data_stderr, b.data_stderr)
    data_reach = critical(num_batches - 1.0, comparisons) * data_stderr
    if shared.batches is not None:
        data_stderr, data_reach = _by_batches(_differences(shared.batches), shared.weights, mean, comparisons)
    bound = sum(x for x in (a.bound, b.bound) if math.isfinite(x))
    beyond, reach = abs(mean) - bound, critical(df, comparisons) * stderr if stderr else 0.0
    return Difference(
        mean=mean,
        stderr=stderr,
        bound=bound,
        units=mean / stderr if stderr > 0 else math.nan,
        differs=beyond > reach,
        data_stderr=data_stderr,
        generalizes=beyond > math.hypot(reach, data_reach) if math.isfinite(data_stderr) else None,
        paired=paired,
    )


def verdict(by: Difference | None) -> str:
    """Whether two numbers differ, in a word or two."""
    if by is None or not math.isfinite(by.mean) or not math.isfinite(by.stderr):
        return "unknown"
    if not by.differs:
        return "may be equal"
    return "differ" if by.generalizes else "differ here"


def critical(df: float, comparisons: int = 1) -> float:
    """How many standard errors chance does not reach, with so many degrees of freedom."""
    return float(stats.t.ppf(1 - _SURE / (2 * max(comparisons, 1)), df)) if df > 0 else math.inf


def of_eigenvalue(x: dict[str, Any] | None) -> Measured | None:
    """An eigenvalue: its residual and its rounding bound it, and no probe has a part in it."""
    if x is None or math.isnan(x["value"]):
        return None
    return Measured(x["value"], 0.0, _known(x["residual"]) + _known(x["rounding"]), x["data_stderr"])


def of_trace(x: dict[str, Any], mean: str = "mean") -> Measured:
    return Measured(x[mean], x["stderr"], _known(x.get("rounding", 0.0)), x.get("data_stderr", math.nan))


def _known(x: float) -> float:
    return 0.0 if math.isnan(x) else x


def _differences(pair: tuple[list[float], list[float]]) -> Tensor:
    common = min(map(len, pair))
    a, b = (torch.tensor(x[:common], dtype=torch.float64, device="cpu") for x in pair)
    return b - a


def _by_probes(
    samples: tuple[list[float], list[float]], plain: tuple[list[float], list[float]] | None
) -> tuple[float, float, float]:
    """The mean difference over the probes that both have, its standard error, and the degrees of freedom of that."""
    d = _differences(samples)
    if len(d) < 2:
        return math.nan, math.inf, 0.0
    simple = float(d.mean()), float(d.std() / len(d) ** 0.5), len(d) - 1.0
    if plain is None:
        return simple
    e = _differences(plain)
    controls = [
        torch.tensor(x[: len(d)], device="cpu") - torch.tensor(y[: len(d)], device="cpu")
        for x, y in zip(plain, samples, strict=True)
    ]
    X = torch.stack([torch.ones_like(d), *(x / (x.abs().max() or 1.0) for x in controls)], dim=1)
    U, sizes, V = torch.linalg.svd(X, full_matrices=False)
    kept = sizes > 1e-8 * sizes[0]  # of two nets that hardly differ the control variates are the same
    if (df := len(d) - int(kept.sum())) < _LEAST_FREEDOM:
        return simple
    inverse = V[kept].T / sizes[kept] @ U[:, kept].T
    coefficients = inverse @ e
    variance = (e - X @ coefficients).square().sum() / df
    return float(coefficients[0]), float(variance.sqrt() * inverse[0].norm()), float(df)


def _by_batches(d: Tensor, weights: list[float] | None, mean: float, comparisons: int) -> tuple[float, float]:
    """The standard error by the data, and how far its interval reaches from its middle towards 0.

    The interval is skew, as the data are; where the mean is that of the probes, its reach is taken along.
    """
    if len(d) < 2 or (weights is not None and not sum(weights) > 0):
        return math.inf, math.inf
    counted = None if weights is None else torch.tensor(weights, dtype=torch.float64, device="cpu")
    lower, upper = data_interval(d, counted, level=1 - _SURE / max(comparisons, 1))
    middle = (d if counted is None else d * counted / counted.mean()).mean()
    return float(data_stderr_of(d, counted)), float(middle - lower if mean > 0 else upper - middle)
