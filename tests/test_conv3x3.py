"""Convolutions in machine code are the convolutions, and a graph that takes them stays the same function."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from graphs import folded_graph, loss_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import needs_compiler, normal, two_convolutions
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import hessfn as hf
from hessfn.core import tree
from hessfn.engine.conv3x3 import kernel, lowering, operations, winograd

pytestmark = needs_compiler

ops = torch.ops.hessfn
channels = st.sampled_from([8, 16, 24, 40])
sizes = st.tuples(st.integers(1, 3), channels, channels, st.integers(3, 13), st.integers(3, 13), st.integers(0, 2))


@pytest.fixture(autouse=True)
def native(monkeypatch):
    monkeypatch.delenv("HESSFN_NATIVE", raising=False)


@pytest.fixture(params=[1, 3])
def threads(request, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)


def assert_float32(found, exact):
    error = torch.linalg.vector_norm(found.double() - exact)
    assert error <= 1e-5 * torch.linalg.vector_norm(exact)


@pytest.mark.usefixtures("threads")
@settings(max_examples=40, deadline=None)
@given(sizes, st.integers(1, 3), st.booleans(), st.booleans())
def test_convolutions_are_summed(sizes, count, with_bias, channels_last):
    n, inputs, outputs, high, wide, padding = sizes
    xs = [normal(n, inputs, high, wide, seed=i) for i in range(count)]
    weights = [normal(outputs, inputs, 3, 3, seed=9 + i) for i in range(count)]
    bias = normal(outputs) if with_bias else None
    exact = sum(F.conv2d(x, w, padding=padding) for x, w in zip(xs, weights, strict=True))
    exact = exact if bias is None else exact + bias[:, None, None]
    images = [x.float().to(memory_format=torch.channels_last) if channels_last else x.float() for x in xs]
    shift = None if bias is None else bias.float()
    found = operations.convolutions(images, [w.float() for w in weights], shift, padding, False)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert_float32(found, exact)


@pytest.mark.usefixtures("threads")
@settings(max_examples=30, deadline=None)
@given(sizes, st.booleans())
def test_derivatives_by_images_and_by_kernels(sizes, channels_last):
    n, inputs, outputs, high, wide, padding = sizes
    x = normal(n, inputs, high, wide).requires_grad_()
    weight = normal(outputs, inputs, 3, 3, seed=1).requires_grad_()
    y = F.conv2d(x, weight, padding=padding)
    change = y.detach().cos()
    by_image, by_kernel = torch.autograd.grad(y, (x, weight), change)
    single = [t.detach().float() for t in (x, weight, change)]
    assert_float32(operations.convolutions([single[2]], [single[1]], None, 2 - padding, True), by_image)
    twice = operations.correlations([single[0]] * 2, [single[2]] * 2, padding, channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert twice.is_contiguous(memory_format=layout)
    assert_float32(twice, 2 * by_kernel)


def test_the_operations_say_what_they_return():
    x, weight = normal(2, 8, 5, 6).float(), normal(16, 8, 3, 3).float()
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.convolutions.default, ([x], [weight], None, 1, False), test_utils=checks)
    y = operations.convolutions([x], [weight], None, 0, False)
    torch.library.opcheck(ops.correlations.default, ([x], [y], 0, True), test_utils=checks)


def test_no_image_is_written_to():
    x, weight = normal(1, 8, 4, 4).float(), normal(8, 8, 3, 3).float()
    before = x.clone(), weight.clone()
    operations.correlations([x], [operations.convolutions([x], [weight], None, 1, True)], 1, True)
    assert torch.equal(x, before[0]) and torch.equal(weight, before[1])


def test_a_graph_with_them_is_the_same_function():
    module, v = linear_graph(*net())
    faster = lowering.lower_to_kernel(module)
    with torch.no_grad():
        plain, found = module(*v), faster(*v)
    for a, b in zip(plain, found, strict=True):
        assert a.shape == b.shape and a.stride() == b.stride()
        assert torch.linalg.vector_norm(a - b) <= 1e-4 * torch.linalg.vector_norm(a)
    # Of the first, only the kernel changes, and nothing is derived by its image; of the second, both factors do.
    assert counts(faster) == {"convolutions": [1, 2, 2], "correlations": [1, 2]}


@pytest.mark.parametrize("make", [hf.hvp, hf.linearized_hvp, partial(hf.linearized_hvp, compile=True)])
def test_products_are_those_of_the_convolutions(make):
    loss, params, x = net()
    v = hf.gaussian(params, 1)[0]
    exact = hf.hvp(*net(torch.float64), mode="double_backward")(tree.map(torch.Tensor.double, v))
    matvec = make(loss, params, x)
    for _ in range(2):  # the first product leaves what the second needs
        assert_same(matvec(v), exact)


@pytest.mark.parametrize("make", [hf.hvp, hf.linearized_hvp])
def test_products_can_be_batched(make):
    loss, params, x = net()
    v = tree.map(torch.cos, params)
    matvec = make(loss, params, x)
    many = torch.func.vmap(matvec)(tree.map(lambda t: torch.stack([t, -2 * t]), v))
    assert_same(tree.map(lambda t: t[1] / -2, many), matvec(v))


@pytest.mark.parametrize("make", [hf.hvp, hf.linearized_hvp])
def test_products_can_be_traced(make):
    loss, params, x = net()
    matvec = make(loss, params, x)
    traced = make_fx(matvec)(tree.map(torch.cos, params))
    assert_same(traced(params), matvec(params))


def test_products_can_be_differentiated():
    found, exact = [], []
    for thirds, mode, (loss, params, x) in ((found, "auto", net()), (exact, "forward", net(torch.float64))):
        point = tree.map(lambda t: t.clone().requires_grad_(), params)
        v = tree.map(lambda t: t.cos().requires_grad_(), params)
        product = tree.dot(hf.hvp(loss, point, x, mode=mode)(v), tree.map(torch.sin, params))
        thirds.extend(torch.autograd.grad(product, [*tree.leaves(point), *tree.leaves(v)]))
    assert_same(found, exact)


@pytest.mark.parametrize(
    "options",
    [{"stride": 2}, {"dilation": 2}, {"groups": 2}, {"kernel_size": 5}, {"padding": 3}, {"padding": (1, 0)},
     {"out_channels": 8}, {"out_channels": 20}, {"out_channels": 136}, {"dtype": torch.float64}],
    ids=lambda options: "-".join(map(str, options.items())),
)  # fmt: skip
def test_other_convolutions_stay_what_they_are(options):
    layer = nn.Conv2d(**{"in_channels": 16, "out_channels": 16, "kernel_size": 3, "padding": 1, **options})
    loss, params = hf.functionalize(layer, nn.MSELoss())
    x = normal(8, 16, 16, 16).to(layer.weight.dtype)
    module, _ = linear_graph(loss, params, (x, torch.zeros_like(layer(x).detach())))
    assert counts(lowering.lower_to_kernel(module)) == {"convolutions": [], "correlations": []}


def test_few_tiles_and_small_images_stay_what_they_are():
    for n, size in ((3, 16), (64, 5)):
        module, _ = linear_graph(*net(n=n, size=size))
        assert counts(lowering.lower_to_kernel(module)) == {"convolutions": [], "correlations": []}


def test_switched_off_nothing_changes(monkeypatch):
    monkeypatch.setenv("HESSFN_NATIVE", "0")
    loss, params, x = net(channels=32)
    assert winograd.convolution in {node.target for node in loss_graph(loss, params, x).graph.nodes}
    monkeypatch.delenv("HESSFN_NATIVE")
    module, _ = linear_graph(loss, params, x)
    assert winograd.convolution not in {node.target for node in loss_graph(loss, params, x).graph.nodes}
    monkeypatch.setenv("HESSFN_NATIVE", "0")
    assert lowering.lower_to_kernel(module).code == module.code


@pytest.mark.parametrize("make", [hf.hvp, hf.linearized_hvp, partial(hf.linearized_hvp, compile=True)])
def test_switched_off_later_products_stay_what_they_are(make, monkeypatch):
    loss, params, x = net()
    v = hf.gaussian(params, 1)[0]
    matvec = make(loss, params, x)
    before = matvec(v)
    monkeypatch.setenv("HESSFN_NATIVE", "0")
    assert_same(matvec(v), tree.map(torch.Tensor.double, before))


def test_missing_memory_is_said(monkeypatch):
    class Full:
        def convolve(self, *_):
            return 0

    monkeypatch.setattr(kernel.KERNEL, "library", Full)
    with pytest.raises(MemoryError, match="8 and 8 channels"):
        operations.convolutions([torch.ones(1, 8, 4, 4)], [torch.ones(8, 8, 3, 3)], None, 1, False)


def assert_same(found, exact):
    error = tree.norm(tree.add(tree.map(torch.Tensor.double, found), exact, -1.0))
    assert error <= 1e-5 * tree.norm(exact)


def net(dtype=torch.float32, channels=16, n=8, size=14):
    return two_convolutions(channels, n, size, dtype)


def linear_graph(loss, params, x):
    return folded_graph(loss, params, x), [p.cos() for p in tree.leaves(params)]


def counts(module):
    """How many pairs each operation has."""
    nodes = {name: getattr(operations, name) for name in ("convolutions", "correlations")}
    return {
        name: sorted(len(node.args[0]) for node in module.graph.find_nodes(op="call_function", target=target))
        for name, target in nodes.items()
    }
