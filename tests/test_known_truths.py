"""What mathematics says of the curvature of nets, with no other library: ranks, spectra, invariances."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import classes, normal, problem, seeded
from torch import Tensor, nn

import hessfn as hf


def rank(matrix: Tensor) -> int:
    return int(torch.linalg.matrix_rank(matrix, rtol=1e-10))


def same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def both_parts(forward: Any, criterion: Any, params: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """The Hessian and its Gauss-Newton part, dense."""
    hessian = hf.hvp(lambda p: criterion(forward(p, batch[0]), batch[1]), params)
    return hf.dense(hessian, params), hf.dense(hf.ggnvp(forward, criterion, params, batch), params)


# Deep linear nets


def linear_net(widths: tuple[int, ...]) -> tuple[Any, dict[str, Tensor]]:
    params = {str(i): normal(o, n, seed=10 + i) for i, (n, o) in enumerate(itertools.pairwise(widths))}

    def forward(params: dict[str, Tensor], x: Tensor) -> Tensor:
        for weight in params.values():
            x = x @ weight.T
        return x

    return forward, params


def half_squares(out: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (out - y).square().sum(1).mean()


@pytest.mark.parametrize(
    ("widths", "r"),
    [
        ((4, 3, 2), 4),
        ((3, 4, 2), 3),
        ((3, 2, 4), 3),  # narrower than inputs and outputs
        ((5, 4, 3), 2),  # inputs of deficient rank
        ((4, 5, 2, 3), 2),
        ((4, 3, 2, 3), 4),
        ((3, 5, 5, 2), 3),
        ((6, 4, 4, 1), 6),  # one output
        ((4, 3, 3, 3, 3), 4),
        ((2, 3, 3, 3, 4), 2),  # more outputs than inputs
    ],
)
def test_ranks_of_a_deep_linear_net(widths: tuple[int, ...], r: int) -> None:
    """Singh, Bachmann, Hofmann (2021), arXiv:2106.16225: at generic weights and targets the bound is reached."""
    forward, params = linear_net(widths)
    x = normal(30, r, seed=1) @ normal(r, widths[0], seed=2)
    y = normal(30, widths[-1], seed=3)
    hessian, outer = both_parts(forward, half_squares, params, (x, y))
    num_outputs, num_layers, num_hidden = widths[-1], len(widths) - 1, sum(widths[1:-1])
    q, s = min(r, *widths[1:]), min(r, num_outputs)
    rank_outer = q * (r + num_outputs - q)
    assert rank(outer) == rank_outer
    assert rank(hessian - outer) == 2 * q * num_hidden + 2 * q * s - num_layers * q**2
    assert rank(hessian) == 2 * q * num_hidden - num_layers * q**2 + q * (r + num_outputs)


@pytest.mark.parametrize("num_layers", [2, 3, 5, 8])
@pytest.mark.parametrize("y", [0.5, 1.0, 3.0])
def test_the_largest_eigenvalue_of_a_balanced_chain_at_its_minimum(num_layers: int, y: float) -> None:
    """All second derivatives of ``(prod w - y)^2 / 2`` there are ``y^(2 - 2/L)``."""
    w = torch.full((num_layers,), y ** (1 / num_layers), dtype=torch.float64)
    matvec = hf.hvp(lambda w: (w.prod() - y).square() / 2, w)
    found = hf.eigsh(matvec, hf.gaussian(w, 1)[0], which="LA").values
    same(found, torch.tensor([num_layers * y ** (2 - 2 / num_layers)], dtype=torch.float64))
    assert rank(hf.dense(matvec, w)) == 1


# Cross-entropy


@pytest.mark.parametrize("num_classes", [2, 3, 5])
def test_softmax_regression_at_zero(num_classes: int) -> None:
    """``(I - 11'/C) / C`` kron the second moments of the inputs: each of their eigenvalues over C, C - 1 times."""
    x, y = normal(20, 4), classes(20, num_classes)
    w = torch.zeros(num_classes, 4, dtype=torch.float64)
    matvec = hf.hvp(lambda w: F.cross_entropy(x @ w.T, y), w)
    moments = x.T @ x / len(x)
    centering = torch.eye(num_classes, dtype=torch.float64) - 1 / num_classes
    same(hf.dense(matvec, w), torch.kron(centering / num_classes, moments))
    expected = (torch.linalg.eigvalsh(moments) / num_classes).repeat_interleave(num_classes - 1)
    same(torch.linalg.eigvalsh(hf.dense(matvec, w))[4:], expected)
    largest = hf.eigsh(matvec, hf.gaussian(w, 1)[0], which="LA", rtol=1e-10).values
    same(largest, expected[-1:])


@pytest.mark.parametrize(("num_samples", "num_classes"), [(3, 3), (2, 4), (40, 3)])
def test_rank_of_the_gauss_newton_matrix_and_its_tangent_kernel(num_samples: int, num_classes: int) -> None:
    """``J'HJ`` has the nonzero eigenvalues of the tangent kernel ``H^1/2 JJ' H^1/2``: at most N (C - 1) of them."""
    model = seeded(lambda: nn.Sequential(nn.Linear(2, 3, bias=False), nn.Tanh(), nn.Linear(3, num_classes)))
    forward, params = hf.stateless(model)
    x, y = normal(num_samples, 2), classes(num_samples, num_classes)
    outer = hf.dense(hf.ggnvp(forward, F.cross_entropy, params, (x, y)), params)
    flat, unravel = hf.tree.ravel(params)
    jacobian = torch.autograd.functional.jacobian(lambda p: forward(unravel(p), x).flatten(), flat)
    p = forward(params, x).softmax(1)
    curvature = torch.block_diag(*(torch.diag(q) - torch.outer(q, q) for q in p)) / num_samples
    values, vectors = torch.linalg.eigh(curvature)
    root = vectors * values.clamp(min=0).sqrt()
    kernel = torch.linalg.eigvalsh(root.T @ jacobian @ jacobian.T @ root)
    size = min(len(flat), num_samples * (num_classes - 1))
    # A shift of all logits by the same number: one direction less of the biases, and of every hidden unit.
    assert rank(outer) == min(size, len(flat) - 4)
    shared = min(len(flat), len(kernel))
    same(torch.linalg.eigvalsh(outer)[-shared:], kernel[-shared:])


def test_a_shift_of_all_logits_has_no_curvature() -> None:
    loss, params, batch, _ = problem("mlp")
    v = hf.tree.map(torch.zeros_like, params)
    v["2.weight"] = normal(5).expand(3, 5).clone()
    v["2.bias"] = torch.full((3,), 0.7, dtype=torch.float64)
    product = hf.hvp(loss, params, batch)(v)
    assert float(hf.tree.norm(product)) <= 1e-12


# Invariances: of a loss that stays the same along a flow of parameters, the derivative of that


def gradient(loss: Any, params: dict[str, Tensor], *args: Any) -> dict[str, Tensor]:
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    return dict(zip(params, torch.autograd.grad(loss(leaves, *args), list(leaves.values())), strict=True))


def layer_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5, bias=False), nn.LayerNorm(5, eps=0.0), nn.Tanh(), nn.Linear(5, 3))


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5, eps=1e-300), nn.Tanh(), nn.Linear(5, 3))


