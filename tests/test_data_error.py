"""The data's own error: held against draws from a set whose Hessians, sample by sample, are all known."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import NETS, classes, dense_hessian, normal, seeded
from spectra import on, symmetric
from test_distributed import pytestmark as without_processes
from test_distributed import run, same_bits
from torch import Tensor, nn

import hessfn as hf
from hessfn.core import tree

NUM_SAMPLES = 600
SIZES = {"0.weight": 128, "0.bias": 8, "2.weight": 80, "2.bias": 10}


@functools.cache
def digits() -> tuple[Any, dict[str, Tensor], Tensor, Tensor]:
    """A trained net of 226 parameters on 600 digits of 4 x 4 pixels: loss, parameters and data."""
    datasets = pytest.importorskip("sklearn.datasets")
    data = datasets.load_digits()
    images = torch.from_numpy(data.images[:NUM_SAMPLES]).div(8).sub(1)
    x, y = F.avg_pool2d(images[:, None], 2).flatten(1), torch.from_numpy(data.target[:NUM_SAMPLES]).long()
    model = seeded(lambda: nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 10)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    loss, params = hf.functionalize(model, nn.CrossEntropyLoss())
    return loss, params, x, y


@functools.cache
def hessians() -> Tensor:
    """``(600, 226, 226)``, of every sample alone, by torch's own transforms from the formula of the net."""
    _, params, x, y = digits()
    flat, unravel = tree.ravel(params)

    def loss(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
        p = unravel(w)
        hidden = torch.tanh(p["0.weight"] @ x + p["0.bias"])
        return F.cross_entropy(p["2.weight"] @ hidden + p["2.bias"], y)

    one = torch.func.hessian(loss)
    return torch.cat([torch.func.vmap(lambda x, y: one(flat, x, y))(*part) for part in zip(x.split(50), y.split(50))])  # noqa: B905


def draws(count: int, size: int, seed: int = 0) -> Tensor:
    """``(count, size)`` samples, with replacement: a draw from a population of which these 600 are all kinds."""
    return torch.randint(NUM_SAMPLES, (count, size), generator=torch.Generator().manual_seed(seed))


def in_parts(values: Tensor, num_parts: int) -> Tensor:
    return values.reshape(num_parts, -1, *values.shape[1:]).mean(1)


def share_covered(values: Tensor, size: int, num_parts: int, trials: int = 1000) -> Tensor:
    """How often the interval by the data of a draw holds the mean over all: ``(...)`` of values ``(600, ...)``."""
    exact = values.mean(0)
    lower, upper = hf.data_interval(in_parts(values[draws(trials, size).T], num_parts))
    return ((lower <= exact) & (exact <= upper)).double().mean(0)


@pytest.mark.parametrize(("size", "num_parts"), [(40, 40), (100, 20), (200, 10), (400, 20)])
def test_intervals_of_traces_cover(size: int, num_parts: int) -> None:
    diagonals = hessians().diagonal(dim1=1, dim2=2)
    layers = torch.stack([part.sum(1) for part in diagonals.split(list(SIZES.values()), dim=1)], dim=1)
    covered = share_covered(torch.cat([diagonals.sum(1, keepdim=True), layers], dim=1), size, num_parts)
    assert 0.935 <= covered[0] <= 0.975, covered  # 1000 trials know it to 0.007
    assert (covered >= 0.925).all(), covered


def test_where_student_fails_by_skewness_these_do_not() -> None:
    values = torch.from_numpy(np.random.default_rng(0).gamma(0.3, size=(40, 10000)))
    lower, upper = hf.data_interval(values)
    assert ((lower <= 0.3) & (upper >= 0.3)).double().mean() >= 0.935
    far = 2.0227 * hf.data_stderr(values)  # t of 39 degrees of freedom
    assert ((values.mean(0) - 0.3).abs() <= far).double().mean() < 0.915


def test_intervals_of_curvature_along_vectors_cover() -> None:
    vectors = torch.linalg.eigh(hessians().mean(0)).eigenvectors[:, [-1, -2, -3, 0]]
    forms = torch.einsum("ik,bij,jk->bk", vectors, hessians(), vectors)
    assert (share_covered(forms, 100, 20) >= 0.925).all()


def half(drawn: Tensor, num_parts: int) -> tuple[Any, Any]:
    """Products with the mean Hessian of some samples, and their forms by part."""
    parts = [hessians()[part].mean(0) for part in drawn.split(len(drawn) // num_parts)]
    mean = torch.stack(parts).mean(0)
    return on(mean, None), lambda v: hf.Forms(torch.stack([v @ A @ v for A in parts])[:, None], torch.ones(len(parts)))


def crossed(drawn: Tensor, num_parts: int, **options: Any) -> hf.CrossFitted:
    (matvec_a, forms_a), (matvec_b, forms_b) = half(drawn[::2], num_parts), half(drawn[1::2], num_parts)
    start = normal(226, seed=3)
    return hf.cross_fitted(matvec_a, matvec_b, start, forms_a=forms_a, forms_b=forms_b, **options)


@pytest.mark.parametrize(("size", "num_parts", "trials"), [(40, 5, 40), (160, 8, 40)])
def test_the_top_eigenvalue_of_all_data_lies_between_the_ends(size: int, num_parts: int, trials: int) -> None:
    exact = torch.linalg.eigvalsh(hessians().mean(0))[-1]
    found = [crossed(drawn, num_parts) for drawn in draws(trials, size, seed=1)]
    assert sum(bool(x.lower <= exact <= x.upper) for x in found) >= 0.95 * trials
    in_sample, between = (torch.stack([getattr(x, name) for x in found]) for name in ("in_sample", "crossed"))
    assert in_sample.mean() > 1.05 * exact > exact > 1.02 * between.mean()  # the one is too large, the other too small
    width = torch.stack([x.upper - x.lower for x in found])
    assert width.median() <= 3 * exact  # and it says something


@pytest.mark.slow
@pytest.mark.parametrize(("size", "num_parts"), [(24, 6), (40, 20), (80, 8), (300, 10)])
def test_the_ends_hold_in_many_draws(size: int, num_parts: int) -> None:
    exact = torch.linalg.eigvalsh(hessians().mean(0))[-1]
    found = [crossed(drawn, num_parts) for drawn in draws(200, size, seed=2)]
    assert sum(bool(x.lower <= exact <= x.upper) for x in found) >= 190


def test_for_the_smallest_all_is_the_other_way_round() -> None:
    parts = [symmetric(torch.linspace(-1, 2, 20), seed) for seed in range(8)]

    def side(sign: int, chosen: list[Tensor]) -> tuple[Any, Any]:
        signed = [sign * A for A in chosen]
        matvec = on(torch.stack(signed).mean(0), None)
        return matvec, lambda v: hf.Forms(torch.stack([v @ A @ v for A in signed])[:, None], torch.ones(len(signed)))

    found = []
    for sign, which in ((1, "LA"), (-1, "SA")):
        (a, forms_a), (b, forms_b) = side(sign, parts[:4]), side(sign, parts[4:])
        found.append(hf.cross_fitted(a, b, normal(20), forms_a=forms_a, forms_b=forms_b, which=which, rtol=1e-9))
    largest, smallest = found
    assert torch.allclose(largest.lower, -smallest.upper, rtol=1e-6)
    assert torch.allclose(largest.upper, -smallest.lower, rtol=1e-6)
    assert torch.allclose(largest.in_sample, torch.linalg.eigvalsh(torch.stack(parts).mean(0))[-1], rtol=1e-6)


def test_a_pair_that_is_known_saves_its_products() -> None:
    drawn = draws(1, 80)[0]
    whole = hf.eigsh(on(hessians()[drawn].mean(0), None), normal(226), which="LA", rtol=1e-6)
    given, computed = crossed(drawn, 8, whole=whole), crossed(drawn, 8)
    assert given.num_matvecs < computed.num_matvecs
    assert torch.allclose(given.in_sample, whole.values[0], rtol=1e-6)
    assert torch.allclose(given.in_sample, computed.in_sample, rtol=1e-3)
    assert torch.equal(given.lower, computed.lower)


# The standard error.


def test_of_equal_weights_it_is_that_of_a_mean() -> None:
    values = normal(12, 3)
    assert torch.allclose(hf.data_stderr(values), values.std(0) / 12**0.5, rtol=1e-12)
    assert torch.allclose(hf.data_stderr(values, torch.full((12,), 7)), values.std(0) / 12**0.5, rtol=1e-12)


def test_its_square_is_unbiased_for_batches_of_unequal_sizes() -> None:
    sizes = torch.tensor([40, 3, 10, 10, 1, 25])
    generator = torch.Generator().manual_seed(0)
    samples = torch.empty(20000, int(sizes.sum()), dtype=torch.float64).exponential_(generator=generator)
    batches = torch.stack([part.mean(1) for part in samples.split(sizes.tolist(), dim=1)])  # (6, 20000)
    means = samples.mean(1)
    stated = hf.data_stderr(batches, sizes).square().mean()
    assert abs(stated / means.var() - 1) < 0.03
    lower, upper = hf.data_interval(batches[:, :4000], sizes)
    assert 0.93 <= ((lower <= 1) & (upper >= 1)).double().mean() <= 0.98


def test_batches_without_weight_do_not_count_and_one_alone_says_nothing() -> None:
    values, weights = torch.tensor([1.0, 2.0, 4.0, 1e9]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert torch.equal(hf.data_stderr(values, weights), hf.data_stderr(values[:3]))
    assert hf.data_stderr(values[:1]) == torch.inf
    lower, upper = hf.data_interval(values[:1])
    assert lower == -torch.inf and upper == torch.inf


def test_the_noise_of_probes_is_taken_off() -> None:
    """Of 400 draws of 12 batches and 6 probes: the mean square is the variance of the exact trace by the data."""
    generator = torch.Generator().manual_seed(0)
    exact, stated, naive = [], [], []
    base = symmetric(torch.linspace(0, 3, 20))
    for trial in range(400):
        scales = torch.rand(12, generator=generator, dtype=torch.float64)
        noise = torch.randn(12, 20, 20, generator=generator, dtype=torch.float64)
        matrices = scales[:, None, None] * base + 0.6 * (noise + noise.mT) * (1 - torch.eye(20))  # of trace 30 scale
        probes = torch.stack(list(hf.rademacher(torch.zeros(20).double(), 6, seed=trial)))
        forms = torch.einsum("pi,bij,pj->bp", probes, matrices, probes)
        exact.append(matrices.diagonal(dim1=1, dim2=2).sum(1).mean())
        stated.append(hf.trace_data_stderr(forms).square())
        naive.append(hf.data_stderr(forms.mean(1)).square())
    variance = torch.stack(exact).var()
    assert 0.8 <= torch.stack(stated).mean() / variance <= 1.3
    assert torch.stack(naive).mean() >= 1.5 * variance


# The forms of batches.

WEIGHTED = nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64))


@pytest.mark.parametrize("net", ["mlp", "conv", "attention"])
@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), nn.MSELoss(), WEIGHTED], ids=["ce", "mse", "weighted"])
def test_forms_are_those_of_every_batch_alone(net: str, criterion: Any) -> None:
    build, shape = NETS[net]
    model = seeded(build)
    loss, params = hf.functionalize(model, criterion)
    inputs = normal(11, *shape[1:])
    targets = normal(11, 3, seed=3) if isinstance(criterion, nn.MSELoss) else classes(11, 3)
    batches = list(zip(inputs.split([5, 2, 4]), targets.split([5, 2, 4]), strict=True))
    vectors = hf.tree.map(lambda *x: torch.stack(x), *hf.gaussian(params, 2))
    found = hf.batch_forms(lambda batch: hf.hvp(loss, params, batch), batches, vectors)
    flat = torch.stack([tree.ravel(v)[0] for v in hf.gaussian(params, 2)])
    exact = torch.stack([((flat @ dense_hessian(loss, params, batch)) * flat).sum(1) for batch in batches])
    assert torch.allclose(found.values, exact, rtol=1e-9, atol=1e-12)
    weights = [float(WEIGHTED.weight[y].sum()) if criterion is WEIGHTED else len(y) for _, y in batches]
    assert torch.allclose(
        found.weights / found.weights.sum(), torch.tensor(weights).double() / sum(weights), rtol=1e-12
    )
    whole = dense_hessian(loss, params, (inputs, targets))
    mean = (found.weights[:, None] * found.values).sum(0) / found.weights.sum()
    assert torch.allclose(mean, ((flat @ whole) * flat).sum(1), rtol=1e-9)


