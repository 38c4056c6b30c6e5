"""The curvature along an update, from losses alone, against closed forms, SciPy's root finder and dense Hessians."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from nets import normal, seeded
from scipy.optimize import brentq
from spectra import LIKES, SPECTRA, N, symmetric
from torch import Tensor, nn

import hessfn as hf


def quadratic(spectrum: str, like: Any) -> tuple[Callable[[Any], Tensor], Any, Any, float]:
    """A loss, its point, its downhill direction there and ``d'Hd / -g'd``, by NumPy."""
    A, x = symmetric(SPECTRA[spectrum].abs()), normal(N)
    unravel = hf.tree.ravel(like)[1]
    g = A.numpy() @ x.numpy()
    d = -g + 0.1 * np.linalg.norm(g) / N**0.5 * normal(N, seed=7).numpy()

    def loss(w: Any) -> Tensor:
        flat = hf.tree.ravel(w)[0]
        return flat @ (A @ flat) / 2 + 1.0

    return loss, unravel(x), unravel(torch.from_numpy(d)), float(d @ A.numpy() @ d / -(g @ d))


@pytest.mark.parametrize("like", LIKES.values(), ids=LIKES)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_along_a_quadratic_it_is_the_directional_curvature(spectrum: str, like: Any) -> None:
    loss, x, d, exact = quadratic(spectrum, like)
    found = hf.critical_sharpness(loss, x, d)
    assert abs(float(found.value) / exact - 1) < 1e-9
    assert found.converged and 0 < found.error < 0.02 * exact and found.num_losses <= 9
    low, high = found.steps.tolist()
    assert low < 2 / exact <= high and high - low <= 0.02 * high


@pytest.mark.parametrize("factor", [1e-4, 0.01, 0.2, 0.5, 1.0, 1.7, 6.0, 40.0, 400.0])
def test_it_is_found_from_a_first_step_of_any_size(factor: float) -> None:
    loss, x, d, exact = quadratic("indefinite", LIKES["tensor"])
    found = hf.critical_sharpness(loss, x, d, step=factor * 2 / exact)
    assert abs(float(found.value) / exact - 1) < 1e-9 and found.converged
    assert found.num_losses <= (5 if 0.1 < factor < 8 else 9)


def test_every_loss_that_is_taken_is_counted() -> None:
    loss, x, d, _ = quadratic("decaying", LIKES["dict"])
    calls = []

    def counted(w: Any, shift: float) -> Tensor:
        calls.append(w)
        return loss(w) + shift

    found = hf.critical_sharpness(counted, x, d, 3.0)
    assert found.num_losses == len(calls) and found.num_losses.dtype == torch.int64
    assert calls[0] is x  # where the loss begins


# In the unit of the step, with a first root; the last two are flat or concave before they rise.
CURVES: dict[str, Callable[[Any], Any]] = {
    "quartic": lambda t: -t + t**2 + 10 * t**4,
    "cubic": lambda t: -t + t**3,
    "exponential": lambda t: torch.special.expm1(3 * t) - 9 * t,
    "kink": lambda t: (t - 1).abs() - 1,
    "root": lambda t: t - (t + 1e-12).sqrt(),
    "logarithm": lambda t: t - torch.log1p(20 * t),
    "concave": lambda t: -0.2 * t - t**2 + t**4,
    "flat": lambda t: -t + t**6,
}


@pytest.mark.parametrize("factor", [None, 0.1, 0.3, 0.9, 1.1, 3.0, 10.0])
@pytest.mark.parametrize("name", CURVES)
def test_the_error_holds_the_root_of_any_curve(name: str, factor: float | None) -> None:
    def curve(t: Any) -> Tensor:
        return CURVES[name](torch.as_tensor(t, dtype=torch.float64))

    ahead = next(t for t in np.geomspace(0.05, 40, 400) if curve(t) > 0)
    root = brentq(lambda t: float(curve(t)), ahead / 1.1, ahead, xtol=1e-14)
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    for max_losses in (5, 9, 40):
        found = hf.critical_sharpness(curve, zero, one, step=factor and factor * root, max_losses=max_losses)
        assert abs(found.value - 2 / root) <= found.error * (1 + 1e-9)
        low, high = found.steps.tolist()
        assert low <= root * (1 + 1e-12) and root <= high * (1 + 1e-12)
        assert 2 / low <= (found.value + found.error) * (1 + 1e-12) if low else found.error == math.inf
        assert 2 / high >= (found.value - found.error) * (1 - 1e-12)
        assert found.num_losses <= max_losses
    assert found.converged and found.error < 0.02 * found.value


def test_what_a_search_takes() -> None:
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)

    def taken(curve: Any, step: float) -> int:
        found = hf.critical_sharpness(curve, zero, one, step=step, max_losses=40)
        assert found.converged
        return int(found.num_losses)

    counts = []
    for curve in CURVES.values():
        root = 2 / float(hf.critical_sharpness(curve, zero, one, max_losses=40).value)
        counts += [taken(curve, factor * root) for factor in np.geomspace(0.1, 10, 9)]
    assert np.mean(counts) < 8.2 and max(counts) <= 16
    # Behind a wall no slope says where it stands: then the ends are halved.
    assert max(taken(lambda t: torch.where(t < 1, -t, 1e6 * t), factor) for factor in (0.3, 0.9, 1.1, 3.0)) <= 28


def test_steps_so_small_that_rounding_hides_the_slope_are_left_at_once() -> None:
    loss, x, d, exact = quadratic("decaying", LIKES["tensor"])
    counts = []
    for offset in 10 ** np.arange(4, 8, 0.25):

        def coarse(w: Tensor, offset: float = offset) -> Tensor:
            return (loss(w.double()) + offset).float()

        for step in (1e-8, 1e-7, 1e-6, 1e-5, 1e-4):
            found = hf.critical_sharpness(coarse, x.float(), d.float(), step=step * 2 / exact, max_losses=40)
            counts.append(int(found.num_losses))
    assert np.mean(counts) < 11


def net() -> tuple[Any, Any, tuple[Tensor, Tensor]]:
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)))
    loss, params = hf.functionalize(model, nn.MSELoss())
    return loss, params, (normal(30, 5), normal(30, 2, seed=9))


@pytest.mark.parametrize("seed", range(3))
def test_of_a_net_it_is_where_scipy_finds_the_loss_again(seed: int) -> None:
    loss, params, batch = net()
    flat, unravel = hf.tree.ravel(params)
    flat = flat + 0.3 * normal(len(flat), seed=seed)

    def dense(w: Tensor) -> Tensor:
        return loss(unravel(w), batch)

    (g,) = torch.autograd.grad(dense(w := flat.clone().requires_grad_()), w)

    def rise(t: float) -> float:
        return float(dense(flat - t * g) - dense(flat))

    eta = next(t for t in np.geomspace(0.01, 1000, 600) if rise(t) > 0)
    eta = brentq(rise, eta / 1.03, eta, xtol=1e-12)
    found = hf.critical_sharpness(loss, unravel(flat), unravel(-g), batch, step=0.1)
    assert found.converged and abs(float(found.value) - 2 / eta) < min(float(found.error), 1e-3 * 2 / eta)


def test_near_a_minimum_of_a_net_it_is_the_curvature_along_the_gradient() -> None:
    loss, params, (inputs, _) = net()
    forward, _ = hf.stateless(seeded(lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))))
    batch = inputs, forward(params, inputs)  # a minimum where it is
    flat, unravel = hf.tree.ravel(params)

    def dense(w: Tensor) -> Tensor:
        return loss(unravel(w), batch)

    H = torch.autograd.functional.hessian(dense, flat)
    values, vectors = np.linalg.eigh(H.numpy())
    for v, exact in ((vectors[:, -1], values[-1]), (vectors[:, -1] + vectors[:, -3], None)):
        near = flat + 1e-4 * torch.from_numpy(v)
        (g,) = torch.autograd.grad(dense(x := near.clone().requires_grad_()), x)
        found = hf.critical_sharpness(loss, unravel(near), unravel(-g), batch)
        along = float(g @ H @ g / (g @ g))
        assert abs(float(found.value) / along - 1) < 1e-3
        assert exact is None or abs(float(found.value) / exact - 1) < 1e-3  # along the top eigenvector: the sharpness


def test_in_float32_the_error_holds_what_rounding_does() -> None:
    loss, x, d, exact = quadratic("decaying", LIKES["tensor"])
    worst = 0.0
    for offset in 10.0 ** np.arange(0, 11, 0.5):  # a loss that is large beside what it falls by

        def coarse(w: Tensor, offset: float = offset) -> Tensor:
            return (loss(w.double()) + offset).float()

        found = hf.critical_sharpness(coarse, x.float(), d.float())
        miss = abs(float(found.value) - exact)
        assert miss <= found.error
        worst = max(worst, miss / exact)
    assert worst > 0.05  # or nothing was asked of the rounding


def test_uphill_and_straight_down_it_says_what_it_knows() -> None:
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    up = hf.critical_sharpness(lambda w: w + w * w, zero, one)
    assert up.error == math.inf and not up.converged and up.steps[0] == 0 and up.value == 2 / up.steps[1]
    down = hf.critical_sharpness(lambda w: -w, zero, one)
    assert down.value == down.error == 1 / down.steps[0] and down.steps[1] == math.inf and not down.converged
    assert up.num_losses == down.num_losses == 9


def test_a_loss_that_is_not_finite_far_away_has_risen() -> None:
    one = torch.ones((), dtype=torch.float64)
    for far in (torch.nan, torch.inf):
        found = hf.critical_sharpness(lambda w, far=far: torch.where(w < 3, w * w, far), one, -one, step=1.9)
        assert abs(float(found.value) - 1) < 1e-9
    wall = hf.critical_sharpness(lambda w: torch.where(w > -0.6, w, torch.nan), one, -one, max_losses=40)
    assert wall.converged and abs(wall.value - 2 / 1.6) <= wall.error


def test_under_vmap_and_under_derivatives_it_is_an_error() -> None:
    x = torch.ones(3, 2).double()
    with pytest.raises(ValueError, match="call it in a loop"):
        torch.func.vmap(lambda w: hf.critical_sharpness(lambda u: u.square().sum(), w, -w).value)(x)
    for derive in (torch.func.grad, torch.func.jacfwd):
        with pytest.raises(ValueError, match="has no derivative"):
            derive(lambda w: hf.critical_sharpness(lambda u: (u**2).sum(), w, -w).value)(x[0])
    w = x[0].clone().requires_grad_()
    with pytest.raises(ValueError, match="has no derivative"):
        hf.critical_sharpness(lambda u: (u**2).sum(), w, -w)
    with torch.no_grad():
        assert abs(hf.critical_sharpness(lambda u: (u**2).sum(), w, -w).value - 1) < 1e-9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"direction": {"w": torch.ones(3)}}, r"leaf 'w' of the direction has shape \(3,\), but \(2,\)"),
        ({"direction": {"v": torch.ones(2)}}, "missing"),
        ({"direction": {"w": torch.zeros(2)}}, "the direction has norm 0.0"),
        ({"loss": lambda w: w["w"]}, r"the loss is a tensor of shape \(2,\), not one real number"),
        ({"loss": lambda w: w["w"].sum() * torch.nan}, "the loss is nan at params"),
        ({"loss": 3.0}, "loss is 3.0, not a function"),
        ({"step": 0.0}, "step=0.0 must be positive"),
        ({"step": math.inf}, "step=inf must be positive and finite"),
        ({"rtol": 0.0}, "rtol=0.0 must be positive"),
        ({"max_losses": 2}, "max_losses=2 at least 3"),
    ],
)
def test_what_is_out_of_range_is_an_error(change: dict[str, Any], message: str) -> None:
    given = {
        "loss": lambda w: w["w"].square().sum(),
        "params": {"w": torch.ones(2)},
        "direction": {"w": -torch.ones(2)},
    }
    with pytest.raises(hf.HessfnError, match=message):
        hf.critical_sharpness(**{**given, **change})
