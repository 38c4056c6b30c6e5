"""The first product is held against gradients on some of the samples first, and on all where these do not settle it."""

from __future__ import annotations

import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import classes, normal, seeded
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import hessfn as hf
from hessfn.losses.samples import few
from hessfn.products.loss_memory import make_trace
from hessfn.products.modes import differentiating
from hessfn.products.part_check import SMALL

sys.path.append(str(Path(__file__).parent / "bench"))
from models import MODELS

N, WIDTH = 96, 128  # so large that entries of the parameters by those of the data are more than SMALL


def problem() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    model = seeded(lambda: nn.Sequential(nn.Linear(WIDTH, 64), nn.Tanh(), nn.Linear(64, 3)))
    assert sum(p.numel() for p in model.parameters()) * 2 * N * WIDTH >= SMALL
    return model, (normal(2 * N, WIDTH), classes(2 * N, 3))


def exact(loss: Any, params: Any, batch: Any, v: Any) -> list[Tensor]:
    leaves = [p.detach().requires_grad_() for p in params.values()]
    gradient = torch.autograd.grad(loss(dict(zip(params, leaves, strict=True)), batch), leaves, create_graph=True)
    return list(torch.autograd.grad(gradient, leaves, list(v.values())))


def is_right(found: Any, truth: list[Tensor]) -> bool:
    apart = [f - t for f, t in zip(found.values(), truth, strict=True)]
    return float(hf.tree.norm(apart)) < 1e-9 * float(hf.tree.norm(truth))


@pytest.mark.parametrize("make", [hf.hvp, hf.linearized_hvp])
def test_the_check_asks_few_samples_and_no_second_time(make: Any) -> None:
    model, batch = problem()
    rows: list[int] = []

    def criterion(out: Tensor, y: Tensor) -> Tensor:
        rows.append(len(out))
        return F.cross_entropy(out, y)

    loss, params = hf.functionalize(model, criterion)
    v = hf.gaussian(params, 1)[0]
    found = make(loss, params, batch)(v)
    of_check = [n for n in rows if n < 2 * N]
    assert of_check and max(of_check) <= 8
    # The whole batch: looked at; and traced, for a product that is linearized.
    assert rows.count(2 * N) == (1 if make is hf.hvp else 2)
    assert is_right(found, exact(loss, params, batch, v))
    if make is hf.linearized_hvp:  # other samples, as many or not, consist of the same operations
        rows.clear()
        for other in (tuple(x.flip(0) for x in batch), tuple(x[:100] for x in batch)):
            assert is_right(make(loss, params, other)(v), exact(loss, params, other, v))
        # Looked at, traced (for their number, and since the list of rows has changed), and differentiated by the truth.
        assert rows == [2 * N] * 3 + [100] * 3


def test_operations_that_only_all_samples_have_are_asked_of_all() -> None:
    """The product of some samples is right: it says nothing of what the loss of more of them consists of."""
    model, batch = problem()
    loss, params = hf.functionalize(model, nn.CrossEntropyLoss())
    with torch.no_grad():
        params = {name: torch.zeros_like(p) if name == "2.bias" else p for name, p in params.items()}

    def of_many(params: Any, batch: Any) -> Tensor:
        return loss(params, batch) + (50 * wrong_rule(params["2.bias"]) if len(batch[1]) > N else 0.0)

    few_of_them = (batch[0][:N], batch[1][:N])
    v = hf.gaussian(params, 1)[0]
    assert is_right(hf.linearized_hvp(of_many, params, few_of_them)(v), exact(loss, params, few_of_them, v))
    with pytest.raises(hf.Untraceable, match="not the curvature of the loss.*vector_norm"):
        hf.linearized_hvp(of_many, params, batch)


