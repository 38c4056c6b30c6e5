"""The diagonal block of every layer: top eigenvalue, Frobenius norm, stable rank, against dense Hessians."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from nets import dense_hessian, normal, problem
from spectra import on, symmetric
from torch import Tensor

import hessfn as hf
from hessfn.core import tree


def blocks(dense: Tensor, like: Any) -> dict[str, Tensor]:
    """The diagonal block of every leaf."""
    sizes = [leaf.numel() for leaf in tree.leaves(like)]
    ends = list(itertools.accumulate(sizes))
    return {
        name: dense[end - size : end, end - size : end]
        for name, size, end in zip(tree.names(like), sizes, ends, strict=True)
    }


def top(block: Tensor) -> Tensor:
    values = torch.linalg.eigvalsh(block)
    return values[values.abs().argmax()]


@pytest.mark.parametrize("net", ["mlp", "conv", "batch_norm", "attention"])
@pytest.mark.parametrize("given", [True, False])
def test_tops_are_those_of_the_dense_blocks(net: str, given: bool) -> None:
    loss, params, batch, _ = problem(net)
    dense = dense_hessian(loss, params, batch)
    matvec = on(dense, params)
    pairs = hf.eigsh(matvec, hf.gaussian(params, 1)[0], k=5, keep_all=True) if given else None
    found = hf.block_tops(matvec, params, eigenpairs=pairs, rtol=1e-4, max_matvecs=60)
    for name, block in blocks(dense, params).items():
        exact = top(block)
        assert (found.values[name] - exact).abs() <= found.residuals[name] + 1e-12, name
        assert found.converged[name] and found.residuals[name] <= 1e-4 * exact.abs() + 1e-12, name
    assert set(found.values) == set(params)


def outlying(seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Three leaves, with few eigenvalues far out, as nets have them: their vectors live in all leaves."""
    like = {"a": torch.zeros(30).double(), "b": torch.zeros(5, 8).double(), "c": torch.zeros(10).double()}
    values = torch.cat([torch.tensor([100.0, 60.0, 30.0]), torch.linspace(-1, 1, 77)])
    return symmetric(values, seed), like


def test_known_pairs_save_products() -> None:
    spent = {True: 0, False: 0}
    for seed in range(5):
        dense, like = outlying(seed)
        pairs = hf.eigsh(on(dense, like), hf.gaussian(like, 1)[0], k=3)
        for given in spent:
            found = hf.block_tops(on(dense, like), like, eigenpairs=pairs if given else None)
            spent[given] += int(found.num_matvecs)
            for name, block in blocks(dense, like).items():
                assert (found.values[name] - top(block)).abs() <= 1e-3 * top(block)
    assert spent[True] <= 0.8 * spent[False]


def test_what_the_pairs_have_not_seen_is_found() -> None:
    """The pairs know of one vector; the top of the block is another, orthogonal to it."""
    like = {"a": torch.zeros(20).double(), "b": torch.zeros(20).double()}
    dense = torch.cat([torch.tensor([5.0, 3.0]), torch.linspace(0, 1, 18), torch.linspace(0, 1, 20)]).double().diag()
    seen = torch.zeros(1, 20).double()
    seen[0, 1] = 1
    vectors = {"a": seen, "b": torch.zeros(1, 20).double()}
    zeros = torch.zeros(1)
    pairs = hf.EigenPairs(torch.tensor([3.0]).double(), vectors, zeros, torch.tensor(1), zeros == 0)
    found = hf.block_tops(on(dense, like), like, "a", eigenpairs=pairs, rtol=1e-3, max_matvecs=20)
    assert abs(found.values["a"] - 5) <= 1e-3 * 5


def test_names_choose_and_the_budget_holds() -> None:
    dense, like = outlying(0)
    asked = []

    def matvec(v: Any) -> Any:
        asked.append(v)
        return on(dense, like)(v)

    found = hf.block_tops(matvec, like, ["a", "c"], rtol=1e-12, max_matvecs=4)
    assert set(found.values) == {"a", "c"} and len(asked) == found.num_matvecs <= 8
    assert not any(found.converged.values())
    assert all(not v["b"].any() for v in asked)
    for name in found.values:  # a residual is true, converged or not
        values = torch.linalg.eigvalsh(blocks(dense, like)[name])
        assert (values - found.values[name]).abs().min() <= found.residuals[name]
    with pytest.raises(hf.HessfnError, match="max_matvecs=2"):
        hf.block_tops(matvec, like, max_matvecs=2)
    with pytest.raises(hf.HessfnError, match="no leaf matches"):
        hf.block_tops(matvec, like, "d")


# Frobenius norms.


def some_pairs(like: Any, n: int, k: int = 2) -> hf.EigenPairs:
    """Orthonormal vectors that are eigenvectors of nothing, with any values."""
    basis = torch.linalg.qr(normal(n, k, seed=9)).Q.T
    rows = torch.stack(list(basis))
    vectors = torch.func.vmap(tree.ravel(like)[1])(rows)
    none = torch.zeros(k)
    return hf.EigenPairs(torch.tensor([2.0, -0.7]).double(), vectors, none, torch.tensor(0), none == 0)


