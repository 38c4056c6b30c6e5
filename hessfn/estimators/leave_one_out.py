"""Traces and diagonals from a low-rank sketch, each probe tested by a sketch that leaves it out.

Where the spectrum decays, these take fewer products than Hutchinson for the same error.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.core.arguments import require_matvec, require_probes
from hessfn.core.errors import InvalidInput
from hessfn.core.results import Estimate
from hessfn.core.tree import MatVec, T, Tree
from hessfn.estimators import krylov
from hessfn.estimators.quadratic_forms import TELLING, Parts, degrees, form, kurtosis, mean_form, whole
from hessfn.estimators.running_mean import measured
from hessfn.estimators.through_origin import slopes


def hutchpp(matvec: MatVec[T], probes: Iterable[T]) -> Estimate[Tensor]:
    """The trace by Hutch++: exact on the range of a sketch, Hutchinson on its complement.

    ``tr Q'AQ + mean of z'(I - QQ') A (I - QQ') z``, with Q a basis of A times the first half of the probes and z the
    second half. The mean is unbiased.

    Args:
        probes: ``rademacher(params, p)``.

    Returns:
        ``mean``, ``stderr`` (of the second part; the first is exact) and ``num_matvecs``. Fewer than six Rademacher
        probes may all miss an eigenvector of two entries: if one is found, ``stderr`` allows for a second one.

    Cost: 3p/2 products; p/2 vectors kept, three times that during the orthogonalisation.

    Raises:
        ValueError: there are fewer than two probes, or more than n, or a product is not finite.

    Source: Meyer, Musco, Musco and Woodruff (2021).

    >>> from hessfn import rademacher
    >>> low_rank = lambda v: torch.ones(50) * v.sum()
    >>> hutchpp(low_rank, rademacher(torch.zeros(50), 4)).mean.round(decimals=2)
    tensor(50., dtype=torch.float64)
    """
    space, probes = _open(matvec, probes, "hutchpp(matvec, probes)")
    half = len(probes) // 2
    q = _sketch(space, probes[:half]).q
    quotients = torch.stack([tree.dot(row, space.matvec(row)) for row in q])
    tests = map(space.ravel, probes[half:])

    def outside(v: Tensor) -> Tensor:
        return v - (q @ v) @ q

    parts: Parts[Tensor, Tensor] = whole()
    found = mean_form((form(z, outside(space.matvec(outside(z))), parts) for z in tests), parts)
    space.finished(found.mean)
    stderr = _beside_what_hides(found.stderr, q, quotients, probes)
    return found._replace(
        mean=quotients.sum() + found.mean, stderr=stderr, num_matvecs=torch.tensor(half + len(probes), device="cpu")
    )


def xtrace(matvec: MatVec[T], probes: Iterable[T]) -> Estimate[Tensor]:
    """The trace by XTrace: Hutch++ where every probe in turn is left out of the sketch and tests it.

    ``t_i = tr Q_i'AQ_i + z_i'P_i A P_i z_i (n - p + 1) / ||P_i z_i||^2``, with Q_i a basis of A times all probes but
    the i-th and ``P_i = I - Q_i Q_i'``; the mean of the t_i is unbiased. The t_i are correlated, since
    they share a sketch. Sketches without two probes estimate the covariance without bias; ``stderr`` includes it.

    Args:
        probes: ``gaussian(params, p)``, p <= n. Rademacher probes leave a bias, far below the standard error.

    Returns:
        ``mean``, ``stderr`` and ``num_matvecs``. Of fewer than six Rademacher probes ``stderr`` is as for
        :func:`hutchpp`.

    Cost: 2p products; p vectors kept, three times that during the orthogonalisation.

    Raises:
        ValueError: there are fewer than two probes, or more than n, or a product is not finite.

    Source: Epperly, Tropp and Webber (2024), whose error estimate ignores the covariance and is too small by up to a
    half.

    >>> from hessfn import rademacher
    >>> low_rank = lambda v: torch.ones(50) * v.sum()
    >>> xtrace(low_rank, rademacher(torch.zeros(50), 4)).mean.round(decimals=2)
    tensor(50., dtype=torch.float64)
    """
    space, probes = _open(matvec, probes, "xtrace(matvec, probes)")
    p, n = len(probes), tree.numel(probes[0])
    q, r, s = _sketch(space, probes)
    h, beyond = _products(space, q)
    w = tree.wide(torch.stack([q @ space.ravel(z) for z in probes], dim=1))
    # Column i belongs to probe i: w has Q'z_i, x has Q'Q_i Q_i'z_i, r has Q'A z_i.
    x = w - s * (s * w).sum(0)
    hs, hx = h @ s, h @ x
    inside = h.trace() - (s * hs).sum(0)
    outside = (w * r).sum(0) - 2 * (x * r).sum(0) + (x * hx).sum(0)
    size = torch.stack([tree.norm(z).square() for z in probes]) - x.square().sum(0)
    samples = inside + outside * (n - p + 1) / size

    cosine, sine = _angles(s)

    def along_u(products: Tensor) -> Tensor:  # takes s_j'y_i, at row j and column i, to u_ij'y_i
        return (products.mT - cosine * products.diagonal()[:, None]) / sine

    shs = s.mT @ hs
    uhu = (shs.diagonal() - 2 * cosine * shs + cosine.square() * shs.diagonal()[:, None]) / sine.square()
    a = along_u(s.mT @ w)
    outside_both = outside[:, None] + 2 * a * (along_u(s.mT @ r) - along_u(s.mT @ hx)) + a.square() * uhu
    both = (inside[:, None] - uhu) + outside_both * (n - p + 2) / (size[:, None] + a.square())
    change = samples[:, None] - both
    # With R = P_i A P_i, u the unit vector along P_i z_i and m = n - p + 1, 2 m (||Ru||^2 - (u'Ru)^2) has the variance
    # of the sample as its mean. One part of R z_i is in the sketch, one beyond.
    squares = (x * (beyond @ x)).sum(0) + (s * (r - hx)).sum(0).square()
    variances = 2 * (n - p + 1) * (squares / size - (outside / size).square()).clamp(min=0)
    alone = (variances.mean() / p).sqrt()
    stderr = _with_covariance(alone, ((change * change.mT).sum() - change.diagonal().square().sum()), p)
    stderr = _beside_what_hides(stderr, q, h.diagonal(), probes)
    return measured(samples.mean(), stderr, 2 * p, degrees(variances.detach()))


def xdiag(matvec: MatVec[T], probes: Iterable[T]) -> Estimate[T]:
    """The diagonal by XDiag: exact on the range of a sketch, ``z * Az`` on its complement, probes left out in turn.

    ``sum z_i y_i / sum z_i^2`` with ``y_i = z_i diag(Q_i Q_i' A) + (I - Q_i Q_i') A z_i``, where Q_i is a basis of A
    times all probes but the i-th. For signs it is the mean of the ``z_i y_i``. It is unbiased. ``stderr`` includes the
    covariance of the summands, as that of :func:`xtrace` does.

    Args:
        probes: ``rademacher(params, p)``, p <= n. Gaussian ones are right too, with a larger error.

    Returns:
        ``mean`` and ``stderr``, trees like the probes, and ``num_matvecs``.

    Cost: 2p products; 5p vectors kept; the standard error takes p^2 operations on vectors.

    Raises:
        ValueError: there are fewer than two probes, or more than n, or a product is not finite.

    Source: Epperly, Tropp and Webber (2024).

    >>> from hessfn import rademacher
    >>> low_rank = lambda v: torch.ones(50) * v.sum()
    >>> xdiag(low_rank, rademacher(torch.zeros(50), 4)).mean[:3].round(decimals=3)
    tensor([1., 1., 1.])
    """
    space, probes = _open(matvec, probes, "xdiag(matvec, probes)")
    p, z = len(probes), torch.stack([space.ravel(z) for z in probes])
    q, r, s = _sketch(space, probes)
    aq = space.finished(torch.stack([space.matvec(row) for row in q]))
    whole = (q * aq).sum(0)
    out, image = s.mT.to(q.dtype) @ q, s.mT.to(q.dtype) @ aq  # row i: s_i as a vector, A s_i
    along = (s * r).sum(0).to(q.dtype)
    cosine, sine = (x.to(q.dtype) for x in _angles(s))
    # A regression of y_i on z_i is free of the spread of z_i^2, which skews the mean of z_i y_i for Gaussian probes.
    alone = slopes((z[i], z[i] * (whole - out[i] * image[i]) + out[i] * along[i]) for i in range(p))

    def change(i: int, j: int) -> Tensor:  # by how much z_i y_i changes where probe j is left out too
        u, au = ((x[j] - cosine[i, j] * x[i]) / sine[i, j] for x in (out, image))
        return u * z[i] * (au * z[i] + along[i] * cosine[i, j] / sine[i, j])

    products = torch.zeros_like(tree.wide(whole))  # the sum over ordered pairs, in the unit of y^2
    for i, j in itertools.combinations(range(p), 2):
        products = products + 2 * tree.wide(change(i, j)) * tree.wide(change(j, i))
    weight = tree.wide(z).square().sum(0)
    products = products * torch.where(weight > 0, p / torch.where(weight > 0, weight, 1.0), 1.0).square()  # 1 of signs
    stderr = _with_covariance(tree.wide(alone.stderr), products, p)
    # The sketches cost degrees of freedom: about a third, as seen.
    return measured(
        space.unravel(alone.mean), space.unravel(stderr), 2 * p, torch.tensor(2 * (p - 1) / 3, device="cpu").double()
    )


def _products(space: krylov.Space[T], q: Tensor) -> tuple[Tensor, Tensor]:
    """``Q'AQ`` and ``W'W`` of ``W = (I - QQ') AQ``, each (p, p)."""
    h: list[Tensor] = []
    rows: list[Tensor] = []
    for row in q:
        image = space.matvec(row)
        h.append(q @ image)
        rest = image - h[-1] @ q
        rows.append(rest - (q @ rest) @ q)  # twice, so that what is left of an exact sketch is rounding
    found = space.finished(torch.stack(h, dim=1))
    w = torch.stack(rows)
    size = w.detach().abs().max()  # squares of small numbers are zero, and those of large ones infinite, in float32
    w = w / size.where(size > 0, torch.ones_like(size))
    return tree.wide(found), tree.wide(w @ w.mT) * tree.wide(size).square()


class _Sketch(NamedTuple):
    q: Tensor  # (p, n), rows are an orthonormal basis of the sketch's range, and zero beyond its rank
    r: Tensor  # (p, p), sketch' = q' r
    s: Tensor  # (p, p), column i: unit vector, in the basis q, that the range loses without probe i; zero if deficient


def _sketch(space: krylov.Space[T], probes: Sequence[T]) -> _Sketch:
    sketch = torch.stack([space.matvec(space.ravel(z)) for z in probes])
    space.finished(sketch)  # before its factorisation, which takes no NaN
    q, triangle = torch.linalg.qr(sketch.mT)
    u, sigma, vh = torch.linalg.svd(tree.wide(triangle))
    kept = sigma > len(sketch) * torch.finfo(sketch.dtype).eps * sigma[0]
    safe = torch.where(kept, sigma, torch.ones_like(sigma))
    away = vh / safe[:, None]
    s = torch.where(kept.all(), away / torch.linalg.vector_norm(away, dim=0), torch.zeros_like(away))
    r = torch.where(kept, sigma, torch.zeros_like(sigma))[:, None] * vh
    return _Sketch((u * kept).mT.to(q.dtype) @ q.mT, r, s)


def _angles(s: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines between s_i and s_j. Without both the range loses s_i and u_ij = (s_j - cosine s_i) / sine."""
    cosine = s.mT @ s
    cosine = cosine - cosine.diagonal().diag_embed()
    return cosine, (1 - cosine.square()).sqrt()


def _with_covariance(stderr: Tensor, products: Tensor, p: int) -> Tensor:
    """The standard error of a mean of p correlated samples, from that of independent ones.

    Let t_ij be t_i from a sketch without probe j. Given all probes but i, both have the same mean, so the covariance of
    t_i and t_j is the mean of ``(t_i - t_ij)(t_j - t_ji)``. ``products`` is the sum of these over ordered pairs.
    """
    return (stderr.square() + products.clamp(min=0) / (p * (p - 1))).sqrt()


def _beside_what_hides(stderr: Tensor, q: Tensor, quotients: Tensor, probes: Sequence[Tree]) -> Tensor:
    """The standard error with what so few sign probes cannot see, of a sketch with rows q.

    An eigenvector of two entries has a twin, of the other sign in one of them. If the two entries have the same product
    of signs in all probes, no probe sees the twin, whose eigenvalue may be as large. So the interval reaches beyond
    the largest quotient of a row, as far as the row is of two entries: ``2 sum q_i^4`` is 1 then, and 6 / n of a vector
    without structure.
    """
    if len(probes) >= TELLING:
        return stderr
    is_sign = (2 - torch.stack([kurtosis(z) for z in probes]).mean()).clamp(0, 1)  # 0 of Gaussian probes
    narrow = (2 * tree.wide(q).pow(4).sum(1)).clamp(max=1)
    hidden = 0.6 * (quotients.abs() * narrow * is_sign).amax()  # the interval has two of these, or more
    together = torch.hypot(stderr, torch.where(hidden > 0, hidden, 1.0))
    return torch.where(hidden > 0, together, stderr)


def _open(matvec: MatVec[T], probes: Iterable[T], call: str) -> tuple[krylov.Space[T], Sequence[T]]:
    require_matvec(matvec, call)
    require_probes(probes, call)
    probes = probes if isinstance(probes, Sequence) else list(probes)
    if len(probes) < 2:
        raise InvalidInput(f"{len(probes)} probes leave nothing to test the sketch with: there must be at least 2")
    n = tree.numel(probes[0])
    if len(probes) > n:
        raise InvalidInput(f"{len(probes)} probes for {n} entries: dense(matvec, like) costs less and is exact")
    return krylov.flatten(matvec, probes[0]), probes