def test_a_transformer_is_held_by_a_trace_of_two_samples() -> None:
    """Of one sample its trace has fewer operations, and plain autograd would take the memory of all of them."""
    layer = seeded(lambda: nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True))
    x = normal(8, 48, 32)
    samples: list[int] = []

    def criterion(out: Tensor, y: Tensor) -> Tensor:
        samples.append(len(out))
        return F.mse_loss(out, y)

    loss, params = hf.functionalize(layer, criterion)
    hf.linearized_hvp(loss, params, (x, x.flip(0)))
    assert samples.count(8) == 2 and set(samples) == {2, 8}  # looked at, and traced


def test_traces_of_all_numbers_of_samples_consist_of_the_same_operations() -> None:
    model, (x, y) = problem()

    def digest(size: int, power: float = 2.0, flag: bool = False) -> str:
        loss, params = hf.functionalize(
            model, lambda out, y: F.cross_entropy(out, y) + out.square().add(1).pow(power).sum(1, keepdim=flag).mean()
        )
        with differentiating():
            return make_trace(loss, params, ((x[:size], y[:size]),)).operations

    assert len({digest(size) for size in (2, 3, 8, 64, 2 * N)}) == 1
    assert len({digest(8), digest(8, power=1.5), digest(8, flag=True)}) == 3


def wrong_rule(w: Tensor) -> Tensor:
    return w.norm() ** 2  # torch's second derivative lacks a term where w is zero


@pytest.mark.parametrize("make", [hf.hvp, hf.linearized_hvp])
def test_a_wrong_rule_shows_on_few_samples_as_well(make: Any) -> None:
    model, batch = problem()
    loss, params = hf.functionalize(model, nn.CrossEntropyLoss())
    with torch.no_grad():
        params = {name: torch.zeros_like(p) if name == "2.bias" else p for name, p in params.items()}

    def with_norm(params: Any, batch: Any) -> Tensor:
        return loss(params, batch) + 50 * wrong_rule(params["2.bias"])

    v = hf.gaussian(params, 1)[0]
    if make is hf.linearized_hvp:
        with pytest.raises(hf.Untraceable, match="not the curvature of the loss.*vector_norm"):
            make(with_norm, params, batch)
        return
    with pytest.warns(UserWarning, match="is not the curvature of the loss"):
        found = make(with_norm, params, batch)(v)
    truth = exact(loss, params, batch, v)
    truth[3] = truth[3] + 100 * v["2.bias"]
    apart = [f - t for f, t in zip(found.values(), truth, strict=True)]
    assert float(hf.tree.norm(apart)) < 1e-5 * float(hf.tree.norm(truth))


def test_what_only_all_samples_have_is_not_finite_there() -> None:
    """Of the samples that the check asks none is at the root's zero; the product of all is an error all the same."""
    model, (x, _) = problem()
    loss, params = hf.functionalize(
        model, lambda out, y: torch.where(y > 0, y * out.sum(1), 0 * out.sum(1)).abs().sqrt().sum()
    )
    y = torch.ones(2 * N, dtype=torch.float64)
    y[1] = 0.0  # it is not among the evenly spaced ones
    assert all(few(y) == 1)
    with pytest.raises(hf.HessfnError, match="curvature is not"):
        hf.hvp(loss, params, (x, y))(hf.gaussian(params, 1)[0])


def test_the_first_product_of_every_linearized_one_is_finite() -> None:
    """One of the samples has no slope. The check does not ask it, and was made for the batch before."""
    model, (x, _) = problem()
    loss, params = hf.functionalize(model, lambda out, y: (y * out.square().sum(1)).sqrt().sum())
    v = hf.gaussian(params, 1)[0]
    y = torch.ones(2 * N, dtype=torch.float64)
    assert math.isfinite(float(hf.tree.norm(hf.linearized_hvp(loss, params, (x, y))(v))))
    y[1] = 0.0  # it is not among the evenly spaced ones
    with pytest.raises(hf.HessfnError, match="curvature is not"):
        hf.linearized_hvp(loss, params, (x, y))(v)


