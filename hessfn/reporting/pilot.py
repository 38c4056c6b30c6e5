"""What a report will cost, and how far its numbers spread: measured on a few batches, before anything long begins."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.core.kept_memory import bytes_kept
from hessfn.core.probes import gaussian, rademacher
from hessfn.core.results import EigenPairs
from hessfn.core.tree import MatVec, Tree
from hessfn.estimators.control_variate import ControlVariate
from hessfn.estimators.eigen import eigsh
from hessfn.products.hessian import hvp
from hessfn.reporting.plan import Costs, Spreads
from hessfn.reporting.problem import Prepared
from hessfn.reporting.products import linearized

_MOST_BATCHES = 6
_NUM_PROBES = 6
_STEPS = (0, 8, 16)  # of the Krylov spaces that are tried as control variates


def measure(problem: Prepared, seconds: float) -> tuple[Costs, Spreads]:
    """Costs and spreads, in about so many seconds: of a few batches, products with whose mean are made.

    Args:
        seconds: how long it may take: so many batches are taken as fit, at least two where there are two.
    """
    begun = time.monotonic()
    batches = list(itertools.islice(problem.batches, _MOST_BATCHES))
    first, probe = batches[0], gaussian(problem.params, 1)[0]
    with torch.no_grad():
        forward = _fastest(lambda: problem.loss(problem.params, first))
    plain = hvp(problem.loss, problem.params, first, trace_after=0, check=False)
    built = time.monotonic()
    made = [_made(problem, first)]
    build, fixed = time.monotonic() - built, 0.0
    if len(batches) > 1:
        built = time.monotonic()
        made.append(_made(problem, batches[1]))
        fixed, build = build, time.monotonic() - built  # the first one had to be traced, and checked
        fixed -= build
    product = _fastest(lambda: made[0](probe))
    per_batch = build + (max(_STEPS) + 1 + _NUM_PROBES) * product
    fits = int((seconds - (time.monotonic() - begun)) / per_batch)
    made += [_made(problem, batch) for batch in batches[2 : max(2, fits)]]
    costs = Costs(
        product=product,
        plain=_fastest(lambda: plain(probe)),
        build=build,
        forward=forward,
        fixed=max(0.0, fixed),
        kept_bytes=bytes_kept(made[0], beside=(problem.loss, problem.params)),
        vector_bytes=sum(leaf.nbytes for leaf in tree.leaves(problem.params)),
    )
    return costs, _spreads(made, problem.params)


def _made(problem: Prepared, batch: Any) -> MatVec:
    found = linearized(problem.loss, problem.params, batch)
    return hvp(problem.loss, problem.params, batch, trace_after=0) if found is None else found


def _fastest(function: Callable[[], Any], times: int = 2) -> float:
    seconds = []
    for _ in range(times):
        begun = time.monotonic()
        function()
        seconds.append(time.monotonic() - begun)
    return min(seconds)


def _spreads(made: list[MatVec], params: Tree) -> Spreads:
    """Of the traces of single batches, and of single probes with each of some Krylov spaces for a control variate."""

    def mean(v: Tree) -> Tree:
        total = made[0](v)
        for matvec in made[1:]:
            total = tree.add(total, matvec(v))
        return tree.scale(1 / len(made), total)

    start, most = gaussian(params, 1)[0], max(_STEPS)
    variates = [None if m == 0 else ControlVariate(_space(mean, start, m), "pilot") for m in _STEPS if m <= most]
    samples: list[list[Tensor]] = []  # by probe: with each control variate
    of_batches: list[Tensor] = []
    best = variates[-1]
    for z in rademacher(params, _NUM_PROBES):
        products = [matvec(z) for matvec in made]
        forms = torch.stack([tree.dot(z, x) for x in products])
        samples.append([forms.mean() - (0.0 if b is None else _change(b, z)) for b in variates])
        of_batches.append(forms - (0.0 if best is None else _change(best, z)))
    table = torch.tensor([[float(x) for x in row] for row in samples])  # (p, m)
    trace = abs(float(table[:, -1].mean())) or 1.0
    groups = torch.stack(of_batches).mean(0)
    probe = {m: float(table[:, i].std()) / trace for i, m in enumerate(_STEPS)}
    return Spreads(data=float(groups.std()) / trace if len(made) > 1 else 0.0, probe=probe)


def _space(matvec: MatVec, start: Tree, num_matvecs: int) -> EigenPairs:
    num_matvecs = min(num_matvecs, tree.numel(start))
    return eigsh(matvec, start, num_matvecs, rtol=None, max_matvecs=num_matvecs)


def _change(variate: ControlVariate[Tree], z: Tree) -> Tensor:
    """What the pairs have of ``z'Az`` more than of the trace."""
    return tree.dot(z, variate.image(z)) - variate.trace()
