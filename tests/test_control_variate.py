"""Eigenpairs as a control variate: unbiased whatever they are, and worth what their eigenvalues weigh."""

import pytest
import torch
from spectra import LIKES, SPECTRA, N, on, symmetric
from torch.func import grad, vmap

from hessfn.core import tree
from hessfn.core.probes import gaussian, rademacher
from hessfn.core.results import EigenPairs
from hessfn.estimators.control_variate import ControlVariate
from hessfn.estimators.eigen import eigsh
from hessfn.estimators.hutchinson import hutchinson, hutchinson_diag, hutchinson_per_leaf
from hessfn.estimators.spectral_sums import trace_of
from hessfn.estimators.spectrum import cumulative, density, quadrature_of, slq, wasserstein
from hessfn.estimators.squared_norms import squared_frobenius, squared_row_norms

FLAT = LIKES["tensor"]
TRIALS = 2000
EXACT = {
    hutchinson: torch.trace,
    hutchinson_diag: torch.diagonal,
    squared_frobenius: lambda A: A.square().sum(),
    squared_row_norms: lambda A: A.square().sum(1),
}


def arbitrary(k=3, seed=4):
    """Pairs that are none: vectors neither orthogonal nor of unit norm, values out of nothing."""
    vectors = torch.stack(list(gaussian(FLAT, k, seed=seed))) / N**0.5
    values = torch.tensor([20.0, -7.0, 3.0])[:k].double()
    return EigenPairs(values, vectors, torch.zeros(k), torch.tensor(0), values > 0)


def exact_pairs(A, k):
    values, vectors = torch.linalg.eigh(A)
    order = values.abs().argsort(descending=True)[:k]
    return EigenPairs(
        values[order], vectors[:, order].T.contiguous(), torch.zeros(k), torch.tensor(0), values[order] > 0
    )


@pytest.mark.parametrize("form", ["tensor", "dict", "nested"])
def test_what_is_known_of_b_is_that_of_the_dense_matrix(form):
    like, pairs = LIKES[form], arbitrary()
    B = torch.einsum("i,ia,ib->ab", pairs.values, pairs.vectors, pairs.vectors)
    _, unravel = tree.ravel(like)
    known = ControlVariate(pairs._replace(vectors=unravel(pairs.vectors)), "here")
    z = gaussian(like, 1, seed=2)[0]
    flat = tree.ravel(z)[0]
    torch.testing.assert_close(tree.ravel(known.image(z))[0], B @ flat)
    torch.testing.assert_close(tree.ravel(known.rest(z, z))[0], flat - B @ flat)
    torch.testing.assert_close(known.trace(), B.trace())
    torch.testing.assert_close(tree.ravel(known.diagonal())[0], B.diagonal())
    torch.testing.assert_close(tree.ravel(known.squared_row_norms())[0], B.square().sum(1))
    torch.testing.assert_close(known.squared_frobenius(), B.square().sum())
    blocks = B.diagonal().split([leaf.numel() for leaf in tree.leaves(like)])
    torch.testing.assert_close(torch.stack(tree.leaves(known.traces())), torch.stack([x.sum() for x in blocks]))


@pytest.mark.parametrize("estimator", EXACT, ids=lambda x: x.__name__)
def test_pairs_that_are_none_leave_no_bias(estimator):
    A, pairs = symmetric(SPECTRA["decaying"]), arbitrary()
    trials = torch.stack(list(rademacher(torch.zeros(2, N).double(), TRIALS)))
    means = vmap(lambda z: estimator(lambda v: A @ v, list(z.unbind()), eigenpairs=pairs).mean)(trials)
    error = (means.mean(0) - EXACT[estimator](A)).abs() / (means.std(0) / TRIALS**0.5)
    assert error.max() <= 4.5


