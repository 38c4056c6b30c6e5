"""The main job: from a model and its data to numbers with their errors, pictures and one page."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hessfn.core import tree
from hessfn.losses.batches import Weights
from hessfn.losses.functional import Choice
from hessfn.parallel.all_reduce import Group
from hessfn.reporting import html
from hessfn.reporting.activations import analyse_activations
from hessfn.reporting.analysis import Analysis
from hessfn.reporting.landscape import analyse_landscape
from hessfn.reporting.options import Options, Which
from hessfn.reporting.problem import Prepared, first_pass, prepare, state_of
from hessfn.reporting.result import result_of, versions
from hessfn.reporting.spectrum import analyse_spectrum
from hessfn.reporting.workspace import Keep, keep_in, open_workspace

Three = tuple[nn.Module, Callable[[Any, Any], Tensor], Iterable[Any]]
Problem = Three | tuple[nn.Module, Callable[[Any, Any], Tensor], Iterable[Any], Weights]


def report(
    problem: Problem,
    out: str | Path,
    *,
    name: str = Options.name,
    params: Choice = Options.params,
    weights: Weights = Options.weights,
    num_batches: int | None = Options.num_batches,
    dtype: torch.dtype | str | None = Options.dtype,
    device: torch.device | str | None = Options.device,
    k: int = Options.k,
    which: Which = Options.which,
    rtol: float = Options.rtol,
    num_probes: int = Options.num_probes,
    num_runs: int = Options.num_runs,
    num_steps: int = Options.num_steps,
    num_activation_probes: int = Options.num_activation_probes,
    radius: float | None = Options.radius,
    num_plane_points: int = Options.num_plane_points,
    seed: int = Options.seed,
    resume: bool = Options.resume,
    journal: bool = Options.journal,
    command: str = Options.command,
    group: Group = Options.group,
) -> dict[str, Any]:
    """The curvature of a model's mean loss over its batches, written to a folder and returned.

    Args:
        problem: ``(model, criterion, batches)``. The model is not changed; its mode counts as it is. Each batch is
            ``(inputs, targets)``, and every pass over ``batches`` must give the same ones. A fourth element may be the
            ``weights``.
        out: the folder, made if it is not there, for ``report.json``, ``report.html`` and ``*.png``. They appear when
            all is computed, or not at all.
        name: what the page calls the problem.
        params: which parameters, as for :func:`hessfn.functionalize`.
        weights: what each batch counts in the mean, as for :func:`hessfn.mean_hvp`.
        num_batches: how many of the batches, the first ones; by default all.
        dtype: what to compute in, such as ``"float64"``, on a copy of the model; by default the model's own.
        device: where to compute, on a copy of the model; by default where the model is.
        k: number of eigenvalues; ``which`` and ``rtol`` as for :func:`hessfn.eigsh`.
        num_probes: random vectors for the trace, one product each.
        num_runs: Lanczos runs for the spectral density, ``num_steps`` products each.
        num_activation_probes: random vectors for the traces by layer of weights and activations, one product with each
            batch; 0 for none of it. A model that allows none is a warning.
        radius: how far the landscape goes each way; by default as far as the quadratic model along the top eigenvector
            rises by ten times the loss, but at most a tenth of the norm of the parameters.
        num_plane_points: points each way of the plane over the top two eigenvectors, one pass over the data each; 0, or
            k = 1, for none.
        seed: of all random vectors.
        resume: take over what a report that was killed has left there, to the same numbers to the last bit. Products
            of other parameters, other data, another dtype or another number of threads are refused; any other option
            may change. Without it they are dropped.
        journal: keep the products in ``out/.unfinished`` until the report is written: as many bytes as the parameters
            have, for each. Not where several processes share the work.
        command: the command line that does this, for the page to say.
        group: processes of ``torch.distributed`` that all call this with the same arguments and share the work: of n
            each takes every n-th batch. The first one writes the files and shows the progress.

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

    Cost: ``num_probes + num_runs * num_steps`` products, those of ``eigsh``, four that check that the products are a
    Hessian's, and one forward pass for each point of the landscape, ``93 + num_plane_points**2``, in a single pass over
    the batches.

    Raises:
        ModuleNotFoundError: jinja2 or plotly, which make the page, is not installed.
        OSError: the products cannot be written, as on a full disk, or another process is about a report in ``out``.
        ValueError: an argument is out of range, ``problem`` is something else, there is no batch, the loss is not
            finite (the batch is named) or no mean over samples by the weights, the products are not a Hessian's, those
            to resume are of another problem, or ``out`` cannot be written.
    """
    options = Options(
        name=name, params=params, weights=weights, num_batches=num_batches, dtype=dtype, device=device, k=k,
        which=which, rtol=rtol, num_probes=num_probes, num_runs=num_runs, num_steps=num_steps,
        num_activation_probes=num_activation_probes, radius=radius, num_plane_points=num_plane_points, seed=seed,
        resume=resume, journal=journal, command=command, group=group,
    )  # fmt: skip
    return run(problem, Path(out), options)


def run(problem: Problem, out: Path, options: Options) -> dict[str, Any]:
    """As :func:`report`, with its options in one object."""
    template = html.template()  # asked for now, since what makes the page may be missing
    # Batches may draw from the global generator, as a DataLoader does: its state is restored.
    with open_workspace(out, options) as workspace, torch.random.fork_rng(devices=[]):
        prepared = prepare(problem, options)
        options = options.fitted(tree.numel(prepared.params))
        first = first_pass(prepared)
        key = {**state_of(prepared), **first.fingerprints, **versions("hessfn", "torch")}
        keep = keep_in(workspace.journals, key, resume=options.resume)
        analysis = analyse(prepared, first.loss, options, keep)
        result = result_of(analysis, prepared, first, options)
        if workspace.scratch is not None:
            html.write(workspace.scratch, template, analysis, result)
    return result


def analyse(problem: Prepared, value: Tensor, options: Options, keep: Keep) -> Analysis:
    """All numbers of a report, of a loss that is ``value`` at the parameters."""
    spectrum = analyse_spectrum(problem, options, keep)
    landscape = analyse_landscape(problem, value, spectrum.eigen, options)
    return Analysis(value, spectrum, landscape, analyse_activations(problem, options, keep))
