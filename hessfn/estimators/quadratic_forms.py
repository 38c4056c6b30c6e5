"""Means of quadratic forms ``z'Az`` with errors that the products tell, not the few numbers that come out of them.

With one dominating eigenvalue ``z'Az`` is like chi-square, and the spread of few samples says little of its variance. A
product says more. For probes of independent entries with ``E z^4 = kappa``, 1 of Rademacher and 3 of Gaussian ones,

    Var z'Az = 2 ||A||_F^2 - (3 - kappa) sum_i a_ii^2 ,

where ``||Az||^2`` has the mean ``||A||_F^2``, and ``z * Az``, whose mean is the diagonal and whose total variance is
``||A||_F^2 + (kappa - 2) sum_i a_ii^2``, tells the second sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Generic

import torch
from torch import Tensor
from typing_extensions import NamedTuple  # typing's own cannot be generic before Python 3.11

from hessfn.core import tree
from hessfn.core.errors import InvalidInput
from hessfn.core.results import Estimate, S
from hessfn.core.tree import T, Tree
from hessfn.estimators import krylov
from hessfn.estimators.running_mean import measured

_MIN_PROBES = 10  # an error from fewer is too uncertain to stop on

# In all of p Rademacher probes two entries have the same product of signs by chance, 2^(1-p). Then nothing tells an
# off-diagonal entry from a diagonal one. From 6 probes on that is rarer than what an interval of 95 % leaves out.
TELLING = 6

# How much the spread of few variances falls short of the true one: seen on spectra from a single eigenvalue to flat.
_SHORT = 10.0


# Degrees of freedom beyond these change the interval by less than what forms are short of a normal distribution.
_MOST = 60.0


class Parts(NamedTuple, Generic[T, S]):
    """How a vector falls into the parts whose forms are wanted: all in one, leaf by leaf, or sample by sample."""

    forms: Callable[[T, T], S]  # of a probe and its image
    norms: Callable[[T], S]
    numel: Callable[[T], Any]  # a tree like the forms, of whole numbers
    coupled: bool  # whether A may have blocks between parts of several leaves


class Form(NamedTuple, Generic[T, S]):
    """One sample, and what its product tells of the variance."""

    value: S  # z'Az
    image: S  # ||Az||
    size: S  # ||z * Az||
    diagonal: T  # z * Az
    kurtosis: Tensor  # (), the mean of z^4


class _Row(NamedTuple, Generic[S]):
    value: S
    image: S
    size: S
    step: S  # the distance of z * Az from the mean of those before, whose square has the mean of one variance
    kurtosis: Tensor


def whole() -> Parts[Any, Tensor]:
    return Parts(tree.dot, tree.norm, tree.numel, False)


def per_leaf() -> Parts[Any, Any]:
    return Parts(
        lambda z, image: tree.map(tree.dot, z, image),
        lambda v: tree.map(tree.norm, v),
        lambda v: tree.map(torch.numel, v),
        True,
    )


def per_sample() -> Parts[Any, Any]:
    """Of trees whose leaves have the samples along their first axis: every sample of every leaf."""

    def rows(x: Tensor) -> Tensor:
        return tree.wide(x)[:, None].flatten(1)

    return Parts(
        lambda z, image: tree.map(lambda a, b: (rows(a) * rows(b)).sum(1), z, image),
        lambda v: tree.map(lambda x: torch.linalg.vector_norm(rows(x), dim=1), v),
        lambda v: tree.map(lambda x: x.numel() // max(len(x), 1), v),
        True,
    )


def form(z: T, image: T, parts: Parts[T, S]) -> Form[T, S]:
    diagonal = tree.map(torch.mul, z, image)
    return Form(parts.forms(z, image), parts.norms(image), parts.norms(diagonal), diagonal, kurtosis(z))


def kurtosis(z: Tree) -> Tensor:
    """The mean of ``z^4``, exactly 1 of signs: a float64 scalar."""
    squares = tree.map(torch.square, z)
    return tree.dot(squares, squares) / tree.numel(z)


class MeanForm(Generic[T, S]):
    """The mean of forms as they come, one at a time; a vector is kept beside the last one."""

    def __init__(self, parts: Parts[T, S]) -> None:
        self._parts = parts
        self._rows: list[_Row[S]] = []
        self._mean: Any = None  # of z * Az
        self._numel: Any = None

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, sample: Form[T, S]) -> None:
        parts, count = self._parts, len(self._rows) + 1
        if count == 1:
            self._mean, self._numel = sample.diagonal, parts.numel(sample.diagonal)
            distance = tree.map(torch.zeros_like, sample.image)
        else:
            change = tree.map(torch.sub, sample.diagonal, self._mean)
            factor = math.sqrt((count - 1) / count)
            distance = tree.map(lambda x: factor * x, parts.norms(change))
            self._mean = tree.map(lambda m, x: m + x / count, self._mean, change)
        self._rows.append(_Row(sample.value, sample.image, sample.size, distance, sample.kurtosis))

    def estimate(self) -> Estimate[S]:
        """The mean with its standard error and degrees of freedom."""
        if not self._rows:
            raise InvalidInput("there is no probe: rademacher(params, num) needs num >= 1")
        return _of(self._rows, self._numel, self._parts.coupled)


def mean_form(samples: Iterable[Form[T, S]], parts: Parts[T, S]) -> Estimate[S]:
    """The mean with its standard error and degrees of freedom; two vectors are kept."""
    forms = MeanForm(parts)
    for sample in samples:
        forms.add(sample)
    return forms.estimate()


def mean_form_until(
    samples: Iterable[Form[T, Tensor]], parts: Parts[T, Tensor], rtol: float, inside: Tensor | float
) -> Estimate[Tensor]:
    """As many samples as the tolerance takes, at least ten where there are ten; ``inside`` is known beside them."""
    forms = MeanForm(parts)
    check = _MIN_PROBES
    for sample in samples:
        forms.add(sample)
        krylov.number(sample.value, sample.value, len(forms))
        if len(forms) >= check:
            check = max(len(forms) + 1, int(1.02 * len(forms)))  # all are looked at: not again for each of thousands
            if is_within(forms.estimate(), rtol, inside):
                break
    found = forms.estimate()
    return found._replace(mean=found.mean + inside)


def is_within(found: Estimate[Tensor], rtol: float, inside: Tensor | float = 0.0) -> bool:
    """Whether half the width of the 95 % interval is at most this part of the mean, and of what is known beside it."""
    lower, upper = found.interval()
    return bool(upper - lower <= 2 * rtol * (found.mean + inside).abs())


def _of(rows: list[_Row[S]], numel: Any, coupled: bool) -> Estimate[S]:
    coupled = coupled and len(tree.leaves(numel)) > 1
    weight = 3 - torch.stack([row.kurtosis for row in rows]).mean()
    values, image, size, step = (
        [torch.stack(column) for column in zip(*(tree.leaves(row[i]) for row in rows), strict=True)] for i in range(4)
    )
    leaves = [
        _error(v, a, d, u, weight, n, coupled)
        for v, a, d, u, n in zip(values, image, size, step, tree.leaves(numel), strict=True)
    ]
    mean, stderr, df = (tree.unflatten(x, rows[0].value) for x in zip(*leaves, strict=True))
    return measured(mean, stderr, len(rows), df)


def _error(
    values: Tensor, image: Tensor, size: Tensor, step: Tensor, weight: Tensor, numel: int, coupled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, standard error and degrees of freedom of forms ``(p, ...)``; ``weight`` is ``3 - kappa``."""
    p, mean = len(values), values.mean(0)
    if p == 1:
        return mean, torch.full_like(mean, torch.inf), torch.zeros_like(mean)
    scale = torch.maximum(image, size).detach().amax(0)  # no square can overflow
    scale = torch.where(scale > 0, scale, 1.0)
    a, d, u = ((x / scale).square() for x in (image, size, step))
    # Of Rademacher probes a and d are equal to the bit: a diagonal matrix has no error at all.
    variance = (2 * a - weight * d).mean(0) + weight * u[1:].mean(0)
    if p < TELLING:  # of sum_i a_ii^2 no more is known than that it is at least (tr A)^2 / n
        variance = torch.maximum(variance, 2 * a.mean(0) - weight * (mean / scale).square() / max(numel, 1))
    single = (2 * a - weight * d + weight * u)[1:].detach()
    df = degrees(single)
    if coupled:  # a block between parts adds its norm but once: between half of the variance and all of it
        variance = torch.maximum(variance / 2, (values / scale).var(0))
        df = df.clamp(max=p - 1)
    known = variance > 0
    stderr = torch.where(known, torch.where(known, variance, 1.0).sqrt() * scale / math.sqrt(p), 0.0)
    return mean, stderr, df


def degrees(variances: Tensor) -> Tensor:
    """Of a mean of ``(m, ...)`` variances: ``2 mean^2 / Var(mean)`` (Satterthwaite 1946), from their spread."""
    m = len(variances)
    if m == 1:
        return torch.ones_like(variances[0])
    mean, spread = variances.mean(0), variances.var(0) * (1 + _SHORT / m) / m
    df = 2 * mean.square() / torch.where(spread > 0, spread, 1.0)
    return torch.where(spread > 0, df, float(m)).clamp(1.0, _MOST)
