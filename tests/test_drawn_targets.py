"""Targets that a model predicts: the numbers they are drawn by, their distribution, and the matrix that they make."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import hessfn as hf
from hessfn.core import philox
from hessfn.core.fingerprints import checksum
from hessfn.core.probes import uniform
from hessfn.products.predictive import require_distribution, seed_of

ROWS = 20_000
LOGITS = torch.tensor([0.3, -1.2, 1.5, 0.0], dtype=torch.float64)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4)).double()


FORWARD, PARAMS = hf.stateless(net())
X = hf.gaussian(torch.zeros(5, 3).double(), 1, seed=1)[0]
Y = torch.tensor([0, 3, 1, 1, 2])
BATCHES = X.reshape(5, 1, 3).expand(5, 2, 3) + torch.tensor([0.0, 0.1]).reshape(1, 2, 1)
V = hf.gaussian(PARAMS, 1, seed=3)[0]
LIKELIHOODS = {
    "classes": (nn.CrossEntropyLoss(), Y),
    "squares": (nn.MSELoss(), X @ torch.ones(3, 4).double()),
    "bits": (nn.BCEWithLogitsLoss(), (X @ torch.ones(3, 4).double()).sign().relu()),
}
each_likelihood = pytest.mark.parametrize("name", LIKELIHOODS)


def values(*shape: int) -> Tensor:
    return hf.gaussian(torch.zeros(shape).double(), 1, seed=7)[0]


def flat(x: Any) -> Tensor:
    return hf.tree.ravel(x)[0]


def product(name: str, x: Tensor = X, **options: Any) -> Tensor:
    criterion, y = LIKELIHOODS[name]
    return flat(hf.fvp(FORWARD, criterion, PARAMS, (x, y[: len(x)]), num_samples=3, **options)(V))


def drawn(criterion: nn.Module, targets: Tensor, seed: int = 0) -> Tensor:
    """Slopes of one draw for each of many rows of the same logits."""
    predicted = require_distribution(criterion, "fvp")(LOGITS.expand(ROWS, 4), targets)
    return predicted.draw(predicted.numbers(predicted.like, 1, seed=seed)[0])


def test_uniform_numbers_are_those_of_numpy() -> None:
    numpys = np.random.Generator(np.random.Philox(np.random.SeedSequence([7, 2, *b"_uniforms"]))).random(1003)
    assert np.array_equal(uniform(torch.zeros(1003).double(), 3, seed=7)[2], numpys)
    words = torch.tensor([0, -1, -(2**63), 2**63 - 1, 2047, 2048])
    least = 2.0**-53
    assert philox.uniforms(words).tolist() == [0.0, 1 - least, 0.5, 0.5 - least, 0.0, least]


def test_classes_come_up_as_often_as_they_are_likely() -> None:
    p = LOGITS.softmax(0)
    slopes = drawn(nn.CrossEntropyLoss(), torch.zeros(ROWS, dtype=torch.int64))
    chosen = p - slopes  # one-hot
    assert ((chosen - chosen.round()).abs() < 1e-12).all() and torch.equal(chosen.round().sum(1), torch.ones(ROWS))
    assert stats.chisquare(chosen.round().sum(0), ROWS * p).pvalue > 1e-4
    after = chosen[:-1].T @ chosen[1:]  # pairs of neighbours: rows are independent
    assert stats.chisquare(after.round().flatten(), (ROWS - 1) * torch.outer(p, p).flatten(), ddof=6).pvalue > 1e-4


def test_targets_of_squares_are_normal_with_variance_one_half() -> None:
    slopes = drawn(nn.MSELoss(), torch.zeros(ROWS, 4).double())  # 2 (o - y)
    assert stats.kstest((slopes / 2**0.5).flatten().numpy(), "norm").pvalue > 1e-4


def test_zeros_and_ones_come_up_as_often_as_they_are_likely() -> None:
    p = LOGITS.sigmoid()
    ones = (p - drawn(nn.BCEWithLogitsLoss(), torch.zeros(ROWS, 4).double())).round()
    for count, chance in zip(ones.sum(0), p, strict=True):
        assert stats.binomtest(int(count), ROWS, float(chance)).pvalue > 1e-4


def test_the_mean_over_draws_is_the_fisher_matrix_by_enumeration() -> None:
    """``1/B sum_i sum_c p_ic g_ic g_ic'``: every class of every sample, with its probability."""
    expected = torch.zeros(len(flat(PARAMS)), len(flat(PARAMS))).double()
    unravel = hf.tree.ravel(PARAMS)[1]
    for x in X:
        chances = FORWARD(PARAMS, x[None]).detach().softmax(1)[0]
        slopes = torch.autograd.functional.jacobian(
            lambda w, x=x: FORWARD(unravel(w), x[None]).log_softmax(1)[0], flat(PARAMS)
        )
        expected += slopes.T @ (chances[:, None] * slopes) / len(X)
    make = lambda seed: hf.fvp(FORWARD, nn.CrossEntropyLoss(), PARAMS, (X, Y), num_samples=40, seed=seed)  # noqa: E731
    found = torch.stack([hf.dense(make(seed), PARAMS, batch_size=64) for seed in range(12)])
    z = (found.mean(0) - expected) / (found.std(0) / 12**0.5 + 1e-12)
    assert float(z.square().mean().sqrt()) < 2 and float(z.abs().max()) < 6
    assert float((found.mean(0) - expected).norm() / expected.norm()) < 0.06


