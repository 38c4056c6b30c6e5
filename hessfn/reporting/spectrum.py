"""The spectrum of a report: eigenvalues, traces and density of a mean loss, from the same products."""

from __future__ import annotations

from typing import Any

import torch

from hessfn.core import tree
from hessfn.core.probes import gaussian, rademacher
from hessfn.core.results import Estimate
from hessfn.core.tree import MatVec, Tree
from hessfn.core.watched import Watched
from hessfn.estimators.eigen import eigsh
from hessfn.estimators.hutchinson import estimate
from hessfn.estimators.spectrum import density, density_band, negative_share, slq
from hessfn.products.hessian import mean_hvp
from hessfn.reporting.analysis import Spectrum
from hessfn.reporting.options import Options
from hessfn.reporting.problem import Prepared
from hessfn.reporting.progress import kept_and_counted, progress_bar
from hessfn.reporting.workspace import Keep
from hessfn.transforms.matvec_check import check_matvec

_CHECKS = 4  # products that check_matvec takes


def analyse_spectrum(problem: Prepared, options: Options, keep: Keep) -> Spectrum:
    """Eigenvalues, traces and density; ``keep(name, matvec)`` is a journal, or leaves the products be."""
    theta, k, seed = problem.params, options.k, options.seed
    later = options.num_probes + options.num_runs * options.num_steps
    # How many products the eigenvalues take turns out on the way: 2k is a guess.
    with progress_bar(options, _CHECKS + 2 * k + later, "product") as bar:
        # Traced at once: a report that is resumed has the products of one that is not, to the bit.
        whole = mean_hvp(problem.loss, theta, problem.batches, weights=problem.weights, trace_after=0)
        matvec = kept_and_counted(whole, keep, "products", bar)
        bar.set_description("check")
        check_matvec(matvec, theta, seed=seed)
        bar.set_description("eigenvalues")
        eigen = eigsh(matvec, gaussian(theta, 1, seed=seed)[0], k, which=options.which, rtol=options.rtol)
        bar.total = bar.n + later
        bar.set_description("trace")
        total, layers = _traces(matvec, theta, options)
        bar.set_description("density")
        quadrature = slq(matvec, gaussian(theta, options.num_runs, seed=seed), options.num_steps)
        bar.set_description("done")
    band = density_band(quadrature) if options.num_runs > 1 else None
    return Spectrum(eigen, total, layers, negative_share(quadrature), density(quadrature), band)


def _traces(matvec: MatVec, theta: Tree, options: Options) -> tuple[Estimate, Estimate[Any]]:
    """The trace, and those of the blocks of all leaves, by name."""
    product = Watched(matvec)

    def sample(z: Tree) -> dict[str, Any]:
        layers = tree.map(tree.dot, z, product(z))
        return {"layers": layers, "total": torch.stack(tree.leaves(layers)).sum()}

    # The sum is a sample of its own: its error does not follow from those of the layers.
    probes = rademacher(theta, options.num_probes, seed=options.seed)
    found: Estimate[Any] = estimate(sample(z) for z in probes)
    product.finished(found.mean)
    total, layers = (Estimate(found.mean[x], found.stderr[x], found.num_matvecs) for x in ("total", "layers"))
    return total, layers
