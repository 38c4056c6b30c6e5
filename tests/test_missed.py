"""No eigenvalue is missed in silence: what one start does not see, a second one does, or ``outside`` says so."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from spectra import LIKES, SPECTRA, on, symmetric
from torch import Tensor

import hessfn as hf
from hessfn.core import tree

KINDS = ["a cluster", "clusters", "copies", "steps", "an edge", "few values"]
RTOL = 1e-3


def hostile(kind: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """A spectrum whose top is a small step above a cluster, a bulk, copies, or a staircase that ends there."""
    gap = 10.0 ** rng.uniform(-6, -1)
    if kind == "a cluster":
        count, width = int(rng.integers(3, n // 2)), 10.0 ** rng.uniform(-8, -3)
        parts = [[1 + gap], 1 - width * rng.random(count), 0.5 * rng.random(n)]
    elif kind == "clusters":
        parts = [[1 + gap], *(x * (1 - 1e-5 * rng.random((n - 1) // 5)) for x in (1, 0.9, 0.5, 0.1, 0.01)), np.zeros(n)]
    elif kind == "copies":
        parts = [np.full(int(rng.integers(2, 10)), 1 + gap), np.ones(10), 0.5 * rng.random(n)]
    elif kind == "steps":  # as the singular values of a Jordan block and its like: each a small step below the last
        parts = [[1 + gap], 1 - gap * np.arange(1, 21), 0.9 * rng.random(n)]
    elif kind == "an edge":
        parts = [[1 + gap], rng.random(n)]
    else:
        count = int(rng.integers(1, 4))
        parts = [np.full(count, 1 + gap), np.ones(count + 1), np.full(3, 0.5), np.zeros(n)]
    return np.concatenate(parts)[:n]


@functools.cache
def trials(
    n: int, count: int, dtype: torch.dtype, k: int
) -> list[tuple[str, np.ndarray, hf.EigenPairs, hf.EigenPairs]]:
    """By one start and with a second. A diagonal will do for any eigenvectors, since Gaussian starts know none."""
    found = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        kind = KINDS[seed % len(KINDS)]
        exact = hostile(kind, n, rng)
        diagonal = torch.from_numpy(exact).to(dtype)
        first, second = hf.gaussian(diagonal, 2, seed=seed)

        def matvec(v: Tensor, diagonal: Tensor = diagonal) -> Tensor:
            return diagonal * v

        one = hf.eigsh(matvec, first, k, which="LA", rtol=RTOL)
        two = hf.eigsh(matvec, first, k, which="LA", rtol=RTOL, second_start=second)
        found.append((kind, np.sort(diagonal.double().numpy())[::-1], one, two))
    return found


def misses(exact: np.ndarray, pairs: hf.EigenPairs, tolerance: float) -> bool:
    """Converged, and yet of other eigenvalues: further below the wanted than a residual could explain."""
    k = len(pairs.values)
    return bool(pairs.converged.all()) and bool((exact[:k] - pairs.values.numpy() > tolerance * exact[:k]).any())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_of_300_tops_a_step_above_others_none_is_missed(dtype: torch.dtype) -> None:
    found = trials(200, 300, dtype, 1)
    alone = [kind for kind, exact, one, _ in found if misses(exact, one, RTOL)]
    assert len(alone) >= 9, "the set is no test if one start finds all"
    assert [kind for kind, exact, _, two in found if misses(exact, two, RTOL)] == []
    products = [np.mean([float(pairs.num_matvecs) for pairs in of]) for of in zip(*[x[2:] for x in found], strict=True)]
    assert products[1] <= 2.5 * products[0]


@pytest.mark.slow
def test_of_several_with_copies_none_is_missed() -> None:
    """Within a bulk, the residual itself allows for an error of its own size."""
    found = trials(400, 90, torch.float64, 4)
    assert sum(misses(exact, one, RTOL) for _, exact, one, _ in found) >= 20
    assert [kind for kind, exact, _, two in found if misses(exact, two, 2 * RTOL)] == []


@pytest.mark.slow
def test_outside_holds_what_has_not_been_found() -> None:
    """It states 0.999: one in 390 may fail. And the intervals are no wider than the whole spectrum by much."""
    held, widths = [], []
    for n, count, k in ((200, 300, 1), (400, 90, 4)):
        for _, exact, _, two in trials(n, count, torch.float64, k):
            assert two.outside is not None
            low, high = two.outside.tolist()
            slack = float(two.residuals.norm()) + 1e-12
            # Weyl: the i-th largest is the i-th of what was found and of what lies outside.
            held.append(bool((exact[:k] <= np.maximum(two.values.numpy(), high) + slack).all()))
            held[-1] &= bool(exact[-1] >= low - slack)
            widths.append((high - low) / (exact[0] - exact[-1]))
    assert sum(held) >= len(held) - 2
    assert np.median(widths) <= 1.5
    assert max(widths) <= 2


@pytest.mark.parametrize("which", ["LM", "LA", "SA", "BE"])
@pytest.mark.parametrize("copies", [2, 3, 5])
def test_repeated_ends_are_found_at_either_side(which: str, copies: int) -> None:
    middle = torch.linspace(-1, 1, 60 - 2 * copies).double()
    d = torch.cat([torch.full((copies,), -3.0).double(), middle, torch.full((copies,), 3.5).double()])
    A = symmetric(d)
    first, second = hf.gaussian(d, 2, seed=copies)
    k = 2 * copies if which in ("LM", "BE") else copies
    pairs = hf.eigsh(lambda v: A @ v, first, k, which=which, rtol=1e-6, second_start=second)  # type: ignore[arg-type]
    ends = {"LA": [3.5], "SA": [-3.0], "LM": [-3.0, 3.5], "BE": [-3.0, 3.5]}[which]
    assert sorted(pairs.values.tolist()) == pytest.approx(sorted(copies * ends), abs=1e-5)
    assert pairs.outside is not None
    if which in ("LM", "BE"):
        assert -3 < pairs.outside[0] < -0.99
        assert 0.99 < pairs.outside[1] < 3.5


def test_a_start_that_has_nothing_of_the_top_misses_it_and_says_converged() -> None:
    """The defect, and what a second direction does about it at few products."""
    d = torch.cat([torch.tensor([10.0]), torch.linspace(0, 5, 199)]).double()
    blind, second = hf.gaussian(d, 2)
    blind[0] = 0.0
    one = hf.eigsh(lambda v: d * v, blind, which="LA")
    assert one.converged.all()
    assert one.values[0] < 5.01
    two = hf.eigsh(lambda v: d * v, blind, which="LA", second_start=second)
    assert two.values[0] == pytest.approx(10, rel=1e-5)
    assert two.outside is not None
    assert 5 <= two.outside[1] < 10
    assert two.num_matvecs <= one.num_matvecs + 40


def test_where_the_wanted_stand_apart_a_second_start_costs_few_products() -> None:
    d = torch.cat([torch.tensor([60.0, 25, 15, 12, 6]), torch.randn(2000, generator=torch.manual_seed(0)) / 5]).double()
    first, second = hf.gaussian(d, 2)
    one, two = (hf.eigsh(lambda v: d * v, first, 5, second_start=s) for s in (None, second))
    assert two.num_matvecs <= one.num_matvecs + 8
    torch.testing.assert_close(two.values, d[:5], rtol=1e-6, atol=0)
    assert two.outside is not None
    assert two.outside.abs().max() <= 6


@pytest.mark.parametrize("size", [2, 3, 7])
def test_a_second_start_where_there_is_hardly_room_for_one(size: int) -> None:
    d = torch.arange(1.0, size + 1).double()
    first, second = hf.gaussian(d, 2)
    for k in range(1, size + 1):
        pairs = hf.eigsh(lambda v: d * v, first, k, which="LA", rtol=1e-9, second_start=second)
        torch.testing.assert_close(pairs.values, d.flip(0)[:k], rtol=1e-9, atol=0)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("which", ["LM", "LA", "SA", "BE"])
def test_all_pairs_of_the_space_are_what_they_say(spectrum: str, second: bool, which: str) -> None:
    """The wanted first, as without; orthonormal; each with its true residual, also after restarts."""
    A = symmetric(SPECTRA[spectrum])
    start, other = hf.gaussian(LIKES["tensor"], 2, seed=1)
    options = {"which": which, "basis_size": 16, "rtol": 1e-8, "second_start": other if second else None}
    pairs = hf.eigsh(lambda v: A @ v, start, 5, keep_all=True, max_matvecs=80, **options)  # type: ignore[arg-type]
    plain = hf.eigsh(lambda v: A @ v, start, 5, max_matvecs=80, **options)  # type: ignore[arg-type]
    size, many = float(A.norm()), len(pairs.values)
    assert 5 <= many <= 18
    assert pairs.num_matvecs == plain.num_matvecs
    torch.testing.assert_close(pairs.values[:5], plain.values, rtol=0, atol=1e-12 * size)
    torch.testing.assert_close(pairs.vectors @ pairs.vectors.T, torch.eye(many).double(), rtol=0, atol=1e-12)
    true = torch.linalg.vector_norm(pairs.vectors @ A - pairs.values[:, None] * pairs.vectors, dim=1)
    torch.testing.assert_close(pairs.residuals, true, rtol=1e-6, atol=1e-12 * size)


def test_the_whole_space_is_a_better_control_variate() -> None:
    """The trace of what is left, in Frobenius norm, is smaller with all pairs than with the wanted."""
    A = symmetric(SPECTRA["decaying"])
    start = hf.gaussian(LIKES["tensor"], 1, seed=1)[0]

    def rest(pairs: hf.EigenPairs) -> Tensor:
        return (A - pairs.vectors.T @ (pairs.values[:, None] * pairs.vectors)).norm()

    few, every = (hf.eigsh(lambda v: A @ v, start, 5, keep_all=x) for x in (False, True))
    assert rest(every) <= 0.8 * rest(few)


def test_all_pairs_of_fixed_cost_under_vmap_are_a_loop() -> None:
    stack = torch.stack([symmetric(d, seed) for seed, d in enumerate(SPECTRA.values())])
    start = hf.gaussian(LIKES["tensor"], 1, seed=1)[0]

    def run(A: Tensor) -> hf.EigenPairs:
        return hf.eigsh(lambda v: A @ v, start, 2, which="BE", rtol=None, max_matvecs=12, keep_all=True)

    together, alone = torch.func.vmap(run)(stack), [run(A) for A in stack]
    assert together.values.shape == (len(stack), 12)
    torch.testing.assert_close(together.values, torch.stack([x.values for x in alone]), rtol=1e-9, atol=1e-9)
    assert together.outside.isnan().all()
    assert alone[0].outside is None


@pytest.mark.parametrize("form", LIKES)
def test_a_second_start_is_a_tree_as_the_first(form: str) -> None:
    A, like = symmetric(SPECTRA["clustered"]), LIKES[form]
    unravel = tree.ravel(like)[1]
    first, second = hf.gaussian(LIKES["tensor"], 2)
    flat = hf.eigsh(lambda v: A @ v, first, 3, second_start=second)
    pairs = hf.eigsh(on(A, like), unravel(first), 3, second_start=unravel(second))
    torch.testing.assert_close(pairs.values, flat.values, rtol=1e-12, atol=0)
    torch.testing.assert_close(pairs.outside, flat.outside, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("second", "options", "message"),
    [
        (torch.ones(60).double(), {"rtol": None, "max_matvecs": 9}, "rtol=None settles nothing: for a second_start"),
        (torch.ones(59).double(), {}, r"second_start has shape \(59,\), but \(60,\) in v0"),
        (torch.zeros(60).double(), {}, "second_start has norm 0.0: start from gaussian"),
        (2 * torch.ones(60).double(), {}, "second_start lies within the first: give another random one"),
    ],
)
def test_a_second_start_that_is_none_is_refused(second: Tensor, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf.eigsh(lambda v: v, torch.ones(60).double(), second_start=second, **options)  # type: ignore[arg-type]
