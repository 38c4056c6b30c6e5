"""The followed ends of a spectrum: right at each call, never missed, and cheap where little has changed."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from spectra import LIKES, SPECTRA, N, on, symmetric
from torch import Tensor, nn

import hessfn as hf

ENDS = {
    "LA": lambda x, k: x.flip(0)[:k],
    "SA": lambda x, k: x[:k],
    "LM": lambda x, k: x[x.abs().argsort(descending=True)][:k],
    "BE": lambda x, k: torch.cat([x[: k // 2], x[len(x) - k + k // 2 :]]),
}


def drifting(spectrum: Tensor, steps: int, size: float) -> Iterator[Tensor]:
    """A matrix, and then others, each off from the one before by ``size`` of its norm."""
    matrix = symmetric(spectrum)
    for i in range(steps):
        yield matrix
        change = symmetric(torch.randn(N, dtype=torch.float64, generator=torch.Generator().manual_seed(i)), seed=i + 1)
        matrix = matrix + size * spectrum.abs().max() * change / torch.linalg.matrix_norm(change, 2)


@pytest.mark.parametrize(
    ("spectrum", "which"),
    [
        ("decaying", "LA"),
        ("negative", "SA"),
        ("rank-deficient", "LA"),
        ("clustered", "LM"),
        pytest.param("indefinite", "BE", marks=pytest.mark.slow),
        pytest.param("indefinite", "LM", marks=pytest.mark.slow),
        pytest.param("flat", "LA", marks=pytest.mark.slow),
        pytest.param("flat", "BE", marks=pytest.mark.slow),
    ],
)
def test_each_call_finds_the_ends_of_its_own_matrix(spectrum: str, which: Any) -> None:
    like, state = LIKES["nested"], None
    for matrix in drifting(SPECTRA[spectrum], 3, 0.02):
        pairs, state = hf.follow(on(matrix, like), state, like=like, k=3, which=which, rtol=1e-6)
        exact = ENDS[which](torch.linalg.eigvalsh(matrix), 3)
        assert pairs.converged.all()
        assert (pairs.values - exact).abs().max() <= 1e-6 * exact.abs().max()
        flat = torch.stack([hf.tree.ravel(hf.tree.map(lambda x: x[i], pairs.vectors))[0] for i in range(3)])  # noqa: B023
        torch.testing.assert_close(flat @ flat.T, torch.eye(3, dtype=torch.float64), atol=1e-10, rtol=0)
        residuals = torch.linalg.vector_norm(flat @ matrix - pairs.values[:, None] * flat, dim=1)
        assert (residuals <= pairs.residuals * (1 + 1e-6) + 1e-12).all()


@pytest.mark.parametrize("new", [10.3, 12.0, 40.0])
@pytest.mark.parametrize("n", [400, pytest.param(20000, marks=pytest.mark.slow)])
def test_a_new_top_orthogonal_to_all_that_was_followed_is_found(n: int, new: float) -> None:
    before = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before[0] = 10.0
    after = before.clone()
    after[1] = new
    for seed in range(3):
        _, state = hf.follow(lambda v: before * v, like=before, seed=100 * seed, rtol=1e-9)
        assert state.vectors[0, 1].abs() < 1e-9
        pairs, _ = hf.follow(lambda v: after * v, state)
        assert abs(pairs.values[0] - new) <= 0.01 * new
        # The vectors alone are exact for an eigenvalue that is no longer the top: nothing in the result says so.
        blind, _ = hf.follow(lambda v: after * v, state, search=False)
        assert abs(blind.values[0] - 10) < 1e-9 and blind.converged.all() and blind.outside is None


def test_a_fixed_number_of_products_finds_a_new_top_that_no_power_of_the_matrix_leads_to() -> None:
    first, second = list(drifting(SPECTRA["decaying"], 2, 0.01))
    before = torch.block_diag(first, torch.zeros(20, 20, dtype=torch.float64))
    after = torch.block_diag(second, 60 * torch.diag(torch.linspace(0, 1, 20, dtype=torch.float64)))
    _, state = hf.follow(lambda v: before @ v, like=before[0], rtol=1e-12)
    pairs, _ = hf.follow(lambda v: after @ v, state, rtol=None, max_matvecs=15)
    assert abs(pairs.values[0] - 60) <= 0.6


def test_where_little_has_changed_a_call_is_a_few_products() -> None:
    for k in (1, 3):
        plain: list[int] = []
        searched: list[int] = []
        start: list[int] = []
        states: list[Any] = [None, None]
        spectrum = torch.cat([torch.rand(N - 3, dtype=torch.float64), torch.tensor([4.0, 7.0, 10.0]).double()])
        for matrix in drifting(spectrum, 6, 1e-4):
            for i, (search, counts) in enumerate([(False, plain), (True, searched)]):
                like = LIKES["dict"]
                pairs, states[i] = hf.follow(on(matrix, like), states[i], like=like, k=k, search=search)
                counts.append(int(pairs.num_matvecs))
            start.append(searched[0])
        assert plain[1:] == [k + 1] * 5  # a product for each vector, and one that checks
        assert max(searched[1:]) <= k + 7 and max(searched[1:]) < start[0]


def test_along_a_training_the_top_of_the_dense_hessian_is_never_missed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4)).double()
    inputs, targets = torch.randn(80, 6, dtype=torch.float64), torch.randint(4, (80,))
    criterion, optimizer = nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    loss, params = hf.functionalize(model, criterion)
    flat, unravel = hf.tree.ravel(params)
    state, spent = None, []
    for step in range(60):
        if step % 12 == 0:
            pairs, state = hf.follow(hf.hvp(loss, params, (inputs, targets)), state, like=params, k=2)
            at = torch.cat([p.detach().reshape(-1) for p in params.values()])
            dense = torch.autograd.functional.hessian(lambda x: loss(unravel(x), (inputs, targets)), at)
            exact = torch.linalg.eigvalsh(dense).flip(0)[:2]
            assert ((pairs.values - exact).abs() <= 0.01 * exact.abs()).all(), step
            assert exact[1] >= pairs.values[1] - pairs.residuals[1]
            spent.append(int(pairs.num_matvecs))
        optimizer.zero_grad()
        criterion(model(inputs), targets).backward()
        optimizer.step()
    assert len(flat) == len(at) and max(spent) < len(flat) / 2


def test_outside_holds_all_other_eigenvalues() -> None:
    state = None
    for matrix in drifting(SPECTRA["indefinite"], 10, 0.05):
        pairs, state = hf.follow(on(matrix, LIKES["tensor"]), state, like=LIKES["tensor"], k=2)
        others = torch.linalg.eigvalsh(matrix)[:-2]
        assert pairs.outside[0] <= others[0] and others[-1] <= pairs.outside[1]


def test_a_state_comes_back_from_a_file_and_goes_on_to_the_bit() -> None:
    like, state = {"w": torch.zeros(N, dtype=torch.float64)}, None
    matrices = list(drifting(SPECTRA["decaying"], 4, 0.01))
    for matrix in matrices[:2]:
        _, state = hf.follow(on(matrix, like), state, like=like, k=2)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    for matrix in matrices[2:]:
        one, state = hf.follow(on(matrix, like), state, k=2)
        other, loaded = hf.follow(on(matrix, like), loaded, k=2)
        assert all(torch.equal(a, b) for a, b in zip(*map(hf.tree.leaves, (one, other)), strict=True))
    like = {"w": like["w"].float()}
    moved, _ = hf.follow(on(matrix.float(), like), loaded, like=like, k=2)
    assert moved.vectors["w"].dtype == torch.float32


def test_directions_differ_from_call_to_call_and_by_seed() -> None:
    seen: list[Tensor] = []

    def matvec(v: Tensor) -> Tensor:
        seen.append(v.clone())
        return spectrum * v

    spectrum, state = torch.linspace(0, 1, N, dtype=torch.float64), None
    firsts = []
    for seed in (0, 1):
        hf.follow(matvec, like=spectrum, seed=seed)
        firsts.append(seen[0])
        seen.clear()
    assert (firsts[0] @ firsts[1]).abs() < 0.9
    seeds = []
    for _ in range(3):
        _, state = hf.follow(matvec, state, like=spectrum)
        seeds.append(int(state.seed))
    assert all(b == a + 1 for a, b in pairwise(seeds))


def test_a_fixed_number_of_products_runs_under_vmap_and_has_derivatives() -> None:
    matrices = torch.stack(list(drifting(SPECTRA["decaying"], 3, 0.01)))
    like = LIKES["tensor"]
    _, state = hf.follow(on(matrices[0], like), like=like, k=2)

    def top(matrix: Tensor) -> Tensor:
        return hf.follow(lambda v: matrix @ v, state, k=2, rtol=None, max_matvecs=30)[0].values

    one_by_one = torch.stack([top(matrix) for matrix in matrices])
    torch.testing.assert_close(torch.func.vmap(top)(matrices), one_by_one, atol=1e-9, rtol=1e-9)
    exact = torch.linalg.eigvalsh(matrices).flip(-1)[:, :2]
    torch.testing.assert_close(one_by_one, exact, rtol=1e-6, atol=0)
    gradient = torch.func.grad(lambda matrix: top(matrix)[0])(matrices[1])
    vector = torch.linalg.eigh(matrices[1]).eigenvectors[:, -1]
    torch.testing.assert_close((gradient + gradient.T) / 2, torch.outer(vector, vector), atol=1e-4, rtol=0)

    def twice(matrix: Tensor) -> Tensor:
        _, state = hf.follow(lambda v: matrix @ v, like=like, rtol=None, max_matvecs=20)
        return hf.follow(lambda v: matrix @ v, state, rtol=None, max_matvecs=20)[0].values

    torch.testing.assert_close(torch.func.vmap(twice)(matrices)[:, 0], exact[:, 0], rtol=1e-6, atol=0)


def test_the_zero_matrix_is_followed_too() -> None:
    state = None
    for factor in (1.0, 0.0, 0.0, 2.0):
        matrix = factor * symmetric(SPECTRA["decaying"])
        pairs, state = hf.follow(lambda v: matrix @ v, state, like=LIKES["tensor"], k=2)  # noqa: B023
        exact = torch.linalg.eigvalsh(matrix).flip(0)
        torch.testing.assert_close(pairs.values, exact[:2], rtol=0.01, atol=0)
        assert pairs.converged.all() and pairs.outside[1] >= exact[2] and pairs.outside[0] <= exact[-1]


def test_one_dimension_and_all_dimensions() -> None:
    state = None
    for value in (2.0, 3.0):
        pairs, state = hf.follow(lambda v: value * v, state, like=torch.zeros(1))  # noqa: B023
        assert float(pairs.values[0]) == pytest.approx(value)
    state = None
    for matrix in (torch.diag(torch.tensor([1.0, 2.0, 3.0])), torch.diag(torch.tensor([3.0, 1.0, 5.0]))):
        pairs, state = hf.follow(lambda v: matrix @ v, state, like=torch.zeros(3), k=3)  # noqa: B023
        torch.testing.assert_close(pairs.values.float(), matrix.diag().sort(descending=True).values)


def test_what_cannot_be_followed_is_refused() -> None:
    like = {"w": torch.zeros(8)}

    def matvec(v: Any) -> Any:
        return hf.tree.map(lambda x: x * torch.arange(1.0, 9.0), v)

    pairs, state = hf.follow(matvec, like=like, k=2)
    with pytest.raises(ValueError, match="the first call needs like"):
        hf.follow(matvec)
    with pytest.raises(ValueError, match="k=1, but the state follows 2"):
        hf.follow(matvec, state)
    with pytest.raises(ValueError, match="the state is a tree of other leaves than like: missing"):
        hf.follow(matvec, state, like={"v": torch.zeros(8)}, k=2)
    with pytest.raises(ValueError, match="has shape"):
        hf.follow(matvec, state, like={"w": torch.zeros(9)}, k=2)
    with pytest.raises(ValueError, match="a tree of other leaves"):
        hf.follow(lambda v: {"v": v["w"]}, state, k=2)
    for wrong in (pairs, (pairs, state), state.vectors):
        with pytest.raises(ValueError, match="give the second of the two"):
            hf.follow(matvec, wrong, k=2)
    with pytest.raises(ValueError, match="which='top' must be one of"):
        hf.follow(matvec, state, k=2, which="top")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed=-1"):
        hf.follow(matvec, like=like, seed=-1)
    with pytest.raises(ValueError, match="give it as max_matvecs"):
        hf.follow(matvec, state, k=2, rtol=None)
