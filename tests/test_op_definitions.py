"""Operations by their definitions are torch's: values, gradients, second derivatives, dtypes."""

import math

import pytest
import torch
import torch.nn.functional as F
from nets import normal
from torch.nn.attention import SDPBackend, sdpa_kernel

from hessfn.engine.op_definitions import by_definition

BOOL = normal(2, 3, 5, 6) > -0.3
BOOL[0, 0, 2] = False  # who attends to nothing
ADDED = normal(5, 6).masked_fill(normal(5, 6, seed=3) > 0.8, -math.inf)
ATTENTION = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "bool mask": {"attn_mask": BOOL},
    "added mask": {"attn_mask": ADDED.double()},
}


def attention(options):
    query, key, value = (normal(2, 3, n, 4, seed=n).double() for n in (5, 6, 7))

    def function(scale):
        q, k, v = query * scale, (key * scale.cos()), value[:, :, :6] * scale
        return F.scaled_dot_product_attention(q, k, v, **options)

    return function, torch.tensor(0.8, dtype=torch.float64)


def norms(dims):
    x, weight = normal(4, 3, 5).double(), normal(3).double()
    functions = {
        "layer": lambda s: F.layer_norm((x * s).sin(), (3, 5), x[0], x[1]),
        "batch": lambda s: F.batch_norm((x * s).sin(), None, None, weight, None, training=True),
        "instance": lambda s: F.instance_norm((x * s).sin(), None, None, None, weight),
        "group": lambda s: F.group_norm((x * s).sin(), 3, weight, weight),
        "rms": lambda s: F.rms_norm((x * s).sin(), (3, 5), x[0]),
    }
    return functions[dims], torch.tensor(0.8, dtype=torch.float64)


def losses(name):
    x, y = 2 * normal(4, 3, seed=1).double(), normal(4, 3, seed=2).double()
    functions = {
        "mse": lambda s: F.mse_loss(x * s, y),
        "mse, summed": lambda s: F.mse_loss((x * s).sin(), y, reduction="sum"),
        "mse, each": lambda s: F.mse_loss((x * s).sin(), y, reduction="none"),
        "mse, weighed": lambda s: F.mse_loss((x * s).sin(), y, weight=y.abs()),
        "huber": lambda s: F.huber_loss(x * s.sin(), y, delta=0.7),
        "soft margin": lambda s: F.soft_margin_loss(x * s.sin(), y.sign()),
    }
    return functions[name], torch.tensor(0.8, dtype=torch.float64)


NORMS = ("layer", "batch", "instance", "group", "rms")
LOSSES = ("mse", "mse, summed", "mse, each", "huber", "soft margin")
CASES = {
    **{name: lambda name=name: losses(name) for name in (*LOSSES, "mse, weighed")},
    **{f"attention, {name}": lambda options=options: attention(options) for name, options in ATTENTION.items()},
    **{f"{name} norm": lambda name=name: norms(name) for name in NORMS},
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_two_derivatives(case):
    function, at = CASES[case]()

    def derivatives(function):
        at.requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):
            value = function(at)
        assert value.isfinite().all()
        (first,) = torch.autograd.grad(value.square().cos().sum(), at, create_graph=True)
        (second,) = torch.autograd.grad(first, at)
        return value, first, second

    for found, wanted in zip(derivatives(by_definition(function)), derivatives(function), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_in_half_precision_are_rounded_once(dtype):
    x = (normal(4, 3, 5) + 30.0).to(dtype)  # a mean that a sum in half precision would lose
    for norm in (
        lambda x: F.layer_norm(x, (3, 5)),
        lambda x: F.batch_norm(x, None, None, training=True),
        lambda x: F.instance_norm(x),
        lambda x: F.group_norm(x, 3),
        lambda x: F.rms_norm(x, (3, 5), eps=1e-5),
    ):
        found = by_definition(norm)(x)
        assert found.dtype == dtype
        torch.testing.assert_close(found, norm(x.float()).to(dtype))


@pytest.mark.parametrize("options", [{"enable_gqa": True}, {"dropout_p": 1.0}, {"is_causal": True}])
def test_other_attention_is_torchs(options):
    heads = 2 if "enable_gqa" in options else 4
    query, key, value = (normal(2, h, 5, 4, seed=h) for h in (4, heads, heads))

    def function(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, **options)

    torch.testing.assert_close(by_definition(function)(query, key, value), function(query, key, value))


def test_under_autocast_dtypes_are_torchs():
    query, x = normal(2, 3, 5, 4), normal(4, 3)

    def function(q, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.scaled_dot_product_attention(q, q, q), F.layer_norm(x @ x.T, (4,))

    for found, wanted in zip(by_definition(function)(query, x), function(query, x), strict=True):
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted)


def test_a_mask_and_causality_at_once_are_refused_as_torchs_math_kernel_does():
    q = normal(2, 3, 5, 4)
    with pytest.raises(RuntimeError), sdpa_kernel(SDPBackend.MATH):  # before torch 2.14 other kernels take both
        by_definition(lambda q: F.scaled_dot_product_attention(q, q, q, ADDED[:, :5], is_causal=True))(q)


@pytest.mark.parametrize("name", LOSSES)
def test_what_torch_has_no_forward_rule_for_has_one(name):
    function, at = losses(name)
    defined = by_definition(lambda s: function(s).sum())
    tangent = torch.func.jvp(torch.func.grad(defined), (at,), (torch.ones_like(at),))[1]
    (first,) = torch.autograd.grad(function(at.requires_grad_()).sum(), at, create_graph=True)
    torch.testing.assert_close(tangent, torch.autograd.grad(first, at)[0], rtol=1e-12, atol=1e-12)


def test_hardsigmoid_is_a_clamp_and_has_two_derivatives():
    x = torch.tensor([-4.0, -2.9, -1.0, 0.0, 2.9, 3.1], dtype=torch.float64)
    twice = torch.func.hessian(by_definition(lambda s: F.hardsigmoid(x * s).pow(3).sum()))
    truth = torch.func.hessian(lambda s: ((x * s + 3) / 6).clamp(0, 1).pow(3).sum())
    at = torch.ones((), dtype=torch.float64)
    torch.testing.assert_close(by_definition(F.hardsigmoid)(x), F.hardsigmoid(x), rtol=0, atol=1e-15)
    torch.testing.assert_close(twice(at), truth(at), rtol=1e-12, atol=1e-12)