@each_likelihood
def test_seeds_and_batches_under_vmap_are_those_of_a_loop(name: str) -> None:
    seeds = torch.func.vmap(lambda seed: product(name, seed=seed))(torch.arange(4))
    assert torch.allclose(seeds, torch.stack([product(name, seed=i) for i in range(4)]), rtol=1e-12, atol=1e-14)
    batches = torch.func.vmap(lambda x: product(name, x))(BATCHES)
    assert torch.allclose(batches, torch.stack([product(name, x) for x in BATCHES]), rtol=1e-12, atol=1e-14)


@pytest.mark.slow
@each_likelihood
def test_a_compiled_product_has_the_same_draws(name: str) -> None:
    compiled = torch.compile(lambda x, seed: product(name, x, seed=seed), backend="aot_eager")
    for seed in (0, 5):
        assert torch.allclose(compiled(X, seed), product(name, seed=seed), rtol=1e-10, atol=1e-13)
    criterion, y = LIKELIHOODS[name]
    matvec = hf.fvp(FORWARD, criterion, PARAMS, (X, y), num_samples=3)
    whole = torch.compile(matvec, backend="aot_eager", fullgraph=True)
    assert torch.allclose(flat(whole(V)), flat(matvec(V)), rtol=1e-10, atol=1e-13)


@each_likelihood
def test_a_device_draws_the_same_targets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = product(name)
    monkeypatch.setattr(philox, "words", philox.computed_words)
    assert torch.equal(product(name), expected)


def test_the_checksum_of_data_is_that_of_a_loop_under_transforms() -> None:
    data = {
        "x": values(4, 3, 2), "labels": torch.arange(4), "none": torch.zeros(4, 0),
        "complex": torch.complex(values(4, 2), values(4, 2) + 1), "mask": torch.arange(8).reshape(4, 2) > 3,
        "half": values(4, 3).bfloat16(),
    }  # fmt: skip
    loop = torch.stack([checksum({name: leaf[i] for name, leaf in data.items()}) for i in range(4)])
    assert torch.equal(torch.func.vmap(checksum)(data), loop) and len(loop.unique()) > 12
    nested = torch.func.vmap(torch.func.vmap(lambda row: checksum([row])))(data["x"])
    assert torch.equal(nested[:, :, 0], torch.stack([torch.cat([checksum([row]) for row in m]) for m in data["x"]]))
    slope = torch.func.grad(lambda x: x.square().sum() + checksum([x]).sum().double())(data["x"])
    assert torch.equal(slope, 2 * data["x"])


def test_the_seed_of_draws_is_one_of_data_and_seed() -> None:
    data = torch.zeros(3), torch.tensor([1, 2])
    found = {int(seed_of(seed, data, "")) for seed in (0, 1, 2**63 - 1, 2**62)}
    found |= {int(seed_of(0, (torch.full((3,), x), torch.tensor([1, 2])), "")) for x in (1e-9, 1.0, -1.0)}
    assert len(found) == 7 and min(found) >= 0
    assert int(seed_of(torch.tensor(1), data, "")) == int(seed_of(1, data, ""))
    for wrong in (torch.tensor(1.5), torch.arange(2)):
        with pytest.raises(hf.HessfnError, match="not a whole number"):
            seed_of(wrong, data, "fvp")
