"""Where results go changes no number, no earlier result and nothing of the caller's."""

from threading import Thread

import pytest
import torch
from graphs import linear_graph, linearized
from hypothesis import given
from hypothesis import strategies as st
from nets import classes, normal, seeded
from torch import Tensor, nn
from torch.func import vmap

import hessfn as hf
from hessfn.core import tree
from hessfn.engine import heap, memory_plan, pipeline


def convolutions():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AvgPool2d(4), nn.Flatten(), nn.Linear(8 * 4, 5),
    )  # fmt: skip
    return net, normal(6, 3, 8, 8)


def transformer():
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(8 * 7, 5)), normal(6, 7, 8)


def perceptron():
    return nn.Sequential(nn.Linear(4, 9), nn.SiLU(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 5)), normal(6, 4)


@pytest.fixture(params=[convolutions, transformer, perceptron])
def loss_and_params(request):
    return problem(request.param)


def problem(net):
    model, batch = seeded(lambda: net()[0]).double().eval(), (net()[1].double(), classes(6, 5))
    loss, params = hf.functionalize(model, nn.CrossEntropyLoss())
    return lambda p: loss(p, batch), params


def with_places(loss, params, at_least=1):
    """How many results of a product have a place that is kept."""
    module = linear_graph(loss, params, at_least=at_least)
    return sum(name.startswith("place_of") for name, _ in module.named_buffers())


def test_products_are_those_by_double_backward_again_and_again(loss_and_params):
    loss, params = loss_and_params
    matvec, exact = linearized(loss, params), hf.hvp(loss, params, mode="double_backward")
    assert with_places(loss, params) > 10
    probes = list(hf.gaussian(params, 3))
    wanted = [exact(v) for v in probes]
    found = [matvec(v) for v in probes]  # the later ones must leave the earlier ones alone
    for f, w in zip(found, wanted, strict=True):
        assert tree.norm(tree.add(f, w, -1.0)) < 1e-12 * tree.norm(w)


def test_the_vector_stays_what_it_is(loss_and_params):
    loss, params = loss_and_params
    v = hf.gaussian(params, 1)[0]
    before = tree.map(torch.clone, v)
    linearized(loss, params)(v)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(v), tree.leaves(before), strict=True))


def test_threads_do_not_write_over_each_other():
    model, batch = (
        seeded(lambda: nn.Sequential(nn.Linear(40, 90), nn.Tanh(), nn.Linear(90, 5))),
        (normal(400, 40), classes(400, 5)),
    )
    loss, params = hf.functionalize(model, nn.CrossEntropyLoss())
    assert with_places(lambda p: loss(p, batch), params, at_least=1 << 16)  # as users get it
    matvec = hf.linearized_hvp(loss, params, batch)
    probes = list(hf.gaussian(params, 4))
    alone = [matvec(v) for v in probes]
    equal = []

    def again(v, wanted):
        for _ in range(50):
            found = tree.leaves(matvec(v))
            equal.append(all(torch.equal(f, w) for f, w in zip(found, tree.leaves(wanted), strict=True)))

    threads = [Thread(target=again, args=pair) for pair in zip(probes, alone, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(equal) == 200
    assert all(equal)


def test_under_vmap_every_result_has_its_own_place(loss_and_params):
    loss, params = loss_and_params
    matvec = linearized(loss, params)
    probes = list(hf.gaussian(params, 3))
    together = vmap(matvec)(tree.map(lambda *leaves: torch.stack(leaves), *probes))
    for i, v in enumerate(probes):
        one = tree.map(lambda leaf, i=i: leaf[i], together)
        wanted = matvec(v)
        assert tree.norm(tree.add(one, wanted, -1.0)) < 1e-12 * tree.norm(wanted)


def test_what_is_small_is_allocated_as_ever():
    loss, params = problem(perceptron)
    assert with_places(loss, params, at_least=1) and not with_places(loss, params, at_least=1 << 16)


@given(st.lists(st.integers(1, 9).map(lambda n: 64 * n), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_what_is_in_use_does_not_overlap_and_gaps_are_used(sizes, random):
    layout, used, most = memory_plan.Layout(), {}, 0
    for size in sizes:
        start = layout.take(size)
        assert all(start + size <= other or other + length <= start for other, length in used.items())
        used[start] = size
        most = max(most, sum(used.values()))
        assert most <= layout.size == max(layout.size, start + size)
        if random.random() < 0.5:
            gone = random.choice(sorted(used))
            layout.release(gone, used.pop(gone))
    for start, size in used.items():
        layout.release(start, size)
    assert layout.free == [(0, layout.size)]
    assert layout.take(layout.size) == 0


def test_the_smallest_gap_is_taken_and_the_last_one_grows():
    layout = memory_plan.Layout()
    a, _, c, _, e = (layout.take(size) for size in (192, 64, 128, 64, 64))
    for start, size in ((a, 192), (c, 128), (e, 64)):
        layout.release(start, size)
    assert layout.take(128) == c
    assert layout.take(256) == e
    assert layout.take(64) == a
    assert layout.size == e + 256


def test_what_is_in_use_at_once_lies_apart():
    """A long chain needs few pieces; two chains that meet at the end need more of them."""
    w = torch.linspace(0.1, 1.0, 50, dtype=torch.float64)

    def loss(w):
        first = second = w
        for i in range(12):
            first, second = (first * (i + 1)).sin(), (second + i).cos()
        return (first * second).sum()

    matvec, exact = linearized(loss, w), hf.hvp(loss, w, mode="double_backward")
    v = torch.ones_like(w)
    torch.testing.assert_close(matvec(v), exact(v), rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("way", [hf.hvp, hf.linearized_hvp])
def test_what_is_added_to_a_product_may_be_of_another_dtype(way):
    w = {"w": torch.linspace(-1, 1, 12).reshape(4, 3), "b": torch.linspace(0, 1, 3).bfloat16()}
    x = normal(5, 4).float()

    def loss(p):
        hidden = x @ p["w"] + p["b"]
        return (p["b"] + hidden * hidden.sin()).square().mean()

    v = tree.map(torch.ones_like, w)
    wide = tree.map(Tensor.float, w)
    exact = hf.hvp(loss, wide, mode="double_backward")(tree.map(Tensor.float, v))
    found = tree.map(Tensor.float, way(loss, w)(v))
    assert tree.norm(tree.add(found, exact, -1.0)) < 0.01 * tree.norm(exact)


def trims(size):
    """Where the heap is trimmed in a product through twelve layers, each with memory of its own until the way back."""

    def loss(w):
        x = w
        for _ in range(12):
            x = (x * x).sin()
        return x.sum()

    job = pipeline.Job(loss, torch.empty(size), ())
    module = pipeline.run(pipeline.STAGES, None, job)
    nodes = list(module.graph.nodes)
    return module, [i / len(nodes) for i, node in enumerate(nodes) if node.target is heap.trim_heap]


def test_the_heap_is_trimmed_before_the_peak_of_a_large_product_alone():
    module, where = trims(1 << 20)
    assert where
    assert max(where) < 0.75  # on the way back less and less is alive
    v = torch.linspace(-1, 1, 1 << 20)
    (found,) = module(torch.linspace(0.1, 0.9, 1 << 20), v)
    assert found.isfinite().all()
    assert trims(1 << 10)[1] == []
