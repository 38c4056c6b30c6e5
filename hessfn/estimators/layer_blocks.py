"""Every leaf's diagonal block: top eigenvalue, Frobenius norm, stable rank, from few products with the whole."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.core.arguments import kind, require_eigenpairs, require_matvec, require_probes, require_vector
from hessfn.core.errors import InvalidInput
from hessfn.core.probes import gaussian
from hessfn.core.results import BlockTops, EigenPairs, Estimate, S
from hessfn.core.tree import MatVec, T
from hessfn.core.watched import Watched
from hessfn.estimators.eigen import eigsh


def block_tops(
    matvec: MatVec[T],
    like: T,
    names: str | Iterable[str] = "*",
    *,
    eigenpairs: EigenPairs[T] | None = None,
    rtol: float = 1e-2,
    max_matvecs: int = 8,
    seed: int = 0,
) -> BlockTops:
    """The eigenvalue of largest magnitude of the diagonal blocks of some leaves, each with its residual.

    A product with one block costs a product with the whole matrix. To need few of them, Lanczos starts for block l at
    the top eigenvector of ``sum_i theta_i q_il q_il'``, the block of the known eigenpairs of the whole, which costs no
    product. It runs until the residual is at most ``rtol |value|`` or the products are spent.

    Args:
        matvec: products with the whole matrix, on trees like ``like``.
        names: glob patterns of dotted leaf names; those of the layers that matter.
        eigenpairs: those of the whole matrix by ``eigsh``, the more the better (``keep_all=True``); None starts at
            random.
        max_matvecs: the most products for one block, at least 3.
        seed: of the random part of every start, a tenth of its norm, so that Lanczos also finds eigenvectors outside
            the span of the eigenpairs.

    Returns:
        Values, residuals and whether they have converged, by leaf name, and the number of products.

    Cost: from 3 to ``max_matvecs`` products a leaf; as many vectors of the size of the leaf.

    Raises:
        ValueError: a pattern matches no leaf, an argument is of another kind or out of range, or a product is not
            finite.

    Source: Lanczos (1950). By Cauchy's interlacing theorem it is never larger than that of the whole.

    >>> matvec = lambda v: {"a": 2 * v["a"] + v["b"], "b": v["a"] + 3 * v["b"]}
    >>> block_tops(matvec, {"a": torch.zeros(1), "b": torch.zeros(1)}, "b").values
    {'b': tensor(3., dtype=torch.float64)}
    """
    call = "block_tops(matvec, like, names)"
    require_matvec(matvec, call)
    require_vector(like, "like", call)
    if max_matvecs < 3:
        raise InvalidInput(f"{call}: max_matvecs={max_matvecs} must be at least 3: two of a start, and one to check")
    if eigenpairs is not None:
        require_eigenpairs(eigenpairs, call)
    rows: dict[str, Tensor] = {} if eigenpairs is None else tree.select(eigenpairs.vectors, "*")
    values, residuals, converged, count = {}, {}, {}, 0
    wanted = tree.select(like, names)
    for index, (name, leaf) in enumerate(zip(tree.names(like), tree.leaves(like), strict=True)):
        if name not in wanted:
            continue
        random = gaussian(leaf, 1, seed=seed)[0]
        start = random
        if eigenpairs is not None and name in rows:
            start = _expected_top(eigenpairs.values, rows[name], random)
        found = eigsh(_of_leaf(matvec, like, index), start, rtol=rtol, max_matvecs=min(max_matvecs, leaf.numel() + 1))
        values[name], residuals[name], converged[name] = found.values[0], found.residuals[0], found.converged[0]
        count += int(found.num_matvecs)
    return BlockTops(values, residuals, converged, torch.tensor(count, device="cpu"))


def _of_leaf(matvec: MatVec[T], like: T, index: int) -> MatVec[Tensor]:
    """The diagonal block of one leaf."""
    blank = [torch.zeros_like(leaf) for leaf in tree.leaves(like)]

    def product(v: Tensor) -> Tensor:
        padded = tree.unflatten([*blank[:index], v, *blank[index + 1 :]], like)
        return tree.leaves(tree.matched(matvec(padded), like, "the product", "like"))[index]

    return product


def _expected_top(values: Tensor, rows: Tensor, random: Tensor) -> Tensor:
    """The top eigenvector by magnitude of ``sum_i values_i q_i q_i'``, of parts ``q_i`` in one leaf, and some noise."""
    flat = tree.wide(rows.detach().flatten(1))
    squares, turn = torch.linalg.eigh(flat @ flat.T)
    there = squares > squares[-1] * 1e-12
    if not bool(there.any()) or float(squares[-1]) == 0:
        return random
    roots, turn = squares[there].sqrt(), turn[:, there]
    small = (turn * roots).T @ (values.detach().to(flat)[:, None] * turn * roots)
    theta, vectors = torch.linalg.eigh(small)
    top = (turn / roots) @ vectors[:, theta.abs().argmax()]
    expected = (top @ flat).reshape(random.shape)
    expected = expected * torch.where((expected * random).sum() < 0, -1.0, 1.0)  # its sign is rounding's
    return (expected + _NOISE / random.numel() ** 0.5 * random).to(random.dtype)


