"""What people do with it: products and consumers under vmap, under autograd, under torch.compile, in any tree."""

import contextlib
import itertools
import subprocess
import sys
import warnings

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import NETS, classes, conv_net, dense_hessian, normal, problem, seeded
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import hessfn as hf
from hessfn.core import tree


def spectrum_of(matvec, params):
    """All that is made of a quadrature."""
    rule = hf.slq(matvec, hf.gaussian(params, 2), 6)
    grid = torch.linspace(-1, 2, 5).double()
    return (
        hf.trace_of(rule, lambda x: x / (x + 20), tree.numel(params)),
        hf.density(rule, grid, sigma=0.5),
        hf.density_band(rule, grid, sigma=0.5),
        hf.density(rule).values[::100],
        hf.density(rule, linthresh=0.1).values[::100],
        hf.cumulative(rule),
        hf.cumulative(rule, grid),
        hf.wasserstein(rule, grid),
    )


def pairs_of(matvec, params):
    return hf.eigsh(matvec, hf.gaussian(params, 1, seed=4)[0], 2, rtol=None, max_matvecs=10)


def signs(like, num=3):
    return hf.rademacher(like, num)


# Every routine without a tolerance.
CONSUMERS = {
    "power_iter": lambda m, p: hf.power_iter(m, hf.gaussian(p, 1, seed=4)[0], max_matvecs=8, rtol=None),
    "lanczos": lambda m, p: hf.lanczos(m, hf.gaussian(p, 1)[0], 6),
    "eigsh": pairs_of,
    "solve": lambda m, p: hf.solve(m, hf.gaussian(p, 1)[0], damping=2.0, rtol=None, max_matvecs=16),
    "hutchinson": lambda m, p: hf.hutchinson(m, signs(p)),
    "hutchinson_per_leaf": lambda m, p: hf.mean_traces(hf.hutchinson_per_leaf(m, signs(p)), p),
    "hutchinson_diag": lambda m, p: hf.hutchinson_diag(m, signs(p)),
    "squared_row_norms": lambda m, p: hf.squared_row_norms(m, signs(p)),
    "squared_frobenius": lambda m, p: hf.squared_frobenius(m, signs(p)),
    "hutchpp": lambda m, p: hf.hutchpp(m, signs(p, 4)),
    "xtrace": lambda m, p: hf.xtrace(m, signs(p)),
    "xdiag": lambda m, p: hf.xdiag(m, signs(p)),
    "deflated_trace": lambda m, p: hf.deflated_trace(m, signs(p), pairs_of(m, p)),
    "slq": lambda m, p: hf.slq(m, hf.gaussian(p, 2), 6),
    "slq, orthogonalised": lambda m, p: hf.slq(m, hf.gaussian(p, 2), 6, orthogonalize=True),
    "functions of the spectrum": spectrum_of,
}


def values(consume, loss, params, batch):
    """All that comes out, but for counts and flags."""
    result = measured(CONSUMERS[consume](hf.hvp(loss, params, batch), params))
    return [x for x in tree.leaves(result) if x.is_floating_point()]


def measured(result):
    """The result without what nobody has measured (None, or under a transform, which refuses None, NaN) and ``df``."""
    if hasattr(result, "_fields"):
        unknown = ("rounding", "data_stderr", "outside", "least", "df")
        fields = zip(result._fields, result, strict=True)
        return type(result)(*(None if name in unknown else measured(x) for name, x in fields))
    return tuple(map(measured, result)) if isinstance(result, tuple) else result


consumers = pytest.mark.parametrize("consume", CONSUMERS)


@consumers
def test_vmap_over_batches_and_over_models_is_the_loop(consume):
    problems = [problem("layer_norm", seed=s) for s in range(2)]
    loss, _, (x, y), _ = problems[0]
    batches = torch.stack([x, x.flip(0) * 1.5]), torch.stack([y, y.flip(0)])
    params = tree.map(lambda *ps: torch.stack(ps), *[p for _, p, _, _ in problems])
    together = torch.func.vmap(lambda p, b: values(consume, loss, p, b))(params, batches)
    for i in range(2):
        alone = values(consume, loss, *tree.map(lambda leaf: leaf[i], (params, batches)))  # noqa: B023
        for a, b in zip(together, alone, strict=True):
            assert torch.allclose(a[i], b, rtol=1e-8, atol=1e-10)


