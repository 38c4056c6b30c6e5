import gc
import linecache
import re
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from graphs import by_recorder, by_reference, derivative_graph, record
from nets import normal, seeded
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import hessfn as hf
from hessfn.core.errors import Untraceable
from hessfn.engine import meta_shapes
from hessfn.engine.recorder import Unsupported
from hessfn.engine.trace import graph_of

PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}


def peak_memory():
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))


def test_record_is_the_function_at_other_values():
    x, y = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    module = record(lambda a, b: [(a @ b).sin_(), a.t() * 2.0], [x, y])
    first, second = module(x + 1, y - 2)
    assert torch.equal(first, ((x + 1) @ (y - 2)).sin()) and torch.equal(second, 2 * (x + 1).t())


def test_recording_computes_nothing_and_takes_no_memory():
    x = torch.ones(20_000)
    record(lambda a: [(a[:10, None] * a).sum()], [x])
    before = peak_memory()
    module = record(lambda a: [(a[:, None] * a).exp().sum()], [x])  # three results of 1.6 GB
    assert peak_memory() - before < 1e8
    assert any(node.name.startswith("exp") for node in module.graph.nodes)


def test_results_share_memory_with_nothing():
    x = torch.ones(2, 3)
    same, view, again = record(lambda a: [a, a.t(), a], [x])(x)
    pointers = [t.untyped_storage().data_ptr() for t in (x, same, view, again)]
    assert len(set(pointers)) == 4


def test_what_depends_on_values_is_refused():
    for function, why in {lambda a: [a * a.sum().item()]: "value of a tensor", lambda a: [a[a > 0]]: "shape"}.items():
        with pytest.raises(Untraceable, match=why):
            record(function, [torch.ones(3)])


def test_what_changes_an_argument_or_a_constant_is_left_to_the_reference():
    outside = torch.ones(3)
    for function in (lambda a: [a.mul_(2.0)], lambda a: [outside.mul_(a)], lambda a: [a[:2][:1].mul_(2.0)]):
        with pytest.raises(Unsupported, match="not its own"):
            record(function, [torch.ones(3)])
    assert torch.equal(outside, torch.ones(3))


VIEWS = {
    "slice": lambda b: b[1:3],
    "of a slice": lambda b: b[1:][:2, 1:],
    "select": lambda b: b[2],
    "diagonal": lambda b: b.diagonal(),
    "as_strided": lambda b: b.as_strided((2, 2), (1, 3), 1),
    "view": lambda b: b.view(2, 6)[1],
    "permuted": lambda b: b.view(2, 2, 3).permute(2, 0, 1)[1:],
    "transposed": lambda b: b.t()[0],
    "split": lambda b: b.split(3)[1],
    "split with sizes": lambda b: b.split([1, 3], 1 - 1)[1],
    "unbind": lambda b: b.unbind(1)[2],
    "chunk": lambda b: b.chunk(3, 1)[-1],
    "unsqueezed": lambda b: b.unsqueeze(1)[:, :, 0],
    "flattened": lambda b: b.flatten()[3:7],
    "squeezed": lambda b: b[:1].squeeze(0),
    "as it is": lambda b: b.detach(),
}


@pytest.mark.parametrize("part", VIEWS.values(), ids=list(VIEWS))
@pytest.mark.parametrize("lean", [True, False])
def test_what_is_written_into_a_view_is_seen_by_all_that_share_its_memory(part, lean):
    def function(a):
        b = a * 2
        before, flat, row = b + 1, b.view(-1), b[2]
        part(b).mul_(3.0).add_(a[0, 0])
        row.sub_(1.0)
        again = part(b) + 1
        part(b).copy_(part(b).sin())
        return [before, b, flat, row, again, flat.sum() * row]

    a = normal(4, 3)
    module = by_recorder(function, [torch.zeros_like(a)], lean=lean)
    for found, right in zip(module(a), function(a), strict=True):
        assert torch.equal(found, right)


