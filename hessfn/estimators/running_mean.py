"""The mean of independent samples with its standard error, one sample in memory at a time."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from hessfn.core import tree
from hessfn.core.errors import InvalidInput
from hessfn.core.results import Estimate, S
from hessfn.core.tree import Tree
from hessfn.core.unknown import unknown
from hessfn.core.watched import Watched


def estimate(samples: Iterable[S]) -> Estimate[S]:
    """Mean and standard error of independent trees, entry by entry, one at a time; in float32 at least."""
    last = deque(_running(samples), maxlen=1)
    if not last:
        raise InvalidInput("there is no probe: rademacher(params, num) needs num >= 1")
    return _of(*last[0])


def _running(samples: Iterable[S]) -> Iterator[tuple[int, S, S]]:
    """Count, mean and root of the sum of squared deviations so far (Welford 1962); no square can overflow."""
    mean: Tree = None
    root: Tree = None
    for count, sample in enumerate(samples, 1):
        wider = tree.map(lambda x: x.to(torch.promote_types(x.dtype, torch.float32)), sample)
        if count == 1:
            mean, root = wider, tree.map(torch.zeros_like, wider)
        else:
            step = tree.map(torch.sub, wider, mean)
            mean = tree.map(lambda m, d, c=count: m + d / c, mean, step)
            root = tree.map(lambda r, d, c=count: torch.hypot(r, d * math.sqrt((c - 1) / c)), root, step)
        yield count, mean, root


def _of(count: int, mean: S, root: S) -> Estimate[S]:
    if count == 1:
        stderr = tree.map(lambda r: torch.full_like(r, torch.inf), root)
    else:
        stderr = tree.map(lambda r: r / math.sqrt(count * (count - 1)), root)
    return measured(
        tree.owned(mean), tree.owned(stderr), count, torch.tensor(count - 1.0, dtype=torch.float64, device="cpu")
    )


def finished(product: Watched[Any], result: Estimate[S]) -> Estimate[S]:
    """The estimate, when all products are finite; the error of a single probe is infinite, and is not asked."""
    product.finished(result.mean)
    return result


def measured(mean: S, stderr: S, num_matvecs: int, df: Any) -> Estimate[S]:
    """An estimate whose error by rounding and by the data nobody has measured."""
    others = (tree.map(unknown, stderr) if _nobody(stderr) else None for _ in range(3))
    return Estimate(mean, stderr, torch.tensor(num_matvecs, device="cpu"), df, *others)


def _nobody(stderr: Tree) -> bool:
    """Whether what is unknown has to be a tensor."""
    return any(unknown(x) is not None for x in tree.leaves(stderr)[:1])