@consumers
def test_a_result_can_be_differentiated_by_the_parameters(consume):
    loss, params, batch, _ = problem("layer_norm")
    flat, unravel = tree.ravel(params)

    def scalar(p):
        return torch.stack([x.square().mean() for x in values(consume, loss, unravel(p), batch)]).sum()

    gradient = torch.func.grad(scalar)(flat)
    direction = normal(len(flat)) / len(flat) ** 0.5
    h = 1e-4
    difference = (scalar(flat + h * direction) - scalar(flat - h * direction)) / (2 * h)
    assert torch.allclose(gradient @ direction, difference, rtol=1e-4)


@pytest.mark.parametrize("mode", ["auto", "forward", "reverse"])
@pytest.mark.parametrize("norm", ["layer_norm", "batch_norm", "instance_norm", "group_norm", "weight_norm"])
def test_third_derivatives_of_norms_are_right(norm, mode):
    build, shape = {
        "layer_norm": NETS["layer_norm"],
        "batch_norm": NETS["batch_norm"],
        "instance_norm": (lambda: conv_net(nn.InstanceNorm2d(4, affine=True)), (5, 1, 5, 5)),
        "group_norm": NETS["group_norm"],
        "weight_norm": (lambda: nn.Sequential(weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)), (6, 4)),
    }[norm]
    loss, params = hf.functionalize(seeded(build).train(), nn.CrossEntropyLoss())
    batch = (normal(*shape), classes(shape[0], 3))
    v, direction = hf.gaussian(params, 2)

    def curvature(p):
        return tree.dot(v, hf.hvp(loss, p, batch, mode=mode)(v))

    slope = tree.dot(torch.func.grad(curvature)(params), direction)
    h = 1e-5
    difference = (curvature(tree.add(params, direction, h)) - curvature(tree.add(params, direction, -h))) / (2 * h)
    assert torch.allclose(slope, difference, rtol=1e-5)


def test_a_trace_is_a_regulariser_by_plain_autograd():
    loss, params, batch, _ = problem("mlp")
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    estimate = hf.hutchinson(hf.hvp(loss, leaves, batch), hf.rademacher(params, 3))
    (estimate.mean + loss(leaves, batch)).backward()

    def scalar(p):
        return hf.hutchinson(hf.hvp(loss, p, batch), hf.rademacher(params, 3)).mean + loss(p, batch)

    for name, gradient in torch.func.grad(scalar)(params).items():
        assert torch.allclose(leaves[name].grad, gradient, rtol=1e-10)


@pytest.mark.parametrize(("make", "net"), [(hf.hvp, "attention"), (hf.linearized_hvp, "batch_norm")])
def test_products_compile_without_graph_breaks(make, net):
    loss, params, batch, _ = problem(net)
    matvec, v = make(loss, params, batch), hf.gaussian(params, 1)[0]
    compiled = torch.compile(matvec, fullgraph=True, backend="aot_eager")
    assert tree.norm(tree.add(compiled(v), matvec(v), -1.0)) <= 1e-12 * tree.norm(matvec(v))


