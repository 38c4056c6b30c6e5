"""Quantiles of Student's t and of chi-square as operations on tensors, under ``vmap`` and a compiler too."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.core.errors import InvalidInput
from hessfn.core.tree import Tree


def half_widths(stderr: Tree, df: Any, level: float) -> Any:
    """``t(df, level) stderr``, half the width of a confidence interval; of a known error (``df`` None) the normal one.

    Args:
        stderr: a tree of standard errors.
        df: degrees of freedom: a tensor ``()``, a tree like ``stderr``, or None.
    """
    if not 0 < level < 1:
        raise InvalidInput(f"level={level} must be between 0 and 1; of an interval that holds 95 % of the time 0.95")
    if df is None:
        return tree.map(lambda e: e * normal_quantile(level), stderr)
    if isinstance(df, Tensor):
        factor = quantile(df, level)
        return tree.map(lambda e: e * _over(factor, e), stderr)
    return tree.map(lambda e, d: e * quantile(d, level).to(e), stderr, df)


def ends_of_squares(mean: Tensor, stderr: Tensor, df: Tensor, least: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """Ends of the interval for a mean of squares: ``least`` and a sum of chi-squares, which leans to the right.

    What is above ``least`` is taken for ``x chi^2_nu / nu``, with nu from the standard error, but at least what a
    single square has in so many samples. Where ``least`` is NaN, or not below the mean, the interval is that of t.
    """
    half = stderr * _over(quantile(df, level), stderr)
    above, count = mean - least, _over(df, stderr)
    usable = (above > 0) & stderr.isfinite() & (stderr > 0)
    relative = torch.where(usable, stderr / torch.where(usable, above, 1.0), 1.0).square() * (1 + _SHORT / count)
    nu = torch.maximum(2 / relative, 0.8 * (count + 1))
    near = normal_quantile(level) * above * relative.sqrt()
    ends = []
    for sign, upper in ((-1, 0.5 - level / 2), (1, 0.5 + level / 2)):
        far = least + above * torch.ops.hessfn.over_chi_square(nu.detach(), upper)
        leaning = torch.where(nu < _NORMAL, far, mean + sign * near)
        ends.append(torch.where(usable, leaning, mean + sign * half))
    # Beside what is known there is a cross term too, which leans to no side: the interval has that of t in it.
    lower = torch.where(least > 0, torch.minimum(ends[0], mean - half), ends[0])
    return lower, torch.where(least > 0, torch.maximum(ends[1], mean + half), ends[1])


_SHORT = 15.0  # how much the spread of few squares falls short of the true one: seen on many spectra
_NORMAL = 1e6  # from so many degrees of freedom on a chi-square is a normal variable


def _over(factor: Tensor, like: Tensor) -> Tensor:
    """For every entry of a batch of results the factor of that result: ``vmap`` puts its axis in front of both."""
    return factor.to(like).reshape(factor.shape + (1,) * (like.dim() - factor.dim()))


def normal_quantile(level: float) -> float:
    """How many standard errors the two-sided normal interval reaches."""
    return math.sqrt(2) * float(torch.erfinv(torch.tensor(level, dtype=torch.float64, device="cpu")))


def quantile(df: Tensor, level: float) -> Tensor:
    """How many standard errors the two-sided interval reaches, for every entry of ``df``; inf where that is 0."""
    # The two-sided quantile solves an equation in the incomplete beta function, which SciPy inverts; no derivative.
    values: Tensor = torch.ops.hessfn.students_t(df.detach(), level)
    return values


def _quantile(df: Tensor, level: float) -> Tensor:
    from scipy.special import stdtrit  # a fifth of a second to load, for what only intervals ask

    found = stdtrit(df.double().clamp(max=1e9).cpu().numpy(), 0.5 + level / 2)
    values = torch.as_tensor(found, dtype=torch.float64, device="cpu").nan_to_num(nan=math.inf, posinf=math.inf)
    return values.to(df.device, tree.wide(df).dtype).reshape(df.shape).clone()


_operation = torch.library.custom_op(
    "hessfn::students_t", _quantile, mutates_args=(), schema="(Tensor df, float level) -> Tensor"
)
_operation.register_fake(lambda df, level: torch.empty_like(tree.wide(df)))
_operation.register_vmap(lambda info, dims, df, level: (torch.ops.hessfn.students_t(df, level), dims[0]))


def _over_chi_square(nu: Tensor, upper: float) -> Tensor:
    """``nu / x``, where a chi-square of ``nu`` degrees of freedom is above x with the probability ``upper``."""
    from scipy.special import chdtri

    degrees = nu.double().clamp(max=_NORMAL).cpu().numpy()
    values = torch.as_tensor(degrees / chdtri(degrees, upper), dtype=torch.float64, device="cpu")
    return values.to(nu.device, tree.wide(nu).dtype).reshape(nu.shape).clone()


_other = torch.library.custom_op(
    "hessfn::over_chi_square", _over_chi_square, mutates_args=(), schema="(Tensor nu, float upper) -> Tensor"
)
_other.register_fake(lambda nu, upper: torch.empty_like(tree.wide(nu)))
_other.register_vmap(lambda info, dims, nu, upper: (torch.ops.hessfn.over_chi_square(nu, upper), dims[0]))
