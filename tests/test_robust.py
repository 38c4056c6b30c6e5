"""Bad numbers, extreme scales, degenerate trees, threads: the right answer, or an error that says what and where."""

import sys
import threading
import warnings
from contextlib import nullcontext

import pytest
import torch
from nets import normal, problem
from spectra import symmetric
from torch import nn
from torch.nn.attention import _cur_sdpa_kernel_backends
from torch.utils.data import DataLoader, TensorDataset

import hessfn as hf
from hessfn.core import tree
from hessfn.reporting.run import report

N = 24
MATRIX = symmetric(torch.linspace(-1, 1.3, N).double() ** 3)
LIKE = {"w": torch.zeros(4, 5), "b": torch.zeros(N - 20)}


def on(matrix, like):
    unravel = tree.ravel(like)[1]
    return lambda v: unravel(matrix @ tree.ravel(v)[0])


def start(like):
    return hf.gaussian(like, 1, seed=3)[0]


def signs(like, num=6):
    return hf.rademacher(like, num, seed=1)


# Each gives numbers that grow as some power of the matrix.
CONSUMERS = {
    "power_iter": (lambda A, x: hf.power_iter(A, start(x), max_matvecs=30)[:3:2], 1),
    "power_iter, fixed": (lambda A, x: hf.power_iter(A, start(x), max_matvecs=9, rtol=None)[:3:2], 1),
    "lanczos": (lambda A, x: hf.lanczos(A, start(x), 8)[:2], 1),
    "eigsh": (lambda A, x: hf.eigsh(A, start(x), 3, basis_size=8).values, 1),
    "eigsh, fixed": (lambda A, x: hf.eigsh(A, start(x), 3, rtol=None, max_matvecs=12)[:3:2], 1),
    "eigsh of a deflated matrix": (
        lambda A, x: hf.eigsh(hf.deflate(A, hf.eigsh(A, start(x), 2, rtol=1e-5).vectors), start(x), 1).values,
        1,
    ),
    "solve": (lambda A, x: hf.solve(A, start(x), rtol=1e-3).x, -1),
    "solve, fixed": (lambda A, x: hf.solve(A, start(x), rtol=None, max_matvecs=9).x, -1),
    "hutchinson": (lambda A, x: hf.hutchinson(A, signs(x))[:2], 1),
    "hutchinson, rtol": (lambda A, x: hf.hutchinson(A, signs(x, 30), rtol=0.5)[:2], 1),
    "hutchinson_per_leaf": (lambda A, x: hf.hutchinson_per_leaf(A, signs(x))[:2], 1),
    "hutchinson_diag": (lambda A, x: hf.hutchinson_diag(A, signs(x))[:2], 1),
    "hutchpp": (lambda A, x: hf.hutchpp(A, signs(x))[:2], 1),
    "xtrace": (lambda A, x: hf.xtrace(A, signs(x))[:2], 1),
    "xdiag": (lambda A, x: hf.xdiag(A, signs(x))[:2], 1),
    "deflated_trace": (lambda A, x: hf.deflated_trace(A, signs(x), hf.eigsh(A, start(x), 2))[:2], 1),
    "squared_row_norms": (lambda A, x: hf.squared_row_norms(A, signs(x))[:2], 2),
    "squared_frobenius": (lambda A, x: hf.squared_frobenius(A, signs(x))[:2], 2),
    "slq": (lambda A, x: hf.slq(A, hf.gaussian(x, 2), 8).nodes, 1),
    "slq, orthogonal": (lambda A, x: hf.slq(A, hf.gaussian(x, 2), 8, orthogonalize=True).nodes, 1),
    "trace_of": (lambda A, x: hf.trace_of(hf.slq(A, hf.gaussian(x, 2), 8), torch.abs, N)[:2], 1),
    "density": (lambda A, x: hf.density(hf.slq(A, hf.gaussian(x, 2), 8)).values, -1),
    "density_band": (lambda A, x: hf.density_band(hf.slq(A, hf.gaussian(x, 2), 8)).upper, -1),
    "cumulative": (lambda A, x: hf.cumulative(hf.slq(A, hf.gaussian(x, 2), 8)).values, 0),
    "wasserstein": (lambda A, x: hf.wasserstein(*(hf.slq(A, hf.gaussian(x, 1, seed=s), 8) for s in (0, 1))), 1),
    "dense": (lambda A, x: hf.dense(A, x), 1),
}


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])  # 8e-31 and 1e30, and no other rounding
@pytest.mark.parametrize("name", CONSUMERS)
def test_a_scaled_float32_matrix_gives_scaled_results(name, scale):
    consume, power = CONSUMERS[name]
    matrix = MATRIX.float()
    plain, scaled = (tree.leaves(consume(on(c * matrix, LIKE), LIKE)) for c in (1.0, scale))
    for a, b in zip(plain, scaled, strict=True):
        assert b.isfinite().all()
        assert torch.allclose(
            a.double(), b.double() * float(scale) ** -power, rtol=1e-3, atol=1e-5 * float(a.abs().max())
        )
    hf.check_matvec(on(scale * matrix, LIKE), LIKE)


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
def test_starting_vectors_and_losses_of_any_size_will_do(scale):
    pair = hf.eigsh(on(MATRIX.float(), LIKE), tree.scale(scale, start(LIKE)), 1)
    assert torch.allclose(pair.values, hf.eigsh(on(MATRIX.float(), LIKE), start(LIKE), 1).values)
    w = torch.tensor([1.0, 2.0])
    for mode in ("traced", "forward", "reverse", "double_backward", "difference"):
        product = hf.hvp(lambda w: scale * (w**3).sum(), w, mode=mode)(torch.ones(2))
        assert torch.allclose(product.double() / scale, torch.tensor([6.0, 12.0]).double(), rtol=1e-3)


