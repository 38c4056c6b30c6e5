"""What a report will cost, and how far its numbers spread: measured on a few batches, before anything long begins."""

from __future__ import annotations

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
from hessfn.estimators.eigen import lanczos
from hessfn.losses.batches import share_of
from hessfn.products.hessian import hvp
from hessfn.reporting.clock import Clock
from hessfn.reporting.plan import Costs, Spreads
from hessfn.reporting.problem import Prepared
from hessfn.reporting.products import linearized
from hessfn.reporting.spread import number_of_all, some

_MOST_BATCHES = 6
_NUM_PROBES = 6
_LEAST_PROBES = 2
_STEPS = (8, 16)  # of the Krylov spaces that are tried as control variates
_PLAIN = 1.5  # what a product costs of which nothing is kept, by that of a linearized one, where it was not measured


def measure(problem: Prepared, clock: Clock) -> tuple[Costs, Spreads]:
    """Costs and spreads of a few batches, spread over all, by products with their mean.

    Args:
        clock: of the pilot alone. It ends with the step during which the time is up; what it takes at least are the
            products of two batches, once linearized, with two probes.
    """
    _, num_ranks = share_of(problem.batches)
    total = number_of_all(problem.batches)
    chosen = some(problem.batches, min(_MOST_BATCHES * num_ranks, total or _MOST_BATCHES))
    # A process without a batch of its own measures one of the others'.
    batches = list(chosen) or list(some(getattr(problem.batches, "batches", ()), 1))
    first, probe = batches[0], gaussian(problem.params, 1)[0]
    forward = _fastest(lambda: problem.loss(problem.params, first))  # not under no_grad: it may have derivatives in it
    begun = time.monotonic()
    made = [_made(problem, first)]
    build, fixed = time.monotonic() - begun, 0.0
    if len(batches) > 1:
        begun = time.monotonic()
        made.append(_made(problem, batches[1]))
        fixed, build = build, time.monotonic() - begun  # the first one had to be traced, and checked
        fixed -= build
    product = _fastest(lambda: made[0](probe))
    fits = int(clock.left / (build + (max(_STEPS) + _NUM_PROBES) * product)) if build + product > 0 else _MOST_BATCHES
    made += [_made(problem, batch) for batch in clock.while_time(batches[2 : max(2, fits)])]
    kept_bytes = bytes_kept(made[0], beside=(problem.loss, problem.params))
    spreads, product = _spreads(made, problem.params, clock)
    plain = _PLAIN * product
    if clock.left > 3 * plain:
        each = hvp(problem.loss, problem.params, first, trace_after=0, check=False)
        plain = _fastest(lambda: each(probe))
    return Costs(
        product=product,
        plain=plain,
        build=build,
        forward=forward,
        fixed=max(0.0, fixed),
        kept_bytes=kept_bytes,
        vector_bytes=sum(leaf.nbytes for leaf in tree.leaves(problem.params)),
    ), spreads


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


class _Late(Exception):
    pass


def _spreads(made: list[MatVec], params: Tree, clock: Clock) -> tuple[Spreads, float]:
    """Of the traces of single batches, and of single probes with each of some Krylov spaces for a control variate.

    And the seconds of a product with one batch, on average: on a machine with other work the fastest is no measure.
    """
    begun, num_products = time.monotonic(), 0

    def products(v: Tree) -> list[Tree]:
        nonlocal num_products
        num_products += 1
        return [matvec(v) for matvec in made]

    probes = list(clock.while_time(rademacher(params, _NUM_PROBES), least=_LEAST_PROBES))
    images, forms = [], []
    for z in clock.while_time(probes, least=_LEAST_PROBES):
        found = products(z)
        images.append(_mean(found))
        forms.append(torch.stack([tree.dot(z, x) for x in found]))
    pace = (time.monotonic() - begun) / num_products  # of a product with all these batches
    variates = _variates(lambda v: _mean(products(v)), params, clock, pace)
    seconds = (time.monotonic() - begun) / (num_products * len(made))
    samples = {m: [_form(z, image, b) for z, image in zip(probes, images, strict=False)] for m, b in variates.items()}
    best = variates[max(variates)]
    known = torch.stack(
        [torch.zeros((), device="cpu") if best is None else _change(best, z) for z in probes[: len(forms)]]
    )
    of_batches = (torch.stack(forms) - known.to(forms[0])[:, None]).mean(0)
    trace = abs(float(torch.stack(samples[max(variates)]).mean())) or 1.0
    probe = {m: float(torch.stack(values).std()) / trace for m, values in samples.items()}
    return Spreads(data=float(of_batches.std()) / trace if len(made) > 1 else 0.0, probe=probe), seconds


def _mean(products: list[Tree]) -> Tree:
    total = products[0]
    for product in products[1:]:
        total = tree.add(total, product)
    return tree.scale(1 / len(products), total)


def _variates(matvec: MatVec, params: Tree, clock: Clock, pace: float) -> dict[int, ControlVariate[Tree] | None]:
    """By the number of Lanczos steps, of one run that ends when the time is up."""
    fits = clock.left / pace if pace > 0 else max(_STEPS)
    steps = [m for m in _STEPS if m <= min(fits, tree.numel(params))]
    none: dict[int, ControlVariate[Tree] | None] = {0: None}
    if not steps:
        return none

    def timely(v: Tree) -> Tree:
        if clock.left < 0:
            raise _Late
        return matvec(v)

    try:
        run = lanczos(timely, gaussian(params, 1)[0], max(steps))
    except _Late:
        return none
    return none | {m: ControlVariate(_pairs(run.alpha[:m], run.beta[: m - 1], run.basis, m), "pilot") for m in steps}


def _pairs(alpha: Tensor, beta: Tensor, basis: Tree, m: int) -> EigenPairs:
    values, s = torch.linalg.eigh(torch.diag(alpha) + beta.diag(1) + beta.diag(-1))
    vectors = tree.map(lambda q: (s.T.to(q) @ q[:m].flatten(1)).reshape(q[:m].shape), basis)
    return EigenPairs(
        values, vectors, torch.zeros_like(values), torch.tensor(m, device="cpu"), torch.zeros_like(values) > 0
    )


def _form(z: Tree, image: Tree, variate: ControlVariate[Tree] | None) -> Tensor:
    plain = tree.dot(z, image)
    return (plain if variate is None else plain - _change(variate, z).to(plain)).cpu()


def _change(variate: ControlVariate[Tree], z: Tree) -> Tensor:
    """What the pairs have of ``z'Az`` more than of the trace."""
    return tree.dot(z, variate.image(z)) - variate.trace()
