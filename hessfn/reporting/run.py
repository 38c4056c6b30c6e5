"""The main job: from a model and its data to numbers with their errors, pictures and one page."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hessfn.core import tree
from hessfn.losses.batches import Weights
from hessfn.losses.functional import Choice
from hessfn.parallel.all_reduce import Group, gather
from hessfn.reporting import html
from hessfn.reporting.activations import analyse_activations
from hessfn.reporting.analysis import Analysis
from hessfn.reporting.clock import Clock
from hessfn.reporting.exact_traces import exact_traces
from hessfn.reporting.landscape import analyse_landscape
from hessfn.reporting.layers import analyse_layers
from hessfn.reporting.options import Options, Which
from hessfn.reporting.part_losses import losses_by_group
from hessfn.reporting.planning import divided, lighter, reserve
from hessfn.reporting.problem import FirstPass, Prepared, first_pass, prepare, some_batches, state_of
from hessfn.reporting.products import Measured
from hessfn.reporting.result import result_of, versions
from hessfn.reporting.spectrum import analyse_spectrum
from hessfn.reporting.traces import analyse_traces
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
    num_pairs: int = Options.num_pairs,
    num_probes: int = Options.num_probes,
    rtol_trace: float | None = Options.rtol_trace,
    num_runs: int = Options.num_runs,
    num_steps: int = Options.num_steps,
    num_layers: int = Options.num_layers,
    minutes: float | None = Options.minutes,
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
        k: number of eigenvalues shown; ``which`` and ``rtol`` as for :func:`hessfn.eigsh`.
        num_pairs: eigenpairs, of which ``k`` are shown. All Ritz pairs of their Krylov space serve as a control variate
            for trace, layers and density, without further products.
        num_probes: random vectors for the trace, one product each. Where the network is linear in each leaf alone, as
            networks of ReLUs are in eval mode, the traces are computed exactly instead, at a backward pass for each
            output of a sample, and six probes are held against them: on the CPU, if that is fewer than the probes, if
            the gradients by all outputs of a sample take at most 32 MB, and not with ``minutes``.
        rtol_trace: take probes until the 95 % interval of the trace has this relative half width.
        num_runs: Lanczos runs for the spectral density, ``num_steps`` products each.
        num_layers: for this many layers, those with the largest traces, also the top eigenvalue and the stable rank.
        minutes: how long the report may take. It chooses the batches, probes and steps with the smallest errors in this
            time, prints the plan, and keeps to the time within a tenth. The batches are spread over all of them, if
            their number is known.
        num_activation_probes: random vectors for the traces by layer of weights and activations, one product with each
            batch; 0 for none. They are exact where those of ``num_probes`` are. If the model does not allow them, there
            is a warning.
        radius: how far the landscape goes each way; by default as far as the quadratic model along the top eigenvector
            rises by ten times the loss, but at most a tenth of the norm of the parameters.
        num_plane_points: points each way of the plane over the top two eigenvectors; 0, or k = 1, for none. About 30
            are computed, where the loss bends most; the others are interpolated.
        seed: of all random vectors.
        resume: use the products that a killed report has left in ``out``; the numbers are the same to the last bit.
            Products of other parameters, other data, another dtype or another number of threads are refused; any other
            option may change. Without it they are deleted.
        journal: keep the products in ``out/.unfinished`` until the report is written, each with as many bytes as the
            parameters. Not if several processes share the work.
        command: the command line of this report, shown on the page.
        group: processes of ``torch.distributed`` that all call this with the same arguments and share the work: of n
            each takes every n-th batch. The first one writes the files and shows the progress.

    Returns:
        What ``report.json`` holds; numbers that are not finite are None:

        - ``schema``, ``date``: the version of this format; when it was made
        - ``loss``, ``gradient_norm``: of the mean over the samples; ``loss_data_stderr``: what other samples would
          change
        - ``accuracy``: value, stderr; None where the targets are no classes
        - ``eigenvalues``: k of them, in the order of ``which``; likewise residuals (of convergence), rounding,
          data_stderr (what other samples would change) and converged; outside: two numbers between which all other
          eigenvalues lie, with probability 0.999
        - ``sharpness``: value, residual, rounding, data_stderr, converged of the largest eigenvalue; lower and upper:
          where that of the population lies, 95 %
        - ``trace``: mean, stderr (by the probes; 0 where it is exact), lower, upper (95 % by the probes), rounding,
          data_stderr
        - ``negative_curvature``: smallest: value and errors of the most negative eigenvalue, whose residual is at most
          ``10 rtol`` of it; share_of_squares: mean, stderr, steps_error of the part of the sum of lambda^2 that is of
          negative ones
        - ``density``: grid, values; lower, upper: a band of 95 % (None of a single run)
        - ``layers``: name: numel, trace and its errors, top, top_residual, stable_rank, stable_rank_stderr (None but
          for the largest), pairs_share
        - ``activations``: name: numel, trace, stderr, weight_numel, weight_trace, weight_stderr, by layer with a
          weight, in the order of their calls (see :func:`hessfn.sensitivities`); may be None
        - ``landscape``: steps, losses {direction: one at each step}; plane, which may be None: steps (of both axes),
          losses (row i is at steps[i] along the first direction), measured (where it is not interpolated), directions
          (two names)
        - ``samples``: of single probes and groups of the data: by these ``hessfn.compare`` compares in pairs
        - ``model``, ``data``, ``cost``: what was looked at, and what it took
        - ``settings``, ``versions``: what it takes to do it again

    Cost: ``num_probes + num_runs * num_steps`` products, about ``4 num_pairs`` for the eigenvalues, some for both ends
    of the spectrum and for layers, ``k`` for the errors by the data, four to check the products, and two in float64, on
    an eighth of the data, for the rounding. The products are linearized, and kept in up to half of the free memory; the
    Krylov space takes about 60 times the memory of the parameters.

    Raises:
        ModuleNotFoundError: jinja2, which makes the page, is not installed.
        OSError: the products cannot be written, as on a full disk, or another process is about a report in ``out``.
        ValueError: an argument is out of range, ``problem`` is something else, there is no batch, the loss is not
            finite (the batch is named) or no mean over samples by the weights, the products are not a Hessian's, those
            to resume are of another problem, or ``out`` cannot be written.
    """
    options = Options(
        name=name, params=params, weights=weights, num_batches=num_batches, dtype=dtype, device=device, k=k,
        which=which, rtol=rtol, num_pairs=num_pairs, num_probes=num_probes, rtol_trace=rtol_trace, num_runs=num_runs,
        num_steps=num_steps, num_layers=num_layers, minutes=minutes, num_activation_probes=num_activation_probes,
        radius=radius, num_plane_points=num_plane_points, seed=seed, resume=resume, journal=journal, command=command,
        group=group,
    )  # fmt: skip
    return run(problem, Path(out), options)


