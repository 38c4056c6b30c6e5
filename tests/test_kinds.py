"""What an operation in place is without that: found by its arguments, since overloads may have other names."""

import pytest
import torch

import hessfn as hf
from hessfn.engine.kinds import kind_of

aten = torch.ops.aten
W = torch.tensor([0.5, 1.5, 2.5], dtype=torch.float64)
C = torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("in_place", "plain"),
    [
        (aten.pow_.Scalar, aten.pow.Tensor_Scalar),
        (aten.pow_.Tensor, aten.pow.Tensor_Tensor),
        (aten.float_power_.Scalar, aten.float_power.Tensor_Scalar),
        (aten.float_power_.Tensor, aten.float_power.Tensor_Tensor),
        (aten.ldexp_.default, aten.ldexp.Tensor),
        (aten.transpose_.default, aten.transpose.int),
        (aten.mul_.Tensor, aten.mul.Tensor),
        (aten.mul_.Scalar, aten.mul.Scalar),
        (aten.mul.Tensor, None),
        (aten.normal_.default, None),
    ],
    ids=str,
)
def test_the_plain_operation_takes_the_same_arguments(in_place, plain):
    assert kind_of(in_place).plain is plain


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.pow_(-0.5),
        lambda x: x.pow_(C),
        lambda x: x.float_power_(3),
        lambda x: x.ldexp_(torch.tensor([1, 2, 0])),
        lambda x: x.unsqueeze(0).transpose_(0, 1).squeeze(1),
    ],
    ids=["pow_ number", "pow_ tensor", "float_power_", "ldexp_", "transpose_"],
)
@pytest.mark.parametrize("of_constant", [False, True])
def test_products_with_them(change, of_constant):
    """As of the degrees of a graph's nodes, which are data."""

    def loss(w, c):
        return (change(c * 1.0).sin() * w**2).sum() if of_constant else (change(w * 1.0).sin() * c).sum()

    assert hf.find_mode(loss, W, C).mode == "traced"
    exact = torch.autograd.functional.hessian(lambda w: loss(w, C), W)
    for made in (hf.hvp(loss, W, C, trace_after=0), hf.linearized_hvp(loss, W, C)):
        torch.testing.assert_close(hf.dense(made, W), exact, rtol=1e-12, atol=1e-12)
