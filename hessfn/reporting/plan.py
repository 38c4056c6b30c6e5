"""The plan of a report: what it will take in time and memory, and how to divide a given time.

Pure functions of what a pilot has measured on a few batches: :class:`Costs` and :class:`Spreads`. The clock that holds a
report to its time is in ``clock.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from hessfn.core.errors import InvalidInput


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


def estimated(plan: Plan, costs: Costs, *, free_bytes: float = math.inf) -> Plan:
    """The plan with what it takes: how many batches are kept, seconds, bytes."""
    raise NotImplementedError


def make_plan(
    costs: Costs,
    spreads: Spreads,
    minutes: float,
    *,
    num_batches: int,
    least: Plan,
    free_bytes: float = math.inf,
) -> Plan:
    """The plan of the smallest error in the time given: ``data^2 / B + probe(m)^2 / p`` for B batches, m steps, p probes.

    Args:
        minutes: for all of the report, from now on.
        num_batches: how many there are.
        least: the plan that is never gone below: its number of batches, probes and steps. Runs, points, activations
            and extra products are taken as they are.
        free_bytes: how much memory may be used.

    Raises:
        ValueError: not even ``least`` fits into the time; the message says what would.
    """
    raise NotImplementedError


def described(plan: Plan) -> str:
    """One line: products, samples, seconds, memory."""
    raise NotImplementedError
