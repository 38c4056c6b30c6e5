import itertools
import weakref

import pytest
import torch
from spectra import LIKES, SPECTRA, N, on, symmetric
from torch.func import grad, vmap

from hessfn.core import tree
from hessfn.core.probes import gaussian, rademacher
from hessfn.estimators.eigen import eigsh
from hessfn.estimators.hutchinson import (
    deflated_trace,
    hutchinson,
    hutchinson_diag,
    hutchinson_per_leaf,
    mean_traces,
)
from hessfn.estimators.leave_one_out import hutchpp, xdiag, xtrace
from hessfn.estimators.running_mean import estimate
from hessfn.estimators.squared_norms import squared_frobenius, squared_row_norms

FLAT = LIKES["tensor"]
spectra = pytest.mark.parametrize("spectrum", SPECTRA)
trees = pytest.mark.parametrize("form", LIKES)


def pairs_of(A, k=5):
    return eigsh(lambda v: A @ v, gaussian(A[0], 1, seed=9)[0], k)


@pytest.mark.slow
@pytest.mark.parametrize("spectrum", ["indefinite", "flat"])
def test_intervals_hold_where_the_tolerance_stopped(spectrum):
    """Stopping on an error from few probes favours those that came out too small."""
    A, trials = symmetric(SPECTRA[spectrum]), 150
    # Shifted so that a trace is as certain to a tenth of its size after some 20 probes.
    variance = 2 * (A.square().sum() - A.diagonal().square().sum())
    A = A + (20 * (variance / 20).sqrt() - A.trace()) / N * torch.eye(N).double()
    inside = 0
    for z in torch.stack(list(rademacher(torch.zeros(60, N).double(), trials))):
        result = hutchinson(lambda v: A @ v, z, rtol=0.1)
        assert 10 <= result.num_matvecs < 60
        lower, upper = result.interval()
        assert upper - lower <= 0.2 * result.mean
        inside += bool(lower <= A.trace() <= upper)
    assert inside / trials >= 0.91


# hutchinson


@trees
def test_hutchinson_is_exact_on_a_diagonal_matrix(form):
    like, d = LIKES[form], torch.linspace(-1, 2, N).double()
    result = hutchinson(on(torch.diag(d), like), rademacher(like, 6))
    torch.testing.assert_close(result.mean, d.sum(), rtol=1e-12, atol=0)
    assert result.stderr <= 1e-12
    assert result.num_matvecs == 6
    few = hutchinson(on(torch.diag(d), like), rademacher(like, 5))
    assert few.stderr > 0.1, "five probes cannot tell a diagonal matrix from one whose signs agree by chance"


def test_hutchinson_error_is_that_of_its_formula():
    """Variance of one Rademacher probe: 2 (||A||_F^2 - sum a_ii^2)."""
    A = symmetric(SPECTRA["indefinite"])
    result = hutchinson(lambda v: A @ v, rademacher(FLAT, 2000))
    variance = 2 * (A.square().sum() - A.diagonal().square().sum())
    torch.testing.assert_close(result.stderr, (variance / 2000).sqrt(), rtol=0.1, atol=0)


def test_hutchinson_stops_at_its_tolerance_but_not_before_ten_probes():
    A = symmetric(SPECTRA["flat"])
    probes = rademacher(FLAT, 10**6)
    assert hutchinson(lambda v: A @ v, probes, rtol=0.5).num_matvecs == 10
    result = hutchinson(lambda v: A @ v, probes, rtol=3e-3)
    assert 10 < result.num_matvecs < 1000
    assert (result.mean - A.trace()).abs() <= 4 * result.stderr


def test_hutchinson_takes_all_probes_where_they_do_not_suffice():
    A = symmetric(SPECTRA["indefinite"])
    result = hutchinson(lambda v: A @ v, rademacher(FLAT, 25), rtol=1e-6)
    assert result == hutchinson(lambda v: A @ v, rademacher(FLAT, 25))
    assert result.num_matvecs == 25


def test_hutchinson_holds_one_probe_at_a_time():
    """They may come from a generator, and only the last two are ever there."""
    seen = []

    def probes():
        for i in range(20):
            z = rademacher(FLAT, 20)[i]
            seen.append(weakref.ref(z))
            yield z
            del z
            assert sum(ref() is not None for ref in seen) <= 1

    assert hutchinson(lambda v: 2 * v, probes()).num_matvecs == 20


