"""The main job: from a model and its data to numbers with their errors, pictures and one page."""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import platform
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hessfn.core import tree
from hessfn.core.errors import InvalidInput
from hessfn.core.results import Sensitivities
from hessfn.core.tree import MatVec, Tree
from hessfn.losses.batches import deal
from hessfn.losses.functional import Choice
from hessfn.parallel.all_reduce import Group
from hessfn.reporting import html
from hessfn.reporting.analysis import Analysis, analyse
from hessfn.reporting.analysis import activations as by_layer
from hessfn.reporting.problem import first_pass, prepare
from hessfn.reporting.workspace import clear, state_of, unfinished
from hessfn.storage import product_journal


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
    activations: int = 30,
    seed: int = 0,
    params: Choice = "*",
    num_batches: int | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    command: str = "",
    group: Group = None,
    journal: bool = True,
    resume: bool = False,
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
        plane: points each way of the plane over the top two eigenvectors, one pass over the data each; 0, or k = 1, for
            none.
        activations: random vectors for the traces by layer of weights and activations, one product with each batch; 0
            for none of it. A model that allows none is a warning.
        seed: of all random vectors.
        params: which parameters, as for :func:`hessfn.functionalize`.
        num_batches: how many of the batches, the first ones; by default all.
        dtype: what to compute in, such as ``"float64"``, on a copy of the model; by default the model's own.
        device: where to compute, on a copy of the model; by default where the model is.
        command: the command line that does this, for the page to say.
        group: processes of ``torch.distributed`` that all call this with the same arguments and share the work: of n
            each takes every n-th batch. The first one writes the files and shows the progress.
        journal: keep the products in ``out/.unfinished`` until the report is written: as many bytes as the parameters
            have, for each. Not where several processes share the work.
        resume: take over what a report that was killed has left there, to the same numbers to the last bit. Products
            of other parameters, other data or another dtype are refused; any other option may change. Without it they
            are dropped.

    Returns:
        What ``report.json`` holds; numbers that are not finite are None::

            loss                  the mean over the samples
            eigenvalues           k of them, in the order of ``which``; residuals and converged likewise
            trace                 mean, stderr
            negative_curvature    mean, stderr of the share of the sum of all |eigenvalues| that is below zero; stderr
                                  is that of the runs, and knows nothing of what more steps would change
            density               grid, values; lower, upper: a band of 95 % (None of a single run)
            layers                name: numel, trace, stderr
            activations           name: numel, trace, stderr, weight_numel, weight_trace, weight_stderr, by layer with a
                                  weight, in the order of their calls (see :func:`hessfn.sensitivities`); may be None
            landscape             steps, losses {direction: one at each step}; plane, which may be None: steps (of both
                                  axes), losses (row i is at steps[i] along the first direction), directions (two names)
            settings, versions    what it takes to do it again

    Cost: ``probes + runs * steps`` products, those of ``eigsh``, four that check that the products are a Hessian's, and
    one forward pass for each point of the landscape, ``93 + plane**2``, in a single pass over the batches.

    Raises:
        ModuleNotFoundError: jinja2, which makes the page, is not installed.
        OSError: the products cannot be written, as on a full disk, or another process is about a report in ``out``.
        ValueError: an argument is out of range, ``problem`` is something else, there is no batch, the loss is not
            finite (the batch is named), the products are not a Hessian's, or ``out`` cannot be written.
    """
    template = html.template()
    for option, given, least in (("probes", probes, 2), ("runs", runs, 1), ("steps", steps, 1)):
        if given < least:
            raise InvalidInput(f"{option}={given} must be at least {least}")
    if radius is not None and not 0 < radius < math.inf:
        raise InvalidInput(f"radius={radius} must be positive")
    if plane != 0 and plane < 3:
        raise InvalidInput(f"plane={plane} must be at least 3, or 0 for no plane")
    if activations < 0 or activations == 1:
        raise InvalidInput(f"activations={activations} must be at least 2, or 0 for none")
    if resume and (group is not None or not journal):
        raise InvalidInput("resume needs the journal, which only a report of a single process keeps")
    writes, out = group is None or group.rank() == 0, Path(out)
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(unfinished(out)) if writes else None
        kept = place if journal and group is None else None
        folder = stack.enter_context(html.staging(out)) if writes else None
        # Whatever the batches draw from the global generator, as a DataLoader does, is given back.
        stack.enter_context(torch.random.fork_rng(devices=[]))
        loss, theta, batches = prepare(problem, params, dtype, device, num_batches)
        if group is not None:
            state = dict(problem[0].named_parameters()), dict(problem[0].named_buffers())
            batches = deal(batches, state, group)
        n, first = tree.numel(theta), tree.leaves(theta)[0]
        if not 1 <= k <= n:
            raise InvalidInput(f"k={k} must be between 1 and {n}, the number of parameters")
        value, num_samples, seen = first_pass(loss, theta, batches)
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
            "activations": activations,
            "seed": seed,
            "dtype": str(first.dtype).removeprefix("torch."),
            "device": str(first.device),
            "command": command,
        }
        key = {**state_of(*problem[:2]), **seen, "device": settings["device"], **_versions("hessfn", "torch")}

        def keep(part: str, matvec: MatVec) -> MatVec:
            return matvec if kept is None else product_journal.journal(matvec, kept / part, key=key)

        if kept is not None and not resume:
            clear(kept)
        analysis = analyse(loss, theta, batches, value, settings, keep)
        settings["radius"] = analysis.steps[-1]
        if activations:
            flows = by_layer(problem, batches, dtype, device, activations, seed, keep)
            analysis = analysis._replace(activations=flows)
        versions = {**_versions("hessfn", "torch", "numpy", "scipy", "matplotlib"), "python": platform.python_version()}
        result = html.plain({**_named(analysis, theta), "settings": settings, "versions": versions})
        if folder is not None:
            html.write(folder, template, analysis, result)
    return result


def _by_layer(flows: Sensitivities) -> dict[str, Any]:
    return {
        name: {
            "numel": flows.activation_numel[name],
            "trace": trace,
            "stderr": flows.activations.stderr[name],
            "weight_numel": flows.weight_numel[name],
            "weight_trace": flows.weights.mean[name],
            "weight_stderr": flows.weights.stderr[name],
        }
        for name, trace in flows.activations.mean.items()
    }


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
        "activations": analysis.activations and _by_layer(analysis.activations),
        "landscape": {
            "steps": analysis.steps,
            "losses": analysis.losses,
            "plane": analysis.plane and analysis.plane._asdict(),
        },
    }


def _versions(*packages: str) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in packages}
