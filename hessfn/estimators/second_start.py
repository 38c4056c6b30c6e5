"""A second random direction: whether the complement of what was found holds an eigenvalue further out.

A Ritz pair whose residual is small is near *an* eigenvalue, not necessarily the one that was asked for: a start that
happens to have next to nothing of an eigenvector, or a cluster that outweighs it, hides it (misconvergence).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hessfn.estimators.krylov import Which

CHANCE = 1e-3  # that an eigenvalue lies outside of the interval that is stated


class Chain:
    """The Lanczos recurrence of ``D = (I - XX') A (I - XX')`` from a random ``w``, X the pairs found, in coordinates.

    The caller's basis grows along it: ``A Q_done = Q_{done + pending} H``. The chain's vectors are columns of
    coordinates in that basis, so that it takes one product a step and keeps no vector of its own.
    """

    def __init__(self, X: Tensor, values: Tensor, residuals: Tensor, w: Tensor, n: int, floor: float) -> None:
        """``X (j, k)`` and ``w (j + 1,)``: coordinates; ``floor``: what rounding leaves of the operator's numbers."""
        self.values, self._n, self._floor = values, n, floor
        self._coupling = float(torch.linalg.vector_norm(residuals))  # of X with the rest: eigenvalues move by no more
        self._X, self._Y = X, X.new_zeros(0, 0)
        self.latest = torch.cat([w[:-1] - X @ (X.T @ w[:-1]), w[-1:]])
        self.latest /= torch.linalg.vector_norm(self.latest)
        self.alpha: list[float] = []
        self.beta: list[float] = []

    def advance(self, H: Tensor, done: int, pending: int) -> Tensor:
        """Further, once the row that the latest vector needs has been multiplied: the coordinates of its residual in
        the pending rows, along which the next product must be. Steps within the rows that there are need none."""
        outside = self._step(H, done, pending)
        while not self.closed() and torch.linalg.vector_norm(outside) <= 10 * self._floor:
            if self._X.shape[1] + self._Y.shape[1] >= done:  # they span the rows: what is left of a step is rounding
                self.beta[-1] = 0.0
                break
            self.latest = self.latest / self.beta[-1]
            outside = self._step(H, done, pending)
        return outside

    def _step(self, H: Tensor, done: int, pending: int) -> Tensor:
        X, Y, y = (_padded(z, done) for z in (self._X, self._Y, self.latest[:, None]))
        upper = H[:done, :done].triu()
        z = upper @ y + upper.triu(1).T @ y
        self.alpha.append(float((y * z).sum()))
        Y = torch.cat([Y, y], 1)
        for known in (X, Y, X, Y):
            z -= known @ (known.T @ z)
        outside = H[done : done + pending, :done] @ y[:, 0]
        size = math.hypot(float(torch.linalg.vector_norm(z)), float(torch.linalg.vector_norm(outside)))
        self.beta.append(size)
        self._X, self._Y, self.latest = X, Y, z[:, 0]
        return outside

    def turned(self, row: Tensor) -> None:
        """The pending rows have been turned so that the residual lies in the first of them, whose row of H this is."""
        self.latest = torch.cat([self.latest, (row @ self._Y[:, -1])[None]]) / self.beta[-1]

    @property
    def num_steps(self) -> int:
        return len(self.alpha)

    def closed(self) -> bool:
        """Whether there is no way on: the chain has seen every eigenvalue that w has a part of."""
        return self.beta[-1] <= 10 * self._floor

    def excludes(self, which: Which, rtol: float) -> bool:
        """Whether no eigenvalue further out than the wanted, by more than the tolerance, is left to be found."""
        chance = CHANCE if which in ("LA", "SA") else CHANCE / 2
        return all(self._log_size(x) >= self._needed(chance) for x in _ends(self.values, which, rtol, self._floor))

    def bounds(self) -> tuple[float, float]:
        """Where the rest of the spectrum lies, but for a probability of ``CHANCE``."""
        ritz = self._ritz()
        found = []
        for edge, sign in ((float(ritz[0]), -1.0), (float(ritz[-1]), 1.0)):
            step = max(self._floor, float(ritz[-1] - ritz[0]))
            if step == 0:  # of the zero matrix, whose only eigenvalue a random direction is sure to see
                found.append(edge + sign * self._coupling)
                continue
            while self._log_size(edge + sign * step) < self._needed(CHANCE / 2):
                step *= 2
            low, high = 0.0, step
            for _ in range(60):
                middle = (low + high) / 2
                below = self._log_size(edge + sign * middle) < self._needed(CHANCE / 2)
                low, high = (middle, high) if below else (low, middle)
            found.append(edge + sign * (high + self._coupling))
        return found[0], found[1]

    def _ritz(self) -> Tensor:
        alpha, beta = (torch.tensor(x, dtype=torch.float64, device="cpu") for x in (self.alpha, self.beta[:-1]))
        return torch.linalg.eigvalsh(alpha.diag() + beta.diag(1) + beta.diag(-1))

    def _needed(self, chance: float) -> float:
        """A random unit vector in N dimensions has a component below d along a given one with a probability of at most
        d sqrt(2N / pi)."""
        return math.log(math.sqrt(2 * (self._n - len(self.values)) / math.pi) / chance)

    def _log_size(self, x: float) -> float:
        """``log |p(x)|``, p the orthonormal Lanczos polynomial with ``q_next = p(D) w``; -inf within the Ritz values.

        q_next has norm 1, so an eigenvector u with eigenvalue x has ``|u'w| <= 1 / |p(x)|``.
        """
        ritz = self._ritz()
        if ritz[0] <= x <= ritz[-1]:
            return -math.inf
        ratio, log, last = math.inf, 0.0, 0.0
        for a, b in zip(self.alpha, self.beta, strict=True):
            ratio = ((x - a) - last / ratio) / max(b, self._floor)  # p_{j+1} / p_j
            log, last = log + math.log(abs(ratio)), b
        return log


def _ends(values: Tensor, which: Which, rtol: float, least: float) -> list[float]:
    """Up to where an eigenvalue that was missed would be none: beyond the last of the wanted, by the tolerance."""

    def beyond(x: Tensor, sign: float) -> float:
        return float(x) + sign * max(rtol * abs(float(x)), least)

    if which == "LM":
        size = values.abs().min()
        return [beyond(-size, -1.0), beyond(size, 1.0)]
    if which == "LA":
        return [beyond(values.min(), 1.0)]
    if which == "SA":
        return [beyond(values.max(), -1.0)]
    half = len(values) // 2  # of one pair alone, the high end is asked for
    low = [beyond(values[half - 1], -1.0)] if half else []
    return [*low, beyond(values[half], 1.0)]


def _padded(x: Tensor, rows: int) -> Tensor:
    return torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])  # torch 2.9 cannot pad what has no columns
