"""Quantiles of Student's t as an operation on tensors, so that they are there under ``vmap`` and a compiler too."""

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


def _over(factor: Tensor, like: Tensor) -> Tensor:
    """For every entry of a batch of results the factor of that result: ``vmap`` puts its axis in front of both."""
    return factor.to(like).reshape(factor.shape + (1,) * (like.dim() - factor.dim()))


def normal_quantile(level: float) -> float:
    """How many standard errors the two-sided normal interval reaches."""
    return math.sqrt(2) * float(torch.erfinv(torch.tensor(level, dtype=torch.float64)))


def quantile(df: Tensor, level: float) -> Tensor:
    """How many standard errors the two-sided interval reaches, for every entry of ``df``; inf where that is 0."""
    # The two-sided quantile solves an equation in the incomplete beta function, which SciPy inverts; no derivative.
    values: Tensor = torch.ops.hessfn.students_t(df.detach(), level)
    return values


def _quantile(df: Tensor, level: float) -> Tensor:
    from scipy.special import stdtrit  # a fifth of a second to load, for what only intervals ask

    found = stdtrit(df.double().clamp(max=1e9).cpu().numpy(), 0.5 + level / 2)
    values = torch.as_tensor(found, dtype=torch.float64).nan_to_num(nan=math.inf, posinf=math.inf)
    return values.to(df.device, tree.wide(df).dtype).reshape(df.shape).clone()


_operation = torch.library.custom_op(
    "hessfn::students_t", _quantile, mutates_args=(), schema="(Tensor df, float level) -> Tensor"
)
_operation.register_fake(lambda df, level: torch.empty_like(tree.wide(df)))
_operation.register_vmap(lambda info, dims, df, level: (torch.ops.hessfn.students_t(df, level), dims[0]))
