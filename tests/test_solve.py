"""Linear systems are held against NumPy's dense solutions, and derivatives against those of dense solutions."""

import inspect

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from nets import classes, normal
from spectra import LIKES, SPECTRA, N, on, symmetric
from torch import nn
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import hessfn as hf
from hessfn.core import tree
from hessfn.core.errors import NoDerivative
from hessfn.core.probes import gaussian

FLAT = LIKES["tensor"]
B = gaussian(FLAT, 1, seed=3)[0]
EYE = torch.eye(N).double()
DTYPES = [torch.float64, torch.float32]

spectra = pytest.mark.parametrize("spectrum", SPECTRA)
trees = pytest.mark.parametrize("form", LIKES)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def system(spectrum, damping=0.1, dtype=torch.float64):
    """A matvec without the damping, and what NumPy says of the system with it: its matrix and solution."""
    A = symmetric(SPECTRA[spectrum])
    damped = A + damping * EYE
    return on(A.to(dtype), FLAT.to(dtype)), damped, torch.from_numpy(np.linalg.solve(damped.numpy(), B.numpy()))


def relative(damped, x, b=B):
    return float((b - damped @ x.double()).norm() / b.norm())


def counted(matvec):
    products = []

    def product(v):
        products.append(None)
        return matvec(v)

    return product, products


# The solution.


@spectra
@pytest.mark.parametrize("rtol", [1e-3, 1e-8, None])
def test_the_solution_is_that_of_numpy(spectrum, rtol):
    matvec, damped, x = system(spectrum)
    found = hf.solve(matvec, B, damping=0.1, rtol=rtol, max_matvecs=None if rtol else N + 1)
    smallest = torch.linalg.eigvalsh(damped).abs().min()
    # ||x - x*|| <= ||b - Ax|| / |smallest eigenvalue|
    assert (found.x - x).norm() <= (1.01 * found.residual * B.norm() + 1e-13 * damped.norm()) / smallest
    assert found.converged
    assert found.residual <= (rtol or 1e-11)


@spectra
@dtypes
def test_the_residual_is_that_of_the_solution_however_far_it_got(spectrum, dtype):
    matvec, damped, _ = system(spectrum, dtype=dtype)
    for budget in (3, 12, 40, 150):
        for rtol in (1e-9, None):
            found = hf.solve(matvec, B.to(dtype), damping=0.1, rtol=rtol, max_matvecs=budget)
            rounding = 4 * torch.finfo(dtype).eps * damped.norm() * found.x.norm() / B.norm()
            assert abs(float(found.residual) - relative(damped, found.x)) <= rounding
            assert bool(found.converged) == bool(found.residual <= (rtol or 1e-6))


@spectra
def test_float32_gets_as_far_as_its_rounding_lets_it(spectrum):
    matvec, damped, _ = system(spectrum, dtype=torch.float32)
    found = hf.solve(matvec, B.float(), damping=0.1)
    floor = torch.finfo(torch.float32).eps * torch.linalg.matrix_norm(damped, 2) * found.x.norm() / B.norm()
    assert found.residual <= max(1e-6, float(floor))


def outliers(sign=1):
    """Forty eigenvalues far from the others, every second of this sign, and a bulk on both sides of zero."""
    tops, bulk = 20 * 0.8 ** torch.arange(40).double(), torch.linspace(0, 1, 180).double() ** 4
    tops[1::2] *= sign
    return symmetric(torch.cat([tops, 0.3 * bulk, -0.08 * bulk]))


WIDE = gaussian(torch.zeros(400).double(), 1)[0]


