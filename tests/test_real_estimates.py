"""The estimators on the trained ResNet20: needs the folder of weights and images beside the repository."""

import pytest
import torch
from test_real_net import all_cores, pytestmark, resnet20  # noqa: F401

import hessfn as hf
from hessfn.trace import deflated_trace


@pytest.mark.usefixtures("all_cores")
def test_the_trace_to_two_percent_within_60_products():
    loss, params, batch, _ = resnet20(200)
    matvec = hf.linearized_hvp(loss, params, batch)
    eig = hf.eigsh(matvec, hf.gaussian(params, 1, seed=0)[0], k=5)
    trace = deflated_trace(matvec, hf.rademacher(params, 26), eig)
    assert eig.num_matvecs + trace.num_matvecs <= 60
    assert trace.stderr <= 0.02 * trace.mean
    assert abs(trace.mean - 142.2) <= 4 * trace.stderr
    assert torch.equal(eig.values, eig.values.sort(descending=True).values)