@pytest.mark.parametrize("build", [layer_norm, batch_norm])
def test_weights_before_a_norm_have_no_scale(build: Any) -> None:
    """``L(c w) = L(w)`` for all c > 0: ``g'w = 0``, and the derivative of that, ``H w = -g`` in w and 0 elsewhere."""
    loss, params = hf.functionalize(seeded(build).train(), nn.CrossEntropyLoss())
    batch = (normal(8, 4), classes(8, 3))
    v = {**hf.tree.map(torch.zeros_like, params), "0.weight": params["0.weight"]}
    g = gradient(loss, params, batch)
    assert abs(float((g["0.weight"] * params["0.weight"]).sum())) <= 1e-12
    expected = {**hf.tree.map(torch.zeros_like, params), "0.weight": -g["0.weight"]}
    same(hf.hvp(loss, params, batch)(v), expected)


def test_rescaling_relu_units_turns_the_gradient() -> None:
    """``L(e^{tA} w) = L(w)``, A being 1 into a unit and -1 out of it: ``H A w = -A g``."""
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)))
    loss, params = hf.functionalize(model, nn.CrossEntropyLoss())
    batch = (normal(10, 4), classes(10, 3))
    scales = normal(6)

    def generator(p: dict[str, Tensor]) -> dict[str, Tensor]:
        into = {"0.weight": scales[:, None] * p["0.weight"], "0.bias": scales * p["0.bias"]}
        return {**into, "2.weight": -scales * p["2.weight"], "2.bias": torch.zeros_like(p["2.bias"])}

    product = hf.hvp(loss, params, batch)(generator(params))
    turned = hf.tree.scale(-1.0, generator(gradient(loss, params, batch)))
    same(product, turned)


# Without derivatives


@pytest.mark.parametrize("net", ["mlp", "layer_norm", "lstm"])
def test_the_trace_agrees_with_losses_alone(net: str) -> None:
    """``E[L(w + t z) + L(w - t z) - 2 L(w)] / t^2`` is the trace, as the step goes to zero."""
    loss, params, batch, _ = problem(net)
    step, here = 1e-3, loss(params, batch)

    def second_difference(z: Any) -> Tensor:
        around = [loss(hf.tree.add(params, z, c), batch) for c in (step, -step)]
        return (sum(around) - 2 * here) / step**2

    samples = torch.stack([second_difference(z) for z in hf.rademacher(params, 100, seed=5)])
    estimate = hf.hutchinson(hf.hvp(loss, params, batch), hf.rademacher(params, 100, seed=6))
    error = (samples.var() / len(samples) + estimate.stderr**2).sqrt()
    assert abs(samples.mean() - estimate.mean) <= 4 * error
    # The same probes, the same samples.
    again = hf.hutchinson(hf.hvp(loss, params, batch), hf.rademacher(params, 100, seed=5))
    torch.testing.assert_close(samples.mean(), again.mean, rtol=1e-4, atol=1e-5)
