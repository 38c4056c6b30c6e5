"""95 % intervals hold the exact value 95 % of the time, on matrices that are hard on them, from five probes on."""

import pytest
import torch
from coverage_cases import ESTIMATORS, KINDS, MATRICES, N, coverage, draw, held
from scipy.special import stdtrit
from scipy.stats import chi2
from torch.func import vmap

from hessfn.core.probes import gaussian, rademacher
from hessfn.core.results import Estimate, Quadrature
from hessfn.estimators.hutchinson import hutchinson, hutchinson_diag, hutchinson_per_leaf
from hessfn.estimators.leave_one_out import hutchpp, xdiag, xtrace
from hessfn.estimators.spectrum import density, density_band
from hessfn.estimators.squared_norms import squared_frobenius

HARD = ["one eigenvalue", "one over a GOE bulk", "trace cancels", "one off-diagonal pair", "ten decades of blocks"]
OF_SPECTRA = ["trace_of", "trace_of, eigenpairs"]
COSTLY = ["xtrace", "xdiag", *OF_SPECTRA]
FAST = [name for name in ESTIMATORS if name not in OF_SPECTRA]
FLAT = torch.zeros(N, dtype=torch.float64)


def failed(estimator, matrices, kind, num_probes):
    found = {matrix: held(estimator, matrix, kind, num_probes) for matrix in matrices}
    return {matrix: share for matrix, (is_held, share) in found.items() if not is_held}


@pytest.mark.parametrize("num_probes", [5, 10])
@pytest.mark.parametrize("estimator", FAST)
def test_intervals_hold_for_few_probes(estimator, num_probes):
    assert not failed(estimator, HARD, KINDS.get(estimator, ["rademacher"])[0], num_probes)


@pytest.mark.parametrize("estimator", ["hutchinson", "squared_frobenius"])
def test_intervals_of_thirty_probes_hold(estimator):
    assert not failed(estimator, HARD, "rademacher", 30)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize("num_probes", [5, 10, 30])
def test_intervals_are_no_wider_than_they_must_be(kind, num_probes):
    """On a matrix without outliers the variance is known from the products, better than from the samples."""
    for estimator in ("hutchinson", "hutchinson, eigenpairs", "hutchinson_diag"):
        assert held(estimator, "GOE", kind, num_probes)[0]
        assert coverage(estimator, "GOE", kind, num_probes) <= 0.975
    A, z = MATRICES["GOE"], draw(kind, 300, num_probes)
    lower, upper = vmap(lambda z: hutchinson(lambda v: A @ v, list(z.unbind())).interval())(z)
    from_samples = 2 * float(stdtrit(num_probes - 1, 0.975)) * vmap(lambda z: ((z @ A) * z).sum(1).std())(z)
    assert (upper - lower).mean() < from_samples.mean() / num_probes**0.5


@pytest.mark.slow
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_intervals_hold_on_every_matrix(estimator, matrix):
    many = (30,) if matrix == "one over a GOE bulk" or estimator not in COSTLY else ()
    for kind in KINDS.get(estimator, ("rademacher", "gaussian")):
        for num_probes in (5, 10, *many):
            assert not failed(estimator, [matrix], kind, num_probes), (kind, num_probes)


@pytest.mark.parametrize("estimator", ["hutchpp", "xtrace"])
def test_few_signs_say_what_they_may_have_missed(estimator):
    """One pair of entries: in one of 16 trials no probe sees its smaller eigenvalue, as large as the larger one."""
    A = MATRICES["one off-diagonal pair"]
    run = {"hutchpp": hutchpp, "xtrace": xtrace}[estimator]
    z = draw("rademacher", 1000, 5)
    unseen = (z[:, :, 0] * z[:, :, 1]).sum(1).abs() == 5
    assert 40 <= int(unseen.sum()) <= 90
    found = vmap(lambda z: run(lambda v: A @ v, list(z.unbind())).interval())(z[unseen])
    assert (found[0] <= A.trace()).all() and (A.trace() <= found[1]).all()
    # A vector that is spread over many entries hides from few probes seldom: it adds next to nothing.
    flat = torch.ones(N, N).double()
    assert run(lambda v: flat @ v, list(z[0].unbind())).stderr < 0.05 * N


