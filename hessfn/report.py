"""The main job: from a model and its data to numbers with their errors, pictures and one page."""

from __future__ import annotations

import copy
import importlib.metadata
import itertools
import math
import platform
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import hessfn as hf
from hessfn import page, tree
from hessfn.batches import mean
from hessfn.model import Choice
from hessfn.page import Analysis
from hessfn.trace import estimate
from hessfn.tree import Tree
from hessfn.ways import check_loss, plain_gradient

Loss = Callable[[Tree, Any], Tensor]


def report(
    problem: tuple[nn.Module, Callable[[Any, Any], Tensor], Iterable[Any]],
    out: str | Path,
    *,
    name: str = "",
    k: int = 5,
    which: str = "LM",
    rtol: float = 1e-3,
    probes: int = 100,
    runs: int = 4,
    steps: int = 60,
    radius: float | None = None,
    plane: int = 15,
    seed: int = 0,
    params: Choice = "*",
    num_batches: int | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    command: str = "",
) -> dict[str, Any]:
    """The curvature of a model's mean loss over its batches, written to a folder and returned.

    Args:
        problem: ``(model, criterion, batches)``. The model is not changed; its mode counts as it is. Each batch is
            ``(inputs, targets)``, and every pass over ``batches`` must give the same ones.
        out: the folder, made if it is not there, for ``report.json``, ``report.html`` and ``*.png``. They appear when
            all is computed, or not at all.
        name: what the page calls the problem.
        k: number of eigenvalues; ``which`` and ``rtol`` as for :func:`hessfn.eigsh`.
        probes: random vectors for the trace, one product each.
        runs: Lanczos runs for the spectral density, ``steps`` products each.
        radius: how far the landscape goes each way; by default as far as the quadratic model along the top eigenvector
            rises by ten times the loss, but at most a tenth of the norm of the parameters.
        plane: points each way of the plane over the top two eigenvectors, one pass over the data each; 0, or k = 1, for none.
        seed: of all random vectors.
        params: which parameters, as for :func:`hessfn.functionalize`.
        num_batches: how many of the batches, the first ones; by default all.
        dtype: what to compute in, such as ``"float64"``, on a copy of the model; by default the model's own.
        device: where to compute, on a copy of the model; by default where the model is.
        command: the command line that does this, for the page to say.

    Returns:
        What ``report.json`` holds; numbers that are not finite are None::

            loss                  the mean over the samples
            eigenvalues           k of them, in the order of ``which``; residuals and converged likewise
            trace                 mean, stderr
            negative_curvature    mean, stderr of the share of the sum of all |eigenvalues| that is below zero
            density               grid, values; lower, upper: a band of 95 % (None of a single run)
            layers                name: numel, trace, stderr
            landscape             steps, losses {direction: one at each step}; plane, which may be None: steps (of both
                                  axes), losses (row i is at steps[i] along the first direction), directions (two names)
            settings, versions    what it takes to do it again

    Cost: ``probes + runs * steps`` products, those of ``eigsh``, four that check that the products are a Hessian's, and
    one forward pass for each point of the landscape, ``93 + plane**2``.

    Raises:
        ModuleNotFoundError: jinja2, which makes the page, is not installed.
        ValueError: an argument is out of range, ``problem`` is something else, there is no batch, the loss is not
            finite (the batch is named), the products are not a Hessian's, or ``out`` cannot be written.
    """
    template = page.template()
    for option, given, least in (("probes", probes, 2), ("runs", runs, 1), ("steps", steps, 1)):
        if given < least:
            raise ValueError(f"{option}={given} must be at least {least}")
    if radius is not None and not 0 < radius < math.inf:
        raise ValueError(f"radius={radius} must be positive")
    if plane != 0 and plane < 3:
        raise ValueError(f"plane={plane} must be at least 3, or 0 for no plane")
    # Whatever the batches draw from the global generator, as a DataLoader does, is given back.
    with page.staging(Path(out)) as folder, torch.random.fork_rng(devices=[]):
        loss, theta, batches = _prepare(problem, params, dtype, device, num_batches)
        n, first = tree.numel(theta), tree.leaves(theta)[0]
        if not 1 <= k <= n:
            raise ValueError(f"k={k} must be between 1 and {n}, the number of parameters")
        value, num_samples = _first_pass(loss, theta, batches)
        settings = {
            "problem": name,
            "parameters": n,
            "params": repr(params) if callable(params) else params,
            "samples": num_samples,
            "num_batches": num_batches,
            "k": k,
            "which": which,
            "rtol": rtol,
            "probes": probes,
            "runs": runs,
            "steps": min(steps, n),
            "radius": radius,
            "plane": plane,
            "seed": seed,
            "dtype": str(first.dtype).removeprefix("torch."),
            "device": str(first.device),
            "command": command,
        }
        analysis = _analyse(loss, theta, batches, value, settings)
        settings["radius"] = analysis.steps[-1]
        result = page.plain({**_named(analysis, theta), "settings": settings, "versions": _versions()})
        page.write(folder, template, analysis, result)
    return result


