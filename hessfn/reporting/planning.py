"""Before anything long begins: what the report will take, or how it divides the time that it was given."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from operator import length_hint
from pathlib import Path

from hessfn.core import tree
from hessfn.core.free_memory import free_bytes
from hessfn.parallel.all_reduce import ShardedBatches, gather
from hessfn.reporting.clock import Clock
from hessfn.reporting.options import Options
from hessfn.reporting.pilot import measure
from hessfn.reporting.plan import Costs, Plan, described, estimated, make_plan
from hessfn.reporting.problem import Prepared
from hessfn.reporting.products import Measured
from hessfn.reporting.progress import say

LEAST_PROBES = 10  # a standard error from fewer is too uncertain to stop on
LEAST_STEPS = 8
PAGE_SECONDS = 6.0  # for pictures and page
STEPS_OF_A_LAYER = 4  # products for the top of one block, which starts near it
_PILOT = 0.1  # of the time
_POINTS = 90  # of a landscape, about
_SECOND_START = 8  # products, about
_FIXED_PRODUCTS = 4 + 2 + 36  # check, rounding, both ends on halves of the data
_STEPS_A_PAIR = 4  # Lanczos steps until one more pair has settled, and nothing further out is left


def work_of(options: Options, num_batches: int) -> Plan:
    """What the options ask for. The Krylov space counts as one of the Lanczos runs."""
    return Plan(
        num_batches=num_batches,
        num_probes=options.num_probes,
        num_steps=options.num_steps,
        num_runs=options.num_runs,
        num_extra=_FIXED_PRODUCTS
        + _STEPS_A_PAIR * options.num_pairs
        + options.k
        + STEPS_OF_A_LAYER * options.num_layers,
        num_points=_POINTS if options.num_plane_points else _POINTS // 2,
        num_activation_probes=options.num_activation_probes,
    )


def announce(measured: Measured, options: Options) -> None:
    """Says what is to come, from the products that were made so far."""
    num_batches = len(measured.sizes)
    each = measured.pace / num_batches
    costs = Costs(
        product=each,
        plain=each,
        forward=each / 3,
        activation=2 * each,
        page=PAGE_SECONDS,
        vector_bytes=sum(leaf.nbytes for leaf in tree.leaves(measured.params)),
        peak_bytes=measured.bytes_kept,
    )
    say(options, f"to come: {described(estimated(work_of(options, num_batches), costs))}")


def products_of_pairs(options: Options) -> int:
    """How many products the eigenpairs may take where the time is given; those that have not settled by then say so."""
    return _STEPS_A_PAIR * options.num_pairs + _SECOND_START


def steps_in_time(options: Options, clock: Clock, pace: float) -> int:
    """How many steps a Lanczos run may take, of those asked for, so that there is time for all that follows."""
    if options.minutes is None:
        return options.num_steps
    after = (
        _POINTS / 3 + 2 * options.num_activation_probes + STEPS_OF_A_LAYER * options.num_layers + LEAST_PROBES
    ) * pace
    fits = int((clock.left - PAGE_SECONDS - after) / (options.num_runs * pace))
    return max(min(options.num_steps, LEAST_STEPS), min(options.num_steps, fits))


def divided(problem: Prepared, options: Options, folder: Path | None) -> Options:
    """The options by which the given minutes make the errors smallest; those of a report that is resumed, from there.

    Args:
        folder: where the plan is kept until the report is written.
    """
    file = None if folder is None else folder / "plan.json"
    if options.resume and file is not None and file.exists():
        plan = Plan(**json.loads(file.read_text("utf-8")))
    else:
        plan = _made(problem, options)
    if options.group is not None:  # of times that each process has measured
        plan = Plan(**gather(asdict(plan), options.group)[0])
    if file is not None:
        file.write_text(json.dumps(asdict(plan)), "utf-8")
    say(options, f"plan: {described(plan)}")
    return replace(
        options,
        num_batches=plan.num_batches,
        num_probes=plan.num_probes,
        num_steps=plan.num_steps,
        num_pairs=max(options.k, plan.num_steps // _STEPS_A_PAIR),
    )


def _made(problem: Prepared, options: Options) -> Plan:
    assert options.minutes is not None
    free = free_bytes(tree.leaves(problem.params)[0].device)
    begun = time.monotonic()
    costs, spreads = measure(problem, _PILOT * 60 * options.minutes)
    used = min(0.9, (time.monotonic() - begun) / (60 * options.minutes))
    costs = replace(
        costs,
        activation=2 * costs.product,
        activation_build=3 * costs.build,
        page=PAGE_SECONDS,
        peak_bytes=2 * costs.kept_bytes,
    )
    num_batches = min(_number_of(problem), options.num_batches or _MANY)
    # The Krylov space grows with the steps of a plan: it is a run, and no extra.
    asked = work_of(options, 2)
    least = replace(
        asked,
        num_batches=min(2, num_batches),
        num_probes=LEAST_PROBES,
        num_steps=_STEPS_A_PAIR * options.k,
        num_runs=options.num_runs + 1,
        num_extra=asked.num_extra - _STEPS_A_PAIR * options.num_pairs,
    )
    return make_plan(
        costs, spreads, options.minutes, num_batches=num_batches, least=least, used=used, free_bytes=free / 2
    )


def _number_of(problem: Prepared) -> int:
    batches = problem.batches
    return length_hint(batches.batches if isinstance(batches, ShardedBatches) else batches) or _MANY


_MANY = 100_000  # batches, where nobody knows