def test_a_constant_of_which_a_part_is_changed_is_none():
    def function(a):
        b = torch.zeros(3, dtype=a.dtype)
        b[:2].copy_(a[:2])
        return [b * a]

    a = normal(3)
    (found,) = record(function, [torch.ones_like(a)])(a)
    assert torch.equal(found, torch.stack([a[0] ** 2, a[1] ** 2, 0 * a[2]]))


def test_an_operation_in_place_keeps_the_dtype_of_its_target():
    def function(a):
        b = a.float()
        b.mul_(a).add_(1)
        return [b, b.double() + 1]

    for found, right in zip(record(function, [torch.zeros(3).double()])(normal(3)), function(normal(3)), strict=True):
        assert found.dtype == right.dtype
        torch.testing.assert_close(found, right)


def test_what_becomes_a_view_in_place_is_written_through():
    def function(a):
        b = a * 2
        row = b[1]
        b.t_().unsqueeze_(0)
        b[0, 1].mul_(a[:, 0])
        return [b, row, b.squeeze_(0) + 1]

    a = normal(4, 3)
    for found, right in zip(record(function, [torch.zeros_like(a)])(a), function(a), strict=True):
        assert torch.equal(found, right)


def windows_in_place(w):
    hidden = torch.cat([w, w]) * 2
    hidden.unfold(0, 3, 3).mul_(w)
    return (hidden**3).sum()


def test_where_the_recorder_fails_for_a_reason_of_its_own_the_reference_takes_its_place():
    w = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)
    with pytest.raises(Unsupported):
        by_recorder(lambda w: [windows_in_place(w)], [w], lean=True)
    v = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    exact = torch.autograd.functional.hessian(windows_in_place, w) @ v
    for make in (hf.hvp, hf.linearized_hvp):
        torch.testing.assert_close(make(windows_in_place, w)(v), exact, rtol=1e-12, atol=1e-12)
    assert hf.find_mode(windows_in_place, w).mode == "traced"


def test_an_operation_whose_shape_nobody_knows_is_left_to_the_reference(monkeypatch):
    def unknown(func, args, kwargs):
        raise TypeError(f"no shape for {func}")

    w = torch.linspace(-1.0, 1.0, 5, dtype=torch.float64)
    monkeypatch.setattr(meta_shapes, "result", unknown)
    found = hf.linearized_hvp(lambda w: (w.sin() * w.exp()).sum(), w)(torch.ones_like(w))
    torch.testing.assert_close(found, 2 * w.cos() * w.exp(), rtol=1e-12, atol=1e-12)


def test_the_reference_too_refuses_shapes_that_depend_on_values():
    for function in (lambda w: [w[w > 0].sum()], lambda w: [w.nonzero()]):
        with pytest.raises(Untraceable, match="shape of a result"):
            by_reference(function, [torch.ones(3)], lean=True)
    mask = torch.tensor([True, False, True])
    assert by_reference(lambda w: [w[mask].sum()], [torch.ones(3)], lean=True)(torch.ones(3))[0] == 2


@pytest.mark.parametrize(
    "loss",
    [
        lambda w: F.embedding_bag(torch.tensor([[0, 1], [1, 0]]), w, mode="max").square().sum(),
        lambda w: torch.cdist(w, torch.zeros(4, 3), p=3.0).square().sum(),
        lambda w: torch.fake_quantize_per_tensor_affine(w, 0.1, 0, -128, 127).square().sum(),
        lambda w: w.square().sum() if w.sum() > 0 else w.sum(),
        lambda w: torch.segment_reduce(w.flatten(), "sum", lengths=torch.tensor([2, 4])).square().sum(),
    ],
    ids=["bags of maxima", "cdist", "fake_quantize", "branch", "segment_reduce"],
)
def test_what_cannot_be_traced_is_untraceable_and_nothing_else(loss):
    with pytest.raises(Untraceable, match="hvp finds another way"):
        hf.linearized_hvp(loss, torch.ones(2, 3))