def _prepare(
    problem: Any, params: Choice, dtype: Any, device: Any, num_batches: int | None
) -> tuple[Loss, Tree, Iterable[Any]]:
    """The loss, which takes batches of any dtype and device to the parameters'; the parameters; the batches."""
    try:
        model, criterion, batches = problem
    except (TypeError, ValueError):
        raise ValueError(f"a problem is (model, criterion, batches), not {_brief(problem)}") from None
    if not isinstance(model, nn.Module) or not callable(criterion) or not isinstance(batches, Iterable):
        found = ", ".join(type(part).__name__ for part in problem)
        raise ValueError(f"a problem is (a torch.nn.Module, a function, an iterable of batches), not ({found})")
    if num_batches is not None and num_batches < 1:
        raise ValueError(f"num_batches={num_batches} must be at least 1")
    wanted_dtype, wanted_device = _dtype(dtype), _device(device)
    if wanted_dtype or wanted_device:
        model = copy.deepcopy(model).to(device=wanted_device, dtype=wanted_dtype)
        if isinstance(criterion, nn.Module):
            criterion = copy.deepcopy(criterion).to(device=wanted_device, dtype=wanted_dtype)
    of_batch, theta = hf.functionalize(model, criterion, params=params)
    home = tree.leaves(theta)[0].device

    def cast(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to(home, wanted_dtype if wanted_dtype and x.is_floating_point() else x.dtype)

    def loss(params: Tree, batch: Any) -> Tensor:
        return of_batch(params, tree.map(cast, batch))

    hf.mean_hvp(loss, theta, batches)  # refuses what cannot be passed over again, before a part of it is taken
    return loss, theta, batches if num_batches is None else list(itertools.islice(batches, num_batches))


def _first_pass(loss: Loss, theta: Tree, batches: Iterable[Any]) -> tuple[Tensor, int]:
    """The mean loss and the number of samples; what is wrong with a batch is said along with its index."""
    sizes: list[int] = []

    def checked(batch: Any) -> Tensor:
        try:
            value = loss(theta, batch)
        except Exception as error:
            raise ValueError(f"no loss could be computed: {_brief(error)}") from error
        check_loss(loss, theta, (batch,))
        sizes.append(len(next(x for x in tree.leaves(batch) if isinstance(x, Tensor))))
        return value

    return mean(checked, batches)(), sum(sizes)


def _analyse(loss: Loss, theta: Tree, batches: Iterable[Any], value: Tensor, settings: dict[str, Any]) -> Analysis:
    k, seed, num_probes, steps = (settings[name] for name in ("k", "seed", "probes", "steps"))
    for_density = settings["runs"] * steps
    whole = hf.mean_hvp(loss, theta, batches)
    # Not hf.progress: only on the way it turns out how many products the eigenvalues take.
    bar = tqdm(total=4 + 2 * k + num_probes + for_density, unit="product", dynamic_ncols=True, mininterval=0.5)

    def matvec(v: Tree) -> Tree:
        product = whole(v)
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
    gradient = mean(lambda batch: tree.unflatten(plain_gradient(loss, theta, (batch,))[1], theta), batches)()
    if tree.norm(gradient) > 0:
        directions["gradient"] = tree.scale(1 / tree.norm(gradient), gradient)
    tenfold = float((20 * value.abs() / eigen.values[first].abs()).sqrt())
    default = min((r for r in (tenfold, 0.1 * float(tree.norm(theta))) if 0 < r < math.inf), default=1.0)
    radius, points = settings["radius"] or default, settings["plane"] if others else 0
    steps, grid = (torch.linspace(-radius, radius, num, dtype=torch.float64) for num in (31, points))
    whole = mean(loss, batches)
    with tqdm(total=31 * len(directions) + points**2, unit="point", desc="landscape", dynamic_ncols=True) as bar:

        def point(params: Tree) -> Tensor:
            bar.update()
            return whole(params)

        losses = {name: hf.line(point, theta, way, steps) for name, way in directions.items()}
        if not points:
            return steps, losses, None
        second = tree.map(lambda leaf: leaf[others[0]], eigen.vectors)
        heights = hf.plane(point, theta, (directions["top eigenvector"], second), grid, grid)
    names = [f"eigenvector of {page.number(float(eigen.values[i]))}" for i in (first, others[0])]
    return steps, losses, page.Plane(grid, heights, names)


def _named(analysis: Analysis, theta: Tree) -> dict[str, Any]:
    stderr = analysis.layers.stderr
    return {
        "loss": analysis.loss,
        "eigenvalues": analysis.eigen.values,
        "residuals": analysis.eigen.residuals,
        "converged": analysis.eigen.converged,
        "trace": {"mean": analysis.trace.mean, "stderr": analysis.trace.stderr},
        "negative_curvature": {"mean": analysis.negative.mean, "stderr": analysis.negative.stderr},
        "density": {
            "grid": analysis.density.grid,
            "values": analysis.density.values,
            "lower": analysis.band and analysis.band.lower,
            "upper": analysis.band and analysis.band.upper,
        },
        "layers": {
            name: {"numel": theta[name].numel(), "trace": trace, "stderr": stderr[name]}
            for name, trace in analysis.layers.mean.items()
        },
        "landscape": {
            "steps": analysis.steps,
            "losses": analysis.losses,
            "plane": analysis.plane and analysis.plane._asdict(),
        },
    }


def _versions() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in ("hessfn", "torch", "numpy", "scipy", "matplotlib")}
    return {**packages, "python": platform.python_version()}


def _dtype(name: torch.dtype | str | None) -> torch.dtype | None:
    dtype = getattr(torch, name, None) if isinstance(name, str) else name
    if name is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype={name!r} must be a floating-point type such as 'float32', 'float64', 'bfloat16'")
    return dtype


def _device(name: torch.device | str | None) -> torch.device | None:
    try:
        return None if name is None else torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device={str(name)!r} cannot be used here: {_brief(error)}") from error


def _brief(x: Any) -> str:
    """One line: the kind of a value, or the kind of an exception and the first line of what it says."""
    first_line = (str(x).strip().splitlines() or [""])[0]
    return f"{type(x).__name__}: {first_line}" if isinstance(x, BaseException) else type(x).__name__
