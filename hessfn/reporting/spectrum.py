"""The spectrum of a report: eigenvalues and density of a mean loss, from the same products, with all their errors."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from hessfn.core import tree
from hessfn.core.probes import gaussian
from hessfn.core.results import Band, Density, EigenPairs
from hessfn.estimators.eigen import eigsh
from hessfn.estimators.krylov import select
from hessfn.estimators.spectrum import density, density_band, slq
from hessfn.reporting.analysis import Negative, Sharpness
from hessfn.reporting.clock import Clock
from hessfn.reporting.ends import negative, pairs_at, sharpness, with_errors
from hessfn.reporting.options import Options
from hessfn.reporting.planning import announce, products_of_pairs, steps_in_time
from hessfn.reporting.products import Measured
from hessfn.reporting.progress import progress_bar
from hessfn.transforms.matvec_check import check_matvec

_CHECKS = 4  # products that check_matvec takes


class Spectrum(NamedTuple):
    """What a Krylov space and some Lanczos runs say."""

    space: EigenPairs  #: all Ritz pairs, which are the control variate of what follows
    eigen: EigenPairs  #: those shown
    group_eigenvalues: Tensor  #: (k, g), the quadratic forms of their vectors by group of the data
    group_weights: Tensor  #: (g,), what each group counts; they sum to 1
    sharpness: Sharpness
    negative: Negative
    density: Density
    band: Band | None


def analyse_spectrum(measured: Measured, options: Options, clock: Clock, width: int | None) -> Spectrum:
    """Eigenvalues, both ends and the density, in fewer steps where the time is short.

    Args:
        width: backward passes of traces that are exact; None where they take probes.
    """
    theta, seed = measured.params, options.seed
    # How many products the eigenvalues take turns out on the way: 2 num_pairs is a guess.
    later = options.k + options.num_runs * options.num_steps
    with progress_bar(options, _CHECKS + 2 * options.num_pairs + later, "product") as bar:
        measured.bar = bar
        bar.set_description("check")
        check_matvec(measured.matvec, theta, seed=seed)
        if options.minutes is None:
            announce(measured, options, width)
        bar.set_description("eigenvalues")
        start, second, *runs = gaussian(theta, 2 + options.num_runs, seed=seed)
        space = eigsh(
            measured.matvec,
            start,
            options.num_pairs,
            which=options.which,
            rtol=options.rtol,
            second_start=second,
            keep_all=True,
            max_matvecs=products_of_pairs(options, clock, measured.pace),
        )
        bar.total = bar.n + later
        bar.set_description("both ends")
        rows = _shown(space.values[: options.num_pairs], options.k, options.which)
        shown, forms = with_errors(pairs_at(space, rows)._replace(outside=space.outside), measured)
        top = sharpness(space, shown, measured, start, options)
        bar.total = bar.n + later - options.k
        bar.set_description("density")
        num_steps = steps_in_time(options, clock, measured.pace)
        quadrature = slq(measured.matvec, runs, num_steps, eigenpairs=space)
        bar.set_description("negative curvature")
        below = negative(space, quadrature, measured, options)
    band = density_band(quadrature, n=tree.numel(theta)) if options.num_runs > 1 else None
    return Spectrum(space, shown, forms.values.T, forms.weights, top, below, density(quadrature), band)


def _shown(values: Tensor, k: int, which: Any) -> list[int]:
    """Rows of the k wanted eigenvalues, in the order of ``which``."""
    order = values.argsort(stable=True)
    rows: list[int] = order[select(values[order], k, which)].tolist()
    return rows
