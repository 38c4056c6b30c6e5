"""The plan of a report: what it will take in time and memory, and how to divide a given time.

Pure functions of what a pilot has measured on a few batches: :class:`Costs` and :class:`Spreads`. The clock that holds
a report to its time is in ``clock.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from hessfn.core.errors import InvalidInput

_STEPS = (8, 12, 16, 24, 32, 48, 64, 96, 128)  # of a Lanczos run, that are tried
MOST_PROBES = 10_000
_VECTORS = 12  # beside those of a Krylov basis
_SPARE = 0.3  # of the time goes to probes and steps that may be dropped if the machine becomes slower on the way
_RESOLUTION = 0.07  # error of a density after m steps, as a part of its range, times m: 1.4e-3 after 50


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What one step of a report takes, measured in a pilot: seconds for one batch of the usual size, and bytes."""

    product: float  #: seconds of a product with one batch that is kept linearized
    plain: float  #: seconds of a product with one batch of which nothing is kept
    build: float = 0.0  #: seconds until the product of one batch is linearized
    forward: float = 0.0  #: seconds of the loss of one batch
    activation: float = 0.0  #: seconds of a probe of the activations with one batch
    activation_build: float = 0.0  #: seconds until a batch's product by the activations is linearized
    fixed: float = 0.0  #: seconds that nothing here changes: the trace of the loss, the pilot
    page: float = 0.0  #: seconds for pictures and page
    kept_bytes: int = 0  #: that the linearized product of one batch keeps
    vector_bytes: int = 0  #: of one vector like the parameters
    peak_bytes: int = 0  #: that a product with one batch, or building one, has in use for the moment