_NOISE = 0.1


def squared_frobenius_per_leaf(
    matvec: MatVec[T], probes: Iterable[T], *, eigenpairs: EigenPairs[T] | None = None
) -> Estimate[T]:
    """The squared Frobenius norm of every leaf's diagonal block, from the same products as a trace.

    For two probes a and b, ``(z_al' (A z_b)_l) (z_bl' (A z_a)_l)`` has the mean ``||A_ll||_F^2``: contributions of
    other leaves are in one factor only, and have mean 0. The estimate is the mean over all pairs of p probes. A single
    probe is not enough: ``||(A z)_l||^2`` also contains the other blocks of these rows.

    Args:
        probes: ``rademacher(params, num)``, or any sequence of independent trees with ``E zz' = I``; two at least.
        eigenpairs: those of the whole by ``eigsh``, as a control variate: with ``B = sum_i theta_i q_i q_i'`` only the
            part of ``A - B`` is estimated. Unbiased for pairs that do not depend on the probes, converged or not.

    Returns:
        ``mean`` and ``stderr``, trees of float64 scalars, and ``num_matvecs``. The error is the jackknife's over the
        probes, widened where it is large, as for a dominating eigenvalue without a given pair. A mean may then be
        negative.

    Cost: one product a probe; p probes and p products kept.

    Raises:
        ValueError: there are fewer than two probes, or a product is not finite.

    Source: a U-statistic as of Hoeffding (1948); Efron and Stein (1981) for the jackknife.

    >>> from hessfn import rademacher
    >>> squared_frobenius_per_leaf(lambda v: {"a": 2 * v["a"]}, rademacher({"a": torch.zeros(1)}, 2)).mean
    {'a': tensor(4., dtype=torch.float64)}
    """
    call = "squared_frobenius_per_leaf(matvec, probes)"
    require_matvec(matvec, call)
    require_probes(probes, call)
    if eigenpairs is not None:
        require_eigenpairs(eigenpairs, call)
    product = Watched(matvec)
    pairs = [(z, product(z)) for z in probes]
    if len(pairs) < 2:
        raise InvalidInput(f"{call}: {len(pairs)} probes make no pair: rademacher(params, num) needs num >= 2")
    first = pairs[0][0]
    zs, ys = ([tree.leaves(pair[part]) for pair in pairs] for part in (0, 1))
    count = len(zs[0])
    rows: list[Tensor] = []
    theta = inner = torch.zeros(0, device="cpu")
    if eigenpairs is not None:
        theta = eigenpairs.values.detach()
        alike = tree.map(lambda x: x.expand(len(theta), *x.shape), first)
        rows = [q.flatten(1) for q in tree.leaves(tree.matched(eigenpairs.vectors, alike, "vectors", "the probes"))]
        inner = torch.stack([_column(zs, i) @ tree.wide(rows[i]).T for i in range(count)]).sum(0)
    found = []
    for i in range(count):  # one leaf in float64 at a time
        z, y = _column(zs, i), _column(ys, i)
        if eigenpairs is None:
            found.append(_paired(z @ y.T))
        else:
            q = tree.wide(rows[i].detach())
            found.append(_with_pairs(z, y - (inner * theta.to(inner)) @ q, q, theta.to(inner)))
    result = Estimate(
        tree.unflatten([mean for mean, _ in found], first),
        tree.unflatten([_widened(mean, stderr) for mean, stderr in found], first),
        torch.tensor(len(pairs), device="cpu"),
        torch.tensor(float(len(pairs) - 1), dtype=found[0][0].dtype, device="cpu"),
    )
    product.finished(result.mean)
    return result


