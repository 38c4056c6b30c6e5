"""The numbers of a report: eigenvalues, traces, density and landscape of a mean loss, from the same products."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable
from operator import length_hint
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

import hessfn as hf
from hessfn import disk, page, tree, words
from hessfn.batches import mean
from hessfn.distributed import Dealt
from hessfn.page import Analysis
from hessfn.prepare import Loss, converted
from hessfn.sensitivity import has_matrix
from hessfn.trace import estimate
from hessfn.tree import MatVec, Tree
from hessfn.ways import plain_gradient

Keep = Callable[[str, MatVec], MatVec]


def analyse(
    loss: Loss,
    theta: Tree,
    batches: Iterable[Any],
    value: Tensor,
    settings: dict[str, Any],
    keep: Keep,
) -> Analysis:
    """All numbers of a report but those by layer; ``keep(name, matvec)`` is a journal, or leaves the products be."""
    k, seed, num_probes, steps = (settings[name] for name in ("k", "seed", "probes", "steps"))
    for_density = settings["runs"] * steps
    whole = hf.mean_hvp(loss, theta, batches)
    # Not hf.progress: only on the way it turns out how many products the eigenvalues take.
    expected = 4 + 2 * k + num_probes + for_density
    options: dict[str, Any] = {"dynamic_ncols": True, "mininterval": 0.5, "smoothing": 0}
    bar = tqdm(total=expected, unit="product", disable=_quiet(batches), **options)
    num_computed = 0

    def computed(v: Tree) -> Tree:
        nonlocal num_computed
        num_computed += 1
        return whole(v)

    kept = keep("products", computed)

    def matvec(v: Tree) -> Tree:
        product = kept(v)
        bar.initial = bar.n + 1 - num_computed  # what was read is done, but says nothing of the time left
        bar.update()
        return product

    def traces(z: Tree) -> dict[str, Any]:
        layers = tree.map(tree.dot, z, matvec(z))
        return {"layers": layers, "total": torch.stack(tree.leaves(layers)).sum()}

    with bar:
        bar.set_description("check")
        hf.check_matvec(matvec, theta, seed=seed)
        bar.set_description("eigenvalues")
        start = hf.gaussian(theta, 1, seed=seed)[0]
        eigen = hf.eigsh(matvec, start, k, which=settings["which"], rtol=settings["rtol"])
        bar.total = bar.n + num_probes + for_density
        bar.set_description("trace")
        # As hutchinson_per_leaf, and their sum along with them: its error does not follow from theirs.
        both = estimate(traces(z) for z in hf.rademacher(theta, num_probes, seed=seed))
        total, layers = (hf.Estimate(both.mean[x], both.stderr[x], both.num_matvecs) for x in ("total", "layers"))
        bar.set_description("density")
        quadrature = hf.slq(matvec, hf.gaussian(theta, settings["runs"], seed=seed), steps)
        density = hf.density(quadrature)
        band = hf.density_band(quadrature) if settings["runs"] > 1 else None
        bar.set_description("done")
    line_steps, losses, plane = _landscape(loss, theta, batches, value, eigen, settings)
    return Analysis(value, eigen, total, _negative(quadrature), layers, density, band, line_steps, losses, plane)


def _quiet(batches: Iterable[Any]) -> bool:
    return isinstance(batches, Dealt) and batches.rank > 0


def _negative(quadrature: hf.Quadrature) -> hf.Estimate:
    """The share of the sum of all |eigenvalues| that is below zero: a ratio of means over the runs."""
    nodes, weights = quadrature
    below, all_of_it = ((weights * x).sum(-1) for x in (-nodes.clamp(max=0), nodes.abs()))
    share = below.mean() / all_of_it.mean()
    return estimate((below - share * all_of_it) / all_of_it.mean())._replace(mean=share)


def _landscape(
    loss: Loss, theta: Tree, batches: Iterable[Any], value: Tensor, eigen: hf.EigenPairs, settings: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor], page.Plane | None]:
    first, *others = eigen.values.abs().argsort(descending=True).tolist()
    directions = {
        "top eigenvector": tree.map(lambda leaf: leaf[first], eigen.vectors),
        "random": hf.random_direction(theta, seed=settings["seed"]),
    }

    def gradient_of(batch: Any) -> Tree:
        return tree.require_finite(tree.unflatten(plain_gradient(loss, theta, (batch,))[1], theta), "the gradient")

    gradient = mean(gradient_of, batches)()
    if tree.norm(gradient) > 0:
        directions["gradient"] = tree.scale(1 / tree.norm(gradient), gradient)
    tenfold = float((20 * value.abs() / eigen.values[first].abs()).sqrt())
    default = min((r for r in (tenfold, 0.1 * float(tree.norm(theta))) if 0 < r < math.inf), default=1.0)
    radius, points = settings["radius"] or default, settings["plane"] if others else 0
    steps, grid = (torch.linspace(-radius, radius, num, dtype=torch.float64) for num in (31, points))
    expected = (31 * len(directions) + points**2) * length_hint(batches) or None
    with tqdm(total=expected, unit="point", desc="landscape", dynamic_ncols=True, disable=_quiet(batches)) as bar:

        def point(params: Tree, batch: Any) -> Tensor:
            bar.update()
            return loss(params, batch)

        def of_batch(batch: Any) -> dict[str, Any]:
            lines = {name: hf.line(point, theta, way, steps, batch) for name, way in directions.items()}
            if not points:
                return {"lines": lines}
            second = tree.map(lambda leaf: leaf[others[0]], eigen.vectors)
            return {
                "lines": lines,
                "plane": hf.plane(point, theta, (directions["top eigenvector"], second), grid, grid, batch),
            }

        found = mean(of_batch, batches)()  # every batch is read once
    if not points:
        return steps, found["lines"], None
    names = [f"eigenvector of {words.number(float(eigen.values[i]))}" for i in (first, others[0])]
    return steps, found["lines"], page.Plane(grid, found["plane"], names)


def activations(
    problem: Any, batches: Iterable[Any], dtype: Any, device: Any, num_probes: int, seed: int, keep: Keep
) -> hf.Sensitivities | None:
    """Traces by layer, or None where they cannot be had; ``keep`` as for :func:`analyse`, for every batch."""
    model, criterion = problem[:2]
    model, criterion = converted(model, criterion, dtype, device)
    if not any(name and has_matrix(name, module) for name, module in model.named_modules()):
        return None

    def cast(x: Any) -> Any:
        wanted = next(model.parameters()).dtype
        return x.to(wanted) if isinstance(x, Tensor) and x.is_floating_point() else x

    if dtype is not None:  # the model is our own copy
        of_model = criterion
        model.register_forward_pre_hook(lambda _, args, kwargs: tree.map(cast, (args, kwargs)), with_kwargs=True)
        criterion = lambda outputs, targets: of_model(outputs, tree.map(cast, targets))  # noqa: E731
    numbers = itertools.count()
    total = num_probes * length_hint(batches) or None
    with tqdm(total=total, unit="product", desc="activations", dynamic_ncols=True, disable=_quiet(batches)) as bar:

        def counted(dots: MatVec) -> MatVec:
            kept = keep(f"activations-{next(numbers)}", dots)

            def product(z: Tree) -> Tree:
                bar.update()
                return kept(z)

            return product

        try:
            return hf.sensitivities(model, criterion, batches, num_probes=num_probes, seed=seed, transform=counted)
        except (ValueError, RuntimeError) as error:
            if disk.Refused in (type(error), type(error.__cause__)):
                raise
            warnings.warn(f"the report leaves the activations out: {error}", stacklevel=4)
            return None
