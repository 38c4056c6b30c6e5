"""Curvature within a loss: the derivative of a trace by the parameters is that of a difference, or it is refused."""

import pytest
import torch
from nets import classes, normal
from torch import nn
from torch.func import grad

import hessfn as hf
from hessfn.core import tree
from hessfn.core.errors import NoDerivative

MODEL = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
LOSS, START = hf.functionalize(MODEL, nn.CrossEntropyLoss())
PARAMS = hf.gaussian(START, 1, seed=2)[0]
BATCH = normal(15, 4).double(), classes(15, 3)
PROBES = hf.rademacher(PARAMS, 2)
DIRECTION = hf.gaussian(PARAMS, 1, seed=5)[0]


def trace(params, mode, inputs=BATCH[0]):
    return hf.hutchinson(hf.hvp(LOSS, params, (inputs, BATCH[1]), mode=mode), PROBES).mean


def dense_trace(params):
    """Of the probes, with the dense matrix."""
    flat, back = tree.ravel(params)
    H = torch.autograd.functional.hessian(lambda w: LOSS(back(w), BATCH), flat)
    rows = torch.stack([tree.ravel(z)[0] for z in PROBES])
    return float((rows @ H * rows).sum(1).mean())


def live(x):
    return tree.map(lambda leaf: leaf.clone().requires_grad_(), x)


@pytest.mark.parametrize("mode", ["auto", "traced", "forward", "reverse"])
def test_a_trace_has_its_derivative_by_the_parameters(mode):
    h = 1e-4
    ends = [dense_trace(tree.add(PARAMS, DIRECTION, c)) for c in (h, -h, 2 * h, -2 * h)]
    difference = (8 * (ends[0] - ends[1]) - (ends[2] - ends[3])) / (12 * h)
    if mode != "traced":  # which is not made under a transform
        assert float(tree.dot(grad(trace)(PARAMS, mode), DIRECTION)) == pytest.approx(difference, rel=1e-7)
    params = live(PARAMS)
    trace(params, mode).backward()
    slope = sum(float((leaf.grad * DIRECTION[name]).sum()) for name, leaf in params.items())
    assert slope == pytest.approx(difference, rel=1e-7)


@pytest.mark.parametrize("mode", ["double_backward", "difference"])
def test_a_mode_without_that_derivative_refuses_it(mode):
    with pytest.raises(NoDerivative, match="no derivative by the parameters"):
        trace(live(PARAMS), mode)
    with pytest.raises(NoDerivative, match="no derivative by the parameters"):
        trace(PARAMS, mode, live(BATCH[0]))
    with torch.no_grad():
        found = trace(live(PARAMS), mode)
    assert float(found) == pytest.approx(dense_trace(PARAMS), rel=1e-6)


def test_an_eigenvalue_has_the_derivative_of_its_form():
    """With the vector held fast, against the derivative through the whole recurrence, and a difference."""

    def top(params):
        pairs = hf.eigsh(hf.hvp(LOSS, params, BATCH), DIRECTION, which="LA", rtol=None, max_matvecs=51)
        return pairs.values[0], tree.map(lambda x: x[0].detach(), pairs.vectors)

    v = top(PARAMS)[1]
    fast = grad(lambda params: tree.dot(v, hf.hvp(LOSS, params, BATCH)(v)))(PARAMS)
    h = 1e-5
    ends = [float(top(tree.add(PARAMS, DIRECTION, c))[0]) for c in (h, -h)]
    assert float(tree.dot(fast, DIRECTION)) == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-5)
    through = grad(lambda params: top(params)[0])(PARAMS)
    assert tree.norm(tree.add(through, fast, -1)) <= 1e-6 * tree.norm(fast)