@pytest.mark.parametrize("sign", [1, -1])
def test_eigenvalues_far_from_the_others_cost_their_products_once(sign):
    """SciPy's MINRES, by the three-term recurrence, finds some of them again and again."""
    A, rtol = outliers(sign), 1e-6
    damped = A + 0.1 * torch.eye(400).double()
    matvec, products = counted(lambda v: damped.numpy() @ v)
    enough = []

    def note(x):
        if relative(damped, torch.from_numpy(x), WIDE) <= rtol:
            enough.append(len(products))

    operator = scipy.sparse.linalg.LinearOperator(A.shape, matvec=matvec, dtype=np.float64)
    named = "rtol" if "rtol" in inspect.signature(scipy.sparse.linalg.minres).parameters else "tol"  # SciPy before 1.14
    scipy.sparse.linalg.minres(operator, WIDE.numpy(), maxiter=300, callback=note, **{named: 1e-12})
    ours = hf.solve(lambda v: A @ v, WIDE, damping=0.1, rtol=rtol)
    assert ours.converged and ours.num_matvecs <= 0.7 * enough[0]
    # As many in float32, but for the last digits, where rounding ends the search.
    narrow = hf.solve(lambda v: A.float() @ v, WIDE.float(), damping=0.1, rtol=1e-4)
    assert narrow.converged
    assert narrow.num_matvecs <= hf.solve(lambda v: A @ v, WIDE, damping=0.1, rtol=1e-4).num_matvecs + 1


@dtypes
@pytest.mark.parametrize("rtol", [1e-6, None])
@pytest.mark.parametrize("spectrum", ["clustered", "rank-deficient"])
def test_a_singular_system_has_the_shortest_of_the_best_solutions(spectrum, rtol, dtype):
    A = symmetric(SPECTRA[spectrum])
    matvec = on(A.to(dtype), FLAT.to(dtype))
    pseudo = torch.linalg.pinv(A, hermitian=True, rtol=1e-12)
    condition = torch.linalg.matrix_norm(A, 2) * torch.linalg.matrix_norm(pseudo, 2)
    far = (2e3 * torch.finfo(dtype).eps + (rtol or 0)) * condition
    for b, solvable in ((A @ B, True), (B, False)):
        found = hf.solve(matvec, b.to(dtype), rtol=rtol, max_matvecs=None if rtol else 2 * N)
        best = pseudo @ b
        assert (found.x - best).norm() <= far * best.norm()
        assert float(found.residual) == pytest.approx(relative(A, best, b), rel=1e-3, abs=0.01 * float(far))
        if dtype == torch.float64:
            assert bool(found.converged) == solvable


@trees
def test_the_solution_does_not_care_how_the_tree_groups_entries(form):
    A, like = symmetric(SPECTRA["indefinite"]), LIKES[form]
    b = tree.ravel(like)[1](B)
    found = hf.solve(on(A, like), b, damping=0.1, rtol=1e-10)
    assert tree.structure(found.x) == tree.structure(b)
    torch.testing.assert_close(tree.ravel(found.x)[0], system("indefinite")[2], rtol=1e-8, atol=1e-8)