@pytest.mark.slow
@pytest.mark.parametrize("consume", [name for name in CONSUMERS if name != "functions of the spectrum"])
def test_a_routine_without_a_tolerance_compiles_without_graph_breaks(consume):
    diagonal = torch.linspace(-1, 2, 12).double()
    like = {"a": torch.zeros(2, 3).double(), "b": torch.zeros(6).double()}
    unravel = tree.ravel(like)[1]

    def floats(d):
        result = CONSUMERS[consume](lambda v: unravel(d * tree.ravel(v)[0]), like)
        return [x for x in tree.leaves(result) if x.is_floating_point()]

    torch.compiler.reset()  # of one function it compiles only so many variants
    found = torch.compile(floats, fullgraph=True, backend="aot_eager")(diagonal)
    for a, b in zip(found, floats(diagonal), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_a_routine_compiles_with_the_products_of_a_net():
    loss, params, batch, _ = problem("mlp")

    def values(p):
        matvec, start = hf.hvp(loss, p, batch), hf.gaussian(p, 1)[0]
        trace = hf.hutchinson(matvec, hf.rademacher(p, 3)).mean
        return hf.eigsh(matvec, start, 2, rtol=None, max_matvecs=8).values, trace

    compiled = torch.compile(values, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(params), values(params), strict=True):
        assert torch.allclose(a, b, rtol=1e-9)


REFUSED = """
import torch, hessfn as hf
for consume in (hf.eigsh, hf.power_iter, lambda m, v: hf.hutchinson(m, hf.rademacher(v, 30), rtol=0.1)):
    compiled = torch.compile(lambda v: consume(lambda u: 2 * u, v), fullgraph=True, backend="eager")
    try:
        compiled(torch.ones(3).double())
    except Exception as error:
        assert "torch.compile has not: pass rtol=None" in str(error), error
    else:
        raise SystemExit("it was not refused")
"""


@pytest.mark.slow
def test_a_tolerance_is_refused_within_a_compiled_function():
    # In a process of its own: where a compiler has given up, functions hold their arguments for longer ever after.
    subprocess.run([sys.executable, "-c", REFUSED], check=True, capture_output=True, text=True, timeout=120)


# Within the contexts of torch that change what autograd does.


@contextlib.contextmanager
def anomaly():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Anomaly Detection has been enabled")
        with torch.autograd.set_detect_anomaly(True):
            yield


CONTEXTS = {"anomaly": anomaly, "inference": torch.inference_mode, "no_grad": torch.no_grad}
contexts = pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)


@contexts
@pytest.mark.parametrize("where", ["made", "used", "both"])
def test_products_are_right_within_contexts(context, where):
    inside, outside = context, contextlib.nullcontext
    made, used = {"made": (inside, outside), "used": (outside, inside), "both": (inside, inside)}[where]
    with made():
        loss, params, batch, model = problem("mlp")
        forward, criterion = hf.stateless(model)[0], nn.CrossEntropyLoss()
        modes = ("auto", "traced", "forward", "reverse", "double_backward", "difference")
        matvecs = [hf.hvp(loss, params, batch, mode=mode) for mode in modes]
        matvecs += [hf.linearized_hvp(loss, params, batch), hf.mean_hvp(loss, params, [batch, batch])]
        others = [make(forward, criterion, params, batch) for make in (hf.ggnvp, hf.fvp)]
        v = hf.gaussian(params, 1)[0]
    plain = problem("mlp")
    flat, unravel = tree.ravel(tree.map(torch.clone, v))
    exact = unravel(dense_hessian(*plain[:3]) @ flat)
    with used():
        found = [(matvec(v), matvec(v)) for matvec in matvecs]
        other = [matvec(v) for matvec in others]
    for pair, mode in itertools.zip_longest(found, modes):
        for product in pair:
            rtol = 1e-6 if mode == "difference" else 1e-12
            assert tree.norm(tree.add(product, exact, -1.0)) <= rtol * tree.norm(exact), mode
    for product, make in zip(other, (hf.ggnvp, hf.fvp), strict=True):
        expected = make(hf.stateless(plain[3])[0], criterion, plain[1], plain[2])(v)
        assert tree.norm(tree.add(product, expected, -1.0)) <= 1e-12 * tree.norm(expected)