def test_pairs_that_are_none_leave_no_bias_in_leaves_and_rules():
    A, pairs = symmetric(SPECTRA["indefinite"]), arbitrary()
    like = {"a": FLAT[:25], "b": FLAT[25:]}
    apart = pairs._replace(vectors={"a": pairs.vectors[:, :25], "b": pairs.vectors[:, 25:]})

    def leaves(z):
        probes = [{"a": x[:25], "b": x[25:]} for x in z.unbind()]
        found = hutchinson_per_leaf(on(A, like), probes, eigenpairs=apart).mean
        return torch.stack([found["a"], found["b"]])

    def rule(z):
        found = slq(lambda v: A @ v, list(z.unbind()), 8, eigenpairs=pairs)
        # Gauss rules of 8 steps have the moments to degree 15 without an error of their own.
        return torch.stack([trace_of(found, lambda x, d=d: x**d, N).mean for d in range(4)])

    values = torch.linalg.eigvalsh(A)
    for run, probes, exact in (
        (leaves, rademacher, torch.stack([A.diagonal()[:25].sum(), A.diagonal()[25:].sum()])),
        (rule, gaussian, torch.stack([(values**d).sum() for d in range(4)])),
    ):
        means = vmap(run)(torch.stack(list(probes(torch.zeros(2, N).double(), TRIALS))))
        spread = (means.std(0) / TRIALS**0.5).clamp(min=1e-12)
        assert ((means.mean(0) - exact).abs() <= 4 * spread + 1e-9).all()


def test_an_estimate_has_the_variance_of_what_the_pairs_leave():
    A = symmetric(SPECTRA["decaying"])
    pairs = exact_pairs(A, 8)
    rest = A - torch.einsum("i,ia,ib->ab", pairs.values, pairs.vectors, pairs.vectors)
    trials = torch.stack(list(rademacher(torch.zeros(5, N).double(), TRIALS)))
    means = vmap(lambda z: hutchinson(lambda v: A @ v, list(z.unbind()), eigenpairs=pairs).mean)(trials)
    variance = 2 * (rest.square().sum() - rest.diagonal().square().sum()) / 5
    assert 0.9 <= means.var() / variance <= 1.1
    plain = vmap(lambda z: hutchinson(lambda v: A @ v, list(z.unbind())).mean)(trials)
    assert means.std() < 0.6 * plain.std()


def test_a_tolerance_is_reached_with_fewer_probes():
    A = symmetric(100.0 * (torch.arange(N) == 0) + 1.0)
    probes = rademacher(FLAT, 1000)
    plain = hutchinson(lambda v: A @ v, probes, rtol=0.2)
    helped = hutchinson(lambda v: A @ v, probes, rtol=0.2, eigenpairs=exact_pairs(A, 1))
    assert helped.num_matvecs == 10 < plain.num_matvecs
    assert (helped.mean - A.trace()).abs() <= 4 * helped.stderr < 0.02 * A.trace()


def test_products_have_a_derivative_though_the_pairs_have_none():
    """The control variate is a constant of mean zero: what is differentiated stays unbiased."""
    A, pairs = symmetric(SPECTRA["decaying"]), exact_pairs(symmetric(SPECTRA["flat"]), 3)
    probes = list(rademacher(FLAT, 4))
    gradient = grad(lambda A: hutchinson(lambda v: A @ v, probes, eigenpairs=pairs).mean)(A)
    torch.testing.assert_close(gradient, sum(torch.outer(z, z) for z in probes) / 4, rtol=1e-12, atol=0)


def test_eigenpairs_of_another_tree_or_number_are_refused():
    A, pairs = symmetric(SPECTRA["flat"]), arbitrary()
    with pytest.raises(ValueError, match=r"eigenpairs has 2 values and \[3\] vectors"):
        hutchinson(lambda v: A @ v, rademacher(FLAT, 3), eigenpairs=pairs._replace(values=pairs.values[:2]))
    with pytest.raises(ValueError, match="give what eigsh"):
        hutchinson(lambda v: A @ v, rademacher(FLAT, 3), eigenpairs=pairs.vectors)
    with pytest.raises(ValueError, match="the vectors of the eigenpairs"):
        hutchinson(lambda v: A @ v, rademacher(FLAT, 3), eigenpairs=pairs._replace(vectors=pairs.vectors[:, :9]))


# Rules with eigenpairs.