def test_parts_of_batches_have_forms_of_their_own() -> None:
    loss, params, x, y = digits()
    vectors = hf.tree.map(lambda v: v[None], hf.gaussian(params, 1)[0])
    flat = tree.ravel(hf.gaussian(params, 1)[0])[0]
    exact = torch.einsum("i,bij,j->b", flat, hessians()[:20], flat)
    make = functools.partial(hf.hvp, loss, params)
    found = hf.batch_forms(make, [(x[:13], y[:13]), (x[13:20], y[13:20])], vectors, microbatch=1)
    assert torch.allclose(found.values[:, 0], exact, rtol=1e-9)
    assert torch.equal(found.weights, torch.ones(20).double())
    by_fours = hf.batch_forms(make, [(x[:20], y[:20])], vectors, microbatch=4)
    assert torch.allclose(by_fours.values[:, 0], in_parts(exact, 5), rtol=1e-9)


def test_traces_by_batch_are_those_of_the_probes() -> None:
    loss, params, x, y = digits()
    probes = hf.rademacher(params, 3)
    batches = [(x[:30], y[:30]), (x[30:40], y[30:40])]
    found = hf.batch_traces(functools.partial(hf.hvp, loss, params), batches, probes)
    for b, rows in enumerate((slice(0, 30), slice(30, 40))):
        A = hessians()[rows].mean(0)
        for p, z in enumerate(probes):
            flat, unravel = tree.ravel(z)
            exact = unravel(flat * (A @ flat))
            for name in params:
                assert torch.allclose(found.values[name][b, p], exact[name].sum(), rtol=1e-9, atol=1e-12)
    assert found.weights.tolist() == [30, 10]
    mean = hf.hutchinson_per_leaf(hf.mean_hvp(loss, params, batches), probes).mean
    share = found.weights / found.weights.sum()
    assert all(torch.allclose(share @ found.values[name].mean(1), mean[name], rtol=1e-9) for name in params)


