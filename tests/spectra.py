"""Symmetric matrices of known spectrum, in float64, as matvecs on trees of several shapes."""

from __future__ import annotations

import numpy as np
import torch

from hessfn.core import tree

N = 60
_i = torch.arange(N, dtype=torch.float64)

SPECTRA = {
    "decaying": 50 * 0.9**_i,
    "clustered": torch.cat([10 + 1e-3 * _i[:5], torch.linspace(0, 1, N - 5, dtype=torch.float64)]),
    "indefinite": torch.linspace(-1, 1.3, N, dtype=torch.float64) ** 3,
    "negative": 5 - 50 * 0.9**_i,
    "rank-deficient": torch.cat([5 - _i[:8] / 2, torch.zeros(N - 8, dtype=torch.float64)]),
    "flat": 1 + 0.1 * torch.sin(_i),
}

LIKES = {
    "tensor": torch.zeros(N, dtype=torch.float64),
    "dict": {"w": torch.zeros(7, 8, dtype=torch.float64), "b": torch.zeros(N - 56, dtype=torch.float64)},
    "nested": {"a": [torch.zeros(5, 2, 5, dtype=torch.float64), {"c": torch.zeros((), dtype=torch.float64)}],
               "d": (torch.zeros(N - 51, dtype=torch.float64),)},
}  # fmt: skip


def symmetric(eigenvalues: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """The matrix of these eigenvalues and random eigenvectors."""
    n = len(eigenvalues)
    random = np.random.default_rng(seed).standard_normal((n, n))
    vectors = torch.linalg.qr(torch.from_numpy(random)).Q
    matrix = (vectors * eigenvalues.double()) @ vectors.T
    return (matrix + matrix.T) / 2


def on(matrix: torch.Tensor, like: tree.Tree) -> tree.MatVec:
    """Products with a matrix, on trees like ``like``."""

    def matvec(v: tree.Tree) -> tree.Tree:
        flat, unravel = tree.ravel(v)
        return unravel(matrix @ flat)

    return matvec
