"""What routines hold at once at their peak is what their docstrings say: one vector more, and a test fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peaks import Peak, peak_in_vectors
from torch import Tensor

import hessfn as hf
from hessfn.core import tree

N = 1 << 20
DIAGONAL = torch.linspace(0, 1, N) ** 8
DIAGONAL[:3] = torch.tensor([5.0, 4.0, 3.0])
LIKE = {"a": torch.zeros(N // 2), "b": torch.zeros(N // 4, 2)}
PARTS = tree.ravel(LIKE)[1](DIAGONAL)
V0, SECOND = hf.gaussian(LIKE, 2)


def times_diagonal(v: dict[str, Tensor]) -> dict[str, Tensor]:
    """A product that takes no memory but that of its result."""
    return tree.map(torch.mul, PARTS, v)


def eigsh(k: int = 1, **options: Any) -> hf.EigenPairs:
    return hf.eigsh(times_diagonal, V0, k, which="LA", **{"basis_size": 8, "max_matvecs": 40, **options})


# Vectors at the peak, the product among them and the start not; as each docstring has it.
PEAKS: dict[str, tuple[float, Callable[[], Any]]] = {
    "slq: 4": (4, lambda: hf.slq(times_diagonal, [V0], 12)),
    "slq, orthogonalize: m + 2": (8, lambda: hf.slq(times_diagonal, [V0], 6, orthogonalize=True)),
    "lanczos: 2m + 2": (14, lambda: hf.lanczos(times_diagonal, V0, 6)),
    "power_iter: 3": (3, lambda: hf.power_iter(times_diagonal, V0, max_matvecs=8)),
    "power_iter, fixed: 3": (3, lambda: hf.power_iter(times_diagonal, V0, max_matvecs=8, rtol=None)),
    "eigsh: basis + 1 + 2": (11, eigsh),
    "eigsh: basis + 1 + k": (13, lambda: eigsh(4)),
    "eigsh, second_start: one more": (14, lambda: eigsh(4, second_start=SECOND)),
    "eigsh, fixed: m + 1 + k": (10, lambda: eigsh(3, rtol=None, max_matvecs=6)),
    "check_matvec: 5": (5, lambda: hf.check_matvec(times_diagonal, LIKE)),
}


@pytest.mark.parametrize("name", PEAKS)
def test_the_peak_is_as_stated(name: str) -> None:
    stated, run = PEAKS[name]
    before = [x for t in (PARTS, V0, SECOND, LIKE) for x in t.values()]
    found = peak_in_vectors(run, *before, vector=4 * N)
    assert stated - 0.5 < found < stated + 0.6


def test_all_that_is_kept_is_the_basis_and_once_more_the_pairs() -> None:
    kept: list[int] = []
    before = [x for t in (PARTS, V0, SECOND, LIKE) for x in t.values()]
    found = peak_in_vectors(lambda: kept.append(len(eigsh(3, keep_all=True).values)), *before, vector=4 * N)
    assert 6 <= kept[0] <= 8
    assert abs(found - (8 + 1 + kept[0])) < 0.6


def test_a_vector_more_is_seen() -> None:
    """The counter itself: what is alive at once, views for nothing, what is freed not."""
    with Peak() as peak:
        x = torch.ones(1000)
        y = x + 1
        z = y[10:].view(2, -1)
        del x
        w = z.clone()
    assert peak.most == 4 * 2000
    del y, z, w
    assert peak.now == 0


def test_what_is_widened_for_a_norm_is_a_part() -> None:
    """Of a whole tensor torch makes a copy in float64 within the operation, which no counter sees."""
    wide: list[int] = []

    class Asked(Peak):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "vector_norm" in str(func) and (kwargs or {}).get("dtype") == torch.float64:
                wide.append(args[0].numel())
            return super().__torch_dispatch__(func, types, args, kwargs)

    with Asked():
        found = tree.norm(DIAGONAL)
    assert max(wide) <= N // 4
    torch.testing.assert_close(found, torch.linalg.vector_norm(DIAGONAL.double()), rtol=1e-14, atol=0)
