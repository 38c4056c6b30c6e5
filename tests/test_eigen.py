import contextlib

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse.linalg
import torch
from spectra import LIKES, SPECTRA, N, on, symmetric
from torch.func import grad, vmap

from hessfn.core import tree
from hessfn.core.probes import gaussian
from hessfn.estimators.eigen import eigsh, lanczos, power_iter
from hessfn.estimators.hutchinson import hutchinson

FLAT = LIKES["tensor"]
V0 = gaussian(FLAT, 1, seed=1)[0]
STACK = torch.stack([symmetric(d, seed) for seed, d in enumerate(SPECTRA.values())])

spectra = pytest.mark.parametrize("spectrum", SPECTRA)
trees = pytest.mark.parametrize("form", LIKES)


def rows(vectors):
    return vmap(lambda v: tree.ravel(v)[0])(vectors)


def wanted(values, k, which):
    """The k eigenvalues of an ascending NumPy array, in the order of the contract."""
    if which == "LM":
        return values[np.argsort(-np.abs(values), kind="stable")[:k]]
    if which == "BE":
        return np.concatenate([values[: k // 2], values[len(values) - (k - k // 2) :]])
    return values[:k] if which == "SA" else values[::-1][:k]


def counted(matrix):
    products = []

    def matvec(v):
        products.append(None)
        return matrix @ v

    return matvec, products


# eigsh


@spectra
@pytest.mark.parametrize("which", ["LM", "LA", "SA", "BE"])
def test_eigsh_agrees_with_dense_eigenvalues(spectrum, which):
    A = symmetric(SPECTRA[spectrum])
    exact = wanted(scipy.linalg.eigh(A.numpy(), eigvals_only=True), 6, which)
    pairs = eigsh(lambda v: A @ v, V0, 6, which=which, rtol=1e-9, basis_size=30, max_matvecs=3000)
    assert np.abs(pairs.values.numpy() - exact).max() <= 1e-9 * np.abs(exact).max() + 1e-12 * float(A.norm())


@spectra
@pytest.mark.parametrize("which", ["LM", "LA", "SA", "BE"])
def test_eigsh_needs_no_more_products_than_arpack(spectrum, which):
    A = symmetric(SPECTRA[spectrum])
    matvec, products = counted(A.numpy())
    operator = scipy.sparse.linalg.LinearOperator(A.shape, matvec=matvec, dtype=np.float64)
    rtol, k = 1e-6, 4
    with contextlib.suppress(scipy.sparse.linalg.ArpackNoConvergence):  # of many copies of zero it may find too few
        scipy.sparse.linalg.eigsh(operator, k, which=which, v0=V0.numpy(), ncv=2 * k + 10, tol=rtol)
    ours = eigsh(lambda v: A @ v, V0, k, which=which, rtol=rtol, basis_size=2 * k + 10, max_matvecs=1000)
    # Held against the dense ones: of the clustered spectrum ARPACK misses the smallest.
    exact = wanted(scipy.linalg.eigh(A.numpy(), eigvals_only=True), k, which)
    assert np.abs(ours.values.numpy() - exact).max() <= rtol * np.abs(exact).max() + 1e-12 * float(A.norm())
    assert ours.converged.all()
    assert ours.num_matvecs <= 1.25 * len(products)  # it is 1.24 with the ARPACK of SciPy 1.11


@spectra
def test_eigsh_states_the_residuals_its_pairs_have(spectrum):
    A = symmetric(SPECTRA[spectrum])
    for budget in (8, 25, 100):  # before, while and after it converges
        pairs = eigsh(lambda v: A @ v, V0, 5, max_matvecs=budget, basis_size=15)
        true = torch.linalg.vector_norm(A @ pairs.vectors.T - pairs.vectors.T * pairs.values, dim=0)
        torch.testing.assert_close(pairs.residuals, true, rtol=1e-6, atol=1e-12 * float(A.norm()))
        torch.testing.assert_close(pairs.vectors @ pairs.vectors.T, torch.eye(5).double(), rtol=0, atol=1e-12)
        assert pairs.num_matvecs <= budget
        assert (pairs.residuals[pairs.converged] <= 1e-3 * pairs.values[pairs.converged].abs() + 1e-13 * A.norm()).all()


@trees
def test_eigsh_does_not_care_how_the_tree_groups_entries(form):
    A, like = symmetric(SPECTRA["indefinite"]), LIKES[form]
    reference = eigsh(lambda v: A @ v, V0, 3)
    pairs = eigsh(on(A, like), tree.ravel(like)[1](V0), 3)
    torch.testing.assert_close(pairs.values, reference.values, rtol=1e-10, atol=0)
    torch.testing.assert_close(rows(pairs.vectors), reference.vectors, rtol=0, atol=1e-10)


def test_eigsh_returns_what_has_not_converged_and_says_so():
    A = symmetric(torch.cat([torch.tensor([100.0]).double(), torch.linspace(0, 1, N - 1).double()]))
    pairs = eigsh(lambda v: A @ v, V0, 3, max_matvecs=6)
    assert pairs.converged.tolist() == [True, False, False]
    assert pairs.values[0] == pytest.approx(100, rel=1e-6)
    assert pairs.num_matvecs == 6


@pytest.mark.parametrize("copies", [2, 3])
def test_eigsh_finds_every_copy_of_an_eigenvalue_from_as_many_starts(copies):
    d = torch.cat([torch.full((copies,), 3.0).double(), torch.linspace(0, 1, N - copies).double()])
    A = symmetric(d)
    starts = torch.stack(list(gaussian(FLAT, copies)))
    pairs = eigsh(lambda v: A @ v, V0, copies, rtol=1e-8, warm_start=starts)
    torch.testing.assert_close(pairs.values, d[:copies], rtol=1e-10, atol=0)


@pytest.mark.parametrize("which", ["LM", "LA", "SA", "BE"])
@pytest.mark.parametrize("d", [[3.0, 3, 3], [5.0, 5, 2, 2], [-4.0, -4, 1], [1.0]])
def test_eigsh_goes_on_behind_an_invariant_subspace(d, which):
    """With few distinct eigenvalues a Krylov space ends at once; the copies are in its complement."""
    A = symmetric(torch.cat([torch.tensor(d).double(), torch.zeros(N - len(d)).double()]))
    exact = wanted(scipy.linalg.eigh(A.numpy(), eigvals_only=True), 4, which)
    pairs = eigsh(lambda v: A @ v, V0, 4, which=which)
    assert np.abs(pairs.values.numpy() - exact).max() <= 1e-12
    assert pairs.converged.all()
    assert pairs.num_matvecs <= 30


@pytest.mark.parametrize("c", [0.0, -2.0])
def test_eigsh_of_a_multiple_of_the_identity(c):
    pairs = eigsh(lambda v: c * v, V0, 4)
    torch.testing.assert_close(pairs.values, torch.full((4,), c).double(), rtol=1e-12, atol=0)
    torch.testing.assert_close(pairs.vectors @ pairs.vectors.T, torch.eye(4).double(), rtol=0, atol=1e-12)
    assert pairs.converged.all()
    assert pairs.num_matvecs == 5


@pytest.mark.parametrize("n", [1, 2, 5])
def test_eigsh_finds_all_eigenpairs_of_a_small_matrix(n):
    A = symmetric(torch.arange(n) - 1.5)
    pairs = eigsh(lambda v: A @ v, V0[:n], n, which="SA")
    torch.testing.assert_close(pairs.values, torch.arange(n) - 1.5, rtol=1e-12, atol=0, check_dtype=False)
    torch.testing.assert_close(A @ pairs.vectors.T, pairs.vectors.T * pairs.values, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@spectra
def test_eigsh_does_not_depend_on_the_unit_of_the_curvature(scale, spectrum):
    A = symmetric(SPECTRA[spectrum]).float()
    a, b = (eigsh(lambda v, c=c: c * (A @ v), V0.float(), 4) for c in (1.0, scale))
    assert a.num_matvecs == b.num_matvecs
    torch.testing.assert_close(b.values / scale, a.values, rtol=1e-4, atol=1e-5 * float(a.values.abs().max()))
    assert (a.converged == b.converged).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eigsh_of_a_net_in_lower_precision_has_values_to_that_precision(dtype):
    d, eps = SPECTRA["decaying"], torch.finfo(dtype).eps
    A = symmetric(d)
    pairs = eigsh(lambda v: (A @ v.double()).to(dtype), V0.to(dtype), 3, rtol=10 * eps)
    apart = (pairs.values[:, None] - d).abs().amin(1)  # the tolerance of bfloat16 is as wide as the gaps
    assert (apart <= pairs.residuals + 4 * eps * d[0]).all()
    assert pairs.values[0] == pytest.approx(float(d[0]), rel=10 * eps)
    assert pairs.vectors.dtype == dtype


def test_eigsh_restarts_within_its_basis():
    """One in six of the eigenpairs, deep in the bulk, from a basis half as large again."""
    A = symmetric(torch.linspace(-1, 1.3, 120).double() ** 3)
    v0 = gaussian(A[0], 1)[0]
    pairs = eigsh(lambda v: A @ v, v0, 20, basis_size=30, max_matvecs=600)
    exact = wanted(scipy.linalg.eigh(A.numpy(), eigvals_only=True), 20, "LM")
    assert pairs.converged.all()
    assert pairs.num_matvecs > 30
    assert np.abs(pairs.values.numpy() - exact).max() <= 1e-3


def test_eigsh_from_earlier_vectors_costs_few_products():
    A = symmetric(SPECTRA["decaying"])
    shift = 1e-3 * symmetric(torch.linspace(-1, 1, N).double(), seed=1)
    before = eigsh(lambda v: A @ v, V0, 5)
    cold = eigsh(lambda v: (A + shift) @ v, V0, 5)
    warm = eigsh(lambda v: (A + shift) @ v, V0, 5, warm_start=before.vectors)
    summed = eigsh(lambda v: (A + shift) @ v, before.vectors.sum(0), 5)
    assert warm.num_matvecs <= 8 < cold.num_matvecs
    assert summed.num_matvecs < cold.num_matvecs
    torch.testing.assert_close(warm.values, cold.values, rtol=1e-5, atol=0)
    again = eigsh(lambda v: A @ v, V0, 5, rtol=1e-2, warm_start=before.vectors)
    assert again.num_matvecs == 6


def test_eigsh_does_not_trust_a_matrix_that_is_not_symmetric():
    A = symmetric(SPECTRA["decaying"])
    skewed = A + torch.triu(torch.ones(N, N), 1)
    pairs = eigsh(lambda v: skewed @ v, V0, 3)
    true = torch.linalg.vector_norm(skewed @ pairs.vectors.T - pairs.vectors.T * pairs.values, dim=0)
    assert not pairs.converged.any()
    assert (pairs.residuals > 0.3 * true).all()


def test_eigsh_does_not_trust_a_matrix_that_changes():
    """As a loader that shuffles makes it: every product is with another matrix."""
    A, count = symmetric(SPECTRA["decaying"]), iter(range(1000))
    pairs = eigsh(lambda v: A @ v + 0.1 * next(count) * v, V0, 3)
    assert not pairs.converged.any()


@trees
def test_eigsh_keeps_its_basis_on_another_device(form):
    A, like = symmetric(SPECTRA["clustered"]), LIKES[form]
    v0 = tree.ravel(like)[1](V0)
    a, b = eigsh(on(A, like), v0, 2), eigsh(on(A, like), v0, 2, basis_device="cpu")
    assert torch.equal(a.values, b.values)


@pytest.mark.parametrize("which", ["LM", "LA", "SA", "BE"])
def test_eigsh_of_fixed_cost_under_vmap_is_a_loop(which):
    def run(A):
        return eigsh(lambda v: A @ v, V0, 3, which=which, rtol=None, max_matvecs=25)

    batched, looped = vmap(run)(STACK), [run(A) for A in STACK]
    torch.testing.assert_close(batched.values, torch.stack([x.values for x in looped]), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(batched.residuals, torch.stack([x.residuals for x in looped]), rtol=1e-8, atol=1e-9)
    assert (batched.num_matvecs == 25).all()


@spectra
@pytest.mark.parametrize("num_matvecs", [12, N])
def test_residuals_of_fixed_cost_are_never_below_the_true_ones(spectrum, num_matvecs):
    A = symmetric(SPECTRA[spectrum])
    pairs = eigsh(lambda v: A @ v, V0, 3, rtol=None, max_matvecs=num_matvecs)
    errors = torch.linalg.vector_norm(pairs.vectors @ A - pairs.values[:, None] * pairs.vectors, dim=1)
    assert (errors <= 1.01 * pairs.residuals).all()


def test_eigsh_of_fixed_cost_differentiates_to_the_projector():
    """d lambda = v' dA v."""
    A = symmetric(SPECTRA["decaying"])

    def top(A):
        return eigsh(lambda v: A @ v, V0, 1, rtol=None, max_matvecs=40).values[0]

    v = scipy.linalg.eigh(A.numpy())[1][:, -1]
    gradient = grad(top)(A)
    torch.testing.assert_close((gradient + gradient.T) / 2, torch.from_numpy(np.outer(v, v)), rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, r"k=0 must be between 1 and 60, the number of entries in v0"),
        ({"k": 61}, r"k=61 must be between 1 and 60, the number of entries in v0"),
        ({"which": "XX"}, r"which='XX' must be one of LM, LA, SA, BE"),
        ({"k": 5, "basis_size": 6}, r"basis_size=6 must be at least 7"),
        ({"k": 5, "max_matvecs": 5}, r"max_matvecs=5 must be at least 6"),
        ({"rtol": None}, r"give it as max_matvecs"),
        ({"rtol": None, "warm_start": torch.ones(2, 60).double()}, r"give the sum of those of warm_start as v0"),
        ({"rtol": None, "k": 5, "max_matvecs": 4}, r"max_matvecs=4 must be at least k=5"),
        ({"warm_start": torch.ones(2, 7).double()}, r"warm_start has shape \(7,\), but \(60,\) in v0"),
    ],
)
def test_eigsh_refuses_what_is_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        eigsh(lambda v: v, V0, **options)


@pytest.mark.parametrize("run", [power_iter, eigsh, lambda f, v: lanczos(f, v, 3)])
def test_a_start_of_zero_or_nan_is_refused(run):
    for bad in (torch.zeros(3), torch.full((3,), torch.nan)):
        with pytest.raises(ValueError, match="has norm"):
            run(lambda v: v, bad)


@pytest.mark.parametrize("run", [power_iter, eigsh])
def test_a_product_that_is_not_finite_is_refused(run):
    with pytest.raises(ValueError, match=r"product 1 of the matvec is not finite"):
        run(lambda v: v / 0, V0)


@pytest.mark.parametrize("run", [power_iter, eigsh, lambda f, v, **o: hutchinson(f, [v], rtol=0.1)])
def test_a_tolerance_under_vmap_is_refused(run):
    with pytest.raises(ValueError, match="pass rtol=None"):
        vmap(lambda A: run(lambda v: A @ v, V0))(STACK)


def test_eigsh_leaves_no_graph_behind():
    A = symmetric(SPECTRA["flat"]).requires_grad_()
    with torch.no_grad():
        pairs = eigsh(lambda v: A @ v, V0, 2)
    assert not any(leaf.requires_grad for leaf in tree.leaves(pairs))


# lanczos


@spectra
@trees
@pytest.mark.parametrize("m", [1, 2, 30, N])
def test_lanczos_recurrence(spectrum, form, m):
    A, like = symmetric(SPECTRA[spectrum]), LIKES[form]
    alpha, beta, basis, residual = lanczos(on(A, like), tree.ravel(like)[1](V0), m)
    Q, r = rows(basis), tree.ravel(residual)[0]
    T = torch.diag(alpha) + torch.diag(beta, 1) + torch.diag(beta, -1)
    right = Q.T @ T
    right[:, -1] += r
    torch.testing.assert_close(A @ Q.T, right, rtol=0, atol=1e-12 * float(A.norm()))
    torch.testing.assert_close(Q @ Q.T, torch.eye(m).double(), rtol=0, atol=1e-12)
    assert (Q @ r).abs().max() <= 1e-12 * A.norm()


def test_lanczos_under_vmap_is_a_loop():
    """Over matrices some of whose Krylov spaces end early, and over starts."""
    starts = torch.stack(list(gaussian(FLAT, len(STACK))))
    batched = vmap(lambda A, v: lanczos(lambda x: A @ x, v, 20))(STACK, starts)
    for i, (A, v) in enumerate(zip(STACK, starts, strict=True)):
        alone = lanczos(lambda x, A=A: A @ x, v, 20)
        size = float(A.norm())
        torch.testing.assert_close(batched.alpha[i], alone.alpha, rtol=0, atol=1e-9 * size)
        torch.testing.assert_close(batched.beta[i], alone.beta, rtol=0, atol=1e-9 * size)


@pytest.mark.parametrize("m", [0, N + 1])
def test_lanczos_refuses_more_steps_than_entries(m):
    with pytest.raises(ValueError, match=rf"num_matvecs={m} must be between 1 and 60"):
        lanczos(lambda v: v, V0, m)


# power_iter


@trees
def test_power_iter_states_the_residual_of_its_vector(form):
    A, like = symmetric(SPECTRA["negative"]), LIKES[form]
    for budget in (1, 5, 200):
        pair = power_iter(on(A, like), tree.ravel(like)[1](V0), max_matvecs=budget)
        v = tree.ravel(pair.vector)[0]
        torch.testing.assert_close(v.norm(), torch.ones(()).double())
        torch.testing.assert_close(pair.value, v @ A @ v, rtol=1e-12, atol=0)
        torch.testing.assert_close(pair.residual, (A @ v - pair.value * v).norm(), rtol=1e-10, atol=1e-12)
        assert bool(pair.converged) == bool(pair.residual <= 1e-3 * pair.value.abs())
        assert pair.num_matvecs <= budget
    assert pair.converged
    assert pair.value == pytest.approx(float(SPECTRA["negative"].min()), rel=1e-5)


@pytest.mark.parametrize(("shift", "top"), [(3.0, 3.0), (-3.0, -3.0)])
def test_power_iter_knows_that_opposite_ends_defeat_it_and_a_shift_mends_that(shift, top):
    A = symmetric(torch.cat([torch.tensor([3.0, -3.0]).double(), torch.linspace(-1, 1, N - 2).double()]))
    assert not power_iter(lambda v: A @ v, V0).converged
    pair = power_iter(lambda v: A @ v, V0, shift=shift)
    assert pair.converged
    assert pair.value == pytest.approx(top, rel=1e-5)


@pytest.mark.parametrize("c", [0.0, 1e-200, -1e150])  # the square of a norm fits in float64
def test_power_iter_of_a_multiple_of_the_identity_takes_one_product(c):
    pair = power_iter(lambda v: c * v, V0)
    assert pair.value == pytest.approx(c, rel=1e-12, abs=0)
    assert pair.num_matvecs == 1
    assert pair.converged


def test_power_iter_of_fixed_cost_under_vmap_is_a_loop():
    def run(A):
        return power_iter(lambda v: A @ v, V0, max_matvecs=30, rtol=None)

    batched, looped = vmap(run)(torch.cat([STACK, 0 * STACK[:1]])), [run(A) for A in (*STACK, 0 * STACK[0])]
    torch.testing.assert_close(batched.value, torch.stack([x.value for x in looped]), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(batched.residual, torch.stack([x.residual for x in looped]), rtol=1e-8, atol=1e-12)
    assert (batched.num_matvecs == 30).all()


# matrices that are given


def test_given_matrices_take_one_line_each():
    dense = symmetric(SPECTRA["decaying"])
    array, sparse = dense.numpy(), scipy.sparse.csr_array(dense.numpy())
    operator = scipy.sparse.linalg.aslinearoperator(sparse)
    matvecs = [
        lambda v: dense @ v,
        lambda v: torch.from_numpy(array @ v.numpy()),
        lambda v: torch.from_numpy(sparse @ v.numpy()),
        lambda v: torch.from_numpy(operator @ v.numpy()),
    ]
    for matvec in matvecs:
        assert eigsh(matvec, V0, 1).values[0] == pytest.approx(50, rel=1e-5)
