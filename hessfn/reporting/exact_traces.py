"""The traces of layers without probes, where the network is linear in each leaf alone: those of Gauss-Newton blocks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.core.results import Estimate
from hessfn.core.tree import Tree
from hessfn.estimators.data_error import data_stderr
from hessfn.losses.batches import weighted_mean
from hessfn.losses.functional import stateless
from hessfn.losses.samples import rows, two_parts
from hessfn.parallel.all_reduce import gather
from hessfn.products.exact_gauss_newton import ggn_traces, has_blocks_of_the_hessian
from hessfn.products.outputs import outputs_of, sides
from hessfn.reporting.options import Options
from hessfn.reporting.planning import HELD_PROBES
from hessfn.reporting.problem import Prepared, batch_in, converted
from hessfn.reporting.products import Measured

_MOST_SAMPLES = 2  # for a look at the outputs
_MARGIN = 4  # of rounding, which is seen on one group of the data


class ExactTraces(NamedTuple):
    """What takes the place of probes, once computed."""

    groups: Tensor  #: (g, l) float64: the trace of every leaf's block, of every group of the data
    weights: Tensor  #: (g,), what each group counts; they sum to 1
    rounding: Tensor  #: (l,), a bound for the error of each leaf's mean

    def estimates(
        self, named: Callable[[Tensor], dict[str, Tensor]]
    ) -> tuple[Estimate[Tensor], Estimate[dict[str, Tensor]]]:
        """Of the whole and of the layers, with no error by probes."""
        mean, spread = self.weights @ self.groups, data_stderr(self.groups, self.weights)
        zero, none = torch.zeros_like(mean), torch.tensor(0)
        total = data_stderr(self.groups.sum(1), self.weights)
        return (
            Estimate(mean.sum(), zero.sum(), none, rounding=self.rounding.sum(), data_stderr=total),
            Estimate(named(mean), named(zero), none, rounding=named(self.rounding), data_stderr=named(spread)),
        )


class Exact:
    """Traces that can be computed exactly, at ``width`` backward passes over the data."""

    def __init__(self, problem: Prepared, measured: Measured, options: Options, width: int) -> None:
        self.width = width
        self._problem, self._measured, self._options = problem, measured, options

    def __call__(self) -> ExactTraces:
        """Cost: as for :func:`hessfn.ggn_traces`, and for one group of the data once more in float64."""
        problem, parts = self._problem, self._measured.parts
        of_part, number = _traces(problem, self._options, problem.params), 0
        first: list[tuple[Any, Tensor]] = []

        def of_group(_: tuple[Any, ...], part: Any, weight: float | Tensor) -> Tree:
            nonlocal number
            group, number = (parts.first + number) % parts.num_groups, number + 1
            found = torch.zeros(parts.num_groups, 1 + len(tree.leaves(problem.params)), dtype=torch.float64)
            found[group, 0] = 1
            found[group, 1:] = of_part(part)
            if not first:
                first.append((part, found[group, 1:]))
            return found

        found: Tensor = weighted_mean(
            of_group, problem.batches, weights=problem.weights, microbatch=parts.size, state=problem.params
        )()
        weights, sums = found[:, 0], found[:, 1:]
        groups = sums / weights.where(weights > 0, 1.0)[:, None]
        return ExactTraces(groups, weights, self._rounding(weights @ groups, first))

    def _rounding(self, mean: Tensor, first: list[tuple[Any, Tensor]]) -> Tensor:
        """As much of each mean as float64 differs by on one part."""
        if self._problem.finer is None or not first:
            return torch.zeros_like(mean)
        (part, found), options = first[0], replace(self._options, dtype="float64")
        finer = _traces(self._problem, options, tree.map(Tensor.double, self._problem.params))(part)
        return _MARGIN * ((finer - found) / finer.where(finer != 0, 1.0)).abs() * mean.abs()


def exact_traces(problem: Prepared, measured: Measured, options: Options) -> Exact | None:
    """None where the blocks are no Gauss-Newton blocks, or probes cost less: a backward pass is about a product.

    Where the time is given, it is divided between data and probes.
    """
    width = None if options.minutes is not None else _width(problem, measured, options)
    if options.group is not None:
        widths = gather(width, options.group)
        width = None if None in widths else max(widths)
    return Exact(problem, measured, options, width) if width is not None else None


def _width(problem: Prepared, measured: Measured, options: Options) -> int | None:
    """Outputs of one sample, if it is worth it; of a process that has no batch it is not known that it is not."""
    try:
        for batch in itertools.islice(problem.batches, 1):
            forward, _ = _forward(problem, options)
            few = batch_in(options, problem.params)(rows(batch, 0, _MOST_SAMPLES) if two_parts(batch) else batch)
            inputs, _ = sides(few)
            parts = outputs_of(forward, problem.params, inputs).parts
            width = max(len(x.flatten()) // max(len(x), 1) for x in parts if x.dim())
            if width + HELD_PROBES > options.num_probes or not has_blocks_of_the_hessian(
                forward, problem.params, inputs
            ):
                return None
            _traces(problem, options, problem.params)(few)
            return width
    except Exception:  # a model that does not take few samples, say: probes ask less of it
        return None
    return 0


def _forward(problem: Prepared, options: Options) -> tuple[Callable[[Tree, Any], Any], Any]:
    model, criterion = converted(problem.model, problem.criterion, options)
    return stateless(model, params=options.params)[0], criterion


def _traces(problem: Prepared, options: Options, params: Tree) -> Callable[[Any], Tensor]:
    """From a part of the data to ``(l,)``."""
    (forward, criterion), fitting = _forward(problem, options), batch_in(options, params)

    def of_part(part: Any) -> Tensor:
        found = ggn_traces(forward, criterion, params, [fitting(part)], weights=[1.0])
        return torch.stack(tree.leaves(found)).cpu()

    return of_part