WITH_TOLERANCE = {
    "eigsh, rtol": lambda m, p: hf.eigsh(m, hf.gaussian(p, 1)[0], 2),
    "power_iter, rtol": lambda m, p: hf.power_iter(m, hf.gaussian(p, 1)[0]),
    "hutchinson, rtol": lambda m, p: hf.hutchinson(m, hf.rademacher(p, 30), rtol=0.3),
    "hutchinson, groups": lambda m, p: hf.hutchinson(m, signs(p, 4), batch_size=2),
    "dense": lambda m, p: hf.dense(m, p, batch_size=16),
    "check_matvec": lambda m, p: hf.check_matvec(m, p),
}


@contexts
@pytest.mark.parametrize("consume", [*CONSUMERS, *WITH_TOLERANCE])
def test_a_routine_is_the_same_within_contexts(consume, context):
    loss, params, batch, _ = problem("layer_norm")
    routine = (CONSUMERS | WITH_TOLERANCE)[consume]
    alone = routine(hf.hvp(loss, params, batch, mode="forward"), params)
    with context():
        within = routine(hf.hvp(loss, params, batch, mode="forward"), params)
    for a, b in zip(tree.leaves(within), tree.leaves(alone), strict=True):
        assert torch.allclose(a.clone().double(), b.double(), rtol=1e-9, atol=1e-12)


@contexts
def test_the_rest_is_the_same_within_contexts(context):
    loss, params, batch, model = problem("layer_norm")
    criterion, v = nn.CrossEntropyLoss(), hf.gaussian(params, 1)[0]

    def rest():
        return [
            hf.line(loss, params, v, [0.0, 1.0], batch),
            hf.gradient_direction(loss, params, batch),
            hf.slice_curvature(loss, params, v, batch).value,
            hf.principal_directions([params, v, tree.scale(2.0, params)]).coordinates,
            hf.sensitivities(model, criterion, [batch], num_probes=2)[:2],
            hf.activation_traces(model, criterion, [batch], ["0"], 2),
            hf.activation_loss(model, criterion, batch, ["0"])[0](
                hf.activation_loss(model, criterion, batch, ["0"])[1]
            ),
        ]

    alone = rest()
    with context():
        within = rest()
        assert hf.find_mode(loss, params, batch).mode == "traced"
    for a, b in zip(tree.leaves(within), tree.leaves(alone), strict=True):
        assert torch.allclose(a.clone().double(), b.double(), rtol=1e-9, atol=1e-12)


def test_a_model_made_in_inference_mode_has_curvature_by_some_of_its_parts():
    with torch.inference_mode():
        _, _, batch, model = problem("mlp")
        loss, params = hf.functionalize(model, nn.CrossEntropyLoss(), params="2.*")
        traces = hf.activation_traces(model, nn.CrossEntropyLoss(), [batch], ["0"], 3).mean
    v = hf.gaussian(params, 1)[0]
    _, _, batch, model = problem("mlp")
    plain, same = hf.functionalize(model, nn.CrossEntropyLoss(), params="2.*")
    flat, unravel = tree.ravel(v)
    exact = unravel(dense_hessian(plain, same, batch) @ flat)
    assert tree.norm(tree.add(hf.hvp(loss, params, batch)(v), exact, -1.0)) <= 1e-12 * tree.norm(exact)
    expected = hf.activation_traces(model, nn.CrossEntropyLoss(), [batch], ["0"], 3).mean
    assert torch.allclose(traces["0"].clone(), expected["0"], rtol=1e-12)


def test_products_in_groups_give_the_same_estimates():
    loss, params, batch, _ = problem("layer_norm")
    matvec = hf.hvp(loss, params, batch)
    signs, normals = hf.rademacher(params, 5), hf.gaussian(params, 5)
    for consume in (
        lambda size: hf.hutchinson(matvec, signs, batch_size=size),
        lambda size: hf.hutchinson_per_leaf(matvec, signs, batch_size=size),
        lambda size: hf.hutchinson_diag(matvec, signs, batch_size=size),
        lambda size: hf.slq(matvec, normals, 8, batch_size=size),
    ):
        alone, grouped = tree.leaves(consume(1)), tree.leaves(consume(2))
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(alone, grouped, strict=True))


