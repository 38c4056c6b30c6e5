"""A report that is given minutes keeps to them, on a machine whose speed changes on the way; its data are spread."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from hessfn import report
from hessfn.reporting import html, pilot
from hessfn.reporting.clock import Clock
from hessfn.reporting.options import Options
from hessfn.reporting.problem import prepare, some_batches
from hessfn.reporting.spread import some, spread

MINUTES = 5.0


class Machine:
    """A clock that goes on by what a loss costs: nothing else takes time, and no test waits for it."""

    def __init__(self, cost: Callable[[float], float]) -> None:
        self.seconds, self.cost = 0.0, cost

    def __call__(self) -> float:
        return self.seconds

    def work(self) -> None:
        self.seconds += self.cost(self.seconds)


class Branching(nn.Module):
    """No trace can stand for it, so that every product computes the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return self.outer(y.tanh() if float(y.detach().square().sum()) >= 0 else y)


def problem(machine: Machine, num_batches: int = 400) -> Any:
    torch.manual_seed(0)
    x = torch.randn(num_batches, 10, 4)
    y = torch.randint(3, (num_batches, 10))

    def slow(outputs: Tensor, targets: Tensor) -> Tensor:
        machine.work()
        return nn.functional.cross_entropy(outputs, targets)

    return Branching().eval(), slow, list(zip(x, y, strict=True))


SPEEDS: dict[str, Callable[[float], float]] = {  # seconds of a loss at a time
    "half as fast from the middle on": lambda t: 0.3 if t < 150 else 0.6,
    "steady": lambda t: 0.3,
    "half as fast early": lambda t: 0.3 if t < 60 else 0.6,
    "half as fast late": lambda t: 0.3 if t < 220 else 0.6,
    "twice as fast from the middle on": lambda t: 0.3 if t < 150 else 0.15,
    "a third as fast now and then": lambda t: 0.9 if int(t) % 20 < 4 else 0.3,
}


@pytest.mark.slow
@pytest.mark.parametrize("speed", SPEEDS)
def test_a_report_takes_the_minutes_it_was_given(
    speed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = Machine(SPEEDS[speed])

    def write(*args: Any) -> None:
        machine.seconds += 6  # as a page takes

    monkeypatch.setattr(time, "monotonic", machine)
    monkeypatch.setattr(html, "write", write)
    made = report(problem(machine), tmp_path, minutes=MINUTES, k=3)
    assert machine.seconds == pytest.approx(60 * MINUTES, rel=0.1)
    said = capsys.readouterr().err
    assert re.search(r"plan: \d+ products over \d+ batches.*, about 4\.\d minutes.*spread over all 400", said)
    assert made["data"]["num_batches"] >= 2
    assert made["trace"]["stderr"] < 0.5 * abs(made["trace"]["mean"])


@pytest.mark.parametrize("cost", [0.05, 0.3, 3.0])
def test_a_pilot_ends_in_its_time(cost: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the machine becomes ten times slower during it; but for its least, two batches with two probes."""
    for slower in (1, 10):
        machine = Machine(lambda t, slower=slower: cost if t < 8 else cost * slower)  # type: ignore[misc]
        monkeypatch.setattr(time, "monotonic", machine)
        prepared = prepare(problem(machine), Options())
        costs, spreads = pilot.measure(prepared, Clock(30.0))
        once = 2 * cost * slower  # a product with two batches
        assert machine.seconds <= max(30.0 + 7 * once, 14 * once)
        assert 0.99 * cost <= costs.product <= 1.01 * cost * slower
        assert spreads.data > 0
        assert min(spreads.probe) == 0


class Counted(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self) -> None:
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return 103

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.loaded.append(index)
        return torch.tensor([float(index)]), torch.tensor(index)


class Stream:
    def __iter__(self) -> Any:
        return iter(range(20))


class Numbered(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(20))

    def __len__(self) -> int:
        return 20


def test_batches_are_spread_over_the_data() -> None:
    assert spread(1, 9) == [4] and spread(9, 9) == list(range(9)) and spread(12, 9) == list(range(9))
    for num, total in ((2, 7), (5, 50), (49, 50)):
        numbers = spread(num, total)
        gaps = [b - a for a, b in itertools.pairwise(numbers)]
        assert len(numbers) == num and max(gaps) - min(gaps) <= 1
        assert abs(numbers[0] + numbers[-1] - (total - 1)) <= 1
    data = Counted()
    found = list(some(DataLoader(data, batch_size=10), 3))
    assert [y.tolist() for _, y in found] == [list(range(10 * i, min(10 * i + 10, 103))) for i in spread(3, 11)]
    assert len(data.loaded) == sum(len(y) for _, y in found)
    assert list(some(Stream(), 3)) == [0, 1, 2]  # nobody knows how many there are
    numbered = DataLoader(Numbered(), batch_size=4)  # which has a length, and an endless sampler
    assert [x.tolist() for x in some(numbered, 2)] == [[4, 5, 6, 7], [12, 13, 14, 15]]


class Boasting(Stream):
    def __len__(self) -> int:
        return 1000


def test_lengths_that_are_not_true_are_refused() -> None:
    with pytest.raises(ValueError, match="more than 999 of them, and end before"):
        some(Boasting(), 1000)
    prepared = prepare((*problem(Machine(lambda t: 0.0), 6), [1.0, 2.0]), Options())
    with pytest.raises(ValueError, match="there are 2 weights for 6 batches"):
        some_batches(prepared, 2)


def test_the_weights_of_batches_go_with_them() -> None:
    model, criterion, batches = problem(Machine(lambda t: 0.0), 6)
    prepared = prepare((model, criterion, batches, [1.0, 2, 3, 4, 5, 6]), Options())
    chosen = some_batches(prepared, 2)
    assert list(chosen.weights) == [2, 5]  # type: ignore[arg-type]
    for (x, _), i in zip(chosen.batches, (1, 4), strict=True):
        assert torch.equal(x, batches[i][0])