def test_any_matvec_over_batches_will_do() -> None:
    matrices = [symmetric(torch.linspace(0, 1, 10), seed) for seed in range(3)]
    batches = [(A, torch.zeros(n)) for A, n in zip(matrices, (1, 2, 3), strict=True)]
    v = normal(10)
    found = hf.batch_forms(lambda batch: on(batch[0], None), iter(batches), v[None], weights=[1, 2, 3])
    assert torch.allclose(found.values[:, 0], torch.stack([v @ A @ v for A in matrices]), rtol=1e-12)
    assert found.weights.tolist() == [1, 2, 3]


@pytest.mark.slow
def test_errors_by_the_data_hold_from_batches_to_intervals() -> None:
    """The whole way, with random probes: 100 draws of 100 samples in ten parts, ten probes."""
    loss, params, x, y = digits()
    exact = hessians().mean(0).trace()
    make = functools.partial(hf.hvp, loss, params)
    hits = 0
    for trial, drawn in enumerate(draws(100, 100, seed=5)):
        forms = hf.batch_traces(make, [(x[drawn], y[drawn])], hf.rademacher(params, 10, seed=trial), microbatch=10)
        total = sum(forms.values.values())
        by_probes = total.mean(0).std() / 10**0.5
        by_data = hf.trace_data_stderr(total, forms.weights)
        hits += bool((total.mean() - exact).abs() <= 2.26 * torch.hypot(by_probes, by_data))
    assert hits >= 88


