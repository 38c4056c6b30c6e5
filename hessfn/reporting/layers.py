"""The layers of a report: the trace of every parameter's diagonal block, and the top of the blocks of the largest."""

from __future__ import annotations

import glob

from torch import Tensor

from hessfn.core import tree
from hessfn.core.probes import rademacher
from hessfn.core.results import Estimate
from hessfn.estimators.layer_blocks import block_tops, squared_frobenius_per_leaf, stable_ranks
from hessfn.reporting.analysis import Layers
from hessfn.reporting.options import Options
from hessfn.reporting.planning import STEPS_OF_A_LAYER
from hessfn.reporting.products import Measured
from hessfn.reporting.progress import progress_bar
from hessfn.reporting.spectrum import Spectrum
from hessfn.reporting.traces import Traces


def analyse_layers(measured: Measured, found: Spectrum, traces: Traces, options: Options) -> Layers:
    """Of every layer its trace; of the layers of the largest traces also the top eigenvalue and the stable rank."""
    mean = traces.layers.mean
    names = sorted(mean, key=lambda name: -abs(float(mean[name])))[: options.num_layers]
    none: dict[str, Tensor] = {}
    if not names:
        return Layers(traces.layers, none, none, Estimate(none, none, traces.layers.num_matvecs), _shares(found, mean))
    with progress_bar(options, STEPS_OF_A_LAYER * len(names), "product", "layers") as bar:
        measured.bar = bar
        tops = block_tops(
            measured.matvec,
            measured.params,
            [glob.escape(name) for name in names],
            eigenpairs=found.space,
            max_matvecs=STEPS_OF_A_LAYER,
            seed=options.seed,
        )
        bar.total = bar.n
    ranks: Estimate[dict[str, Tensor]] = Estimate(none, none, traces.layers.num_matvecs)
    if len(traces.images) > 1:
        images = iter(traces.images)
        probes = rademacher(measured.params, len(traces.images), seed=options.seed)
        squares = squared_frobenius_per_leaf(lambda z: next(images), probes, eigenpairs=found.space)
        ranks = stable_ranks(squares, tops)
    return Layers(traces.layers, tops.values, tops.residuals, ranks, _shares(found, mean))


def _shares(found: Spectrum, traces: dict[str, Tensor]) -> dict[str, Tensor]:
    """The part of each layer's trace that is of the eigenpairs shown: ``sum_i theta_i ||q_il||^2 / tr A_ll``."""
    theta = found.eigen.values
    held = [theta @ tree.wide(x.flatten(1)).square().sum(1).to(theta) for x in tree.leaves(found.eigen.vectors)]
    return {name: value / traces[name] for name, value in zip(tree.names(found.eigen.vectors), held, strict=True)}
