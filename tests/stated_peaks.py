"""What routines hold at once at their peak. As a program it measures all of them and writes them as JSON.

Tests run it in a process of its own: where torch.compile has once given up, every call holds its arguments until it
returns, one vector more than otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from peaks import peak_in_vectors
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


def solve(**options: Any) -> hf.Solution:
    return hf.solve(times_diagonal, V0, x0=SECOND, damping=0.01, basis_size=6, max_matvecs=30, **options)


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
    "solve: basis + 8": (14, solve),
    "solve, preconditioned: 2 basis + 12": (24, lambda: solve(precondition=lambda v: v)),
    "check_matvec: 5": (5, lambda: hf.check_matvec(times_diagonal, LIKE)),
}


def measured() -> dict[str, float]:
    before = [x for t in (PARTS, V0, SECOND, LIKE) for x in t.values()]
    of = lambda run: peak_in_vectors(run, *before, vector=4 * N)  # noqa: E731
    found = {name: of(run) for name, (_, run) in PEAKS.items()}
    pairs: list[int] = []
    found["eigsh, keep_all"] = of(lambda: pairs.append(len(eigsh(3, keep_all=True).values)))
    return {**found, "pairs of keep_all": pairs[0]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measured()))
