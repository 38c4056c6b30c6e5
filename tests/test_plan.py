"""A plan takes the time that it says, keeps to what is given, and no other plan has smaller errors."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import pytest

import hessfn as hf
from hessfn.core.errors import InvalidInput
from hessfn.reporting import planning
from hessfn.reporting.clock import Clock
from hessfn.reporting.options import Options
from hessfn.reporting.plan import Costs, Plan, Spreads, described, estimated, make_plan

COSTS = Costs(
    product=0.10, plain=0.16, build=0.6, forward=0.04, activation=0.3, activation_build=1.0, fixed=4.0, page=6.0,
    kept_bytes=10**8, vector_bytes=10**7, peak_bytes=2 * 10**8,
)  # fmt: skip
SPREADS = Spreads(data=0.8, probe={0: 0.3, 8: 0.1, 16: 0.05})
LEAST = Plan(
    num_batches=2, num_probes=10, num_steps=12, num_runs=2, num_extra=20, num_points=80, num_activation_probes=4
)


def simulated(plan: Plan, costs: Costs) -> float:
    """The seconds, one step after the other."""
    seconds = costs.fixed + costs.page
    for batch in range(plan.num_batches):
        is_kept = batch < plan.num_kept
        seconds += costs.forward + (costs.build if is_kept else 0.0)
        for _ in range(plan.num_steps * plan.num_runs + plan.num_probes + plan.num_extra):
            seconds += costs.product if is_kept else costs.plain
        for _ in range(plan.num_points):
            seconds += costs.forward
        if plan.num_activation_probes:
            seconds += costs.activation_build + plan.num_activation_probes * costs.activation
    return seconds


def random_plan(draw: random.Random) -> Plan:
    counts = {
        name: draw.randrange(1, 60) for name in ("num_batches", "num_probes", "num_steps", "num_runs", "num_extra")
    }
    return Plan(**counts, num_points=draw.randrange(100), num_activation_probes=draw.choice([0, 3, 9]))


@pytest.mark.parametrize("seed", range(30))
def test_a_plan_takes_the_time_and_the_memory_that_it_says(seed: int) -> None:
    draw = random.Random(seed)
    free = draw.choice([math.inf, 3 * 10**9, 10**9, 10**7])
    plan = estimated(random_plan(draw), COSTS, free_bytes=free)
    assert plan.seconds == pytest.approx(simulated(plan, COSTS))
    assert plan.num_kept <= plan.num_batches
    assert plan.num_bytes <= max(free, COSTS.peak_bytes + (plan.num_steps + 12) * COSTS.vector_bytes)
    if math.isfinite(free) and 0 < plan.num_kept < plan.num_batches:
        assert plan.num_bytes + COSTS.kept_bytes > free  # one more would not have fitted


def test_batches_are_kept_where_that_saves_more_than_it_takes() -> None:
    few, many = (Plan(num_batches=5, num_probes=num, num_steps=1) for num in (8, 10))
    assert estimated(few, COSTS).num_kept == 0  # 9 products save 0.54 s, and to build takes 0.6
    assert estimated(many, COSTS).num_kept == 5


@pytest.mark.parametrize("minutes", [2, 5, 20])
@pytest.mark.parametrize("free", [math.inf, 2 * 10**9, 4 * 10**8])
@pytest.mark.parametrize("data", [0.01, 0.3, 3.0])
def test_no_plan_that_fits_has_a_smaller_error(minutes: float, free: float, data: float) -> None:
    spreads = dataclasses.replace(SPREADS, data=data)
    plan = make_plan(COSTS, spreads, minutes, num_batches=60, least=LEAST, free_bytes=free)
    assert 0.9 * 60 * minutes < plan.seconds <= 60 * minutes
    smallest = estimated(dataclasses.replace(LEAST, num_batches=plan.num_batches), COSTS, free_bytes=free)
    assert smallest.seconds <= 0.7 * 60 * minutes or plan.num_batches == LEAST.num_batches
    assert plan.seconds == pytest.approx(simulated(plan, COSTS))
    assert plan.error == pytest.approx(
        math.hypot(data / plan.num_batches**0.5, probe(plan.num_steps) / plan.num_probes**0.5)
    )
    draw = random.Random(1)
    for _ in range(3000):
        other = dataclasses.replace(
            LEAST,
            num_batches=draw.randrange(2, 61),
            num_probes=draw.randrange(10, 400),
            num_steps=draw.choice([12, 16, 24, 32, 48, 64]),
        )
        other = estimated(other, COSTS, spreads, free_bytes=free)
        # On so many batches 0.7 of the time must be enough: a machine that becomes slower makes fewer probes and steps.
        smallest = estimated(dataclasses.replace(LEAST, num_batches=other.num_batches), COSTS, free_bytes=free)
        if other.seconds <= 60 * minutes and smallest.seconds <= 0.7 * 60 * minutes:
            worst = [math.hypot(p.error, 0.07 / p.num_steps) for p in (plan, other)]
            assert worst[0] <= 1.02 * worst[1]  # numbers of batches are a twentieth apart


def probe(num_steps: int) -> float:
    """Of SPREADS: a power law from 8 to 16 steps, and the inverse root beyond."""
    if num_steps >= 16:
        return 0.05 * (16 / num_steps) ** 0.5
    return 0.1 * 0.5 ** (math.log(num_steps / 8) / math.log(2))


def test_all_data_are_taken_where_they_are_few_and_time_is_long() -> None:
    plan = make_plan(COSTS, SPREADS, 60, num_batches=7, least=LEAST)
    assert plan.num_batches == 7
    assert plan.num_probes > 100


def test_data_are_worth_more_batches_and_probes_are_worth_more_probes() -> None:
    many = make_plan(COSTS, Spreads(data=5.0, probe={0: 0.01}), 10, num_batches=1000, least=LEAST)
    few = make_plan(COSTS, Spreads(data=0.01, probe={0: 1.0}), 10, num_batches=1000, least=LEAST)
    assert many.num_batches > 5 * few.num_batches
    assert few.num_probes > 5 * many.num_probes


def test_too_little_time_says_what_would_be_enough() -> None:
    with pytest.raises(hf.HessfnError, match=r"minutes=0\.2 is too short.*give minutes=(\S+), or") as caught:
        make_plan(COSTS, SPREADS, 0.2, num_batches=60, least=LEAST)
    enough = float(str(caught.value).split("give minutes=")[1].split(",")[0])
    assert make_plan(COSTS, SPREADS, enough, num_batches=60, least=LEAST).num_batches == 2


def test_what_the_pilot_has_taken_is_not_there_any_more() -> None:
    whole = make_plan(COSTS, SPREADS, 4.5, num_batches=60, least=LEAST)
    assert make_plan(COSTS, SPREADS, 5, num_batches=60, least=LEAST, used=0.1) == whole
    with pytest.raises(hf.HessfnError, match=r"minutes=0\.2 is too short") as caught:
        make_plan(COSTS, SPREADS, 0.2, num_batches=60, least=LEAST, used=0.1)
    enough = float(str(caught.value).split("give minutes=")[1].split(",")[0])
    assert make_plan(COSTS, SPREADS, enough, num_batches=60, least=LEAST, used=0.1).num_batches == 2


def test_a_plan_is_one_line() -> None:
    plan = make_plan(COSTS, SPREADS, 5, num_batches=60, least=LEAST, free_bytes=10**9)
    line = described(plan)
    assert "\n" not in line
    for part in (f"{plan.num_products} products", f"{plan.num_batches} batches", "minutes", "MB", "%"):
        assert part in line


class Time:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def test_a_clock_ends_before_the_item_that_would_be_too_long() -> None:
    time = Time()
    clock = Clock(10.0, now=time)
    done = []
    for item in clock.while_time(range(1000), reserve=2.0):
        time.seconds += 0.7
        done.append(item)
    assert len(done) == 11  # after which 7.7 of 8 seconds are gone
    assert clock.spent == pytest.approx(7.7) and clock.left == pytest.approx(2.3)


def test_at_least_so_many_are_done_however_late_it_is() -> None:
    time = Time()
    clock = Clock(1.0, now=time)
    time.seconds += 50
    assert list(clock.while_time("abcdef", least=3)) == ["a", "b", "c"]


def test_without_a_limit_all_are_done() -> None:
    clock = Clock(None)
    assert list(clock.while_time(range(5), reserve=1e9)) == [0, 1, 2, 3, 4]
    assert clock.fits(1e12)


def test_the_slowest_item_so_far_counts() -> None:
    time = Time()
    clock = Clock(10.0, now=time)
    taken = []
    for seconds in clock.while_time([1, 4, 1, 1, 1, 1]):
        time.seconds += seconds
        taken.append(seconds)
    assert taken == [1, 4, 1, 1]  # at 6 another 4 is just in time, at 7 it is not


def test_processes_do_as_the_group_says() -> None:
    assert list(Clock(None, agree=lambda there_is: False).while_time("abc", least=1)) == ["a"]
    late = Clock(-1.0, agree=lambda there_is: True)
    assert list(late.while_time("abc")) == ["a", "b", "c"]


def test_what_one_process_finds_too_short_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_short() -> Plan:
        raise InvalidInput("minutes=1 is too short")

    plan = Plan(num_batches=2, num_probes=10, num_steps=20)
    for make, others in ((too_short, plan), (lambda: plan, "minutes=1 is too short")):
        said: list[Any] = [others if isinstance(others, str) else dataclasses.asdict(others)]
        monkeypatch.setattr(planning, "gather", lambda made, group, said=said: [made, *said])
        with pytest.raises(InvalidInput, match="minutes=1 is too short"):
            planning.agreed(make, Options(group="of two processes"))
    monkeypatch.setattr(planning, "gather", lambda made, group: [dataclasses.asdict(plan), made])
    assert planning.agreed(lambda: dataclasses.replace(plan, num_probes=99), Options(group="of two processes")) == plan
