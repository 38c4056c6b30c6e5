"""The numbers of a report, as named tuples: the spectrum, the landscape and the traces by layer of one mean loss.

``k`` is the number of eigenvalues, ``p`` of probes, ``g`` of groups of the data, ``s`` of steps along a line, ``w`` of
points each way of the plane. Lengths are in the unit of the parameters, eigenvalues in that of the loss over that of
the parameters squared. What was not measured is None.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hessfn.core.results import Band, Density, EigenPairs, Estimate, Sensitivities


class Sharpness(NamedTuple):
    """The largest eigenvalue: of the samples, and where that of the population lies, from which they were drawn."""

    pair: EigenPairs  #: k = 1, with all errors
    lower: Tensor | None  #: (), of the population, 95 %: from vectors of one half of the data, on the other half
    upper: Tensor | None  #: (), of the population, 95 %: the samples' own, which is too high on average


class Negative(NamedTuple):
    """Negative curvature, by quantities that converge."""

    smallest: EigenPairs  #: k = 1: the most negative eigenvalue, with all errors
    share: Estimate  #: (), from 0 to 1: the part of the sum of all squared eigenvalues that is of negative ones
    steps_error: Tensor  #: (), how far the rule of so many Lanczos steps may be off in ``share``


class Layers(NamedTuple):
    """What is known of the diagonal block of every parameter tensor, by its name."""

    trace: Estimate[dict[str, Tensor]]  #: with rounding and the data's error
    top: dict[str, Tensor]  #: the largest eigenvalue of the block by magnitude, of the layers of the largest traces
    top_residual: dict[str, Tensor]  #: of that
    stable_rank: Estimate[dict[str, Tensor]]  #: ``||A||_F^2 / ||A||^2`` of the block, of the same layers
    pairs_share: dict[str, Tensor]  #: the part of the trace that is of the eigenpairs shown


class Samples(NamedTuple):
    """The single samples behind the means, from which two reports of the same probes or data are compared in pairs."""

    trace: Tensor  #: (p,)
    layers: dict[str, Tensor]  #: (p,) each
    plain_trace: Tensor  #: (p,), ``z'Az``: the same without the control variate, which is another one in each report
    plain_layers: dict[str, Tensor]  #: (p,) each
    weights: Tensor  #: (g,), what each group of the data counts; they sum to 1
    group_trace: Tensor  #: (g,), the trace of each group
    group_layers: dict[str, Tensor]  #: (g,) each
    group_eigenvalues: Tensor  #: (k, g), the quadratic forms of the eigenvectors


class Plane(NamedTuple):
    """The loss over the plane of the top two eigenvectors."""

    steps: Tensor  #: (w,), distances from the parameters along both axes, ascending, 0 in the middle if w is odd
    losses: Tensor  #: (w, w), in the unit of the loss; row i is at ``steps[i]`` along the first direction
    measured: Tensor  #: (w, w), bool: where the loss was computed, and not interpolated
    directions: list[str]  #: the names of the two directions, each of unit norm


class Landscape(NamedTuple):
    """The loss along lines, and over a plane, through the parameters."""

    steps: Tensor  #: (s,), distances from the parameters along each direction, ascending, 0 in the middle
    losses: dict[str, Tensor]  #: (s,), in the unit of the loss, by the name of the direction, each of unit norm
    plane: Plane | None  #: None where none was asked for, or only one eigenvector is known
    measured: dict[str, Tensor]  #: (s,), bool: where the loss along each line was computed, and not interpolated


class Analysis(NamedTuple):
    """All that a report shows."""

    loss: Tensor  #: (), the mean over the samples
    group_losses: Tensor  #: (g,), that of each group of the data
    eigen: EigenPairs  #: k pairs, in the order of ``which``; vectors are trees like the parameters
    sharpness: Sharpness
    trace: Estimate  #: (), the sum of all eigenvalues
    layers: Layers
    negative: Negative
    density: Density  #: of the eigenvalues, smoothed
    band: Band | None  #: 95 % at each point of the density; None of a single run
    samples: Samples
    landscape: Landscape  #: through the parameters
    activations: Sensitivities | None  #: traces by layer; None where none were asked for, or none can be had
    num_products: int  #: with the mean Hessian
    mode: str  #: how products are made, in words
    stages: dict[str, float]  #: seconds of each
