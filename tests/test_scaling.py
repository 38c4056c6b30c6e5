"""Scaled matrices against dense ones, and their eigenvalues against NumPy's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from nets import classes, normal, seeded
from spectra import LIKES, SPECTRA, N, on, symmetric
from torch import Tensor, nn

import hessfn as hf


def entries(low: float = 0.3, high: float = 3.0, seed: int = 4) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).uniform(low, high, N))


@pytest.mark.parametrize("like", LIKES.values(), ids=LIKES)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_it_is_the_matrix_with_its_rows_and_columns_scaled(spectrum: str, like: Any) -> None:
    A, s = symmetric(SPECTRA[spectrum]), entries()
    scale = hf.tree.ravel(like)[1](s)
    dense = hf.dense(hf.scaled(on(A, like), scale), like)
    assert torch.allclose(dense, s[:, None] * A * s, rtol=1e-13, atol=1e-13 * float(A.abs().max()))


def test_its_eigenvalues_are_those_of_the_preconditioned_matrix() -> None:
    A, P = symmetric(SPECTRA["indefinite"]), entries(1e-3, 10.0)
    exact = np.linalg.eigvals((A / P[:, None]).numpy())  # of P^-1 A, which is not symmetric
    assert abs(exact.imag).max() < 1e-9 * abs(exact).max()
    pairs = hf.eigsh(hf.scaled(lambda v: A @ v, P.rsqrt()), normal(N), k=3, which="LA", rtol=1e-10)
    assert np.allclose(pairs.values, np.sort(exact.real)[::-1][:3], rtol=1e-9)
    for value, w in zip(pairs.values, pairs.vectors * P.rsqrt(), strict=True):  # and its eigenvectors, scaled
        assert torch.linalg.norm(A @ w - value * P * w) < 1e-7 * torch.linalg.norm(A @ w)


def test_a_zero_takes_a_row_out_and_a_sign_turns_it() -> None:
    A, s = symmetric(SPECTRA["flat"]), torch.ones(N, dtype=torch.float64)
    s[3], s[5] = 0.0, -1.0
    dense = hf.dense(hf.scaled(lambda v: A @ v, s), s)
    assert not dense[3].any() and not dense[:, 3].any()
    assert torch.allclose(dense[5, 7:], -A[5, 7:], rtol=1e-14)


def test_leaves_meet_by_name_and_keep_their_dtypes() -> None:
    A = symmetric(SPECTRA["decaying"])
    like = {"w": torch.zeros(7, 8), "b": torch.zeros(4)}
    s = entries()
    scale = {"b": s[56:], "w": s[:56].reshape(7, 8)}  # another order, float64
    v = {"w": normal(7, 8).float(), "b": normal(4).float()}

    def matvec(x: dict[str, Tensor]) -> dict[str, Tensor]:
        assert all(leaf.dtype == torch.float32 for leaf in x.values())
        flat = A @ torch.cat([x["w"].reshape(-1), x["b"]]).double()
        return {"b": flat[56:].float(), "w": flat[:56].reshape(7, 8).float()}

    product = hf.scaled(matvec, scale)(v)
    assert list(product) == list(v) and all(leaf.dtype == torch.float32 for leaf in product.values())
    flat, _ = hf.tree.ravel(v)
    exact = s * (A @ (s * flat.double()))
    assert torch.allclose(hf.tree.ravel(product)[0].double(), exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))
    assert hf.tree.names(product) == hf.tree.names(like)


def test_it_runs_under_vmap_over_scales_and_is_differentiated_by_them() -> None:
    A, v, u = symmetric(SPECTRA["indefinite"]), normal(N), normal(N, seed=5)
    scales = torch.stack([entries(seed=i) for i in range(3)])

    def form(s: Tensor) -> Tensor:
        return u @ hf.scaled(lambda x: A @ x, s)(v)

    together = torch.func.vmap(form)(scales)
    assert torch.allclose(together, torch.einsum("bi,ij,bj->b", u * scales, A, v * scales), rtol=1e-12)
    s = scales[0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(form(s), s)
    assert torch.allclose(slope, u * (A @ (s * v)) + v * (A @ (s * u)), rtol=1e-12)


def test_a_hessian_is_scaled_like_any_matrix() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)))
    loss, params = hf.functionalize(model, nn.CrossEntropyLoss())
    batch = normal(6, 4), classes(6, 2)
    flat, unravel = hf.tree.ravel(params)
    exact = torch.autograd.functional.hessian(lambda x: loss(unravel(x), batch), flat)
    s = entries()[: len(flat)]
    dense = hf.dense(hf.scaled(hf.hvp(loss, params, batch), unravel(s)), params)
    assert torch.allclose(dense, s[:, None] * exact * s, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ({"w": torch.ones(2)}, r"missing \['b'\]"),
        ({"w": torch.ones(2), "b": torch.ones(1), "c": torch.ones(1)}, r"unexpected \['c'\]"),
        ({"w": torch.ones(2), "b": torch.ones(2)}, r"leaf 'b' of scale has shape \(2,\), but \(1,\) in the vector"),
        (
            {"w": torch.ones(2, device="meta"), "b": torch.ones(1, device="meta")},
            "'w' of scale is on meta, the vector on",
        ),
    ],
)
def test_a_scale_that_does_not_match_is_an_error(scale: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf.scaled(lambda v: v, scale)({"w": torch.ones(2), "b": torch.ones(1)})


@pytest.mark.parametrize(
    ("matvec", "scale", "message"),
    [
        (lambda v: v, {"w": torch.tensor([1.0, torch.nan])}, "scale is not finite in leaf 'w'"),
        (lambda v: v, {"w": torch.tensor([1.0, torch.inf])}, "scale is not finite in leaf 'w'"),
        (lambda v: v, 2.0, "scale is 2.0, not a tensor"),
        (lambda v: v, torch.ones(2, dtype=torch.int64), "torch.int64, not floating-point"),
        (torch.ones(2, 2), torch.ones(2), "lambda v: A @ v"),
    ],
)
def test_what_is_no_scale_is_an_error_before_any_product(matvec: Any, scale: Any, message: str) -> None:
    with pytest.raises(hf.HessfnError, match=message):
        hf.scaled(matvec, scale)