# Numbers that are not finite


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "consume",
    [
        lambda A, x: hf.power_iter(A, start(x)),
        lambda A, x: hf.eigsh(A, start(x), 2),
        lambda A, x: hf.hutchinson(A, signs(x), rtol=0.1),
        lambda A, x: hf.deflated_trace(A, signs(x), hf.eigsh(on(MATRIX.float(), x), start(x)), rtol=0.1),
        lambda A, x: hf.hutchpp(A, signs(x)),
        lambda A, x: hf.xtrace(A, signs(x)),
        lambda A, x: hf.xdiag(A, signs(x)),
        lambda A, x: hf.check_matvec(A, x),
    ],
)
def test_a_product_that_is_not_finite_is_named_with_its_leaf(consume, bad):
    def broken(v):
        return {"w": 2 * v["w"], "b": torch.where(torch.arange(N - 20) == 1, bad, v["b"])}

    with pytest.raises(ValueError, match=r"product.* is not finite in leaf 'b': are the loss and its curvature finite"):
        consume(broken, LIKE)


def test_fixed_numbers_of_products_say_which_one_is_not_finite():
    count = 0

    def third_is_bad(v):
        nonlocal count
        count += 1
        return tree.scale(torch.nan if count == 3 else 2.0, tree.add(v, LIKE | {"b": v["b"]}))

    for consume in (
        lambda A: hf.slq(A, hf.gaussian(LIKE, 1), 5),
        lambda A: hf.eigsh(A, start(LIKE), rtol=None, max_matvecs=5),
        lambda A: hf.hutchinson(A, signs(LIKE)),
        lambda A: hf.power_iter(A, start(LIKE), max_matvecs=4, rtol=None),
    ):
        count = 0
        with pytest.raises(ValueError, match="product 3 of the matvec is not finite"):
            consume(third_is_bad)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_the_batch_is_named(bad):
    loss, params, (x, y), _ = problem("mlp")
    batches = [(x, y), (x + 1, y), (torch.full_like(x, bad), y)]  # the first product traces, the third one fails
    with pytest.raises(
        ValueError, match=r"batch 2: the product is not finite in leaf '0.weight' and 3 more of 4 leaves"
    ):
        hf.mean_hvp(loss, params, batches)(hf.gaussian(params, 1)[0])
    with pytest.raises(ValueError, match="batch 0: the loss is nan at these parameters"):
        hf.mean_hvp(loss, params, batches[::-1])(hf.gaussian(params, 1)[0])


def test_a_finite_loss_may_have_a_gradient_that_is_not():
    params = {"a": torch.zeros(2), "b": torch.ones(2)}

    def loss(p):
        return p["a"].sqrt().sum() + p["b"].square().sum()

    with pytest.raises(ValueError, match="the direction is not finite in leaf 'a'"):
        hf.gradient_direction(loss, params)
    with pytest.raises(ValueError, match="its curvature is not, in leaf 'a'"):
        hf.eigsh(hf.hvp(loss, params), start(params))
    with pytest.raises(ValueError, match="product 1 of the matvec is not finite in leaf 'a'"):
        hf.eigsh(hf.hvp(loss, params, check=False), start(params))