def test_hutchinson_under_vmap_is_a_loop_and_differentiates():
    stack = torch.stack([symmetric(d) for d in SPECTRA.values()])
    probes = rademacher(FLAT, 5)
    batched = vmap(lambda A: hutchinson(lambda v: A @ v, probes))(stack)
    looped = [hutchinson(lambda v, A=A: A @ v, probes) for A in stack]
    torch.testing.assert_close(batched.mean, torch.stack([x.mean for x in looped]), rtol=1e-12, atol=0)
    torch.testing.assert_close(batched.stderr, torch.stack([x.stderr for x in looped]), rtol=1e-10, atol=1e-14)
    gradient = grad(lambda A: hutchinson(lambda v: A @ v, probes).mean)(stack[0])
    torch.testing.assert_close(gradient, sum(torch.outer(z, z) for z in probes) / 5, rtol=1e-12, atol=0)


@pytest.mark.parametrize("estimator", [hutchinson, hutchinson_per_leaf, hutchinson_diag, squared_frobenius])
def test_one_probe_says_nothing_of_its_error_and_none_nothing_at_all(estimator):
    assert torch.isinf(estimator(lambda v: v, rademacher(FLAT, 1)).stderr).all()
    with pytest.raises(ValueError, match="there is no probe"):
        estimator(lambda v: v, rademacher(FLAT, 0))


def test_a_product_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="product 1 of the matvec is not finite"):
        hutchinson(lambda v: v / 0, rademacher(FLAT, 10), rtol=0.1)


# per leaf


@pytest.mark.parametrize("form", ["dict", "nested"])
def test_traces_per_leaf_are_those_of_the_diagonal_blocks(form):
    A, like = symmetric(SPECTRA["decaying"]), LIKES[form]
    result = hutchinson_per_leaf(on(A, like), rademacher(like, 200))
    sizes = [leaf.numel() for leaf in tree.leaves(like)]
    blocks = torch.stack([block.sum() for block in A.diagonal().split(sizes)])
    means, errors = torch.stack(tree.leaves(result.mean)), torch.stack(tree.leaves(result.stderr))
    assert ((means - blocks).abs() <= 4 * errors).all()
    whole = hutchinson(on(A, like), rademacher(like, 200))
    torch.testing.assert_close(means.sum(), whole.mean, rtol=1e-12, atol=0)
    per_entry = mean_traces(result, like)
    torch.testing.assert_close(torch.stack(tree.leaves(per_entry.mean)), means / torch.tensor(sizes))
    torch.testing.assert_close(torch.stack(tree.leaves(per_entry.stderr)), errors / torch.tensor(sizes))


# sketches


@trees
@pytest.mark.parametrize("estimator", [hutchpp, xtrace])
def test_a_sketch_of_the_rank_is_exact(estimator, form):
    A, like = symmetric(SPECTRA["rank-deficient"]), LIKES[form]
    result = estimator(on(A, like), rademacher(like, 24))
    torch.testing.assert_close(result.mean, A.trace(), rtol=1e-10, atol=0)
    assert result.stderr <= 1e-10 * A.trace()


@trees
def test_a_diagonal_from_a_sketch_of_the_rank_is_exact(form):
    A, like = symmetric(SPECTRA["rank-deficient"]), LIKES[form]
    result = xdiag(on(A, like), rademacher(like, 12))
    torch.testing.assert_close(tree.ravel(result.mean)[0], A.diagonal(), rtol=0, atol=1e-11)
    assert tree.ravel(result.stderr)[0].max() <= 1e-11


def leave_one_out(A, probes, i, *also):
    """Trace with the i-th probe for a test, the variance its product tells, and diagonal: as defined, all dense."""
    n, rest = len(A), [z for j, z in enumerate(probes) if j not in (i, *also)]
    Q = torch.linalg.qr(A @ torch.stack(rest).T).Q
    P, m = torch.eye(n).double() - Q @ Q.T, n - len(rest)
    z = probes[i]
    u = P @ z / (P @ z).norm()
    image = P @ A @ u
    variance = 2 * m * (image.square().sum() - (u @ image).square())
    return torch.trace(Q.T @ A @ Q) + m * u @ image, (Q @ Q.T @ A).diagonal() + z * (P @ A @ z), variance