def run(problem: Problem, out: Path, options: Options) -> dict[str, Any]:
    """As :func:`report`, with its options in one object."""
    template = html.template()  # asked for now, since what makes the page may be missing
    seconds, group = None if options.minutes is None else 60 * options.minutes, options.group
    clock = Clock(seconds) if group is None else Clock(seconds, agree=lambda x: all(gather(x, group)))
    # Batches may draw from the global generator, as a DataLoader does: its state is restored.
    with open_workspace(out, options) as workspace, torch.random.fork_rng(devices=[]):
        prepared = prepare(problem, options)
        options = options.fitted(tree.numel(prepared.params))
        if options.minutes is not None:
            options = divided(prepared, options, workspace.journals, clock).fitted(tree.numel(prepared.params))
            prepared = some_batches(prepared, options.num_batches or 1)
        first = first_pass(prepared)
        key = {**state_of(prepared), **first.fingerprints, **versions("hessfn", "torch")}
        keep = keep_in(workspace.journals, key, resume=options.resume)
        analysis = analyse(prepared, first, options, keep, clock)
        result = result_of(analysis, prepared, first, options, clock.spent)
        if workspace.scratch is not None:
            html.write(workspace.scratch, template, result)
    return result


def analyse(problem: Prepared, first: FirstPass, options: Options, keep: Keep, clock: Clock) -> Analysis:
    """All numbers of a report. The trace comes late: its probes take the time that is left."""
    measured, stages = Measured(problem, first.sizes, keep), Stages()
    exact = exact_traces(problem, measured, options)
    stages.begin("spectrum")
    found = analyse_spectrum(measured, options, clock, exact.width if exact else None)
    options = lighter(options, clock, measured.pace)
    stages.begin("landscape")
    landscape = analyse_landscape(problem, first.loss, first.gradient, found.eigen, options)
    activations = None
    if exact is None:
        stages.begin("activations")
        activations = analyse_activations(problem, options, keep)
    stages.begin("trace")
    traces = analyse_traces(measured, found, options, clock, exact, reserve=reserve(options, measured.pace))
    if exact is not None:
        stages.begin("activations")
        known = traces.exact and traces.exact.sensitivities
        activations = known or analyse_activations(problem, options, keep)
    stages.begin("layers")
    layers = analyse_layers(measured, found, traces, options)
    return Analysis(
        loss=first.loss,
        group_losses=losses_by_group(problem, measured.parts),
        eigen=found.eigen,
        sharpness=found.sharpness,
        trace=traces.total,
        layers=layers,
        negative=found.negative,
        density=found.density,
        band=found.band,
        samples=traces.samples,
        landscape=landscape,
        activations=activations,
        num_products=measured.num_products,
        mode=measured.mode,
        stages=stages.end(),
    )


class Stages:
    """How long each stage takes, one after the other."""

    def __init__(self) -> None:
        self._begun: list[tuple[str, float]] = []

    def begin(self, name: str) -> None:
        self._begun.append((name, time.monotonic()))

    def end(self) -> dict[str, float]:
        """Seconds of each."""
        times = [begun for _, begun in self._begun[1:]] + [time.monotonic()]
        return {name: end - begun for (name, begun), end in zip(self._begun, times, strict=True)}
