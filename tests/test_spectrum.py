import functools

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from nets import classes, dense_hessian, normal, seeded
from spectra import LIKES, SPECTRA, N, on, symmetric
from torch import nn
from torch.func import grad, vmap

from hessfn.core import tree
from hessfn.core.probes import gaussian, rademacher
from hessfn.core.results import Quadrature
from hessfn.estimators.hutchinson import hutchinson
from hessfn.estimators.spectral_sums import trace_of
from hessfn.estimators.spectrum import cumulative, density, density_band, slq, wasserstein
from hessfn.losses.functional import functionalize
from hessfn.products.hessian import hvp

FLAT = LIKES["tensor"]
spectra = pytest.mark.parametrize("spectrum", SPECTRA)
trees = pytest.mark.parametrize("form", LIKES)
either = pytest.mark.parametrize("orthogonalize", [False, True])


@functools.cache
def rule_of(spectrum, num=3, steps=12, **options):
    A = symmetric(SPECTRA[spectrum])
    return A, slq(lambda v: A @ v, gaussian(FLAT, num), steps, **options)


# slq


@either
@spectra
@pytest.mark.parametrize("steps", [1, 5, 30, N])
def test_weights_sum_to_one_and_nodes_lie_in_the_spectrum(spectrum, steps, orthogonalize):
    A, (nodes, weights) = rule_of(spectrum, steps=steps, orthogonalize=orthogonalize)
    values, slack = scipy.linalg.eigh(A.numpy(), eigvals_only=True), 1e-10 * float(A.norm())
    assert nodes.shape == weights.shape == (3, steps)
    assert nodes.dtype == weights.dtype == torch.float64
    torch.testing.assert_close(weights.sum(1), torch.ones(3).double(), rtol=1e-12, atol=0)
    assert (weights >= 0).all()
    assert nodes.min() >= values[0] - slack
    assert nodes.max() <= values[-1] + slack
    assert (nodes.diff(dim=1) >= 0).all()


@either
@trees
def test_moments_are_exact_up_to_degree_2m_minus_1(form, orthogonalize):
    A, like, m = symmetric(SPECTRA["indefinite"]), LIKES[form], 4
    probes = gaussian(like, 3)
    nodes, weights = slq(on(A, like), probes, m, orthogonalize=orthogonalize)
    for degree in range(2 * m):
        moments = []
        for z in probes:
            flat, _ = tree.ravel(z)
            moments.append(flat @ torch.linalg.matrix_power(A, degree) @ flat / (flat @ flat))
        torch.testing.assert_close((weights * nodes**degree).sum(1), torch.stack(moments), rtol=1e-10, atol=1e-12)
    wrong = (weights * nodes ** (2 * m)).sum(1) - flat @ torch.linalg.matrix_power(A, 2 * m) @ flat / (flat @ flat)
    assert wrong.abs().max() > 1e-6


@spectra
def test_three_vectors_give_the_rule_of_the_whole_basis(spectrum):
    """Not node by node: copies of a converged node share its weight."""
    _, kept = rule_of(spectrum, steps=40, orthogonalize=True)
    _, light = rule_of(spectrum, steps=40)
    size = float(kept.nodes.max() - kept.nodes.min())
    assert wasserstein(light, kept) <= 2e-3 * size
    for fn in (torch.cos, lambda x: x * x, lambda x: (x / 50).exp()):
        a, b = trace_of(light, fn, N).mean, trace_of(kept, fn, N).mean
        assert (a - b).abs() <= 1e-6 * N * fn(kept.nodes).abs().max()


