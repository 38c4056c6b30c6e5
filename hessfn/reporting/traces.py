"""The traces of a report: of the whole and of every layer, from the same probes, with the errors by probes and by data.

The eigenpairs are a control variate (``z'Az - sum_i theta_i ((q_i'z)^2 - 1)``), leaf by leaf and group by group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.core.free_memory import free_bytes
from hessfn.core.probes import rademacher
from hessfn.core.results import Estimate, ProductRounding
from hessfn.core.tree import Tree
from hessfn.core.warn import warn
from hessfn.estimators.control_variate import ControlVariate, plus
from hessfn.estimators.data_error import trace_data_stderr
from hessfn.estimators.quadratic_forms import MeanForm, form, is_within, per_leaf, whole
from hessfn.estimators.rounding import rounding_of_products
from hessfn.reporting.analysis import Samples
from hessfn.reporting.clock import Clock
from hessfn.reporting.exact_traces import Exact, ExactTraces
from hessfn.reporting.options import Options
from hessfn.reporting.plan import MOST_PROBES
from hessfn.reporting.planning import HELD_PROBES, LEAST_PROBES
from hessfn.reporting.products import Measured, no_rounding
from hessfn.reporting.progress import progress_bar
from hessfn.reporting.spectrum import Spectrum

_SURE = 1 - 1e-6  # that they lie in the interval, for each of them
_PROBES_OF_PARTS = 12  # enough to tell the spread over parts, whose products take longer
_MOST_IMAGES = 40  # for the stable ranks of layers
_SHARE = 0.1  # of the memory that is free, for these


class Traces(NamedTuple):
    total: Estimate
    layers: Estimate[dict[str, Tensor]]
    samples: Samples
    images: list[Tree]  # products with the first probes, as far as memory allows
    exact: ExactTraces | None  # what took the place of the probes, if it did


class _Sample(NamedTuple):
    leaves: Tensor  # (l,)
    plain: Tensor  # (l,), without the control variate
    groups: Tensor | None  # (g, l), of the first probes
    image: Tree  # None where it is not kept


class _Means:
    """The trace and those of the layers, whose errors are known from the products better than from the samples."""

    def __init__(self, known: ControlVariate[Tree]) -> None:
        self.known = known
        self._total: MeanForm[Tree, Tensor] = MeanForm(whole())
        self._layers: MeanForm[Tree, Tree] = MeanForm(per_leaf())

    def add(self, z: Tree, image: Tree) -> None:
        rest = self.known.rest(z, image)
        self._total.add(form(z, rest, whole()))
        self._layers.add(form(z, rest, per_leaf()))

    def __len__(self) -> int:
        return len(self._total)

    def total(self) -> Estimate[Tensor]:
        return plus(self._total.estimate(), self.known.trace())

    def _by_leaf(self) -> Estimate[Tree]:
        return plus(self._layers.estimate(), self.known.traces())

    def agree_with(self, known: ExactTraces) -> bool:
        """Whether the exact traces lie in the intervals of the probes: of the whole, and of every layer."""
        wanted = known.weights @ known.groups
        layers = self._by_leaf()
        return _is_in(wanted.sum(), self.total(), known.rounding.sum()) and all(
            _is_in(x, Estimate(mean, stderr, layers.num_matvecs, df), slack)
            for x, mean, stderr, df, slack in zip(
                wanted, *map(tree.leaves, (layers.mean, layers.stderr, layers.df)), known.rounding, strict=True
            )
        )

    def layers(self, names: list[str]) -> Estimate[dict[str, Tensor]]:
        found = self._by_leaf()

        def named(x: Any) -> Any:
            return dict(zip(names, tree.leaves(x), strict=True))

        return found._replace(mean=named(found.mean), stderr=named(found.stderr), df=named(found.df))


def analyse_traces(
    measured: Measured, found: Spectrum, options: Options, clock: Clock, exact: Exact | None, *, reserve: float
) -> Traces:
    """Both traces, from as many probes as are asked for, as the tolerance takes, or as there is time for.

    Where they can be had exactly, a few probes are held against them, and say what is said of products alone.
    """
    names = tree.names(measured.params)
    known = exact() if exact else None
    with progress_bar(options, HELD_PROBES if known else options.num_probes, "product", "trace") as bar:
        measured.bar = bar
        means = _Means(ControlVariate(found.space, "traces of a report"))
        samples = list(_sampled(measured, found, options, clock, reserve, means, known))
        if known and not means.agree_with(known):
            warn("the traces by Gauss-Newton blocks are not those of the probes, which are taken instead")
            known = None
        rounding = None if known else _rounding(measured, options)
    leaves, plain = (torch.stack([getattr(x, part) for x in samples]) for part in ("leaves", "plain"))  # (p, l)
    weights = found.group_weights

    def named(values: Tensor) -> dict[str, Tensor]:
        return dict(zip(names, values.unbind(-1), strict=True))

    if known:
        groups, (total, layers) = known.groups, known.estimates(named)
    else:
        by_probe = torch.stack([x.groups for x in samples if x.groups is not None], dim=1)  # (g, p, l)
        groups = by_probe.mean(1)
        total = means.total()._replace(
            rounding=rounding and rounding.total, data_stderr=trace_data_stderr(by_probe.sum(2), weights)
        )
        layers = means.layers(names)._replace(
            rounding=rounding and named(torch.stack(tree.leaves(rounding.leaves))),
            data_stderr=named(trace_data_stderr(by_probe, weights)),
        )
        if options.rtol_trace is not None and not is_within(total, options.rtol_trace):
            warn(f"the trace is not known to rtol_trace={options.rtol_trace:g} after {len(samples):,} probes")
    kept = Samples(
        trace=leaves.sum(1),
        layers=named(leaves),
        plain_trace=plain.sum(1),
        plain_layers=named(plain),
        weights=weights,
        group_trace=groups.sum(1),
        group_layers=named(groups),
        group_eigenvalues=found.group_eigenvalues,
    )
    return Traces(total, layers, kept, [x.image for x in samples if x.image is not None], known)


def _sampled(
    measured: Measured,
    found: Spectrum,
    options: Options,
    clock: Clock,
    reserve: float,
    means: _Means,
    known: ExactTraces | None,
) -> Iterator[_Sample]:
    """Each probe's traces, with the whole Krylov space as control variate.

    Of the pairs that are shown the groups' own quadratic forms are known, which take the same part out of the traces of
    the groups.
    """
    rtol = options.rtol_trace
    open_ended = rtol is not None or options.minutes is not None
    probes = rademacher(measured.params, MOST_PROBES if open_ended else options.num_probes, seed=options.seed)
    theta, terms = found.space.values, _terms(means.known)
    rows = torch.cat([(theta == value).nonzero()[0] for value in found.eigen.values])
    of_groups = theta[None].repeat(found.group_eigenvalues.shape[1], 1)  # (g, j)
    of_groups[:, rows] = found.group_eigenvalues.T
    home = tree.leaves(measured.params)[0].device
    size = sum(x.nbytes for x in tree.leaves(measured.params))
    num_kept = int(min(_MOST_IMAGES, _SHARE * free_bytes(home) / size)) if options.num_layers else 0
    for z in clock.while_time(probes, reserve=reserve, least=LEAST_PROBES):
        is_cut = (HELD_PROBES if known else 0) <= len(means) < _PROBES_OF_PARTS
        product, change = measured(z) if is_cut else measured.by_batch(z), terms(z)
        leaves = product.weights @ product.forms
        groups = product.forms - of_groups @ change if is_cut else None
        image = product.image if len(means) < num_kept else None
        means.add(z, product.image)
        yield _Sample(leaves - theta @ change, leaves, groups, image)
        if known and len(means) == HELD_PROBES and means.agree_with(known):
            return
        if rtol is not None and len(means) % LEAST_PROBES == 0 and is_within(means.total(), rtol):
            return


def _is_in(value: Tensor, estimate: Estimate, slack: Tensor) -> bool:
    lower, upper = estimate.interval(_SURE)
    return bool(lower - slack <= value.to(lower)) and bool(value.to(upper) <= upper + slack)


def _terms(pairs: ControlVariate[Tree]) -> Callable[[Tree], Tensor]:
    """``z -> (j, l)``: ``(q_il'z_l)(q_i'z) - ||q_il||^2`` of every pair i and leaf l, whose mean is 0."""
    squares = pairs.leaf_squares().cpu()

    def terms(z: Tree) -> Tensor:
        components = pairs.leaf_components(z).cpu()
        return components * components.sum(1, keepdim=True) - squares

    return terms


def _rounding(measured: Measured, options: Options) -> ProductRounding[Tree] | None:
    matvecs = measured.precisions()
    if matvecs is not None:
        return rounding_of_products(*matvecs, rademacher(measured.params, 1, seed=options.seed)[0])
    zero = no_rounding(measured.params)
    return None if zero is None else ProductRounding(zero, zero, tree.map(lambda _: zero, measured.params))