def _column(leaves: list[list[Tensor]], index: int) -> Tensor:
    """``(p, m)``, wide: one leaf of several trees."""
    return torch.stack([tree.wide(x[index]).flatten() for x in leaves])


def _with_pairs(z: Tensor, rest: Tensor, q: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """``||B||^2 + 2 tr B R + ||R||^2`` of one block, R the rest of it."""
    known = ((q @ q.T).square() * torch.outer(theta, theta)).sum()
    between = 2 * ((z @ q.T) * (rest @ q.T)) @ theta  # (p,), of the mean 2 tr B R
    mean, stderr = _paired(z @ rest.T, between)
    return known + mean, stderr


def _paired(forms: Tensor, single: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and standard error of ``forms_ab forms_ba + (single_a + single_b) / 2`` over pairs of unlike probes."""
    p = len(forms)
    kernel = forms * forms.T
    if single is not None:
        kernel = kernel + (single[:, None] + single[None]) / 2
    kernel = kernel - kernel.diag().diag()
    sums = kernel.sum(1)
    mean = sums.sum() / (p * (p - 1))
    if p == 2:
        return mean, torch.full_like(mean, torch.inf)
    without = (sums.sum() - 2 * sums) / ((p - 1) * (p - 2))
    return mean, ((without - without.mean()).square().sum() * (p - 1) / p).sqrt()


def _widened(mean: Tensor, stderr: Tensor) -> Tensor:
    """Wide enough for ``mean +- 2 stderr`` to hold the interval of the logarithm, by which these squares are symmetric.

    Where one eigenvalue dominates, squares of few probes are mostly too small, and so is their spread.
    """
    relative = (stderr / mean.abs()).clamp(max=1.0)
    return torch.where(mean == 0, stderr, stderr * (torch.expm1(2 * relative) / (2 * relative)).nan_to_num(1.0))


def stable_ranks(squares: Estimate[S], tops: BlockTops) -> Estimate[dict[str, Tensor]]:
    """The stable rank of diagonal blocks, ``||A_ll||_F^2 / ||A_ll||_2^2``: from 1 to the rank.

    It says how many directions share a block's curvature.

    Args:
        squares: of :func:`squared_frobenius_per_leaf`.
        tops: of :func:`block_tops`; the stable ranks are those of its leaves.

    Returns:
        ``mean`` and ``stderr``, dicts by leaf name of float64 scalars, without unit. The error is that of the Frobenius
        norm and of the residual of the top together.

    Cost: no product.

    Raises:
        ValueError: ``tops`` is of another kind.

    Source: Rudelson and Vershynin (2007), for the stable rank.

    >>> a = {"a": torch.tensor(8.0)}
    >>> tops = BlockTops({"a": torch.tensor(2.0)}, {"a": torch.tensor(0.0)}, {"a": torch.tensor(True)}, torch.tensor(3))
    >>> stable_ranks(Estimate(a, {"a": torch.tensor(1.0)}, torch.tensor(10)), tops).mean
    {'a': tensor(2.)}
    """
    if not isinstance(tops, BlockTops):
        raise InvalidInput(f"stable_ranks(squares, tops): tops is {kind(tops)}; give what block_tops(...) returns")
    names = tree.names(squares.mean)
    means = dict(zip(names, tree.leaves(squares.mean), strict=True))
    errors = dict(zip(names, tree.leaves(squares.stderr), strict=True))
    ranks, stderrs = {}, {}
    for name, top in tops.values.items():
        ranks[name] = means[name] / top.square()
        doubled = 2 * ranks[name] * tops.residuals[name] / top.abs()
        stderrs[name] = torch.hypot(errors[name] / top.square(), doubled)
    df = squares.df if isinstance(squares.df, Tensor) else None
    return Estimate(ranks, stderrs, squares.num_matvecs, df)