@either
@pytest.mark.parametrize("d", [[2.0], [2.0, 0.0], [-3.0, 0.0, 1.0]])
def test_a_space_that_ends_early_leaves_the_rule_exact(d, orthogonalize):
    eigenvalues = torch.tensor(d).double().repeat(N // len(d))
    A = symmetric(eigenvalues)
    rule = slq(lambda v: A @ v, gaussian(FLAT, 2), 10, orthogonalize=orthogonalize)
    for z, nodes, weights in zip(gaussian(FLAT, 2), *rule, strict=True):
        exact = z @ torch.linalg.matrix_exp(A) @ z / (z @ z)
        torch.testing.assert_close((weights * nodes.exp()).sum(), exact, rtol=1e-9, atol=0)
        assert nodes.min() >= min(d) - 1e-9
        assert nodes.max() <= max(d) + 1e-9


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
@either
def test_slq_does_not_depend_on_the_unit_of_the_curvature(scale, orthogonalize):
    A = symmetric(SPECTRA["indefinite"]).float()
    probes = gaussian(FLAT.float(), 2)
    one, other = (slq(lambda v, c=c: c * (A @ v), probes, 20, orthogonalize=orthogonalize) for c in (1.0, scale))
    torch.testing.assert_close(other.nodes / (scale or 1.0), one.nodes * (scale > 0), rtol=0, atol=1e-3)
    assert (other.weights.sum(1) - 1).abs().max() <= 1e-6


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 0.01), (torch.bfloat16, 0.03)])
def test_nets_of_lower_precision_have_float64_rules(dtype, error):
    A, exact = rule_of("indefinite", num=5, steps=30)
    rule = slq(lambda v: (A @ v.double()).to(dtype), gaussian(FLAT.to(dtype), 5), 30)
    assert rule.nodes.dtype == torch.float64
    assert wasserstein(rule, exact) <= error * (exact.nodes.max() - exact.nodes.min())


@pytest.mark.parametrize(("d", "n"), [("indefinite", 2000), ("decaying", 2000)])
def test_one_probe_of_90_steps_is_within_one_percent(d, n):
    values = {
        "indefinite": torch.linspace(-1, 1.3, n).double() ** 3,
        "decaying": 50 * 0.99 ** torch.arange(n).double(),
    }[d]
    rule = slq(lambda v: values * v, gaussian(values, 1), 90)
    assert wasserstein(rule, values) <= 0.01 * (values.max() - values.min())


def test_one_probe_sees_the_spectrum_of_a_trained_net():
    """Its Hessian has a few outliers and most of its eigenvalues near zero."""
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 18), nn.Tanh(), nn.Linear(18, 18), nn.Tanh(), nn.Linear(18, 4)))
    centers, labels = normal(4, 8, seed=3), classes(200, 4)
    batch = centers[labels] + 0.7 * normal(200, 8, seed=4), labels
    loss, params = functionalize(model, nn.CrossEntropyLoss())
    for _ in range(40):
        step = grad(loss)(params, batch)
        params = {name: p - 0.5 * step[name] for name, p in params.items()}
    matvec = hvp(loss, params, batch)
    exact = torch.linalg.eigvalsh(dense_hessian(loss, params, batch))
    rule = slq(matvec, gaussian(params, 1), 90)
    assert wasserstein(rule, exact) <= 0.01 * (exact[-1] - exact[0])