def test_a_report_names_the_batch_whose_gradient_is_not_finite(tmp_path):
    class Steep(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.z = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return x[:, :3] @ self.w.tanh() + x[:, 3] * (1e25 * self.z)

    batches = [(torch.ones(2, 4), torch.zeros(2)), (torch.tensor([[1.0, 1.0, 1.0, 1e25]]), torch.zeros(1))]
    small = {"k": 1, "num_probes": 2, "num_runs": 1, "num_steps": 2, "num_plane_points": 0, "num_activation_probes": 0}
    with pytest.raises(ValueError, match="batch 1: the gradient is not finite in leaf 'z'"):
        report((Steep(), lambda outputs, _: outputs.mean(), batches), tmp_path, **small)


def test_what_float16_cannot_hold_is_said():
    like = {"w": torch.zeros(6, dtype=torch.float16)}
    with pytest.raises(ValueError, match="leaf 'w': float16 ends at 65504, take float32"):
        hf.eigsh(lambda v: tree.scale(1e5, v), start(like))
    assert torch.allclose(
        hf.eigsh(lambda v: tree.scale(1e4, v), start(like)).values, torch.tensor(1e4).double(), rtol=1e-3
    )


# Degenerate models


@pytest.mark.parametrize("make", [hf.hvp, hf.linearized_hvp])
def test_empty_layers_and_scalars_are_leaves_like_others(make):
    params = {"none": torch.zeros(0, 3).double(), "scalar": torch.tensor(0.5).double(), "w": normal(3)}

    def loss(p):
        return (p["scalar"] * p["w"]).tanh().square().sum() + p["none"].sum()

    matvec = make(loss, params)
    hessian = hf.dense(matvec, params)
    values = torch.linalg.eigvalsh(hessian)
    assert torch.allclose(hessian, hessian.T, rtol=1e-12) and hessian.shape == (4, 4)
    assert torch.allclose(hf.eigsh(matvec, start(params), 4, which="SA").values, values)
    layers = hf.hutchinson_per_leaf(matvec, signs(params, 2))
    assert layers.mean["none"] == 0 and hf.mean_traces(layers, params).mean["none"] == 0
    assert hf.hutchinson_diag(matvec, signs(params, 2)).mean["none"].shape == (0, 3)
    assert hf.slq(matvec, hf.gaussian(params, 2), 4).nodes.shape == (2, 4)
    assert hf.line(loss, params, hf.random_direction(params), [0.0]).isfinite().all()
    assert torch.equal(hf.filter_normalized(params, params)["w"], torch.zeros(3).double())
    hf.check_matvec(matvec, params)


def test_a_model_of_empty_layers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has nothing to initialise
        model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 0), nn.Linear(0, 1)).double()
    loss, params = hf.functionalize(model, nn.MSELoss())
    batch = (normal(4, 2), normal(4, 1))
    for matvec in (hf.hvp(loss, params, batch), hf.linearized_hvp(loss, params, batch)):
        assert torch.allclose(hf.eigsh(matvec, start(params)).values, torch.tensor(2.0).double())  # by the last bias


@pytest.mark.parametrize("n", [1, 2])
def test_models_of_one_and_two_parameters(n):
    params = {"w": torch.arange(1.0, n + 1).double()}
    matvec = hf.hvp(lambda p: (p["w"] ** 3).sum() / 6, params)  # diag(w)
    exact = params["w"].flip(0)
    assert torch.allclose(hf.eigsh(matvec, start(params), n).values, exact)
    assert torch.allclose(hf.eigsh(matvec, start(params), n, which="BE").values, exact.flip(0))
    assert torch.allclose(hf.eigsh(matvec, start(params), n, rtol=None, max_matvecs=n).values, exact)
    assert torch.allclose(hf.power_iter(matvec, start(params)).value, exact[0], rtol=1e-5)
    assert torch.allclose(hf.slq(matvec, hf.gaussian(params, 1), n).nodes[0], exact.flip(0))
    assert torch.allclose(hf.hutchinson(matvec, signs(params)).mean, exact.sum())
    few = pytest.raises(ValueError, match="2 probes for 1 entries: dense") if n == 1 else nullcontext()
    with few:
        assert hf.hutchpp(matvec, hf.gaussian(params, 2)).mean.isfinite()
    with few:
        assert torch.allclose(hf.xtrace(matvec, hf.gaussian(params, 2)).mean, exact.sum())
    with few:
        assert hf.xdiag(matvec, signs(params, 2)).mean["w"].isfinite().all()


def test_no_parameters_is_an_error():
    with pytest.raises(ValueError, match="the model has: none"):
        hf.functionalize(nn.ReLU(), nn.MSELoss())
    for empty in ({}, {"none": torch.zeros(0)}):
        for call in (
            lambda x: hf.hvp(lambda p: torch.ones(()), x)(x),
            lambda x: hf.mean_hvp(lambda p, b: torch.ones(()), x, [torch.ones(2)])(x),
            lambda x: hf.gaussian(x, 1),
            lambda x: hf.rademacher(x, 1),
        ):
            with pytest.raises(ValueError, match="no entries"):
                call(empty)
        for call in (
            lambda x: hf.eigsh(lambda v: v, x),
            lambda x: hf.power_iter(lambda v: v, x),
            lambda x: hf.lanczos(lambda v: v, x, 1),
            lambda x: hf.slq(lambda v: v, [x], 1),
        ):
            with pytest.raises(ValueError, match="no entries|between 1 and 0"):
                call(empty)


