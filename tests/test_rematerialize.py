"""What is computed again behind the peak of memory is the same, and what was kept over it is less."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nets import seeded
from test_fused import truth
from torch import Tensor, fx, nn

import hessfn as hf
from hessfn.engine import pipeline, rematerialize
from hessfn.engine.liveness import live_bytes, owners_of
from hessfn.engine.op_definitions import by_definition


class Block(nn.Module):
    """What is normalised, activated and viewed is needed again on the way down."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.gelu(self.up(self.norm(x))).unflatten(-1, (3, 4)).transpose(-1, -2)
        return x + self.down(hidden.flatten(-2).tanh())


NETS: dict[str, Any] = {
    "blocks": lambda: nn.Sequential(nn.Linear(5, 6), Block(), Block(), nn.Linear(6, 2)),
    "activations": lambda: nn.Sequential(nn.Linear(5, 7), nn.SiLU(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 2)),
    "convolutions": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 4, 3), nn.GELU(), nn.Conv1d(4, 2, 3), nn.Tanh(), nn.Flatten()
    ),
}
PEAKS = {"blocks": (0.85, 0.85), "activations": (0.85, 0.97), "convolutions": (0.97, 0.85)}  # of what they were


def problem(name: str) -> Any:
    loss, params = hf.functionalize(seeded(NETS[name]), nn.MSELoss())
    generator = torch.Generator().manual_seed(1)
    return loss, params, tuple(torch.randn(200, n, generator=generator, dtype=torch.float64) for n in (5, 2))


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rematerialize, "WORTH", 1)
    monkeypatch.setattr(rematerialize, "MULTIPLICATIONS", 1)


def graphs(loss: Any, params: Any, batch: Any, linearized: bool) -> tuple[fx.Graph, fx.Graph]:
    """Before and after."""
    found: dict[str, fx.Graph] = {}

    def after(name: str, module: fx.GraphModule) -> None:
        graph = fx.Graph()
        graph.output(graph.graph_copy(module.graph, {}))
        found[name] = graph

    pipeline.run(pipeline.STAGES, None, pipeline.Job(by_definition(loss), params, (batch,), linearized), after)
    return found["add_products"], found["rematerialize"]


def peak(graph: fx.Graph) -> int:
    nodes = list(graph.nodes)
    return max(live_bytes(nodes, owners_of(nodes))[0])


@pytest.mark.slow
@pytest.mark.parametrize("linearized", [False, True], ids=["plain", "linearized"])
@pytest.mark.parametrize("name", NETS)
def test_products_are_the_same_with_less_memory(
    name: str, linearized: bool, always: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, params, batch = problem(name)
    expected = truth(loss, params, batch)
    make: Any = hf.linearized_hvp if linearized else lambda *given: hf.hvp(*given, trace_after=0)
    found = hf.dense(make(loss, params, batch), params)
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12)
    before, after = graphs(loss, params, batch, linearized)
    assert len(after.nodes) > len(before.nodes)
    assert peak(after) < PEAKS[name][linearized] * peak(before)
    monkeypatch.setattr(rematerialize, "WORTH", 1 << 40)
    assert torch.equal(found, hf.dense(make(*problem(name)), params))  # the same operations, to the last bit


def test_nothing_is_computed_again_that_would_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rematerialize, "WORTH", 1)
    before, after = graphs(*problem("activations"), False)
    assert len(after.nodes) == len(before.nodes)


def test_small_results_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rematerialize, "MULTIPLICATIONS", 1)
    before, after = graphs(*problem("blocks"), False)
    assert len(after.nodes) == len(before.nodes)


def test_only_what_is_cheap_is_computed_twice(always: None) -> None:
    before, after = graphs(*problem("blocks"), False)

    def products(graph: fx.Graph) -> list[str]:
        names = [str(node.target) for node in graph.nodes]
        return sorted(name for name in names if "mm" in name)

    assert products(before) == products(after)