@either
def test_slq_under_vmap_is_a_loop(orthogonalize):
    stack = torch.stack([symmetric(d) for d in SPECTRA.values()])
    probes = gaussian(FLAT, 2)

    def run(A):
        return slq(lambda v: A @ v, probes, 8, orthogonalize=orthogonalize)

    batched, looped = vmap(run)(stack), [run(A) for A in stack]
    torch.testing.assert_close(batched.nodes, torch.stack([x.nodes for x in looped]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(batched.weights, torch.stack([x.weights for x in looped]), rtol=1e-6, atol=1e-9)


def test_slq_refuses_more_steps_than_entries_and_no_probes():
    with pytest.raises(ValueError, match=r"num_matvecs=61 must be between 1 and 60"):
        slq(lambda v: v, gaussian(FLAT, 1), 61)
    with pytest.raises(ValueError, match=r"there is no probe"):
        slq(lambda v: v, gaussian(FLAT, 0), 5)


# density


@spectra
@pytest.mark.parametrize("linthresh", [None, 0.1])
def test_density_integrates_to_one(spectrum, linthresh):
    _, rule = rule_of(spectrum)
    grid, values = density(rule, linthresh=linthresh)
    assert float(torch.trapezoid(values, grid)) == pytest.approx(1, abs=1e-4)
    assert (values >= 0).all()


def test_density_is_a_mixture_of_gaussians():
    _, rule = rule_of("indefinite")
    at = torch.linspace(-1, 1, 7).double()
    expected = [np.sum(rule.weights.numpy() * scipy.stats.norm.pdf(x, rule.nodes.numpy(), 0.2)) / 3 for x in at.numpy()]
    torch.testing.assert_close(density(rule, at, sigma=0.2).values, torch.tensor(expected).double(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("linthresh", [None, 0.1])
def test_density_scales_with_the_eigenvalues(linthresh):
    """Its width is relative to the range: in other units it is the same curve."""
    _, rule = rule_of("decaying")
    c = 1e-6
    scaled = Quadrature(c * rule.nodes, rule.weights)
    a, b = density(rule, linthresh=linthresh), density(scaled, linthresh=linthresh and c * linthresh)
    torch.testing.assert_close(b.grid / c, a.grid, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(b.values * c, a.values, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("c", [0.0, 3.0, -1e-9])
def test_density_of_a_multiple_of_the_identity(c):
    grid, values = density(slq(lambda v: c * v, gaussian(FLAT, 2), 5))
    assert float(torch.trapezoid(values, grid)) == pytest.approx(1, abs=1e-4)
    assert grid[values.argmax()] == pytest.approx(c, rel=0.01, abs=0.01 if c == 0 else 0)


def test_density_band_holds_the_density_of_many_probes():
    A = symmetric(SPECTRA["indefinite"])
    many = slq(lambda v: A @ v, gaussian(FLAT, 300, seed=1), 12)
    few = slq(lambda v: A @ v, gaussian(FLAT, 15), 12)
    grid, lower, upper = density_band(few, sigma=0.2)
    truth = density(many, grid, sigma=0.2).values
    inside = ((lower <= truth) & (truth <= upper)).double().mean()
    assert inside > 0.8
    assert (upper - lower).max() < 0.5 * truth.max()
    mean = density(few, grid, sigma=0.2).values
    assert ((lower <= mean) & (mean <= upper)).all()


def test_a_width_under_vmap_asks_for_a_grid():
    _, rule = rule_of("flat")
    with pytest.raises(ValueError, match="give grid"):
        vmap(lambda nodes: density(Quadrature(nodes[None], rule.weights[:1]), sigma=0.1).values)(rule.nodes)


@pytest.mark.parametrize("option", [{"sigma": 0.0}, {"sigma": -1.0}, {"linthresh": 0.0}])
def test_density_refuses_a_width_that_is_none(option):
    _, rule = rule_of("flat")
    with pytest.raises(ValueError, match="must be positive"):
        density(rule, **option)


def test_density_band_of_one_probe_is_refused():
    _, rule = rule_of("flat", num=1)
    with pytest.raises(ValueError, match="one probe has no spread"):
        density_band(rule)


# distributions


def test_cumulative_counts_the_eigenvalues():
    A, rule = rule_of("indefinite", num=40, steps=30)
    values = torch.linalg.eigvalsh(A)
    grid = torch.linspace(-2, 2, 50).double()
    fractions = (values[None] <= grid[:, None]).double().mean(1)
    assert (cumulative(rule, grid).values - fractions).abs().max() <= 0.05
    x, F = cumulative(rule)
    assert (x.diff() >= 0).all()
    assert (F.diff() >= 0).all()
    assert F[-1] == pytest.approx(1, abs=1e-12)


def test_wasserstein_is_that_of_scipy():
    (_, a), (_, b) = rule_of("indefinite"), rule_of("flat", num=2, steps=5)
    expected = scipy.stats.wasserstein_distance(
        a.nodes.flatten(), b.nodes.flatten(), a.weights.flatten(), b.weights.flatten()
    )
    assert float(wasserstein(a, b)) == pytest.approx(expected, rel=1e-10)
    values = SPECTRA["decaying"]
    expected = scipy.stats.wasserstein_distance(a.nodes.flatten(), values, a.weights.flatten())
    assert float(wasserstein(a, values)) == pytest.approx(expected, rel=1e-10)
    assert wasserstein(a, a) == 0


# functions of the spectrum

FUNCTIONS = {
    "log-determinant": lambda x: (x + 20).log(),
    "effective dimension": lambda x: x / (x + 20),
    "negative mass": lambda x: -x.clamp(max=0),
    "trace": lambda x: x,
    "squared Frobenius norm": torch.square,
}


@either
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("spectrum", ["indefinite", "decaying", "flat"])
def test_traces_of_functions_lie_within_their_errors(name, spectrum, orthogonalize):
    A, rule = rule_of(spectrum, num=40, steps=30, orthogonalize=orthogonalize)
    result = trace_of(rule, FUNCTIONS[name], N)
    exact = FUNCTIONS[name](torch.linalg.eigvalsh(A)).sum()
    assert (result.mean - exact).abs() <= 4 * result.stderr + 1e-9 * N
    assert result.num_matvecs == 40 * 30


def test_trace_of_the_identity_function_is_hutchinson():
    A = symmetric(SPECTRA["indefinite"])
    probes = rademacher(FLAT, 6)
    a, b = trace_of(slq(lambda v: A @ v, probes, 3), lambda x: x, N), hutchinson(lambda v: A @ v, probes)
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-10, atol=0)
    assert 0.5 < a.stderr / b.stderr < 2  # one knows the products, the other their rules


@either
def test_trace_of_differentiates(orthogonalize):
    """d tr f(A) = tr f'(A) dA, here for the log-determinant, whose gradient is the inverse."""
    A = symmetric(SPECTRA["flat"] + torch.linspace(0, 3, N))
    probes = rademacher(FLAT, 3)

    def logdet(A):
        return trace_of(slq(lambda v: A @ v, probes, 25, orthogonalize=orthogonalize), torch.log, N).mean

    def along(t):
        return logdet(A + t * direction)

    direction = symmetric(torch.linspace(-1, 1, N), seed=5)
    slope = (along(1e-4) - along(-1e-4)) / 2e-4
    torch.testing.assert_close((grad(logdet)(A) * direction).sum(), slope, rtol=1e-6, atol=1e-8)


@either
@pytest.mark.parametrize("spectrum", ["decaying", "rank-deficient"])
def test_trace_of_differentiates_where_spaces_end_and_copies_come_up(spectrum, orthogonalize):
    A, direction = symmetric(SPECTRA[spectrum]), symmetric(torch.linspace(-1, 1, N), seed=5)
    if spectrum == "rank-deficient":
        direction = A @ direction @ A  # of the same range: else a small change is none
    size = A.norm() / direction.norm()

    def along(t):
        rule = slq(lambda v: A @ v + t * size * (direction @ v), rademacher(FLAT, 2), 40, orthogonalize=orthogonalize)
        return trace_of(rule, lambda x: (x / 20).cos(), N).mean

    slope = (along(1e-5) - along(-1e-5)) / 2e-5
    torch.testing.assert_close(grad(along)(torch.zeros(()).double()), slope, rtol=1e-5, atol=0)


@pytest.mark.parametrize("linthresh", [None, 1e-3])
def test_a_width_that_takes_too_many_points_is_refused(linthresh):
    rule = Quadrature(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]]))
    with pytest.raises(ValueError, match="widen sigma"):
        density(rule, sigma=1e-12, linthresh=linthresh)
    assert density(rule, torch.zeros(1), sigma=1e-12, linthresh=linthresh).values.isfinite().all()
