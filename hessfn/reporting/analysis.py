"""The numbers of a report: eigenvalues, traces, density and landscape of a mean loss, from the same products."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable
from operator import length_hint
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hessfn.core import tree
from hessfn.core.errors import JournalError
from hessfn.core.probes import gaussian, rademacher
from hessfn.core.results import Band, Density, EigenPairs, Estimate, Sensitivities
from hessfn.core.tree import MatVec, Tree
from hessfn.estimators import spectrum
from hessfn.estimators.eigen import eigsh
from hessfn.estimators.hutchinson import estimate
from hessfn.landscape import slices
from hessfn.landscape.directions import random_direction
from hessfn.losses.batches import mean
from hessfn.parallel.all_reduce import ShardedBatches
from hessfn.products.hessian import mean_hvp
from hessfn.products.loss_checks import plain_gradient
from hessfn.quantization.sensitivity import has_matrix, sensitivities
from hessfn.reporting import text
from hessfn.reporting.problem import Loss, converted
from hessfn.transforms.matvec_check import check_matvec

Keep = Callable[[str, MatVec], MatVec]


class Plane(NamedTuple):
    steps: Tensor
    losses: Tensor
    directions: list[str]


class Analysis(NamedTuple):
    """All that a report shows."""

    loss: Tensor
    eigen: EigenPairs
    trace: Estimate
    negative: Estimate
    layers: Estimate
    density: Density
    band: Band | None
    steps: Tensor
    losses: dict[str, Tensor]
    plane: Plane | None
    activations: Sensitivities | None = None


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
    whole = mean_hvp(loss, theta, batches)
    # Not progress: only on the way it turns out how many products the eigenvalues take.
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
        check_matvec(matvec, theta, seed=seed)
        bar.set_description("eigenvalues")
        start = gaussian(theta, 1, seed=seed)[0]
        eigen = eigsh(matvec, start, k, which=settings["which"], rtol=settings["rtol"])
        bar.total = bar.n + num_probes + for_density
        bar.set_description("trace")
        # As hutchinson_per_leaf, and their sum along with them: its error does not follow from theirs.
        both = estimate(traces(z) for z in rademacher(theta, num_probes, seed=seed))
        total, layers = (Estimate(both.mean[x], both.stderr[x], both.num_matvecs) for x in ("total", "layers"))
        bar.set_description("density")
        quadrature = spectrum.slq(matvec, gaussian(theta, settings["runs"], seed=seed), steps)
        density = spectrum.density(quadrature)
        band = spectrum.density_band(quadrature) if settings["runs"] > 1 else None
        bar.set_description("done")
    line_steps, losses, plane = _landscape(loss, theta, batches, value, eigen, settings)
    return Analysis(
        value, eigen, total, spectrum.negative_share(quadrature), layers, density, band, line_steps, losses, plane
    )


def _quiet(batches: Iterable[Any]) -> bool:
    return isinstance(batches, ShardedBatches) and batches.rank > 0


def _landscape(
    loss: Loss, theta: Tree, batches: Iterable[Any], value: Tensor, eigen: EigenPairs, settings: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor], Plane | None]:
    first, *others = eigen.values.abs().argsort(descending=True).tolist()
    directions = {
        "top eigenvector": tree.map(lambda leaf: leaf[first], eigen.vectors),
        "random": random_direction(theta, seed=settings["seed"]),
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
            lines = {name: slices.line(point, theta, way, steps, batch) for name, way in directions.items()}
            if not points:
                return {"lines": lines}
            second = tree.map(lambda leaf: leaf[others[0]], eigen.vectors)
            return {
                "lines": lines,
                "plane": slices.plane(point, theta, (directions["top eigenvector"], second), grid, grid, batch),
            }

        found = mean(of_batch, batches)()  # every batch is read once
    if not points:
        return steps, found["lines"], None
    names = [f"eigenvector of {text.number(float(eigen.values[i]))}" for i in (first, others[0])]
    return steps, found["lines"], Plane(grid, found["plane"], names)


def activations(
    problem: Any, batches: Iterable[Any], dtype: Any, device: Any, num_probes: int, seed: int, keep: Keep
) -> Sensitivities | None:
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
            return sensitivities(model, criterion, batches, num_probes=num_probes, seed=seed, transform=counted)
        except (ValueError, RuntimeError) as error:
            if JournalError in (type(error), type(error.__cause__)):
                raise
            warnings.warn(f"the report leaves the activations out: {error}", stacklevel=4)
            return None