def test_the_zero_matrix():
    def zero(v):
        return tree.scale(0.0, v)

    eig = hf.eigsh(zero, start(LIKE), 3)
    assert eig.converged.all() and (eig.values == 0).all() and (eig.residuals == 0).all()
    assert hf.power_iter(zero, start(LIKE)).converged
    for estimate in (
        hf.hutchinson(zero, signs(LIKE, 20), rtol=1e-3),
        hf.hutchpp(zero, signs(LIKE)),
        hf.xtrace(zero, signs(LIKE)),
        hf.deflated_trace(zero, signs(LIKE), eig),
    ):
        assert estimate.mean == estimate.stderr == 0
    for estimate in (hf.hutchinson_diag(zero, signs(LIKE)), hf.xdiag(zero, signs(LIKE))):
        assert all((leaf == 0).all() for leaf in tree.leaves(estimate[:2]))
    rule = hf.slq(zero, hf.gaussian(LIKE, 2), 5)
    assert (rule.nodes == 0).all()
    assert torch.allclose(rule.weights.sum(1), torch.ones(2).double())
    x, y = hf.density(rule)
    assert torch.allclose(torch.trapezoid(y, x), torch.tensor(1.0).double(), rtol=1e-6)
    hf.check_matvec(zero, LIKE)


def test_a_loss_without_curvature_has_the_zero_hessian_in_every_mode():
    w = {"w": normal(3)}
    for mode in ("traced", "forward", "reverse", "double_backward"):
        assert (hf.hvp(lambda p: p["w"].sum(), w, mode=mode)(w)["w"] == 0).all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says how large its error is
        assert (hf.hvp(lambda p: (0 * p["w"]).sum(), w, mode="difference")(w)["w"] == 0).all()
    assert (hf.linearized_hvp(lambda p: p["w"].sum(), w)(w)["w"] == 0).all()


# Threads


@pytest.mark.parametrize("mode", ["traced", "forward", "linearized", "mean", "activation"])
def test_two_threads_with_one_model_get_the_right_answers(mode):
    loss, params, batch, model = problem("attention")
    if mode == "activation":
        of_shifts, params = hf.activation_loss(model, nn.CrossEntropyLoss(), batch, nn.Linear)
    vectors = hf.gaussian(params, 3)

    def products():
        if mode == "mean":
            matvec = hf.mean_hvp(loss, params, DataLoader(TensorDataset(*batch), batch_size=3))
        elif mode == "linearized":
            matvec = hf.linearized_hvp(loss, params, batch)
        elif mode == "activation":
            matvec = hf.hvp(of_shifts, params)
        else:
            matvec = hf.hvp(loss, params, batch, mode=mode)
        return [matvec(v) for v in vectors]

    exact, found, together = products(), [], threading.Barrier(2)
    kernels, onednn = _cur_sdpa_kernel_backends(), torch._C._get_mkldnn_enabled()

    def work():
        together.wait()
        found.extend([products(), products()])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(found) == 4
    for result in found:
        for a, b in zip(result, exact, strict=True):
            assert tree.norm(tree.add(a, b, -1.0)) <= 1e-12 * tree.norm(b)
    assert (kernels, onednn) == (_cur_sdpa_kernel_backends(), torch._C._get_mkldnn_enabled())


@pytest.mark.parametrize("values", [[1.0] * 5, [0.0] * 5, [0.0, 0.0, 1.0, 1.0, 1.0]])
@pytest.mark.parametrize("orthogonalize", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_function_of_a_matrix_with_repeated_eigenvalues_can_be_differentiated(values, orthogonalize, seed):
    direction = symmetric(torch.arange(5.0))
    matrix = torch.diag(torch.tensor(values)).double()
    probes = hf.gaussian(torch.zeros(5).double(), 3, seed=seed)

    def total(t):
        rule = hf.slq(lambda v: (matrix + t * direction) @ v, probes, 4, orthogonalize=orthogonalize)
        return hf.trace_of(rule, torch.square, 5).mean

    zero, h = torch.tensor(0.0).double(), 1e-4
    slope = (total(zero + h) - total(zero - h)) / (2 * h)
    assert torch.func.grad(total)(zero).isfinite()
    if len(set(values)) == 1:  # else other nodes come up beside 0 and 1
        assert torch.allclose(torch.func.grad(total)(zero), slope, atol=1e-6)
