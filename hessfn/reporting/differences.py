"""How far two numbers of two reports are apart, against what the errors of both allow.

Reports of nets with the same parameters and the same seed have the same probes. Sample for sample, what a probe says of
both nets differs by far less than the two estimates err, so the error of the difference is that of paired samples: the
mean of ``d_i = b_i - a_i`` with ``sd(d) / sqrt(p)``. Reports of the same data are paired by batch in the same way,
for what other data would say.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

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
    batches: tuple[list[float], list[float]] | None = None  #: of A and B, by the same batches
    weights: list[float] | None = None  #: of the batches


def difference(
    a: Measured, b: Measured, shared: Shared, *, num_probes: int, num_batches: int, comparisons: int = 1
) -> Difference:
    """B less A, where ``num_probes`` and ``num_batches`` are those of the smaller sample, if they are not shared.

    The levels are 95 % for all ``comparisons`` together (Bonferroni).
    """
    mean, stderr, df = b.mean - a.mean, math.hypot(a.stderr, b.stderr), num_probes - 1.0
    if shared.samples is not None:
        d = _differences(shared.samples)
        df, stderr = len(d) - 1.0, _stderr(d, np.ones_like(d))
        if len({*map(len, shared.samples)}) > 1:  # of one more probes were asked than of the other
            mean = float(d.mean())
    data_stderr, data_df = math.hypot(a.data_stderr, b.data_stderr), num_batches - 1.0
    if shared.batches is not None:
        d = _differences(shared.batches)
        data_df, data_stderr = len(d) - 1.0, _stderr(d, np.array(shared.weights))
    bound = sum(x for x in (a.bound, b.bound) if math.isfinite(x))
    beyond = abs(mean) - bound
    both = math.hypot(stderr, data_stderr)
    general = beyond > critical(_welch((stderr, df), (data_stderr, data_df)), comparisons) * both
    return Difference(
        mean=mean,
        stderr=stderr,
        bound=bound,
        units=mean / stderr if stderr > 0 else math.nan,
        differs=beyond > (critical(df, comparisons) * stderr if stderr else 0.0),
        data_stderr=data_stderr,
        generalizes=general if math.isfinite(both) else None,
        paired=shared.samples is not None,
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


def _differences(pair: tuple[list[float], list[float]]) -> np.ndarray:
    common = min(map(len, pair))
    a, b = (np.array(x[:common], dtype=np.float64) for x in pair)
    return b - a


def _stderr(x: np.ndarray, weights: np.ndarray) -> float:
    """Of a weighted mean, to first order in the weights (the error of a ratio estimate)."""
    num = len(x)
    if num < 2 or not weights.sum():
        return math.inf
    parts = weights / weights.sum() * (x - np.average(x, weights=weights))
    return float(np.sqrt(num / (num - 1) * (parts**2).sum()))


def _welch(*errors: tuple[float, float]) -> float:
    """The degrees of freedom of a sum (Welch and Satterthwaite), from standard errors and their own."""
    known = [(stderr, df) for stderr, df in errors if stderr > 0]
    if not known or any(df <= 0 for _, df in known):
        return 0.0
    # In units of the largest, so that no fourth power is too small for a float.
    largest = max(stderr for stderr, _ in known)
    parts = [((stderr / largest) ** 2, df) for stderr, df in known]
    return sum(x for x, _ in parts) ** 2 / sum(x**2 / df for x, df in parts)
