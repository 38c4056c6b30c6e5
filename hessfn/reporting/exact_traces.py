"""The traces of layers without probes, where the network is linear in each leaf alone: those of Gauss-Newton blocks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.core.results import Estimate, Sensitivities
from hessfn.core.tree import Tree
from hessfn.estimators.data_error import data_stderr
from hessfn.losses.activation import shifted_forward
from hessfn.losses.batches import weighted_mean
from hessfn.losses.samples import length, rows, two_parts
from hessfn.parallel.all_reduce import gather
from hessfn.products.exact_gauss_newton import ggn_traces, has_blocks_of_the_hessian
from hessfn.products.outputs import outputs_of, sides
from hessfn.quantization.sensitivity import exact_sensitivities, has_matrix
from hessfn.reporting.options import Options
from hessfn.reporting.planning import HELD_PROBES
from hessfn.reporting.problem import Prepared, batch_in, converted
from hessfn.reporting.products import Measured

_MOST_SAMPLES = 2  # for a look at the outputs
_MOST_BYTES = 2**25  # of the gradients by all outputs of a sample: of larger ones few samples are taken at a time
_MARGIN = 4  # of rounding, which is seen on one group of the data

Shifts = dict[str, Tensor]


class ExactTraces(NamedTuple):
    """What takes the place of probes, once computed."""

    groups: Tensor  #: (g, l) float64: the trace of every leaf's block, of every group of the data
    weights: Tensor  #: (g,), what each group counts; they sum to 1
    rounding: Tensor  #: (l,), a bound for the error of each leaf's mean
    sensitivities: Sensitivities | None  #: by layers' weights and activations; None where these bend, or are not asked

    def estimates(
        self, named: Callable[[Tensor], dict[str, Tensor]]
    ) -> tuple[Estimate[Tensor], Estimate[dict[str, Tensor]]]:
        """Of the whole and of the layers, with no error by probes."""
        mean, spread = self.weights @ self.groups, data_stderr(self.groups, self.weights)
        zero, none = torch.zeros_like(mean), torch.tensor(0, device="cpu")
        total = data_stderr(self.groups.sum(1), self.weights)
        return (
            Estimate(mean.sum(), zero.sum(), none, rounding=self.rounding.sum(), data_stderr=total),
            Estimate(named(mean), named(zero), none, rounding=named(self.rounding), data_stderr=named(spread)),
        )


class _Network:
    """The network of a report as a function of its parameters, and of shifts of what enters its layers."""

    def __init__(self, problem: Prepared, options: Options, params: Tree) -> None:
        model, self.criterion = converted(problem.model, problem.criterion, options)
        self._shifted, self._zeros = shifted_forward(model, has_matrix, "input", strict=False)
        self.params, self.fitting = params, batch_in(options, params)

    def __call__(self, point: tuple[Tree, Shifts], inputs: Any) -> Any:
        return self._shifted(*point, inputs)

    def shifts(self, inputs: Any) -> Shifts:
        """Zeros, of one sample; none where the first axis is not that of the samples."""
        number, found = length(inputs), self._zeros(inputs)[0]
        fits = all(x.dim() and len(x) == number for x in found.values())
        return {name: x[:1].clone() for name, x in found.items()} if fits else {}

    def traces(self, part: Any, shifts: Shifts) -> Tensor:
        """``(l + f,)``: of every leaf's block, and of every shift's."""
        found = ggn_traces(self, self.criterion, (self.params, shifts), [self.fitting(part)], weights=[1.0])
        return torch.stack(tree.leaves(found)).cpu()


class Exact:
    """Traces that can be computed exactly, at ``width`` backward passes over the data."""

    def __init__(self, problem: Prepared, measured: Measured, options: Options, width: int, shifts: Shifts) -> None:
        self.width, self._shifts = width, shifts
        self._problem, self._measured, self._options = problem, measured, options

    def __call__(self) -> ExactTraces:
        """Cost: as for :func:`hessfn.ggn_traces`, and for one group of the data once more in float64."""
        problem, parts = self._problem, self._measured.parts
        network, number = _Network(problem, self._options, problem.params), 0
        num_leaves = len(tree.leaves(problem.params))
        first: list[tuple[Any, Tensor]] = []

        def of_group(_: tuple[Any, ...], part: Any, weight: float | Tensor) -> Tree:
            nonlocal number
            group, number = (parts.first + number) % parts.num_groups, number + 1
            found = torch.zeros(parts.num_groups, 1 + num_leaves + len(self._shifts), dtype=torch.float64, device="cpu")
            found[group, 0] = 1
            found[group, 1:] = network.traces(part, self._shifts)
            if not first:
                first.append((part, found[group, 1 : 1 + num_leaves]))
            return found

        found: Tensor = weighted_mean(
            of_group, problem.batches, weights=problem.weights, microbatch=parts.size, state=problem.params
        )()
        weights, sums = found[:, 0], found[:, 1:]
        groups = sums / weights.where(weights > 0, 1.0)[:, None]
        leaves, mean = groups[:, :num_leaves], weights @ groups
        sensitivities = self._sensitivities(mean[:num_leaves], mean[num_leaves:])
        return ExactTraces(leaves, weights, self._rounding(mean[:num_leaves], first), sensitivities)

    def _sensitivities(self, leaves: Tensor, shifts: Tensor) -> Sensitivities | None:
        if not self._shifts:
            return None
        weights = dict(zip(tree.names(self._problem.params), leaves, strict=True))
        activations = dict(zip(self._shifts, shifts, strict=True))
        numel = {name: x.numel() for name, x in self._shifts.items()}
        return exact_sensitivities(self._problem.model, weights, activations, numel)

    def _rounding(self, mean: Tensor, first: list[tuple[Any, Tensor]]) -> Tensor:
        """As much of each mean as float64 differs by on one part."""
        if self._problem.finer is None or not first:
            return torch.zeros_like(mean)
        (part, found), options = first[0], replace(self._options, dtype="float64")
        finer = _Network(self._problem, options, tree.map(Tensor.double, self._problem.params)).traces(part, {})
        return _MARGIN * ((finer - found) / finer.where(finer != 0, 1.0)).abs() * mean.abs()


def exact_traces(problem: Prepared, measured: Measured, options: Options) -> Exact | None:
    """None where the blocks are no Gauss-Newton blocks, or probes cost less: a backward pass is about a product.

    Where the time is given, it is divided between data and probes. What few samples at a time cost on an accelerator,
    nobody has measured.
    """
    on_cpu = tree.leaves(problem.params)[0].device.type == "cpu"
    found = _looked_at(problem, options) if on_cpu and options.minutes is None else None
    if options.group is not None:
        said = gather(found and (found[0], list(found[1])), options.group)
        found = found if all(x == said[0] for x in said) else None
    return Exact(problem, measured, options, *found) if found is not None else None


def _looked_at(problem: Prepared, options: Options) -> tuple[int, Shifts] | None:
    """The outputs of one sample, and shifts of what enters the layers; None where probes are to be taken."""
    try:
        for batch in itertools.islice(problem.batches, 1):
            network = _Network(problem, options, problem.params)
            few = rows(batch, 0, _MOST_SAMPLES) if two_parts(batch) else batch
            inputs, _ = sides(network.fitting(few))
            outputs = outputs_of(network, (problem.params, {}), inputs).parts
            width = max(len(x.flatten()) // max(len(x), 1) for x in outputs if x.dim())
            size = sum(leaf.nbytes for leaf in tree.leaves(problem.params))
            if width + HELD_PROBES > options.num_probes or width * size > _MOST_BYTES:
                return None
            shifts = network.shifts(inputs) if options.num_activation_probes else {}
            for chosen in (shifts, {}) if shifts else ({},):
                if has_blocks_of_the_hessian(network, (problem.params, chosen), inputs):
                    network.traces(few, chosen)
                    return width, chosen
        return None
    except Exception:  # a model that does not take few samples, say: probes ask less of it
        return None