def test_a_vector_that_is_not_finite_is_no_fault_of_the_loss() -> None:
    model, batch = problem()
    loss, params = hf.functionalize(model, nn.CrossEntropyLoss())
    v = hf.tree.scale(math.nan, hf.gaussian(params, 1)[0])
    assert all(leaf.isnan().all() for leaf in hf.linearized_hvp(loss, params, batch)(v).values())


@pytest.mark.parametrize("size", [4, 7, 8, 9, 16, 64, 100, 513])
def test_few_samples_are_a_quarter_at_most_of_all_tensors_alike(size: int) -> None:
    x = torch.arange(2 * size).reshape(size, 2)
    batch = {"x": x, "rows": torch.arange(3 * size), "array": np.arange(size), "scale": 2.0, "one": torch.tensor(1)}
    some = few(batch)
    number = len(some["x"])
    assert 1 <= number <= min(8, size / 4 + 1)
    of = some["array"]
    assert torch.equal(some["x"], x[torch.from_numpy(of)])
    assert some["rows"].tolist() == [3 * i + j for i in of.tolist() for j in range(3)]
    assert some["scale"] == 2.0 and some["one"] == 1
    assert few(batch, least=2)["one"] == 1 and len(few(batch, least=2)["x"]) == max(number, 2)
    assert few({"x": x, "edges": torch.zeros(2 * size + 1)}) is None
    assert few((x, object())) is None


@pytest.mark.parametrize("size", [1, 2, 3])
def test_few_long_sequences_are_cut_to_their_first_positions(size: int) -> None:
    ids = torch.arange(80 * size).reshape(size, 80)
    some = few({"ids": ids, "embedded": ids[..., None].float(), "targets": ids.flatten(), "mask": ids.numpy() > 0})
    assert torch.equal(some["ids"], ids[:, :10]) and some["ids"].data_ptr() != ids.data_ptr()
    assert some["embedded"].shape == (size, 10, 1)
    assert torch.equal(some["targets"], ids[:, :10].flatten())
    assert some["mask"].shape == (size, 10)
    # Too short, and what has no positions: a label of each sequence, a mask of pairs.
    assert few(ids[:, :60]) is None
    assert few((ids, torch.zeros(size))) is None
    assert few((ids, torch.zeros(size, 1, 80, 80))) is None


def test_the_check_of_one_long_sequence_asks_its_first_positions() -> None:
    model = seeded(lambda: nn.Sequential(nn.Embedding(2000, 512), nn.Tanh(), nn.Linear(512, 5)))
    shapes: list[tuple[int, ...]] = []

    def loss(params: Any, batch: Any) -> Tensor:
        shapes.append(tuple(batch[0].shape))
        out = torch.func.functional_call(model, params, batch[0])
        return F.cross_entropy(out.flatten(0, 1), batch[1].flatten())

    params = {name: p.detach() for name, p in model.named_parameters()}
    batch = classes(96, 2000)[None], classes(96, 5)[None]
    v = hf.gaussian(params, 1)[0]
    found = hf.hvp(loss, params, batch)(v)
    assert set(shapes) == {(1, 12), (1, 96)}
    assert is_right(found, exact(loss, params, batch, v))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_first_product_costs_little_more_than_a_plain_one(name: str) -> None:
    """1.5 on a quiet machine (docs/benchmarks.md); processor time, of which others' jobs take some."""
    model, criterion, batch = MODELS[name]()
    seconds: dict[str, list[float]] = {"plain": [], "first": []}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(5):
            loss, params = hf.functionalize(model, criterion)
            v = hf.gaussian(params, 1)[0]

            def plain(loss: Any = loss, params: Any = params, v: Any = v) -> None:
                with sdpa_kernel(SDPBackend.MATH):
                    torch.func.jvp(lambda p: torch.func.grad(loss)(p, batch), (params,), (v,))

            for which, run in (("plain", plain), ("first", lambda: hf.hvp(loss, params, batch)(v))):  # noqa: B023
                start = time.process_time()
                run()
                seconds[which].append(time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    assert statistics.median(seconds["first"][1:]) <= 2 * statistics.median(seconds["plain"][1:])