@pytest.mark.parametrize("spectrum", ["indefinite", "decaying", "flat"])
def test_xtrace_and_xdiag_are_their_definitions(spectrum):
    A, probes = symmetric(SPECTRA[spectrum]), list(rademacher(FLAT, 6))
    alone = [leave_one_out(A, probes, i) for i in range(6)]
    for run, part in ((xtrace, 0), (xdiag, 1)):
        samples = torch.stack([x[part] for x in alone])
        change = {
            (i, j): alone[i][part] - leave_one_out(A, probes, i, j)[part]
            for i, j in itertools.permutations(range(6), 2)
        }
        shared = sum(change[i, j] * change[j, i] for i, j in change)
        result = run(lambda v: A @ v, probes)
        torch.testing.assert_close(result.mean, samples.mean(0), rtol=1e-9, atol=1e-10)
        variance = torch.stack([x[2] for x in alone]).mean() if run is xtrace else samples.var(0)
        expected = (variance / 6 + shared.clamp(min=0) / 30).sqrt()
        torch.testing.assert_close(result.stderr, expected, rtol=1e-7, atol=1e-10)
        assert result.num_matvecs == 12


def test_xtrace_is_exact_on_a_multiple_of_the_identity():
    result = xtrace(lambda v: -2 * v, gaussian(FLAT, 5))
    torch.testing.assert_close(result.mean, torch.tensor(-2.0 * N).double(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("estimator", [hutchpp, xtrace, xdiag])
def test_a_sketch_of_the_zero_matrix_is_zero(estimator):
    result = estimator(lambda v: 0 * v, rademacher(FLAT, 6))
    assert (result.mean == 0).all()
    assert (result.stderr == 0).all()


@pytest.mark.parametrize("estimator", [hutchpp, xtrace, xdiag])
def test_sketches_count_their_products_and_refuse_too_few_or_too_many_probes(estimator):
    calls = []
    result = estimator(lambda v: calls.append(None) or 2 * v, rademacher(FLAT, 7))
    assert result.num_matvecs == len(calls)
    for num, message in ((1, "at least 2"), (N + 1, r"dense\(matvec, like\) costs less")):
        with pytest.raises(ValueError, match=message):
            estimator(lambda v: v, rademacher(FLAT, num))


def test_deflation_leaves_the_variance_of_what_is_left():
    """Fewer products than Hutchinson for the same error, by the eigenvalues taken out."""
    A = symmetric(SPECTRA["decaying"])
    pairs = pairs_of(A, 20)
    plain = hutchinson(lambda v: A @ v, rademacher(FLAT, 200))
    result = deflated_trace(lambda v: A @ v, rademacher(FLAT, 200), pairs)
    assert result.stderr < plain.stderr / 4
    assert (result.mean - A.trace()).abs() <= 4 * result.stderr


@pytest.mark.parametrize("form", ["dict", "nested"])
def test_deflation_by_rough_eigenvectors_is_unbiased_still(form):
    A, like = symmetric(SPECTRA["indefinite"]), LIKES[form]
    rough = eigsh(on(A, like), gaussian(like, 1)[0], 4, max_matvecs=6)
    assert not rough.converged.any()
    result = deflated_trace(on(A, like), rademacher(like, 500), rough)
    assert (result.mean - A.trace()).abs() <= 4 * result.stderr


# diagonals and rows


@trees
def test_hutchinson_diag_lies_within_its_errors(form):
    A, like = symmetric(SPECTRA["indefinite"]), LIKES[form]
    result = hutchinson_diag(on(A, like), rademacher(like, 300))
    mean, stderr = tree.ravel(result.mean)[0], tree.ravel(result.stderr)[0]
    assert ((mean - A.diagonal()).abs() <= 5 * stderr).all()
    variance = A.square().sum(1) - A.diagonal().square()
    torch.testing.assert_close(stderr, (variance / 300).sqrt(), rtol=0.3, atol=0)


def test_running_means_are_the_means():
    like = {"a": torch.zeros(3).double(), "b": torch.zeros(()).double()}
    samples = [tree.map(lambda x: 1e6 + x, z) for z in gaussian(like, 50)]
    result = estimate(samples)
    for name in "ab":
        stacked = torch.stack([s[name] for s in samples])
        torch.testing.assert_close(result.mean[name], stacked.mean(0), rtol=1e-14, atol=0)
        torch.testing.assert_close(result.stderr[name], stacked.std(0) / 50**0.5, rtol=1e-8, atol=0)


# vmap


@pytest.mark.parametrize("estimator", [hutchpp, xtrace, xdiag, hutchinson_diag, squared_row_norms])
def test_estimators_under_vmap_are_a_loop(estimator):
    stack = torch.stack([symmetric(d) for d in SPECTRA.values()])
    probes = rademacher(FLAT, 6)
    batched = vmap(lambda A: estimator(lambda v: A @ v, probes))(stack)
    looped = [estimator(lambda v, A=A: A @ v, probes) for A in stack]
    torch.testing.assert_close(batched.mean, torch.stack([x.mean for x in looped]), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(batched.stderr, torch.stack([x.stderr for x in looped]), rtol=1e-5, atol=1e-8)