def test_a_diagonal_from_a_sketch_is_unbiased_for_any_probes():
    A = MATRICES["ten decades"]
    means = vmap(lambda z: xdiag(lambda v: A @ v, list(z.unbind())).mean)(draw("gaussian", 4000, 6))
    error = means.mean(0) - A.diagonal()
    assert (error.abs() <= 4.5 * means.std(0) / len(means) ** 0.5 + 1e-12).all()


def test_an_error_is_what_the_products_know_where_the_samples_agree_by_chance():
    """A pair of large off-diagonal entries, which two entries of few probes' signs hide or show."""
    A = MATRICES["one off-diagonal pair"]
    z = draw("gaussian", 1000, 5)
    stderr, mean = vmap(lambda z: (lambda x: (x.stderr, x.mean))(xtrace(lambda v: A @ v, list(z.unbind()))))(z)
    assert ((mean - A.trace()).abs() > 10 * stderr + 1e-9 * A.norm()).double().mean() <= 0.01


def test_a_band_holds_the_density_point_by_point():
    for matrix in ("one over a GOE bulk", "GOE"):
        values, vectors = torch.linalg.eigh(MATRICES[matrix])
        grid = torch.linspace(float(values[0]) - 2, float(values[-1]) + 2, 40).double()
        everything = Quadrature(values[None], torch.full((1, N), 1 / N).double())
        truth = density(everything, grid, sigma=1.0).values

        def ends(z, values=values, vectors=vectors, grid=grid):
            weights = (z / z.norm(dim=1, keepdim=True) @ vectors).square()
            return density_band(Quadrature(values.expand(len(z), -1), weights), grid, sigma=1.0, n=N)[1:]

        for num_probes in (5, 10):
            lower, upper = vmap(ends)(draw("gaussian", 1000, num_probes))
            slack = 1e-9 * truth.max()
            inside = ((lower - slack <= truth) & (truth <= upper + slack)).double().mean(0)
            assert inside.min() >= 0.92
            assert inside.mean() <= 0.98


# The interval itself.


@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_an_interval_is_that_of_students_t_or_normal(level):
    found = Estimate(torch.tensor(2.0).double(), torch.tensor(0.5).double(), torch.tensor(8), torch.tensor(7.0))
    for x in (found, found._replace(df=None)):
        lower, upper = x.interval(level)
        half = 0.5 * float(stdtrit(1e12 if x.df is None else 7, 0.5 + level / 2))
        assert float(upper) == pytest.approx(2 + half, rel=1e-6)
        assert float(lower) == pytest.approx(2 - half, rel=1e-6)
    with pytest.raises(ValueError, match=r"level=95 must be between 0 and 1"):
        found.interval(95)


def test_an_interval_of_squares_is_that_of_chi_square():
    """A matrix of one eigenvalue: ``||Az||^2`` of a Gaussian probe is chi-square, whatever is found of its spread."""
    p, mean, stderr = 10, 3.0, 3.0 * (2 / 10) ** 0.5
    found = Estimate(*(torch.tensor(x).double() for x in (mean, stderr)), torch.tensor(p), torch.tensor(p - 1.0))
    lower, upper = found._replace(least=torch.zeros(()).double()).interval()
    nu = 0.8 * p  # the least that a spread of squares is taken to tell
    assert float(lower) == pytest.approx(mean * nu / chi2.ppf(0.975, nu), rel=1e-9)
    assert float(upper) == pytest.approx(mean * nu / chi2.ppf(0.025, nu), rel=1e-9)


def test_an_interval_has_the_shape_of_its_mean():
    A = MATRICES["GOE"]
    like = {"a": FLAT[:7].reshape(7, 1), "b": FLAT[7:]}

    def matvec(v):
        out = A @ torch.cat([v["a"][:, 0], v["b"]])
        return {"a": out[:7, None], "b": out[7:]}

    for run in (hutchinson_per_leaf, hutchinson_diag):
        found = run(matvec, rademacher(like, 8))
        lower, upper = found.interval()
        for name in like:
            assert lower[name].shape == upper[name].shape == found.mean[name].shape
            assert ((lower[name] < found.mean[name]) & (found.mean[name] < upper[name])).all()
    many = vmap(lambda A: hutchinson_diag(lambda v: A @ v, gaussian(FLAT, 4)))(torch.stack([A, 2 * A]))
    lower, upper = many.interval()
    torch.testing.assert_close(upper[1] - lower[1], 2 * (upper[0] - lower[0]))
    lower, upper = squared_frobenius(lambda v: A @ v, gaussian(FLAT, 1)).interval()
    assert lower == -torch.inf
    assert upper == torch.inf