@pytest.mark.parametrize("given", [False, True])
def test_the_mean_over_all_pairs_of_sign_vectors_is_exact(given: bool) -> None:
    like = {"a": torch.zeros(2).double(), "b": torch.zeros(1, 2).double()}
    dense = symmetric(torch.tensor([4.0, -3.0, 2.0, 0.5]), 3)
    unravel = tree.ravel(like)[1]
    signs = [unravel(torch.tensor(s).double()) for s in itertools.product([-1, 1], repeat=4)]
    pairs = some_pairs(like, 4) if given else None
    found = [hf.squared_frobenius_per_leaf(on(dense, like), both, eigenpairs=pairs).mean
             for both in itertools.product(signs, signs)]  # fmt: skip
    for name, block in blocks(dense, like).items():
        mean = torch.stack([x[name] for x in found]).mean()
        assert torch.allclose(mean, block.square().sum(), rtol=1e-10), name


@pytest.mark.slow
@pytest.mark.parametrize("num_probes", [8, 20])
@pytest.mark.parametrize("given", [False, True])
def test_the_error_of_a_squared_norm_holds(num_probes: int, given: bool) -> None:
    dense, like = outlying(1)
    matvec = on(dense, like)
    pairs = hf.eigsh(matvec, hf.gaussian(like, 1)[0], k=3) if given else None
    hits, trials, errors = 0, 300, []
    for seed in range(trials):
        found = hf.squared_frobenius_per_leaf(matvec, hf.rademacher(like, num_probes, seed=seed), eigenpairs=pairs)
        lower, upper = found.interval()
        for name, block in blocks(dense, like).items():
            exact = block.square().sum()
            hits += bool(lower[name] <= exact <= upper[name])
            errors.append(float((found.mean[name] - exact) / exact))
    assert hits >= 0.925 * 3 * trials
    spread = torch.tensor(errors).square().mean().sqrt()
    assert spread <= 0.02 if given else spread >= 0.1  # the pairs make it a number


def test_other_leaves_do_not_enter() -> None:
    like = {"a": torch.zeros(3).double(), "b": torch.zeros(40).double()}
    dense = torch.zeros(43, 43).double()
    dense[:3, :3] = torch.eye(3)
    dense[:3, 3:] = 0.3 * normal(3, 40)
    dense[3:, :3] = dense[:3, 3:].T
    found = hf.squared_frobenius_per_leaf(on(dense, like), hf.rademacher(like, 400))
    rows = hf.squared_row_norms(on(dense, like), hf.rademacher(like, 400)).mean["a"].sum()
    assert abs(found.mean["a"] - 3) <= 4 * found.stderr["a"] <= 3
    assert rows > 10  # what one probe at a time would say


def test_products_that_one_has_will_do() -> None:
    dense, like = outlying(2)
    probes = hf.rademacher(like, 6)
    images = iter([on(dense, like)(z) for z in probes])
    again = hf.squared_frobenius_per_leaf(lambda z: next(images), probes)
    assert again.mean == hf.squared_frobenius_per_leaf(on(dense, like), probes).mean


def test_stable_ranks_are_those_of_the_blocks() -> None:
    dense, like = outlying(4)
    matvec = on(dense, like)
    pairs = hf.eigsh(matvec, hf.gaussian(like, 1)[0], k=3)
    squares = hf.squared_frobenius_per_leaf(matvec, hf.rademacher(like, 20), eigenpairs=pairs)
    tops = hf.block_tops(matvec, like, ["a", "b"], eigenpairs=pairs)
    ranks = hf.stable_ranks(squares, tops)
    assert set(ranks.mean) == {"a", "b"}
    for name in ranks.mean:
        block = blocks(dense, like)[name]
        exact = block.square().sum() / torch.linalg.matrix_norm(block, 2).square()
        assert abs(ranks.mean[name] - exact) <= 4 * ranks.stderr[name] <= 0.2 * exact
    far = tops._replace(residuals=dict.fromkeys(tops.residuals, tops.values["a"] / 10))
    assert hf.stable_ranks(squares, far).stderr["a"] >= 0.2 * ranks.mean["a"]


def test_few_probes_and_other_kinds_are_refused() -> None:
    dense, like = outlying(0)
    matvec = on(dense, like)
    with pytest.raises(hf.HessfnError, match="num >= 2"):
        hf.squared_frobenius_per_leaf(matvec, hf.rademacher(like, 1))
    squares = hf.squared_frobenius_per_leaf(matvec, hf.rademacher(like, 2))
    assert squares.stderr["a"] == torch.inf
    with pytest.raises(hf.HessfnError, match="tops is"):
        hf.stable_ranks(squares, squares)
    with pytest.raises(hf.HessfnError, match="not finite"):
        hf.squared_frobenius_per_leaf(lambda v: tree.scale(torch.nan, v), hf.rademacher(like, 2))