def test_vmap_over_vectors_gives_the_whole_hessian():
    loss, params, batch, _ = problem("mlp")
    flat, unravel = tree.ravel(params)
    matvec = hf.hvp(loss, params, batch)
    rows = torch.func.vmap(lambda v: tree.ravel(matvec(unravel(v)))[0])(torch.eye(len(flat)).double())
    assert torch.allclose(rows, dense_hessian(loss, params, batch), atol=1e-12)


@pytest.mark.parametrize(
    "net", ["mlp", "conv", "batch_norm", "group_norm", "layer_norm", "rms_norm", "attention", "lstm"]
)
@pytest.mark.parametrize("criterion", ["cross_entropy", pytest.param("mse", marks=pytest.mark.slow)])
def test_estimates_of_real_losses_agree_with_scipy(net, criterion):
    loss, params, batch, _ = problem(net, criterion)
    exact = scipy.linalg.eigh(dense_hessian(loss, params, batch).numpy(), eigvals_only=True)
    exact = torch.from_numpy(exact)
    matvec = hf.hvp(loss, params, batch)
    v0 = hf.gaussian(params, 1, seed=2)[0]
    wanted = {"LM": exact[exact.abs().argsort(descending=True)][:3], "LA": exact.flip(0)[:3], "SA": exact[:3]}
    for which, values in wanted.items():
        found = hf.eigsh(matvec, v0, 3, which=which, rtol=1e-8)
        assert found.converged.all()
        assert torch.allclose(found.values, values, rtol=1e-8, atol=1e-10 * float(exact.abs().max()))
        assert (found.residuals <= 1e-8 * found.values.abs() * 1.01).all()
    trace = hf.hutchinson(matvec, hf.rademacher(params, 30))
    assert abs(trace.mean - exact.sum()) <= 4 * trace.stderr
    nodes, weights = hf.slq(matvec, hf.gaussian(params, 10), min(40, len(exact)))
    means = (weights * nodes).sum(1) * len(exact)
    assert abs(means.mean() - exact.sum()) <= 4 * means.std() / 10**0.5


@settings(max_examples=25, deadline=None)
@given(
    widths=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    samples=st.integers(1, 4),
    activation=st.sampled_from([nn.Tanh, nn.Softplus, nn.GELU, nn.ReLU, nn.Sigmoid]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    bias=st.booleans(),
    nested=st.booleans(),
    seed=st.integers(0, 50),
)
def test_products_are_right_linear_and_symmetric_for_any_net(widths, samples, activation, dtype, bias, nested, seed):
    layers = [f for a, b in itertools.pairwise(widths) for f in (nn.Linear(a, b, bias=bias), activation())]
    model = seeded(lambda: nn.Sequential(*layers[:-1], nn.Linear(widths[-1], 2)), seed).to(dtype)
    plain, params = hf.functionalize(model, nn.CrossEntropyLoss())
    batch = (normal(samples, widths[0], seed=seed).to(dtype), classes(samples, 2, seed=seed))

    def loss(p, b):
        return plain(dict(p[0]) if nested else p, b)

    params = [params] if nested else params
    v, w = hf.gaussian(params, 2, seed=seed)
    matvec = hf.hvp(loss, params, batch)
    hessian = dense_hessian(loss, params, batch)
    rtol = 1e-10 if dtype == torch.float64 else 1e-3
    scale = rtol * (hessian.norm() * tree.norm(v) * tree.norm(w) + torch.finfo(dtype).tiny)
    assert tree.norm(tree.add(matvec(v), tree.ravel(v)[1](hessian @ tree.ravel(v)[0]), -1.0)) <= scale
    together, apart = matvec(tree.add(v, w, 2.0)), tree.add(matvec(v), matvec(w), 2.0)
    assert tree.norm(tree.add(together, apart, -1.0)) <= scale
    assert abs(tree.dot(v, matvec(w)) - tree.dot(w, matvec(v))) <= scale
