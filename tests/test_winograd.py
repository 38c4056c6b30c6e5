"""Convolutions by tiles are the convolutions, and so are all their derivatives."""

import operator

import pytest
import torch
import torch.nn.functional as F
from graphs import linearized, loss_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import normal, two_convolutions
from torch import nn

import hessfn as hf
from hessfn.core import tree
from hessfn.engine.conv3x3 import winograd

CHANNELS = 32  # the fewest for which tiles are faster


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    monkeypatch.setenv("HESSFN_NATIVE", "0")


@given(st.tuples(*[st.integers(1, 6)] * 3), st.integers(3, 11), st.integers(3, 11), st.integers(0, 2), st.booleans())
@settings(max_examples=40, deadline=None)
def test_tiles_give_the_convolution(sizes, high, wide, padding, with_bias):
    n, inputs, outputs = sizes
    x, weight = normal(n, inputs, high, wide), normal(outputs, inputs, 3, 3)
    bias = normal(outputs) if with_bias else None
    plain = F.conv2d(x, weight, bias, padding=padding)
    torch.testing.assert_close(winograd.convolution(x, weight, bias, padding), plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_products_by_tiles_are_those_of_the_convolution(dtype, close):
    loss, params, x = two_convolutions(CHANNELS, n=6, size=14, dtype=dtype)
    v = tree.map(torch.cos, params)
    assert uses_tiles(loss, params, x)
    exact = hf.hvp(loss, params, x, mode="double_backward")(v)
    for product in (hf.hvp(loss, params, x), hf.linearized_hvp(loss, params, x)):
        for _ in range(2):  # the first product leaves the constants of the second as they were
            assert tree.norm(tree.add(product(v), exact, -1.0)) <= close * tree.norm(exact)
    many = torch.func.vmap(linearized(loss, params, x))(tree.map(lambda t: torch.stack([t, -2 * t]), v))
    assert tree.norm(tree.add(tree.map(lambda t: t[1], many), exact, 2.0)) <= close * tree.norm(exact)


@pytest.mark.parametrize("name", ["first", "second"])
def test_products_may_be_batched_in_some_leaves_only(name):
    loss, params, x = two_convolutions(CHANNELS, n=6, size=14)
    v = tree.map(torch.cos, params)
    many = torch.stack([v[name], -2 * v[name]])
    for product in (hf.hvp(loss, params, x), hf.linearized_hvp(loss, params, x)):
        exact = product({**v, name: many[1]})
        found = torch.func.vmap(lambda part: product({**v, name: part}))(many)  # noqa: B023
        assert tree.norm(tree.add(tree.map(lambda t: t[1], found), exact, -1.0)) <= 1e-12 * tree.norm(exact)


def test_products_by_an_image_go_through_the_tiles_overlaps():
    loss, params, x = two_convolutions(CHANNELS, n=6, size=14)
    shifts = torch.zeros_like(x)
    shifted = lambda shift, p: loss(p, x + shift)  # noqa: E731
    assert uses_tiles(shifted, shifts, params)
    exact = hf.hvp(shifted, shifts, params, mode="double_backward")(x)
    assert tree.norm(hf.hvp(shifted, shifts, params)(x) - exact) <= 1e-10 * tree.norm(exact)


def test_tiles_are_cut_in_groups_that_share_the_images_evenly():
    groups = winograd.groups_of(images=128, tiles=16, inputs=32, outputs=32, size=4)
    assert groups > 1 and 128 % groups == 0
    loss, params, x = two_convolutions(CHANNELS, n=24, size=16)
    assert winograd.groups_of(24, 16, CHANNELS, CHANNELS, 8) > 1
    exact = hf.hvp(loss, params, x, mode="double_backward")(params)
    assert tree.norm(tree.add(hf.linearized_hvp(loss, params, x)(params), exact, -1.0)) <= 1e-10 * tree.norm(exact)


@pytest.mark.parametrize(
    "options",
    [{"stride": 2}, {"dilation": 2}, {"groups": 2}, {"kernel_size": 5}, {"padding": (1, 0)}, {"out_channels": 8}],
    ids=lambda options: next(iter(options)),
)
def test_other_convolutions_stay_what_they_are(options):
    module = nn.Conv2d(**{"in_channels": CHANNELS, "out_channels": CHANNELS, "kernel_size": 3, "padding": 1, **options})
    loss, params = hf.functionalize(module.double(), nn.MSELoss())
    x = normal(8, CHANNELS, 16, 16)
    assert not uses_tiles(loss, params, (x, torch.zeros_like(module(x).detach())))


@pytest.mark.parametrize("shape", [(2, 3, 10, 14), (2, 2, 10, 13, 1), (2, 2, 10, 14, 3)])
def test_a_models_own_overlapping_pieces_are_added_up_too(shape):
    def loss(w):
        return w.unfold(2, 6, 4).unfold(3, 6, 4).pow(3).sum()

    w = normal(*shape)
    v = w.cos()
    exact = hf.hvp(loss, w, mode="double_backward")(v)
    torch.testing.assert_close(hf.hvp(loss, w)(v), exact, rtol=1e-10, atol=0.0)


def test_convolutions_right_behind_a_batch_norm_go_by_tiles_too():
    module = nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)).double().eval()
    loss, params = hf.functionalize(module, nn.MSELoss())
    x = normal(4, CHANNELS, 16, 16)
    assert uses_tiles(loss, params, (x, x.tanh()))


def uses_tiles(loss, params, x):
    nodes = loss_graph(loss, params, x).graph.find_nodes(op="call_function", target=winograd.convolution)
    return operator.truth(nodes)
