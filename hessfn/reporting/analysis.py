"""The numbers of a report, as named tuples: the spectrum, the landscape and the traces by layer of one mean loss.

``k`` is the number of eigenvalues, ``s`` of steps along a line, ``p`` of points each way of the plane. Lengths are in
the unit of the parameters, eigenvalues in that of the loss over that of the parameters squared.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hessfn.core.results import Band, Density, EigenPairs, Estimate, Sensitivities


class Spectrum(NamedTuple):
    """What the products with the Hessian of the parameters say."""

    eigen: EigenPairs  #: k pairs, in the order of ``which``; vectors are trees like the parameters
    trace: Estimate  #: (), the sum of all eigenvalues
    layers: Estimate[dict[str, Tensor]]  #: (), by parameter: the trace of its own block; they add up to ``trace``
    negative: Estimate  #: (), from 0 to 1: the share of the sum of all |eigenvalues| that is below zero
    density: Density  #: of the eigenvalues, smoothed
    band: Band | None  #: 95 % at each point of the density; None of a single run


class Plane(NamedTuple):
    """The loss over the plane of the top two eigenvectors."""

    steps: Tensor  #: (p,), distances from the parameters along both axes, ascending, 0 in the middle if p is odd
    losses: Tensor  #: (p, p), in the unit of the loss; row i is at ``steps[i]`` along the first direction
    directions: list[str]  #: the names of the two directions, each of unit norm


class Landscape(NamedTuple):
    """The loss along lines, and over a plane, through the parameters."""

    steps: Tensor  #: (s,), distances from the parameters along each direction, ascending, 0 in the middle
    losses: dict[str, Tensor]  #: (s,), in the unit of the loss, by the name of the direction, each of unit norm
    plane: Plane | None  #: None where none was asked for, or only one eigenvector is known


class Analysis(NamedTuple):
    """All that a report shows."""

    loss: Tensor  #: (), the mean over the samples
    spectrum: Spectrum  #: by the parameters
    landscape: Landscape  #: through the parameters
    activations: Sensitivities | None  #: traces by layer; None where none were asked for, or none can be had