def test_products_can_be_differentiated_by_the_vector():
    loss, params = hf.functionalize(
        seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))), F.mse_loss
    )
    matvec, (v, w) = hf.hvp(loss, params, (normal(6, 4), normal(6, 3))), hf.gaussian(params, 2)
    leaves = {name: x.clone().requires_grad_() for name, x in v.items()}
    found = torch.autograd.grad(hf.tree.dot(matvec(leaves), w), list(leaves.values()))
    torch.testing.assert_close(dict(zip(leaves, found, strict=True)), matvec(w), rtol=1e-12, atol=1e-14)


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_products_compute_only_what_they_need():
    def net():
        return nn.Sequential(*[nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU()) for _ in range(4)])

    batch = normal(2, 8, 12, 12), normal(2, 8, 4, 4)
    loss, params = hf.functionalize(seeded(net).eval(), nn.MSELoss())
    gradient = flops(lambda: hf.tree.map(torch.Tensor.sum, torch.func.grad(loss)(params, batch)))
    products = hf.hvp(loss, params, batch, mode="traced"), hf.linearized_hvp(loss, params, batch)
    products[0](params)  # finds its way
    plain, linear = (flops(lambda product=product: product(params)) / gradient for product in products)
    assert linear <= 2.0 + 1e-6  # six convolutions where the gradient has three
    assert plain <= 8 / 3  # and the loss and its gradient by the activations, but not that by the weights


def test_nothing_is_multiplied_by_the_zero_derivative_of_a_constant():
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    loss, params = hf.functionalize(model.eval(), nn.MSELoss())
    batch = normal(4, 6), normal(4, 3)
    module = derivative_graph(loss, params, batch)
    products = [node for node in module.graph.nodes if node.target in PRODUCTS]
    # The layers, their tangents; the gradients by hidden activations and weights, and both sides of their tangents,
    # but neither the gradient by the weights itself nor anything for the derivative of the data.
    assert len(products) == 2 + 3 + 1 + 2 + 1 + 2


def test_zeros_stay_zero_only_in_what_is_linear_in_them():
    def function(a):
        zero = torch.zeros_like(a)
        return [zero * a + a, a + zero.sum(0), F.pad(zero, (1, 1), value=2.0) * 3, zero.exp() * a, a / (zero + 2)]

    x = normal(3, 4)
    for found, right in zip(record(function, [x + 1])(x), function(x), strict=True):
        torch.testing.assert_close(found, right, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("loss", [lambda w: w.sin().pow(3).sum(), windows_in_place], ids=["recorder", "reference"])
def test_graphs_leave_nothing_behind_when_their_product_is_gone(loss):
    def sizes():
        gc.collect()
        return len(linecache.cache), sum(issubclass(type(x), torch.fx.GraphModule) for x in gc.get_objects())

    def once():
        w = torch.ones(3, dtype=torch.float64)
        own = types.FunctionType(loss.__code__, loss.__globals__)  # another loss each time, whose memory goes with it
        hf.hvp(own, w, mode="traced")(w)
        hf.linearized_hvp(own, w)(w)

    once()
    before = sizes()
    for _ in range(3):
        once()
    assert all(after <= now for after, now in zip(sizes(), before, strict=True))  # what others left may have gone


def test_no_tensor_of_a_trace_survives_it():
    """Not by way of autograd's graph either, which is no part of Python's."""
    model = seeded(
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3))
    )
    batch = normal(2, 1, 5, 5), torch.tensor([0, 2])

    def once():
        loss, params = hf.functionalize(model.eval(), nn.CrossEntropyLoss())
        hf.hvp(loss, params, batch, mode="traced", check=False)(params)
        hf.linearized_hvp(loss, params, batch, check=False)(params)

    def counts():
        gc.collect()
        kinds = [type(x) for x in gc.get_objects()]
        return [sum(issubclass(kind, of) for kind in kinds) for of in (torch.Tensor, torch.fx.Node)]

    once()
    before = counts()
    for _ in range(3):
        once()
    assert all(after <= now for after, now in zip(counts(), before, strict=True))


def test_every_node_that_is_written_is_told_of():
    """By which a bar shows how far a long trace is."""
    told = []
    graph = graph_of(lambda x: [(x * 2 + 1).sin()], [torch.ones(3)], lean=False, on_node=lambda: told.append(1))
    assert len(told) == len(graph.graph.nodes)
    graph.graph.create_node("call_function", torch.sin)
    assert len(told) == len(graph.graph.nodes) - 1
