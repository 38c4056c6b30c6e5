"""Constants that follow on each other are one, and the graph is the same function."""

import pytest
import torch
import torch.nn.functional as F
from graphs import linear_graph, linearized
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

import hessfn as hf
from hessfn.engine.rewrites import fixed_nodes, reassociate_constants

aten = torch.ops.aten


def multiplications(shapes, order):
    """A graph of constants of these shapes times a vector, which is the last input."""
    graph = fx.Graph()
    constants = [graph.placeholder(f"c{i}") for i in range(len(shapes))]
    for c, shape in zip(constants, shapes, strict=True):
        c.meta["val"] = torch.empty(shape, dtype=torch.float64, device="meta")
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(3, 4, dtype=torch.float64, device="meta")
    out = x
    for c, first in zip(constants, order, strict=True):
        out = graph.call_function(aten.mul.Tensor, (c, out) if first else (out, c))
        out.meta["val"] = x.meta["val"]
    graph.output(out)
    return graph


def left_to_do(graph, num_fixed):
    fixed = fixed_nodes(graph, num_fixed)
    return [n for n in graph.nodes if n.op == "call_function" and n not in fixed]


shape = st.sampled_from([(3, 4), (3, 1), (1, 4), (4,)])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(shape, st.booleans()), min_size=1, max_size=5))
def test_a_chain_of_products_is_the_same_function_with_fewer_of_them(chain):
    shapes, order = zip(*chain, strict=True)
    graph = multiplications(shapes, order)
    values = [torch.rand(s, dtype=torch.float64) + 0.5 for s in (*shapes, (3, 4))]
    before = fx.Interpreter(fx.GraphModule({}, graph)).run(*values)
    reassociate_constants(graph, len(shapes))
    graph.lint()
    after = fx.Interpreter(fx.GraphModule({}, graph)).run(*values)
    torch.testing.assert_close(after, before, rtol=1e-14, atol=0)
    left = left_to_do(graph, len(shapes))
    assert len(left) <= len(chain)
    if all(s == (3, 4) for s in shapes):
        assert len(left) == 1


def test_constants_do_not_take_more_memory_than_before():
    graph = multiplications([(3, 1), (1, 4)], [False, True])
    reassociate_constants(graph, 2)
    assert len([n for n in graph.nodes if n.op == "call_function"]) == 2


def test_a_constant_in_use_elsewhere_stays():
    graph = multiplications([(3, 4), (3, 4)], [False, False])
    a, b, _ = graph.find_nodes(op="placeholder")
    (output,) = graph.find_nodes(op="output")
    with graph.inserting_before(output):
        others = [graph.call_function(aten.mul.Tensor, (output.args[0], c)) for c in (a, b)]
        for other in others:
            other.meta = dict(output.args[0].meta)
    output.args = (tuple(others),)
    reassociate_constants(graph, 2)
    # (x * a) * b has two users, so it is not taken apart; each of them would need a constant more.
    assert len(left_to_do(graph, 2)) == 4


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_no_product_computes_the_slope_of_gelu(approximate):
    w = torch.linspace(-2.0, 2.0, 12, dtype=torch.float64).reshape(3, 4)
    x = torch.linspace(-1.0, 1.5, 8, dtype=torch.float64).reshape(4, 2)

    def loss(w):
        return F.gelu(F.gelu(w @ x, approximate=approximate), approximate=approximate).square().sum()

    names = {str(node.target) for node in linear_graph(loss, w).graph.nodes if node.op == "call_function"}
    assert not any("gelu_backward" in name for name in names)
    v = torch.cos(w)
    dense = torch.autograd.functional.hessian(loss, w).reshape(12, 12)
    torch.testing.assert_close(linearized(loss, w)(v).flatten(), dense @ v.flatten(), rtol=1e-12, atol=1e-12)


def test_a_large_slope_and_a_small_one_meet():
    w = torch.tensor([1e-3, 0.5, 30.0], dtype=torch.float64)

    def loss(w):
        return F.softplus(1e3 * F.silu(w)).sum()

    v = torch.ones_like(w)
    exact = hf.hvp(loss, w, mode="double_backward")(v)
    torch.testing.assert_close(linearized(loss, w)(v), exact, rtol=1e-9, atol=1e-12)