def _forms_over_ranks(rank: int, size: int, folder: Path) -> None:
    matrices = [symmetric(torch.linspace(0, 1, 10), seed) for seed in range(5)]
    batches = [(A, torch.zeros(n)) for n, A in enumerate(matrices, 1)]
    v = normal(2, 10)
    sharded = hf.ShardedBatches(batches)
    found = hf.batch_forms(lambda batch: on(batch[0], None), sharded, v, weights=[1, 2, 3, 4, 5])
    order = [0, 2, 4, 1, 3]  # rank 0 has the even ones
    exact = torch.stack([((v @ matrices[i]) * v).sum(1) for i in order])
    assert torch.allclose(found.values, exact, rtol=1e-12)
    assert found.weights.tolist() == [i + 1 for i in order]
    assert same_bits(found)


@pytest.mark.slow
@without_processes
def test_processes_have_the_forms_of_all_batches(tmp_path: Path) -> None:
    run(_forms_over_ranks, 2, tmp_path)


# What is refused.


def test_what_is_no_spread_is_refused() -> None:
    forms = torch.ones(3, 2)
    for wrong in (torch.ones(2), torch.tensor([1.0, -1.0, 1.0]), torch.zeros(3)):
        with pytest.raises(hf.HessfnError, match="weights"):
            hf.data_stderr(forms, wrong)
    with pytest.raises(hf.HessfnError, match="forms is"):
        hf.data_stderr(torch.tensor(1.0))
    with pytest.raises(hf.HessfnError, match=r"\(b, p, \.\.\.\)"):
        hf.trace_data_stderr(torch.ones(3))
    with pytest.raises(hf.HessfnError, match="level=1"):
        hf.data_interval(forms, level=1)
    with pytest.raises(hf.HessfnError, match="which='LM'"):
        crossed(draws(1, 40)[0], 4, which="LM")
    with pytest.raises(hf.HessfnError, match="there is no vector"):
        hf.batch_traces(lambda batch: lambda v: v, [torch.ones(2)], hf.rademacher(torch.ones(2), 0))
