"""Eigenpairs and spectra of every layer's block, and how far apart they are: dense Hessians, closed forms."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
import scipy.integrate
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from nets import dense_hessian, normal, problem
from spectra import LIKES, on, symmetric
from torch import Tensor, nn

import hessfn as hf
from hessfn.core import tree
from hessfn.problems import digits


def dense_blocks(dense: Tensor, like: Any, blocks: dict[str, list[str]]) -> dict[str, Tensor]:
    """The diagonal blocks of a dense matrix, by the entries of their leaves."""
    owner = [name for name, leaf in zip(tree.names(like), tree.leaves(like), strict=True) for _ in range(leaf.numel())]
    rows = {name: [i for i, leaf in enumerate(owner) if leaf in leaves] for name, leaves in blocks.items()}
    return {name: dense[at][:, at] for name, at in rows.items()}


def by_module(params: dict[str, Tensor]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in params:
        found.setdefault(name.rsplit(".", 1)[0], []).append(name)
    return found


@pytest.mark.parametrize(
    ("net", "make_of"),
    [
        ("mlp", hf.linearized_hvp),
        ("attention", hf.hvp),
        *(pytest.param(net, hf.linearized_hvp, marks=pytest.mark.slow) for net in ("batch_norm", "attention")),
        *(pytest.param(net, hf.hvp, marks=pytest.mark.slow) for net in ("mlp", "batch_norm")),
    ],
)
def test_eigenpairs_are_those_of_the_dense_blocks(net: str, make_of: Any) -> None:
    loss, params, batch, _ = problem(net)
    exact = dense_blocks(dense_hessian(loss, params, batch), params, by_module(params))
    v0, second = hf.gaussian(params, 2)
    found = hf.eigsh_per_block(lambda part: make_of(loss, part, batch), params, v0, 3, rtol=1e-6, second_start=second)
    assert list(found) == list(exact)
    for name, block in exact.items():
        values = torch.linalg.eigvalsh(block)
        wanted = values[values.abs().argsort(descending=True)][:3]
        assert found[name].converged.all(), name
        assert (found[name].values - wanted).abs().max() <= found[name].residuals.max() + 1e-12, name
        flat = torch.cat([x.flatten(1) for x in found[name].vectors.values()], 1)
        assert torch.allclose(block @ flat.T, flat.T * found[name].values, atol=1e-5 * float(wanted.abs().max())), name


@pytest.mark.parametrize("tree_of", list(LIKES))
def test_blocks_of_any_tree_by_restriction(tree_of: str) -> None:
    like = LIKES[tree_of]
    dense = symmetric(torch.linspace(-1, 2, tree.numel(like)))
    matvec = on(dense, like)
    found = hf.eigsh_per_block(
        lambda part: hf.restrict(matvec, like, list(part)), like, hf.gaussian(like, 1)[0], 2, which="LA", rtol=1e-9
    )
    own = {name: [name] for name in tree.names(like)} if tree_of != "nested" else {"a": ["a.0"], "a.1": ["a.1.c"]}
    if tree_of == "nested":
        own["d"] = ["d.0"]
    assert list(found) == list(own)
    for name, block in dense_blocks(dense, like, own).items():
        wanted = torch.linalg.eigvalsh(block).flip(0)[:2]
        assert len(found[name].values) == len(wanted)
        assert torch.allclose(found[name].values, wanted, atol=1e-8), name


def test_blocks_have_the_names_and_the_leaves_that_are_asked_for() -> None:
    loss, params, batch, _ = problem("attention")
    dense = dense_hessian(loss, params, batch)
    asked = {"mixing": ["qkv.*", "out.weight"], "norm": "norm.*"}
    leaves = {"mixing": ["qkv.weight", "qkv.bias", "out.weight"], "norm": ["norm.weight", "norm.bias"]}
    start = hf.gaussian(params, 1)[0]
    found = hf.eigsh_per_block(lambda part: hf.hvp(loss, part, batch), params, start, blocks=asked, rtol=1e-6)
    for name, block in dense_blocks(dense, params, leaves).items():
        values = torch.linalg.eigvalsh(block)
        assert torch.allclose(found[name].values, values[values.abs().argmax()], rtol=1e-6), name
        assert set(found[name].vectors) == set(leaves[name])
    patterns = hf.slq_per_block(
        lambda part: hf.hvp(loss, part, batch), params, hf.gaussian(params, 1), 2, blocks=["*.weight", "*.bias"]
    )
    assert list(patterns) == ["*.weight", "*.bias"]


@pytest.mark.parametrize("net", ["conv", pytest.param("attention", marks=pytest.mark.slow)])
def test_quadratures_have_the_moments_of_the_dense_blocks(net: str) -> None:
    loss, params, batch, _ = problem(net)
    exact = dense_blocks(dense_hessian(loss, params, batch), params, by_module(params))
    probes = hf.gaussian(params, 3)
    found = hf.slq_per_block(lambda part: hf.hvp(loss, part, batch), params, iter(probes), 4, orthogonalize=True)
    for name, block in exact.items():
        leaves = by_module(params)[name]
        assert found[name].nodes.shape == (3, min(4, len(block)))
        for z, nodes, weights in zip(probes, *found[name], strict=True):
            flat = torch.cat([z[leaf].flatten() for leaf in leaves])
            for power in range(2 * len(nodes)):
                moment = flat @ torch.linalg.matrix_power(block, power) @ flat / (flat @ flat)
                size = float(torch.linalg.matrix_norm(block, 2)) ** power
                assert abs(weights @ nodes**power - moment) <= 1e-10 * size, (name, power)


def test_blocks_run_under_vmap_and_autograd() -> None:
    params = {"a.w": normal(4), "b.w": normal(3, seed=5)}

    def loss(p: dict[str, Tensor], x: Tensor, fixed: dict[str, Tensor]) -> Tensor:
        q = {**fixed, **p}
        return (q["a.w"] ** 4).sum() * (1 + q["b.w"].square().sum()) * x + (q["b.w"] ** 3).sum()

    def tops(x: Tensor) -> Tensor:
        found = hf.eigsh_per_block(
            lambda part: hf.hvp(loss, part, x, params, mode="forward"),
            params,
            hf.gaussian(params, 1)[0],
            rtol=None,
            max_matvecs=3,
        )
        return torch.stack([pairs.values[0] for pairs in found.values()])

    at = torch.tensor([0.5, 2.0]).double()
    looped = torch.stack([tops(x) for x in at])
    assert torch.allclose(torch.func.vmap(tops)(at), looped, rtol=1e-10)
    step = 1e-5
    slope = torch.func.jacrev(tops)(at[0])
    assert torch.allclose(slope, (tops(at[0] + step) - tops(at[0] - step)) / (2 * step), rtol=1e-6)


def test_what_is_wrong_is_said_with_the_block() -> None:
    loss, params, batch, _ = problem("mlp")
    start, probes = hf.gaussian(params, 1)[0], hf.gaussian(params, 2)

    def make(part: dict[str, Tensor]) -> Any:
        return hf.hvp(loss, part, batch)

    with pytest.raises(hf.HessfnError, match=r"block '2': .*make\(part\).* matvec is 3"):
        hf.eigsh_per_block(lambda part: 3 if "2.bias" in part else make(part), params, start)
    with pytest.raises(ValueError, match="no leaf matches 'conv"):
        hf.eigsh_per_block(make, params, start, blocks={"first": "conv*"})
    with pytest.raises(ValueError, match="v0 is a tree of other leaves than params"):
        hf.eigsh_per_block(make, params, {"0.weight": start["0.weight"]})
    with pytest.raises(ValueError, match="blocks is a list of 1, not patterns"):
        hf.eigsh_per_block(make, params, start, blocks=[["0.*"]])
    with pytest.raises(ValueError, match="k=0 must be at least 1"):
        hf.eigsh_per_block(make, params, start, 0)
    with pytest.raises(ValueError, match="make is a dict of 0, not a function"):
        hf.slq_per_block({}, params, probes, 2)


# Distances.


def rule(values: Tensor) -> hf.Quadrature:
    """All eigenvalues, as a quadrature of one row."""
    return hf.Quadrature(values[None], torch.full_like(values, 1 / len(values))[None])


def smoothed(values: np.ndarray, x: np.ndarray, sigma: float) -> np.ndarray:
    return np.exp(-0.5 * ((x[:, None] - values) / sigma) ** 2).mean(1) / (sigma * math.sqrt(2 * math.pi))


def by_integration(a: np.ndarray, b: np.ndarray, sigma: float) -> float:
    """Jensen-Shannon of two smoothed spectra, by the definition, on a grid of its own."""
    x = np.linspace(min(a.min(), b.min()) - 9 * sigma, max(a.max(), b.max()) + 9 * sigma, 40001)
    p, q = smoothed(a, x, sigma) + 1e-300, smoothed(b, x, sigma) + 1e-300
    m = (p + q) / 2
    return float(scipy.integrate.trapezoid(p * np.log(p / m) + q * np.log(q / m), x) / 2)


A = torch.cat([torch.linspace(0, 1, 58), torch.tensor([3.0, 5.0])]).double()
OTHERS = {"the same": A, "moved": A + 0.3, "twice": 2 * A, "far": 20 * A, "one more": torch.cat([A[1:], A[-1:] + 4])}


@pytest.mark.parametrize("which", list(OTHERS))
@pytest.mark.parametrize("sigma", [0.05, 0.4])
def test_the_divergence_is_the_integral_of_its_definition(which: str, sigma: float) -> None:
    other = OTHERS[which]
    found = hf.jensen_shannon(rule(A), rule(other), sigma=sigma).mean
    assert abs(float(found) - by_integration(A.numpy(), other.numpy(), sigma)) <= 1e-6
    assert 0 <= float(found) <= math.log(2)
    assert torch.allclose(hf.jensen_shannon(rule(other), rule(A), sigma=sigma).mean, found, atol=1e-14)


def test_the_divergence_of_two_normal_densities() -> None:
    """Of equal width: by quadrature of the known integral; of none in common: log 2."""
    one, other = torch.tensor([0.0]).double(), torch.tensor([1.0]).double()
    z, w = np.polynomial.hermite_e.hermegauss(60)
    # KL(p | m) = -E_p log((1 + q/p) / 2), and q/p = exp(z - 1/2) for means 0 and 1 of unit width.
    exact = -(w / w.sum()) @ np.log((1 + np.exp(z - 0.5)) / 2)
    assert float(hf.jensen_shannon(rule(one), rule(other), sigma=1.0).mean) == pytest.approx(exact, abs=1e-6)
    assert float(hf.jensen_shannon(rule(one), rule(other), sigma=0.01).mean) == pytest.approx(math.log(2), abs=1e-12)


def test_the_divergence_knows_no_unit() -> None:
    for scale in (1e-9, 1e9):
        found = hf.jensen_shannon(rule(scale * A), rule(scale * OTHERS["moved"])).mean
        assert torch.allclose(found, hf.jensen_shannon(rule(A), rule(OTHERS["moved"])).mean, rtol=1e-9)


def test_a_logarithmic_axis_tells_small_spectra_apart() -> None:
    """Two spectra a factor of 100 apart, beside one a factor of 1e6 above them."""
    three = {"a": rule(1e-4 * (1 + A)), "b": rule(1e-2 * (1 + A)), "c": rule(1e4 * (1 + A))}
    even = hf.jensen_shannon_per_pair(three).mean
    wide = hf.jensen_shannon_per_pair(three, linthresh=1e-6).mean
    assert float(even[0, 1]) < 1e-6 and float(even[0, 2]) > 0.3
    assert float(wide[0, 1]) > 0.6
    a, b = (np.arcsinh(1e6 * three[name].nodes[0].numpy()) for name in "ab")
    span = np.arcsinh(1e6 * three["c"].nodes.max().item()) - a.min()
    sigma = span / ((len(A) - 1) * math.sqrt(8 * math.log(3)))
    assert float(wide[0, 1]) == pytest.approx(by_integration(a, b, sigma), abs=1e-5)


def quadratures(values: Tensor, num: int, seed: int) -> hf.Quadrature:
    """What random directions see of a diagonal matrix, after all steps."""
    squares = normal(num, len(values), seed=seed).square()
    return hf.Quadrature(values.expand(num, -1), squares / squares.sum(1, keepdim=True))


@pytest.mark.slow
@pytest.mark.parametrize("which", list(OTHERS))
@pytest.mark.parametrize(("num", "least"), [(3, 0.85), (10, 0.91)])
def test_intervals_hold_the_divergence_of_the_exact_spectra(which: str, num: int, least: float) -> None:
    """Of nominal 95 of 100; and neither the error nor what is left of the bias is far from the spread."""
    other = OTHERS[which]
    sigma, trials, held, found = float(torch.maximum(A.max(), other.max())) / 25, 300, 0, []
    exact = hf.jensen_shannon(rule(A), rule(other), sigma=sigma).mean
    for seed in range(trials):
        one = hf.jensen_shannon(quadratures(A, num, 2 * seed), quadratures(other, num, 2 * seed + 1), sigma=sigma)
        low, high = one.interval()
        held += bool(low <= exact <= high)
        found.append((float(one.mean), float(one.stderr)))
    means, stderrs = np.array(found).T
    assert held >= least * trials
    assert abs(means.mean() - float(exact)) <= 4 * means.std() / math.sqrt(trials) + 0.15 * means.std()
    assert 0.75 <= stderrs.mean() / means.std() <= 1.35
    assert torch.isinf(hf.jensen_shannon(quadratures(A, 1, 0), quadratures(other, num, 1)).stderr)


def test_the_error_and_the_bias_are_those_of_the_jackknife() -> None:
    """By leaving out one probe after another, with integrals of their own; degrees of freedom as of Satterthwaite."""
    sides, sigma = [quadratures(A, 3, 0), quadratures(2 * A, 4, 1)], 0.4
    x = np.linspace(-4, 14, 20001)

    def divergence(rows: list[list[int]]) -> float:
        p, q = (
            sum(
                float(w) * smoothed(np.array([float(node)]), x, sigma)
                for i in kept
                for node, w in zip(side.nodes[i], side.weights[i], strict=True)
            )
            / len(kept)
            + 1e-300
            for side, kept in zip(sides, rows, strict=True)
        )
        m = (p + q) / 2
        return float(scipy.integrate.trapezoid(p * np.log(p / m) + q * np.log(q / m), x) / 2)

    both = [[0, 1, 2], [0, 1, 2, 3]]
    whole = divergence(both)
    corrected, squares = whole, []
    for side, kept in enumerate(both):
        without = np.array(
            [divergence([[j for j in r if s != side or j != i] for s, r in enumerate(both)]) for i in kept]
        )
        corrected += (len(kept) - 1) * (whole - without.mean())
        squares.append(without.var() * (len(kept) - 1))
    found = hf.jensen_shannon(*sides, sigma=sigma)
    assert float(found.mean) == pytest.approx(corrected, abs=1e-7)
    assert float(found.stderr) == pytest.approx(math.sqrt(sum(squares)), rel=1e-5)
    assert float(found.df) == pytest.approx(sum(squares) ** 2 / (squares[0] ** 2 / 2 + squares[1] ** 2 / 3), rel=1e-5)


def test_pairs_are_the_pairs() -> None:
    three = {"a": quadratures(A, 4, 0), "b": quadratures(2 * A, 4, 1), "c": quadratures(A + 0.3, 4, 2)}
    found = hf.jensen_shannon_per_pair(three, sigma=0.3)
    assert torch.equal(found.mean, found.mean.T) and torch.equal(found.stderr, found.stderr.T)
    assert torch.equal(found.mean.diag(), torch.zeros(3).double())
    alone = hf.jensen_shannon(three["a"], three["c"], sigma=0.3)
    # On another grid, of its own two spectra.
    assert torch.allclose(found.mean[0, 2], alone.mean, atol=1e-5)
    assert torch.allclose(found.stderr[0, 2], alone.stderr, rtol=1e-3)


def test_the_divergence_runs_under_vmap_and_autograd() -> None:
    scales = torch.tensor([1.5, 3.0]).double()
    mine, other = quadratures(A, 3, 0), quadratures(A, 3, 1)

    def apart(scale: Tensor) -> Tensor:
        found = hf.jensen_shannon(mine, hf.Quadrature(scale * other.nodes, other.weights))
        return torch.stack([found.mean, found.stderr])

    assert torch.allclose(torch.func.vmap(apart)(scales), torch.stack([apart(c) for c in scales]), rtol=1e-10)
    step = 1e-6
    slope = torch.func.jacrev(apart)(scales[0])
    assert torch.allclose(slope, (apart(scales[0] + step) - apart(scales[0] - step)) / (2 * step), rtol=1e-5)


@pytest.mark.parametrize("options", [{"sigma": 0.0}, {"linthresh": -1.0}, {"sigma": float("nan")}, {"sigma": 1e-9}])
def test_widths_are_refused_that_are_none(options: dict[str, float]) -> None:
    with pytest.raises(hf.HessfnError, match=r"jensen_shannon\(a, b\): (sigma|linthresh)="):
        hf.jensen_shannon(rule(A), rule(2 * A), **options)
    with pytest.raises(ValueError, match="quadrature is a tensor"):
        hf.jensen_shannon(A, rule(A))
    with pytest.raises(ValueError, match="not a dict of what slq"):
        hf.jensen_shannon_per_pair([rule(A), rule(A)])


# Figures.


def three_blocks() -> dict[str, hf.Quadrature]:
    return {"first": rule(A), "se$ond": rule(2 * A), "third": rule(100 * A)}


def test_a_heat_map_shows_the_distances() -> None:
    found = hf.jensen_shannon_per_pair(three_blocks(), linthresh=0.1)
    ax = hf.plot.distance_plot(found, three_blocks(), Figure().subplots())
    (image,) = ax.get_images()
    assert np.allclose(image.get_array(), found.mean.numpy(), atol=1e-12)
    assert image.get_clim() == pytest.approx((0.0, float(found.mean.max())))
    (same,) = hf.plot.distance_plot(found, three_blocks(), Figure().subplots(), furthest=math.log(2)).get_images()
    assert same.get_clim() == pytest.approx((0.0, math.log(2)))
    labels = ["first", r"se\$ond", "third"]
    assert [x.get_text() for x in ax.get_xticklabels()] == [x.get_text() for x in ax.get_yticklabels()] == labels
    assert [float(x.get_text()) for x in ax.texts] == pytest.approx(found.mean[~torch.eye(3).bool()].tolist(), rel=0.06)
    ax.figure.savefig(io.BytesIO())
    with pytest.raises(ValueError, match="there are 2 names for distances of shape"):
        hf.plot.distance_plot(found, ["a", "b"])
    with pytest.raises(ValueError, match="furthest=0 must be positive"):
        hf.plot.distance_plot(found, three_blocks(), furthest=0)


@pytest.mark.parametrize("linthresh", [None, 0.1])
def test_rows_show_the_densities(linthresh: float | None) -> None:
    densities = {name: hf.density(one, linthresh=linthresh) for name, one in three_blocks().items()}
    ax = hf.plot.density_rows_plot(densities, Figure().subplots(), floor=1e-4)
    assert ax.get_xscale() == ("linear" if linthresh is None else "symlog")
    for row, (mesh, one) in enumerate(zip(ax.collections, densities.values(), strict=True)):
        corners = mesh.get_coordinates()
        assert corners[..., 1].min() < row < corners[..., 1].max()
        middle = (corners[0, 1:, 0] + corners[0, :-1, 0]) / 2
        peak = int(mesh.get_array().argmax())
        along = one.values if linthresh is None else one.values * (one.grid.square() + linthresh**2).sqrt()
        assert abs(middle[peak] - float(one.grid[along.argmax()])) <= float(one.grid.diff().max())
    ax.figure.savefig(io.BytesIO())
    for wrong in ({}, DENSITIES_OF_NO_NAME):
        with pytest.raises(ValueError, match="a dict from name to density"):
            hf.plot.density_rows_plot(wrong)
    with pytest.raises(ValueError, match="floor=0 must be between 0 and 1"):
        hf.plot.density_rows_plot(densities, floor=0)


DENSITIES_OF_NO_NAME: Any = [hf.density(rule(A))]


# The order of arXiv 2402.16788, in small.


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.out(F.scaled_dot_product_attention(self.query(y), self.key(y), self.value(y)))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Reads an image of 8 x 8 as 16 patches."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(4, width), nn.Parameter(0.02 * torch.randn(16, width))
        self.layers, self.norm = nn.Sequential(Layer(width), Layer(width)), nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        patches = F.unfold(images, 2, stride=2).transpose(1, 2)
        return self.head(self.norm(self.layers(self.embed(patches) + self.position)).mean(1))


def trained(images: Tensor, labels: Tensor, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Transformer().double()
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        for _ in range(200):
            some = torch.randint(len(images), (64,))
            optimizer.zero_grad()
            F.cross_entropy(model(images[some]), labels[some]).backward()
            optimizer.step()
        return model


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_blocks_of_a_transformer_are_more_unlike_than_those_of_a_convolutional_net(seed: int) -> None:
    convolutional, criterion, batches = digits(num_images=1797, batch_size=1797)
    images, labels = batches[0][0].double(), batches[0][1]
    transformer = trained(images, labels, seed)
    for model in (convolutional.double(), transformer):
        assert (model(images).argmax(1) == labels).double().mean() > 0.8
    found = {}
    for model, names in ((convolutional, "block*.conv?.weight"), (transformer, "layers.*.[qkvoud]*.weight")):
        loss, params = hf.functionalize(model, criterion, params=names)
        matvec = hf.linearized_hvp(loss, params, (images[:50], labels[:50]))
        found[model] = hf.slq_per_block(
            lambda part, matvec=matvec, params=params: hf.restrict(matvec, params, list(part)),
            params,
            hf.gaussian(params, 4),
            15,
            blocks={name: name for name in params},
        )
    assert list(map(len, found.values())) == [4, 12]
    for logarithmic in (False, True):
        means = []
        for rules in found.values():
            top = max(float(rule.nodes.max()) for rule in rules.values())
            apart = hf.jensen_shannon_per_pair(rules, linthresh=0.01 * top if logarithmic else None)
            pairs = ~torch.eye(len(rules), dtype=torch.bool)
            means.append((apart.mean[pairs].mean(), apart.stderr[pairs].mean()))
        (alike, error), (unlike, other) = means
        assert unlike - alike > (2.0 if logarithmic else 1.0) * torch.hypot(error, other)
    tops = [torch.stack([rule.nodes.max() for rule in rules.values()]) for rules in found.values()]
    assert tops[1].max() / tops[1].min() > 4 * tops[0].max() / tops[0].min()