@dataclass(frozen=True, kw_only=True)
class Spreads:
    """Standard deviations that a pilot has seen, all relative to the trace: what the errors of a plan follow from."""

    data: float  #: of the trace of one batch, from batch to batch
    probe: Mapping[int, float]  #: of one probe, by the number of Lanczos steps whose pairs are its control variate


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much a report will compute, and what that takes."""

    num_batches: int
    num_probes: int  #: for the trace, one product each
    num_steps: int  #: of each Lanczos run, one product each
    num_runs: int = 1
    num_extra: int = 0  #: products for all else: checks, the second start, the smallest eigenvalue, layers
    num_points: int = 0  #: of the landscape, one forward pass over the batches each
    num_activation_probes: int = 0
    num_kept: int = 0  #: of the batches, how many products are kept linearized
    seconds: float = 0.0
    num_bytes: int = 0  #: in use at the most, beyond model and data
    error: float = field(default=math.inf)  #: of the trace, relative: by data and by probes together

    @property
    def num_products(self) -> int:
        """With the mean over the batches, each of which takes as many of one batch."""
        return self.num_probes + self.num_steps * self.num_runs + self.num_extra


def estimated(plan: Plan, costs: Costs, spreads: Spreads | None = None, *, free_bytes: float = math.inf) -> Plan:
    """The plan with what it takes: how many batches are kept linearized, seconds, bytes, and the error to expect.

    A batch is kept if there is room for it, and if what that saves is more than what it takes to build it.
    """
    vectors = plan.num_steps + _VECTORS
    room = free_bytes - costs.peak_bytes - vectors * costs.vector_bytes
    is_worth = plan.num_products * (costs.plain - costs.product) > costs.build
    kept = (
        int(min(plan.num_batches, max(room, 0) / costs.kept_bytes if costs.kept_bytes else math.inf)) if is_worth else 0
    )
    products = kept * costs.product + (plan.num_batches - kept) * costs.plain
    activations = costs.activation_build + plan.num_activation_probes * costs.activation
    seconds = (
        costs.fixed
        + costs.page
        + kept * costs.build
        + plan.num_products * products
        + plan.num_batches * (1 + plan.num_points) * costs.forward  # the first pass is a forward pass too
        + (plan.num_batches * activations if plan.num_activation_probes else 0.0)
    )
    num_bytes = kept * costs.kept_bytes + vectors * costs.vector_bytes + costs.peak_bytes
    error = math.inf if spreads is None else _error(plan, spreads)
    return replace(plan, num_kept=kept, seconds=seconds, num_bytes=num_bytes, error=error)


def make_plan(
    costs: Costs,
    spreads: Spreads,
    minutes: float,
    *,
    num_batches: int,
    least: Plan,
    used: float = 0.0,
    free_bytes: float = math.inf,
) -> Plan:
    """The plan of the smallest errors in the time given.

    For B batches, m steps and p probes, of the trace ``data^2 / B + probe(m)^2 / p``, and of the density what the
    resolution of a rule of m steps is. A part of the time goes to probes and steps that can be dropped: a machine may
    become slower on the way.

    Args:
        minutes: for all of the report.
        used: the part of that, from 0 to 1, which the pilot has taken.
        num_batches: how many there are.
        least: the plan that is never gone below: its number of batches, probes and steps. Runs, points, activations
            and extra products are taken as they are.
        free_bytes: how much memory may be used.

    Raises:
        ValueError: not even ``least`` fits into the time; the message says what would.

    >>> costs = Costs(product=0.1, plain=0.15, build=0.5, forward=0.03, page=5.0)
    >>> spreads = Spreads(data=1.0, probe={0: 0.1, 20: 0.02})
    >>> plan = make_plan(costs, spreads, 5, num_batches=500, least=Plan(num_batches=2, num_probes=10, num_steps=20))
    >>> plan.num_batches, plan.num_probes, round(plan.seconds)
    (58, 13, 297)
    """
    limit = 60 * minutes * (1 - used)
    cheapest = estimated(least, costs, spreads, free_bytes=free_bytes)
    if cheapest.seconds > limit:
        # A pilot takes a tenth of the time, or what it has taken now, if that is longer.
        seconds = max(cheapest.seconds / 0.9, cheapest.seconds + 60 * minutes * used)
        enough = math.ceil(seconds / 6) / 10
        raise InvalidInput(
            f"minutes={minutes:g} is too short for the smallest report, {described(cheapest)}: give "
            f"minutes={enough:g}, or smaller batches"
        )
    best = cheapest
    for batches in _sizes(least.num_batches, max(num_batches, least.num_batches)):
        smallest = estimated(replace(least, num_batches=batches), costs, spreads, free_bytes=free_bytes)
        if smallest.seconds > (1 - _SPARE) * limit:
            continue
        for steps in (least.num_steps, *(m for m in _STEPS if m > least.num_steps)):
            found = _filled(replace(least, num_batches=batches, num_steps=steps), costs, spreads, limit, free_bytes)
            if found is not None and _badness(found) < _badness(best):
                best = found
    return best


def described(plan: Plan) -> str:
    """One line: products, batches, seconds, memory; and the error, where it is known.

    >>> described(Plan(num_batches=2, num_probes=30, num_steps=20, num_kept=2, seconds=75.0, num_bytes=3 * 10**8))
    '50 products over 2 batches (all kept), about 1.2 minutes and 300 MB'
    """
    kept = f" ({'all' if plan.num_kept == plan.num_batches else plan.num_kept} kept)" if plan.num_kept else ""
    batches = f"{plan.num_batches} batch{'es' if plan.num_batches != 1 else ''}{kept}"
    costs = f"about {_duration(plan.seconds)} and {_size(plan.num_bytes)}"
    line = f"{plan.num_products} products over {batches}, {costs}"
    if not math.isfinite(plan.error):
        return line
    return f"{line}; the trace to about {100 * plan.error:.2g} % (one standard error, by data and probes)"


def _error(plan: Plan, spreads: Spreads) -> float:
    of_data = spreads.data**2 / plan.num_batches
    of_probes = _spread_after(plan.num_steps, spreads) ** 2 / plan.num_probes
    return math.sqrt(of_data + of_probes)


def _badness(plan: Plan) -> float:
    return math.hypot(plan.error, _RESOLUTION / max(plan.num_steps, 1))


def _spread_after(num_steps: int, spreads: Spreads) -> float:
    """Of one probe: a power law between what the pilot has seen, and the inverse root beyond it."""
    seen = sorted((max(m, 1), max(spread, 0.0)) for m, spread in spreads.probe.items())
    before = [pair for pair in seen if pair[0] <= num_steps]
    after = [pair for pair in seen if pair[0] > num_steps]
    if not before:
        return seen[0][1]
    (m, spread) = before[-1]
    if not after:
        return spread * math.sqrt(m / max(num_steps, 1))
    (later, smaller) = after[0]
    part = math.log(num_steps / m) / math.log(later / m)
    return spread ** (1 - part) * smaller**part


def _filled(plan: Plan, costs: Costs, spreads: Spreads, limit: float, free_bytes: float) -> Plan | None:
    """The plan with as many probes as there is time for; None where there is none."""
    found = estimated(plan, costs, spreads, free_bytes=free_bytes)
    if found.seconds > limit:
        return None
    low, high = plan.num_probes, MOST_PROBES
    while low < high:  # whether batches are kept depends on the number of products, so the time is no straight line
        middle = (low + high + 1) // 2
        longer = estimated(replace(plan, num_probes=middle), costs, spreads, free_bytes=free_bytes)
        low, high = (middle, high) if longer.seconds <= limit else (low, middle - 1)
    return estimated(replace(plan, num_probes=low), costs, spreads, free_bytes=free_bytes)


def _sizes(least: int, most: int) -> list[int]:
    """Numbers of batches: all of them where they are few, else each by a twentieth more than the last."""
    sizes = [least]
    while sizes[-1] < most:
        sizes.append(min(most, max(sizes[-1] + 1, int(sizes[-1] * 1.05))))
    return sizes


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 60 else f"{seconds / 60:.1f} minutes"


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:.0f} MB" if num_bytes < 1e9 else f"{num_bytes / 1e9:.1f} GB"