def test_leaves_of_unlike_dtypes_keep_them_and_the_residual_is_of_what_is_returned():
    A = symmetric(SPECTRA["flat"])
    like = {"a": torch.zeros(N // 2, dtype=torch.bfloat16), "b": torch.zeros(N - N // 2, dtype=torch.float64)}
    b = tree.ravel(like)[1](B)

    def matvec(v):
        flat, back = tree.ravel(v)
        return back(A @ flat)

    found = hf.solve(matvec, b, rtol=None, max_matvecs=12)
    assert [x.dtype for x in found.x.values()] == [torch.bfloat16, torch.float64]
    x, right = tree.ravel(found.x)[0], tree.ravel(b)[0]
    rest = right - tree.ravel(matvec(found.x))[0]
    assert float(found.residual) == pytest.approx(float(rest.norm() / right.norm()), rel=1e-9)
    assert relative(A, x, right) <= 10 * torch.finfo(torch.bfloat16).eps and not found.converged


# Numbers of products.


@pytest.mark.parametrize("basis_size", [2, 3, 5, 100])
def test_without_a_tolerance_it_takes_the_products_it_is_given(basis_size):
    A = symmetric(SPECTRA["flat"])
    for budget in (*range(3, 12), 33):
        for x0 in (None, torch.ones_like(B)):
            matvec, products = counted(lambda v: A @ v)
            found = hf.solve(matvec, B, x0=x0, rtol=None, max_matvecs=budget, basis_size=basis_size)
            assert len(products) == found.num_matvecs == budget
            assert float(found.residual) == pytest.approx(relative(A, found.x), rel=1e-6, abs=1e-15)


@pytest.mark.parametrize("spectrum", ["decaying", "indefinite"])
@pytest.mark.parametrize("basis_size", [5, 20, 100])
def test_with_a_tolerance_it_stays_within_the_most(spectrum, basis_size):
    plain, _, _ = system(spectrum)
    for most in (2, 7, 30, 120):
        matvec, products = counted(plain)
        found = hf.solve(matvec, B, damping=0.1, max_matvecs=most, basis_size=basis_size)
        assert len(products) == found.num_matvecs <= most
        assert found.residual <= 1


@dtypes
def test_where_the_krylov_space_ends_so_does_the_search(dtype):
    """Eight eigenvalues and one repeated: nine steps, an end, a check; rounding may ask for that twice."""
    matvec, _, _ = system("rank-deficient", dtype=dtype)
    found = hf.solve(matvec, B.to(dtype), damping=0.1, rtol=1e-30)
    assert not found.converged and found.num_matvecs <= 2 * 11


def test_a_short_basis_costs_products_and_not_the_solution():
    A = outliers()
    whole, short = (hf.solve(lambda v: A @ v, WIDE, damping=0.1, rtol=1e-4, basis_size=size) for size in (100, 15))
    assert whole.converged and short.converged
    assert short.num_matvecs > whole.num_matvecs


def test_a_solution_to_start_from_saves_the_products_that_led_to_it():
    matvec, _, x = system("decaying")
    cold = hf.solve(matvec, B, damping=0.1)
    near = hf.solve(matvec, B, damping=0.1, x0=x + 1e-5 * x.norm() * torch.sin(B))
    assert near.converged and near.num_matvecs < cold.num_matvecs
    there = hf.solve(matvec, B, damping=0.1, x0=x)
    assert there.num_matvecs == 1 and torch.equal(there.x, x)


@spectra
def test_no_search_ends_with_more_than_it_began_with(spectrum):
    """Asked for more than float32 has, from a solution that is as good as that."""
    matvec, _, x = system(spectrum, dtype=torch.float32)
    for start in (x.float(), *(x.float() * (1 + 1e-7 * noise) for noise in gaussian(B.float(), 5, seed=1))):
        began, ended = (hf.solve(matvec, B.float(), damping=0.1, x0=start, rtol=rtol) for rtol in (1.0, 1e-12))
        assert torch.equal(began.x, start) and ended.residual <= began.residual


@pytest.mark.parametrize("options", [{}, {"rtol": None, "max_matvecs": 5}])
def test_of_nothing_there_is_nothing(options):
    zero = torch.zeros(4).double()
    for x0 in (None, torch.ones(4).double()):
        found = hf.solve(lambda v: 2 * v, zero, x0=x0, **options)
        assert torch.equal(found.x, zero) and found.residual == 0 and found.converged
    found = hf.solve(lambda v: 0 * v, zero + 1, **options)
    assert torch.equal(found.x, zero) and found.residual == 1 and not found.converged


# Several at once.


@trees
def test_several_right_hand_sides_at_once_under_vmap(form):
    A, like = symmetric(SPECTRA["indefinite"]), LIKES[form]
    flat = torch.stack([B, 0 * B, *gaussian(FLAT, 3)])
    stack = tree.ravel(like)[1](flat)
    found = vmap(lambda b: hf.solve(on(A, like), b, damping=0.1, rtol=None, max_matvecs=N + 1))(stack)
    dense = np.linalg.solve((A + 0.1 * EYE).numpy(), flat.numpy().T).T
    torch.testing.assert_close(vmap(lambda v: tree.ravel(v)[0])(found.x), torch.from_numpy(dense), rtol=1e-8, atol=1e-9)
    assert found.converged.all() and found.residual[1] == 0


def test_several_matrices_and_dampings_at_once_under_vmap():
    stack = torch.stack([symmetric(d, seed) for seed, d in enumerate(SPECTRA.values())])
    dampings = torch.linspace(0.1, 0.7, len(stack)).double()
    found = vmap(lambda A, c: hf.solve(lambda v: A @ v, B, damping=c, rtol=None, max_matvecs=N + 1))(stack, dampings)
    for A, c, x, residual in zip(stack, dampings, found.x, found.residual, strict=True):
        exact = np.linalg.solve((A + c * EYE).numpy(), B.numpy())
        torch.testing.assert_close(x, torch.from_numpy(exact), rtol=1e-8, atol=1e-8)
        assert float(residual) == pytest.approx(relative(A + c * EYE, x), rel=0.5, abs=1e-13)


@pytest.mark.slow
def test_it_compiles_as_a_whole():
    A = symmetric(SPECTRA["indefinite"])

    def solution(b, damping):
        return hf.solve(lambda v: A @ v, b, damping=damping, rtol=None, max_matvecs=12, basis_size=6)

    c = torch.tensor(0.1).double()
    found = torch.compile(solution, fullgraph=True, backend="aot_eager")(B, c)
    torch.testing.assert_close(found.x, solution(B, c).x, rtol=1e-9, atol=1e-9)
    with pytest.raises(Exception, match="pass rtol=None"):
        torch.compile(lambda b: hf.solve(lambda v: A @ v, b).x, fullgraph=True, backend="aot_eager")(B)


# Derivatives.

n = 6
_random = np.random.default_rng(0)
S = torch.from_numpy(_random.standard_normal((n, n)))
S = S + S.T
J = torch.from_numpy(_random.standard_normal((n, 2)))
b0 = torch.from_numpy(_random.standard_normal(n))

MATRICES = {
    "indefinite": lambda t: torch.diag(torch.tensor([3.0, -2, 1, -1, 0.5, 4]).double()) + 0.3 * t * S + t**2 * J @ J.T,
    # The Krylov space ends after 3 steps, and the steps to the solution have another derivative.
    "low rank and a multiple of the identity": lambda t: (
        (J + t * S[:, :2]) @ (J + t * S[:, :2]).T + torch.eye(n).double()
    ),
    "the identity, moved": lambda t: torch.eye(n).double() + (t - 0.7) * S,
}
t0 = torch.tensor(0.7).double()
matrices = pytest.mark.parametrize("name", MATRICES)


def functions(name, num_matvecs=n + 3, **options):
    """Of (t, b, damping) to a number: with the routine, and densely."""
    matrix = MATRICES[name]

    def ours(t, b, damping):
        x = hf.solve(lambda v: matrix(t) @ v, b, damping=damping, rtol=None, max_matvecs=num_matvecs, **options).x
        return (x * torch.sin(x)).sum()

    def dense(t, b, damping):
        x = torch.linalg.solve(matrix(t) + damping * torch.eye(n).double(), b)
        return (x * torch.sin(x)).sum()

    return ours, dense


def all_close(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@matrices
def test_derivatives_are_those_of_the_dense_solution(name):
    ours, dense = functions(name)
    arguments = (t0, b0, torch.tensor(0.2).double())
    wanted = grad(dense, argnums=(0, 1, 2))(*arguments)
    all_close(grad(ours, argnums=(0, 1, 2))(*arguments), wanted)
    all_close(vjp(ours, *arguments)[1](torch.ones(()).double()), wanted)
    live = [x.clone().requires_grad_() for x in arguments]
    ours(*live).backward()
    all_close([x.grad for x in live], wanted)
    tangents = (torch.ones(()).double(), torch.cos(b0), -torch.ones(()).double())
    slope = sum((w * t).sum() for w, t in zip(wanted, tangents, strict=True))
    all_close(jvp(ours, arguments, tangents)[1:], [slope])
    all_close(jacfwd(ours, argnums=(0, 2))(*arguments), [wanted[0], wanted[2]])


@matrices
def test_a_derivative_is_a_difference_of_dense_solutions(name):
    ours, dense = functions(name)
    damping, h = torch.tensor(0.2).double(), 1e-5
    difference = (dense(t0 + h, b0, damping) - dense(t0 - h, b0, damping)) / (2 * h)
    assert float(grad(ours)(t0, b0, damping)) == pytest.approx(float(difference), rel=1e-5, abs=1e-7)


@matrices
def test_derivatives_in_and_around_vmap(name):
    ours, dense = functions(name)
    ts, c = torch.linspace(0.5, 0.7, 3).double(), torch.tensor(0.2).double()
    bs = torch.stack([b0, b0.flip(0), torch.sin(3 * b0)])
    wanted = torch.stack([grad(dense)(t, b, c) for t, b in zip(ts, bs, strict=True)])
    all_close(vmap(grad(ours), (0, 0, None))(ts, bs, c), wanted)
    all_close(grad(lambda ts: vmap(ours, (0, 0, None))(ts, bs, c).sum())(ts), wanted)
    all_close(vmap(lambda t, b: jvp(lambda t: ours(t, b, c), (t,), (c / c,))[1])(ts, bs), wanted)
    all_close(jacrev(lambda ts: vmap(ours, (0, 0, None))(ts, bs, c))(ts).diagonal(), wanted)
    live = ts.clone().requires_grad_()
    vmap(ours, (0, 0, None))(live, bs, c).sum().backward()
    all_close(live.grad, wanted)


def test_a_preconditioner_and_a_start_change_no_derivative():
    options = {"precondition": hf.diagonal_preconditioner(torch.arange(1.0, n + 1).double()), "x0": torch.sin(b0)}
    ours, dense = functions("indefinite", n + 4, **options)
    c = torch.tensor(0.2).double()
    all_close(grad(ours, argnums=(0, 1, 2))(t0, b0, c), grad(dense, argnums=(0, 1, 2))(t0, b0, c))


def test_the_derivative_by_the_parameters_that_the_matrix_is_made_of():
    """Of a network's Hessian, by its parameters, against differences of dense solutions."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    loss, params = hf.functionalize(model, nn.CrossEntropyLoss())
    batch = normal(12, 3).double(), classes(12, 3)
    b, direction = gaussian(params, 2)
    num = tree.numel(params)

    def ours(params):
        x = hf.solve(hf.hvp(loss, params, batch), b, damping=2.0, rtol=None, max_matvecs=num + 2).x
        return tree.dot(x, direction)

    def dense(params):
        flat, back = tree.ravel(params)
        H = torch.autograd.functional.hessian(lambda w: loss(back(w), batch), flat)
        x = np.linalg.solve((H + 2.0 * torch.eye(num).double()).numpy(), tree.ravel(b)[0].numpy())
        return float(torch.from_numpy(x) @ tree.ravel(direction)[0])

    h = 1e-4
    differences = [(dense(tree.add(params, v, h)) - dense(tree.add(params, v, -h))) / (2 * h) for v in (b, direction)]
    found = grad(ours)(params)
    assert [float(tree.dot(found, v)) for v in (b, direction)] == pytest.approx(differences, rel=1e-5)
    live = tree.map(lambda x: x.clone().requires_grad_(), params)
    ours(live).backward()
    for name, leaf in live.items():
        torch.testing.assert_close(leaf.grad, found[name], rtol=1e-8, atol=1e-10)


def test_a_second_derivative_is_refused():
    ours, _ = functions("indefinite")
    c = torch.tensor(0.2).double()
    for second in (grad(grad(ours)), hessian(ours), jacfwd(jacfwd(ours))):
        with pytest.raises(NoDerivative, match="first derivatives"):
            second(t0, b0, c)
    live = t0.clone().requires_grad_()
    with pytest.raises(NoDerivative, match="create_graph"):
        torch.autograd.grad(ours(live, b0, c), live, create_graph=True)
    with pytest.raises(NoDerivative, match="under a transform"):
        grad(ours)(live, b0, c)


def test_a_derivative_out_of_a_vmap_that_is_over_is_refused():
    ours, _ = functions("indefinite")
    pull = vjp(lambda ts: vmap(ours, (0, None, None))(ts, b0, t0), torch.ones(3).double())[1]
    with pytest.raises(NoDerivative, match="that vmap is over"):
        pull(torch.ones(3).double())


def test_with_a_tolerance_there_is_no_derivative_and_no_vmap():
    A = symmetric(SPECTRA["flat"])
    with pytest.raises(ValueError, match="rtol=None"):
        hf.solve(lambda v: A @ v, B.clone().requires_grad_())
    with pytest.raises(ValueError, match="rtol=None"):
        grad(lambda t: hf.solve(lambda v: t * v, B).x.sum())(t0)
    with pytest.raises(ValueError, match="rtol=None"):
        grad(lambda t: hf.solve(lambda v: A @ v, B, damping=t).x.sum())(t0)
    with pytest.raises(ValueError, match="rtol=None"):
        vmap(lambda b: hf.solve(lambda v: A @ v, b))(torch.stack([B, B]))
    with torch.no_grad():
        assert hf.solve(lambda v: A @ v, B.clone().requires_grad_()).converged


# Preconditioners.


def scaled_badly():
    scale = 10.0 ** torch.linspace(-1.5, 1.5, N).double()
    A = symmetric(SPECTRA["flat"])
    return scale[:, None] * A * scale


@dtypes
def test_a_diagonal_mends_a_matrix_whose_entries_are_of_unlike_sizes(dtype):
    A = scaled_badly()
    b, rtol = (A @ B).to(dtype), 1e-4
    matvec = on(A.to(dtype), b)
    plain = hf.solve(matvec, b, rtol=rtol, max_matvecs=600)
    for diagonal in (A.diagonal(), hf.hutchinson_diag(on(A, FLAT), hf.rademacher(FLAT, 50)).mean):
        helped = hf.solve(matvec, b, rtol=rtol, precondition=hf.diagonal_preconditioner(diagonal.to(dtype)))
        assert helped.converged
        assert helped.num_matvecs <= plain.num_matvecs / 2
        assert relative(A, helped.x, b.double()) <= 1.1 * rtol


def test_it_stops_by_the_residual_itself_and_not_by_its_norm_in_the_preconditioner():
    """Where the two are orders of magnitude apart, few products more than the fewest that do."""
    A, rtol = scaled_badly(), 1e-5
    b, precondition = A @ B, hf.diagonal_preconditioner(A.diagonal())
    found = hf.solve(lambda v: A @ v, b, rtol=rtol, precondition=precondition)

    def residual(num):
        return hf.solve(lambda v: A @ v, b, rtol=None, max_matvecs=num, precondition=precondition).residual

    fewest = next(num for num in range(2, 2 * N) if residual(num) <= rtol)
    assert found.converged and found.num_matvecs == fewest


@pytest.mark.parametrize(("sign", "share"), [(1, 0.7), (-1, 0.9)])
def test_eigenpairs_take_the_outliers_out(sign, share):
    """Most where they are of one sign: of both signs they become two clusters, at 1 and -1."""
    A = outliers(sign)
    pairs = hf.eigsh(lambda v: A @ v, WIDE, 20, rtol=1e-4)
    plain = hf.solve(lambda v: A @ v, WIDE, damping=0.1)
    helped = hf.solve(lambda v: A @ v, WIDE, damping=0.1, precondition=hf.spectral_preconditioner(pairs, 0.1))
    assert helped.converged and plain.converged
    assert helped.num_matvecs <= share * plain.num_matvecs
    x = torch.from_numpy(np.linalg.solve((A + 0.1 * torch.eye(400).double()).numpy(), WIDE.numpy()))
    for found in (plain, helped):
        assert relative(A + 0.1 * torch.eye(400).double(), found.x, WIDE) <= 1e-6
        assert (found.x - x).norm() <= 1e-3 * x.norm()


@trees
def test_what_a_preconditioner_is_as_a_matrix(form):
    like = LIKES[form]
    back = tree.ravel(like)[1]
    diagonal = torch.linspace(-2, 2, N).double()
    diagonal[3] = 0
    dense = hf.dense(hf.diagonal_preconditioner(back(diagonal), -0.5), like)
    sizes = diagonal.abs().clamp(min=1e-3 * diagonal.abs().mean())
    torch.testing.assert_close(dense, torch.diag(1 / (sizes + 0.5)))

    A = symmetric(SPECTRA["negative"])
    pairs = hf.eigsh(on(A, like), back(B), 4, rtol=1e-10, max_matvecs=500)
    found = hf.dense(hf.spectral_preconditioner(pairs, 0.5), like)
    values, Q = np.linalg.eigh(A.numpy())
    order = np.argsort(-np.abs(values))
    sizes = np.abs(values[order])
    sizes[4:] = sizes[3]
    exact = (Q[:, order] / (sizes + 0.5)) @ Q[:, order].T
    torch.testing.assert_close(found, torch.from_numpy(exact), rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"rtol": None, "max_matvecs": 10}])
def test_a_preconditioner_that_is_not_positive_definite_is_refused(options):
    A = symmetric(SPECTRA["flat"])
    signs = torch.ones(N).double()
    for negative in (N, 10):  # at once, and later
        signs[:negative] = -1
        with pytest.raises(ValueError, match="not positive definite"):
            hf.solve(lambda v: A @ v, B, precondition=lambda v: signs * v, **options)
        signs[:] = 1


# What is asked of the arguments.


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("max_matvecs=1 must be at least 2", {"max_matvecs": 1}),
        ("max_matvecs=2 must be at least 3", {"max_matvecs": 2, "x0": B}),
        ("give it as max_matvecs", {"rtol": None}),
        ("rtol=0 must be above 0", {"rtol": 0}),
        ("damping=nan must be finite", {"damping": float("nan")}),
        ("not one number", {"damping": torch.ones(2)}),
        ("basis_size=1 must be at least 2", {"basis_size": 1}),
        ("precondition is a tensor", {"precondition": B}),
        ("x0 has shape", {"x0": B[:3]}),
        ("not finite", {"x0": B / 0}),
        ("product 1 of the matvec is not finite", {"damping": 0.0}),
        ("what precondition returns is not finite", {"precondition": lambda v: v / 0}),
    ],
)
def test_an_argument_out_of_range_is_named(words, options):
    with pytest.raises(ValueError, match=words):
        hf.solve(lambda v: v / 0, B, **options)


def test_a_vector_that_is_none_is_named():
    for b, words in ((B * torch.nan, "not finite"), (torch.ones(3) + 1j, "view_as_real"), (torch.arange(3), "int64")):
        with pytest.raises(ValueError, match=words):
            hf.solve(lambda v: v, b)
    estimate = hf.hutchinson_diag(lambda v: v, hf.rademacher(B, 2))
    with pytest.raises(ValueError, match="take the .mean"):
        hf.diagonal_preconditioner(estimate)
    with pytest.raises(ValueError, match="no damping"):
        hf.diagonal_preconditioner(0 * B)
    pairs = hf.EigenPairs(torch.zeros(1), B[None], torch.zeros(1), torch.tensor(1), torch.tensor([True]))
    with pytest.raises(ValueError, match="no damping"):
        hf.spectral_preconditioner(pairs)
    with pytest.raises(ValueError, match="what eigsh"):
        hf.spectral_preconditioner(B)
