"""From traces to bits: the rise of the loss that rounding is expected to cost, and the bits that make it least."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.core.arguments import kind, require_vector
from hessfn.core.errors import InvalidInput
from hessfn.core.results import Estimate, Sensitivities
from hessfn.core.tree import Tree
from hessfn.quantization.programme import Item, least
from hessfn.quantization.quantizer import Bits, leaf_of, require_bits, squared_error

Weights = Mapping[str, Tensor]


def expected_rise(
    sensitivities: Sensitivities,
    params: Weights,
    bits: Bits,
    *,
    activations: Weights | None = None,
    per_channel: bool = True,
) -> Estimate[dict[str, Tensor]]:
    """The expected rise of the loss when the weights of one layer are rounded: ``tr H / n * ||w - Q(w)||^2 / 2``.

    This is the second-order rise for errors without a preferred direction. It does not contain the gradient along the
    actual rounding error, nor the curvature along it, which may be several times the mean curvature.

    Args:
        sensitivities: what :func:`hessfn.sensitivities` returns.
        params: the weights by name, ``"<layer>.weight"``, such as :func:`hessfn.functionalize` returns them.
        bits: one number for all layers, or a dict of them by layer, as :func:`allocate_bits` returns it.
        activations: the input of each layer, samples along the first axis. The rise by rounding it to the bits of the
            layer, with one scale for all, is then added; it is that of the mean sample.
        per_channel: as for :func:`hessfn.quantized`, which is Q.

    Returns:
        ``mean`` and ``stderr`` by layer, in the unit of the loss; the errors are those of the traces by their probes. A
        trace within its error may be negative, and its rise too. The layers share their probes, so the error of a sum
        over layers may be as large as the sum of the errors.

    Cost: no product; what ``quantized`` costs.

    Raises:
        ValueError: an argument is of another kind or out of range, or a weight is missing or not finite.

    Source: HAWQ-V2 (Dong et al., 2020).

    >>> traces = Estimate({"0": torch.tensor(2.0)}, {"0": torch.tensor(0.1)}, torch.tensor(50))
    >>> table = Sensitivities(traces, traces, {"0": 2}, {"0": 2})
    >>> found = expected_rise(table, {"0.weight": torch.tensor([[1.0, -0.4]])}, 2)  # which become 1 and 0
    >>> round(float(found.mean["0"]), 4), round(float(found.stderr["0"]), 4)
    (0.08, 0.004)
    """
    table = _require_table(sensitivities, params, "expected_rise(sensitivities, params, bits)")
    layers = list(bits) if isinstance(bits, Mapping) else list(table.weight_numel)
    means, stderrs = {}, {}
    for layer in layers:
        number = require_bits(bits[layer] if isinstance(bits, Mapping) else bits)
        parts = _parts(table, layer, params, activations, per_channel)
        costs = [part.per_trace(number) for part in parts]
        pairs = list(zip(parts, costs, strict=True))
        means[layer] = torch.tensor(sum(cost * part.trace for part, cost in pairs), dtype=torch.float64, device="cpu")
        # Both traces come from the same probes: their errors may go the same way.
        stderrs[layer] = torch.tensor(
            sum(cost * part.stderr for part, cost in pairs), dtype=torch.float64, device="cpu"
        )
    return Estimate(means, stderrs, table.weights.num_matvecs.clone(), table.weights.df)


def allocate_bits(
    sensitivities: Sensitivities,
    *,
    choices: Iterable[int] = (2, 4, 8),
    mean_bits: float | None = None,
    total_bits: int | None = None,
    params: Weights | None = None,
    activations: Weights | None = None,
    fixed: Mapping[str, int] | None = None,
    per_channel: bool = True,
) -> dict[str, int]:
    """The bits of every layer that minimise the expected rise of the loss under a limit on the size.

    It solves the integer programme of HAWQ-V3: one of ``choices`` for each layer, a limit on the number of bits, and
    the smallest sum of :func:`expected_rise`. In this sum a trace ``t`` with the standard error ``s`` counts as its
    mean under the condition that it is not negative, ``t + s pdf(t / s) / cdf(t / s)``: close to t if t is far above
    its error, a fraction of s if t is near 0 or negative. So no trace rewards rounding errors.

    Args:
        sensitivities: what :func:`hessfn.sensitivities` returns.
        choices: bits to choose from, each from 2 to 32.
        mean_bits: the size, as the mean over all weights; or
        total_bits: as the number of bits of all weights together.
        params: the weights by name, as for :func:`expected_rise`: their errors are those of :func:`hessfn.quantized`.
            Without them the weights of all layers are taken to have the same range, and errors that are uniform
            between two levels. Weights that layers share, which are one tensor under two names, get the same bits and
            are stored once.
        activations: as for :func:`expected_rise`; by default weights alone are rounded. They need ``params``.
        fixed: layers whose bits are not chosen, such as the first and the last. They count in the size.
        per_channel: as for :func:`hessfn.quantized`.

    Returns:
        Bits by layer, in the order of the calls.

    Cost: no product; for each choice what ``quantized`` costs, and a programme of layers times choices unknowns.

    Raises:
        ValueError: no choice fits into the size, and how much would; or an argument is of another kind or out of range.

    Source: HAWQ-V2 (Dong et al., 2020), HAWQ-V3 (Yao et al., 2021).

    >>> t = {"a": torch.tensor(90.0), "b": torch.tensor(1.0)}, {"a": torch.tensor(1.0), "b": torch.tensor(0.1)}
    >>> traces = Estimate(*t, torch.tensor(50))
    >>> table = Sensitivities(traces, traces, {"a": 10, "b": 10}, {"a": 5, "b": 5})
    >>> allocate_bits(table, mean_bits=5), allocate_bits(table, mean_bits=4)
    ({'a': 8, 'b': 2}, {'a': 4, 'b': 4})
    """
    table = _require_table(sensitivities, params, "allocate_bits(sensitivities, mean_bits=)")
    options = sorted({require_bits(number) for number in choices})
    if not options:
        raise InvalidInput("choices is empty: give some, such as (2, 4, 8)")
    own = {layer: require_bits(number) for layer, number in (fixed or {}).items()}
    if strangers := [layer for layer in own if layer not in table.weight_numel]:
        raise InvalidInput(f"fixed: {strangers[0]!r} is no layer of the sensitivities: {', '.join(table.weight_numel)}")
    if activations is not None and params is None:
        raise InvalidInput("activations are of no use without params: the rises of both have to be in one unit")
    groups = _groups(list(table.weight_numel), params)
    items = []
    for layers in groups:
        numbers = sorted({own[layer] for layer in layers if layer in own}) or options
        if len(numbers) > 1 and any(layer in own for layer in layers):
            raise InvalidInput(f"fixed: {' and '.join(layers)} share their weight, and are given {numbers} bits")
        # Of a weight that layers share, the trace is that of all its uses, and stands under each name.
        parts = [
            part
            for i, layer in enumerate(layers)
            for part in _parts(table, layer, params, activations, per_channel)[i > 0 :]
        ]
        rises = [sum(part.counted * part.per_trace(number) for part in parts) for number in numbers]
        items.append(Item(table.weight_numel[layers[0]], numbers, rises))
    chosen = least(items, _size(items, mean_bits, total_bits))
    found = {layer: number for layers, number in zip(groups, chosen, strict=True) for layer in layers}
    return {layer: found[layer] for layer in table.weight_numel}


def _size(items: list[Item], mean_bits: float | None, total_bits: int | None) -> int:
    """How many bits there are, once they are found to be enough."""
    if (mean_bits is None) == (total_bits is None):
        raise InvalidInput("give one of mean_bits, the mean over all weights, and total_bits, their sum")
    name, given = ("mean_bits", mean_bits) if total_bits is None else ("total_bits", total_bits)
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not math.isfinite(given):
        raise InvalidInput(f"{name}: {kind(given)} is no finite number")
    numel, needed = sum(item.numel for item in items), sum(item.numel * item.bits[0] for item in items)
    size = given if total_bits is not None else given * numel
    if size < needed:
        enough = needed if total_bits is not None else f"{math.ceil(1e4 * needed / numel) / 1e4:g}"
        raise InvalidInput(
            f"{name}={given} is less than the fewest bits of all choices take: it must be at least {enough}"
        )
    return math.floor(size * (1 + 1e-12))


class _Part(NamedTuple):
    """What is rounded, with the trace of its block."""

    of: Any  #: the tensor, or None where it is not known
    trace: float
    stderr: float
    numel: int
    samples: int
    per_channel: bool

    def per_trace(self, bits: int) -> float:
        """The expected rise over the trace: half the mean squared error of an entry."""
        if self.of is None:
            return (2 / (2**bits - 2)) ** 2 / 24  # a uniform error between two levels of a range from -1 to 1
        return squared_error(self.of, bits, self.per_channel) / (2 * self.numel * self.samples)

    @property
    def counted(self) -> float:
        return given_not_negative(self.trace, self.stderr)


def given_not_negative(mean: float, stderr: float) -> float:
    """The mean of a normal variable of this mean and deviation, of its values from 0 on."""
    from scipy.special import log_ndtr

    if stderr == 0:
        return max(mean, 0.0)
    at = mean / stderr
    return max(0.0, mean + stderr * math.exp(-at * at / 2 - math.log(2 * math.pi) / 2 - log_ndtr(at)))


def _parts(
    table: Sensitivities, layer: str, params: Weights | None, activations: Weights | None, per_channel: bool
) -> list[_Part]:
    if layer not in table.weight_numel:
        raise InvalidInput(f"{layer!r} is no layer of the sensitivities: {', '.join(table.weight_numel)}")
    weight, numel = None, table.weight_numel[layer]
    if params is not None:
        weight = _weight(params, layer)
        if weight.numel() * (2 if weight.is_complex() else 1) != numel:
            raise InvalidInput(f"the weight of {layer!r} has {weight.numel()} entries, its trace is that of {numel}")
    parts = [_part(table.weights, layer, weight, numel, 1, per_channel)]
    if activations is not None:
        if layer not in activations:
            raise InvalidInput(f"activations: what enters {layer!r} is missing")
        entering = tree.require_finite(activations[layer].detach(), f"what enters {layer!r}")
        samples = len(entering)
        if entering[:1].numel() != table.activation_numel[layer]:
            raise InvalidInput(
                f"activations: a sample of what enters {layer!r} has {entering[:1].numel()} entries, its trace is that "
                f"of {table.activation_numel[layer]}: of several calls give one row a sample, all together"
            )
        parts.append(_part(table.activations, layer, entering, entering[:1].numel(), samples, False))
    return parts


def _part(
    traces: Estimate[dict[str, Tensor]], layer: str, of: Tensor | None, numel: int, samples: int, per_channel: bool
) -> _Part:
    mean, stderr = float(traces.mean[layer]), float(traces.stderr[layer])
    if not (math.isfinite(mean) and math.isfinite(stderr)):
        raise InvalidInput(f"the trace of {layer!r} is {mean} +- {stderr}: num_probes=2 or more give it an error")
    return _Part(of, mean, stderr, numel, samples, per_channel)


def _weight(params: Tree, layer: str) -> Tensor:
    name = leaf_of(layer, names := tree.names(params))
    leaf = tree.leaves(params)[names.index(name)]
    found: Tensor = tree.require_finite(leaf.detach(), f"the weight of {layer!r}")
    return found


def _groups(layers: list[str], params: Tree | None) -> list[list[str]]:
    """Layers by weight: those that share one are together."""
    if params is None:
        return [[layer] for layer in layers]
    found: dict[Any, list[str]] = {}
    by_name = dict(zip(tree.names(params), tree.leaves(params), strict=True))
    for layer in layers:
        leaf = by_name[leaf_of(layer, list(by_name))]
        found.setdefault((leaf.data_ptr(), leaf.shape, leaf.stride()), []).append(layer)
    return list(found.values())


def _require_table(x: Any, params: Any, call: str) -> Sensitivities:
    if not all(hasattr(x, field) for field in Sensitivities._fields):
        raise InvalidInput(
            f"{call}: sensitivities is {kind(x)}; give what sensitivities(model, criterion, batches) returns"
        )
    if params is not None:
        require_vector(params, "params", call)
    table: Sensitivities = x
    return table
