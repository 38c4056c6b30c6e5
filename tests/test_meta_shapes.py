import subprocess
import sys

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given, settings

from hessfn.engine import meta_shapes

aten = torch.ops.aten
OPERATIONS = {
    aten.neg.default: 1,
    aten.relu.default: 1,
    aten.clone.default: 1,
    aten.add.Tensor: 2,
    aten.div.Tensor: 2,
    aten.lt.Tensor: 2,
    aten.addcmul.default: 3,
}


def looks(t):
    """Of dimensions of one entry the stride is anything, and so are all where there are no entries."""
    strides = [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]
    return t.shape, t.dtype, strides if t.numel() else []


def check(func, *args, **kwargs):
    expected, found = func(*args, **kwargs), meta_shapes.result(func, args, kwargs)
    pairs = zip(meta_shapes.tensors(expected), meta_shapes.tensors(found), strict=True)
    assert all(looks(e) == looks(f) and f.is_meta for e, f in pairs), (func, args)


@st.composite
def laid_out(draw, shape):
    """A tensor that broadcasts to the shape: its dimensions in any order in memory, cut from a larger one, repeated."""
    sizes = [draw(st.sampled_from([n, n, n, 1])) for n in shape]
    order = draw(st.permutations(range(len(sizes))))
    pad = draw(st.sampled_from([0, 0, 1]))
    x = torch.ones([sizes[i] + pad for i in order], dtype=draw(st.sampled_from([torch.float32, torch.float64])))
    x = x.permute([order.index(i) for i in range(len(sizes))])[tuple(slice(n) for n in sizes)]
    return x.expand(shape) if draw(st.booleans()) else x


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_entrywise_results_are_laid_out_as_by_the_operation(data):
    func = data.draw(st.sampled_from(list(OPERATIONS)))
    shape = data.draw(st.lists(st.integers(0, 5), max_size=4))
    args = [data.draw(laid_out(shape)) for _ in range(OPERATIONS[func])]
    assume(func is not aten.addcmul.default or len({t.dtype for t in args}) == 1)
    check(func, *args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_results_look_as_by_the_operation(dtype):
    x, image = torch.ones(4, 8, dtype=dtype), torch.ones(2, 4, 6, 5, dtype=dtype).to(memory_format=torch.channels_last)
    check(aten.addmm.default, x[0, :3], x, torch.ones(8, 3, dtype=dtype))
    check(aten.mean.default, x, dtype=torch.float64)
    check(aten.mean.dim, image, [1, 3], True)
    check(aten.var_mean.correction, image, [0, 2], correction=0)
    check(aten.var.correction, torch.ones(4, 8, dtype=torch.complex64), [1])
    check(aten._log_softmax.default, x.t(), 1, False)
    check(aten.native_layer_norm.default, *(x.float(), [8], x[0].float(), x[0].float(), 1e-5))
    check(aten.nll_loss_forward.default, x, torch.ones(4, dtype=torch.long), None, 1, -100)
    check(aten.all.dims, x > 0, [0], True)
    check(aten.cat.default, [image, image], 1)
    check(aten.cat.default, [x, x[:2].double()], 0)
    check(aten.cat.default, [x, torch.ones(0)], -1)
    check(aten.cat.default, [x.t(), x.t()], -1)
    kernel, ones = torch.ones(3, 4, 3, 3, dtype=dtype), [1, 1]
    check(aten.convolution.default, image, kernel, None, ones, ones, ones, False, [0, 0], 1)


def test_what_does_not_fit_is_refused():
    with pytest.raises(RuntimeError, match="2"):
        meta_shapes.result(aten.add.Tensor, (torch.ones(2), torch.ones(3)), {})
    with pytest.raises(RuntimeError, match="3"):
        meta_shapes.result(aten.cat.default, ([torch.ones(2, 2), torch.ones(2, 3)],), {})


def test_random_operations_draw_nothing():
    state = torch.get_rng_state()
    found = meta_shapes.result(aten.bernoulli.p, (torch.ones(3, 2), 0.5), {})
    assert found.shape == (3, 2) and torch.equal(state, torch.get_rng_state())


PRODUCTS = """
import sys, torch, hessfn as hf
from torch import nn
x, y = torch.randn(4, 3, 16), torch.tensor([0, 1, 2, 1])
layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
model = nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1), nn.Flatten(1, 2),
                      layer, nn.Flatten(), nn.Linear(48, 20), nn.ReLU(), nn.Linear(20, 3)).eval()
loss, params = hf.functionalize(model, nn.CrossEntropyLoss())
v = hf.gaussian(params, 1)[0]
hf.hvp(loss, params, (x, y), trace_after=0)(v)
hf.linearized_hvp(loss, params, (x, y))(v)
plain = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3))
loss, params = hf.functionalize(plain, nn.CrossEntropyLoss())
hf.hvp(loss, params, (x, y))(hf.gaussian(params, 1)[0])
assert "torch._dynamo" not in sys.modules
"""


def test_a_product_does_not_import_the_compiler():
    subprocess.run([sys.executable, "-c", PRODUCTS], check=True)
