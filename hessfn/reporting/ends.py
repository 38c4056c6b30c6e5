"""Both ends of the spectrum: the sharpness with its place in the population, and the most negative eigenvalue."""

from __future__ import annotations

import torch

from hessfn.core import tree
from hessfn.core.results import EigenPairs, Forms, Quadrature
from hessfn.core.tree import Tree
from hessfn.estimators.data_error import cross_fitted, data_stderr
from hessfn.estimators.eigen import eigsh
from hessfn.estimators.negative import negative_share_of_squares
from hessfn.estimators.rounding import rounding_of_pairs
from hessfn.reporting.analysis import Negative, Sharpness
from hessfn.reporting.options import Options, Which
from hessfn.reporting.products import Measured, no_rounding

_MOST = 24  # products for an end that the space has not found
_ROUGH = 0.05  # of the vectors of the halves: the other half's quotient is a lower end in any case
_EASIER = 10  # times the tolerance of other eigenvalues: see negative


def with_errors(pairs: EigenPairs, measured: Measured) -> tuple[EigenPairs, Forms]:
    """Pairs with all errors, and the quadratic forms of their vectors by group of the data; a product each."""
    found = [measured(row(pairs.vectors, i)) for i in range(len(pairs.values))]
    forms = Forms(torch.stack([x.forms.sum(1) for x in found], dim=1), found[0].weights)
    matvecs = measured.precisions()
    zero = no_rounding(measured.params)
    none = None if zero is None else zero.expand_as(pairs.values)
    rounding = none if matvecs is None else rounding_of_pairs(*matvecs, pairs)
    return pairs._replace(rounding=rounding, data_stderr=data_stderr(*forms)), forms


def row(vectors: Tree, index: int) -> Tree:
    return tree.map(lambda x: x[index], vectors)


def end_of(space: EigenPairs, sign: int, measured: Measured, rtol: float) -> EigenPairs:
    """The largest (sign 1) or smallest (-1) eigenvalue, k = 1: from the space, or from where that has come near it."""
    index = int((sign * space.values).argmax())
    found = pairs_at(space, [index])
    good = found.residuals <= rtol * found.values.abs()
    if good:
        return found._replace(converged=good)
    which: Which = "LA" if sign > 0 else "SA"
    return eigsh(measured.matvec, row(space.vectors, index), which=which, rtol=rtol, max_matvecs=_MOST)


def pairs_at(pairs: EigenPairs, rows: list[int]) -> EigenPairs:
    """Some of the pairs, with the errors that are known."""
    at = torch.tensor(rows, device="cpu")
    return EigenPairs(
        pairs.values[at],
        tree.map(lambda x: x[at.to(x.device)], pairs.vectors),
        pairs.residuals[at],
        pairs.num_matvecs,
        pairs.converged[at],
        None if pairs.rounding is None else pairs.rounding[at],
        None if pairs.data_stderr is None else pairs.data_stderr[at],
    )


def sharpness(space: EigenPairs, shown: EigenPairs, measured: Measured, start: Tree, options: Options) -> Sharpness:
    """The largest eigenvalue; where there are groups of data, both ends for that of the population."""
    known = (shown.values == space.values.max()).nonzero().flatten().tolist()
    if known:
        pair = pairs_at(shown, known[:1])
    else:
        pair, _ = with_errors(end_of(space, 1, measured, options.rtol), measured)
    if measured.parts.num_groups < 2:
        return Sharpness(pair, None, None)
    bracket = cross_fitted(
        measured.half(0),
        measured.half(1),
        start,
        forms_a=measured.forms_of_half(0),
        forms_b=measured.forms_of_half(1),
        whole=pair,
        rtol=_ROUGH,
    )
    return Sharpness(pair, bracket.lower, bracket.upper)


def negative(space: EigenPairs, quadrature: Quadrature, measured: Measured, options: Options) -> Negative:
    """The most negative eigenvalue, and how much of all squared curvature is negative.

    The eigenvalue has ten times the tolerance of the others. Its vector is not shown, and its own error is about the
    square of the residual over the distance to the next eigenvalue: at a residual of a hundredth of it usually less
    than a thousandth, of which rounding and the choice of the data leave nothing to be seen.
    """
    pair, _ = with_errors(end_of(space, -1, measured, _EASIER * options.rtol), measured)
    found = negative_share_of_squares(quadrature, tree.numel(measured.params))
    return Negative(pair, found.share, found.steps_error)
