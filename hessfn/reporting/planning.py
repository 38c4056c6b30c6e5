"""Before anything long begins: what the report will take, or how it divides the time that it was given."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from hessfn.core import tree
from hessfn.core.errors import InvalidInput
from hessfn.core.free_memory import free_bytes
from hessfn.parallel.all_reduce import gather
from hessfn.reporting.clock import Clock
from hessfn.reporting.options import Options
from hessfn.reporting.pilot import measure
from hessfn.reporting.plan import Costs, Plan, described, estimated, make_plan
from hessfn.reporting.problem import Prepared
from hessfn.reporting.products import Measured
from hessfn.reporting.progress import say
from hessfn.reporting.spread import number_of_all

LEAST_PROBES = 10  # a standard error from fewer is too uncertain to stop on
LEAST_STEPS = 8
PAGE_SECONDS = 6.0  # for pictures and page
HELD_PROBES = 6  # against traces that are exact
STEPS_OF_A_LAYER = 4  # products for the top of one block, which starts near it
_PILOT = 0.1  # of the time
_POINTS = 55  # of a landscape, about
_SECOND_START = 8  # products, about
_FIXED_PRODUCTS = 4 + 2 + 26  # check, rounding, both ends on halves of the data
_ACTIVATION = 3  # products that a probe of the activations takes, with its part in making it linear
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
        num_points=_points(options),
        num_activation_probes=options.num_activation_probes,
    )


def announce(measured: Measured, options: Options, width: int | None) -> None:
    """Says what is to come, from the products that were made so far; of traces that are exact, a product an output."""
    num_batches = len(measured.sizes)
    work = work_of(options, num_batches)
    if width is not None:
        work = replace(work, num_probes=HELD_PROBES, num_extra=work.num_extra + width)
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
    say(options, f"to come: {described(estimated(work, costs))}")


def products_of_pairs(options: Options, clock: Clock, pace: float) -> int | None:
    """How many products the eigenpairs may take where the time is given; those that have not settled by then say so."""
    if options.minutes is None:
        return None
    wanted = _STEPS_A_PAIR * options.num_pairs + _SECOND_START
    least = _STEPS_A_PAIR * options.k
    others = options.num_runs * options.num_steps + options.num_probes
    return _cut(options, clock, pace, wanted, min(least, wanted), others, fixed=_FIXED_PRODUCTS + options.k)


def steps_in_time(options: Options, clock: Clock, pace: float) -> int:
    """How many steps a Lanczos run may take, of those asked for, so that there is time for all that follows."""
    if options.minutes is None:
        return options.num_steps
    wanted, least = options.num_runs * options.num_steps, options.num_runs * min(options.num_steps, LEAST_STEPS)
    return _cut(options, clock, pace, wanted, least, options.num_probes) // options.num_runs


def reserve(options: Options, pace: float) -> float:
    """Seconds of what follows on the trace."""
    return PAGE_SECONDS + STEPS_OF_A_LAYER * options.num_layers * pace


def lighter(options: Options, clock: Clock, pace: float) -> Options:
    """The options, less the plane and the activations if there is no time left for them beside the least of a trace."""
    if options.minutes is None:
        return options
    room = clock.left - reserve(options, pace) - LEAST_PROBES * pace
    for found in _lighter(options):
        fits = room >= _beside(found, clock) * pace
        if fits if options.group is None else gather(fits, options.group)[0]:
            break
    _say_left_out(found, options)
    return found


def _lighter(options: Options) -> list[Options]:
    """The options, and what is left out where time is short: first the plane, then the activations too."""
    without_plane = replace(options, num_plane_points=0)
    without_both = replace(without_plane, num_activation_probes=0)
    return [options, *(x for x in (without_plane, without_both) if x != options)]


def _say_left_out(found: Options, options: Options) -> None:
    parts = [
        part
        for part, name in (("the plane", "num_plane_points"), ("the activations", "num_activation_probes"))
        if getattr(found, name) != getattr(options, name)
    ]
    if parts:
        say(options, f"the report leaves out {' and '.join(parts)}, for which there is no time")


def _points(options: Options) -> int:
    return _POINTS if options.num_plane_points else _POINTS // 2


def _beside(options: Options, clock: Clock) -> float:
    """What landscape and activations take, in products."""
    return _points(options) * clock.forward + _ACTIVATION * options.num_activation_probes


def _cut(
    options: Options, clock: Clock, pace: float, wanted: int, least: int, others: int, *, fixed: float = 0.0
) -> int:
    """Of the products that are wanted as many as there is time for, if ``others`` are cut by the same part.

    The machine may have become slower since the plan was made: what is left of the time is shared anew. All processes
    get the number of the first one.
    """
    room = clock.left - reserve(options, pace) - (fixed + _beside(options, clock)) * pace
    part = min(1.0, room / (pace * (wanted + others))) if pace > 0 else 1.0
    number = max(least, min(wanted, int(part * wanted)))
    return number if options.group is None else int(gather(number, options.group)[0])


def divided(problem: Prepared, options: Options, folder: Path | None, clock: Clock) -> Options:
    """The options by which the given minutes make the errors smallest; those of a report that is resumed, from there.

    Args:
        folder: where the plan is kept until the report is written.
        clock: of the whole report.
    """
    file = None if folder is None else folder / "plan.json"
    if options.resume and file is not None and file.exists():
        plan = Plan(**json.loads(file.read_text("utf-8")))
    else:
        plan = agreed(partial(_made, problem, options, clock), options)
    if file is not None:
        file.write_text(json.dumps(asdict(plan)), "utf-8")
    total = number_of_all(problem.batches)
    of_all = "" if total is None or total <= plan.num_batches else f", spread over all {total:,}"
    say(options, f"plan: {described(plan)}{of_all}")
    found = replace(
        options,
        num_batches=plan.num_batches,
        num_probes=plan.num_probes,
        num_steps=plan.num_steps,
        num_pairs=max(options.k, plan.num_steps // _STEPS_A_PAIR),
        num_plane_points=options.num_plane_points if plan.num_points == _points(options) else 0,
        num_activation_probes=plan.num_activation_probes,
    )
    _say_left_out(found, options)
    return found


def agreed(make: Callable[[], Plan], options: Options) -> Plan:
    """The plan of the first process, of the times that it has measured; an error if any process has found one."""
    if options.group is None:
        return make()
    made: dict[str, Any] | str
    try:
        made = asdict(make())
    except InvalidInput as error:
        made = str(error)
    said = gather(made, options.group)
    errors = [x for x in said if isinstance(x, str)]
    if errors:
        raise InvalidInput(errors[0])
    return Plan(**said[0])


def _made(problem: Prepared, options: Options, clock: Clock) -> Plan:
    assert options.minutes is not None
    free = free_bytes(tree.leaves(problem.params)[0].device)
    costs, spreads = measure(problem, Clock(_PILOT * 60 * options.minutes))
    clock.forward = min(1.0, costs.forward / costs.product) if costs.product > 0 else clock.forward
    used = clock.spent / (60 * options.minutes)
    costs = replace(
        costs,
        activation=2 * costs.product,
        activation_build=3 * costs.build,
        page=PAGE_SECONDS,
        peak_bytes=2 * costs.kept_bytes,
    )
    num_batches = number_of_all(problem.batches) or options.num_batches or _MANY
    reason = None
    for lighter in _lighter(options):
        # The Krylov space grows with the steps of a plan: it is a run, and no extra.
        asked = work_of(lighter, 2)
        least = replace(
            asked,
            num_batches=min(2, num_batches),
            num_probes=LEAST_PROBES,
            num_steps=_STEPS_A_PAIR * options.k,
            num_runs=options.num_runs + 1,
            num_extra=asked.num_extra - _STEPS_A_PAIR * options.num_pairs,
        )
        try:
            return make_plan(
                costs, spreads, options.minutes, num_batches=num_batches, least=least, used=used, free_bytes=free / 2
            )
        except InvalidInput as error:
            reason = error
    assert reason is not None
    raise reason


_MANY = 100_000  # batches, where nobody knows