def test_a_rule_with_pairs_is_a_rule():
    A = symmetric(SPECTRA["decaying"])
    pairs = exact_pairs(A, 4)
    rule = slq(lambda v: A @ v, gaussian(FLAT, 6), 15, eigenpairs=pairs)
    assert rule.nodes.shape == rule.weights.shape == (6, 15 + 4 + 1)
    torch.testing.assert_close(rule.weights.sum(1), torch.ones(6).double(), rtol=1e-12, atol=0)
    torch.testing.assert_close(rule.nodes[:, 15:19], pairs.values.expand(6, -1))
    x, y = density(rule)
    assert float(torch.trapezoid(y, x)) == pytest.approx(1, abs=1e-3)
    assert cumulative(rule).values[-1] == pytest.approx(1, abs=1e-12)
    # Beyond the known eigenvalues there is, in the mean of the rows, exactly one in n each.
    top = cumulative(rule, pairs.values[1:3].mean(0, keepdim=True)).values
    assert float(top) == pytest.approx(1 - 2 / N, abs=1e-6)
    alone = slq(lambda v: A @ v, gaussian(FLAT, 1), 15, eigenpairs=pairs).weights.sum(1)
    assert 1e-6 < (alone - 1).abs() < 6 * 8**0.5 / N


@pytest.mark.slow
@pytest.mark.parametrize(("spectrum", "least"), [("decaying", 1.5), ("clustered", 3.0)])
def test_a_rule_with_pairs_is_nearer_to_the_spectrum(spectrum, least):
    values = SPECTRA[spectrum]
    A = symmetric(values)
    pairs = exact_pairs(A, 5)
    errors = torch.zeros(2, 40).double()
    for i in range(40):
        for j, known in enumerate((None, pairs)):
            rule = slq(lambda v: A @ v, gaussian(FLAT, 3, seed=i), 20, eigenpairs=known)
            errors[j, i] = wasserstein(rule, values)
    assert errors[0].mean() >= least * errors[1].mean()


@pytest.mark.parametrize("m", [6, 20])
def test_the_ritz_pairs_of_a_run_are_its_rule(m):
    """The nodes are those of the tridiagonal matrix of the run, the weights the parts of its start along vectors."""
    A, v0 = symmetric(SPECTRA["indefinite"]), gaussian(FLAT, 1, seed=3)[0]
    basis = torch.stack([v0 / v0.norm(), *_powers(A, v0, m - 1)]).T
    theta, s = torch.linalg.eigh(basis.T @ A @ basis)
    pairs = EigenPairs(theta, (basis @ s).T, torch.zeros(m), torch.tensor(m), theta > 0)
    order = torch.randperm(m, generator=torch.Generator().manual_seed(1))
    shuffled = pairs._replace(values=theta[order], vectors=pairs.vectors[order])
    expected = slq(lambda v: A @ v, [v0], m, orthogonalize=True)
    for given in (pairs, shuffled):
        rule = quadrature_of(given, v0)
        torch.testing.assert_close(rule.nodes, expected.nodes, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(rule.weights, expected.weights, rtol=1e-7, atol=1e-10)


def _powers(A, v0, count):
    """An orthonormal basis of the Krylov space, each vector from the last: the powers alone are too nearly parallel."""
    basis = [v0 / v0.norm()]
    for _ in range(count):
        v = A @ basis[-1]
        for _ in range(2):
            for q in basis:
                v = v - (q @ v) * q
        basis.append(v / v.norm())
    return basis[1:]


def test_one_lanczos_run_serves_pairs_and_density():
    A, v0 = symmetric(SPECTRA["decaying"]), gaussian(FLAT, 1, seed=3)[0]
    pairs = eigsh(lambda v: A @ v, v0, 3, keep_all=True)
    rule = quadrature_of(pairs, v0)
    torch.testing.assert_close(rule.weights.sum(), torch.ones(()).double(), rtol=1e-9, atol=0)
    first = v0 @ A @ v0 / (v0 @ v0)
    torch.testing.assert_close((rule.weights * rule.nodes).sum(), first, rtol=1e-6, atol=0)
