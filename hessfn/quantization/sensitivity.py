"""How much the loss minds errors in each layer's weights and activations: traces by layer, over a whole data set."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hessfn.core import tree
from hessfn.core.arguments import require_batches, require_model
from hessfn.core.errors import InvalidInput
from hessfn.core.probes import rademacher
from hessfn.core.results import Estimate, S, Sensitivities
from hessfn.core.tree import MatVec
from hessfn.losses.activation import Edge, joint_loss
from hessfn.losses.batches import Weights, mean, share_of
from hessfn.losses.functional import about, as_real, private
from hessfn.losses.layer_selection import Layers
from hessfn.losses.model_inputs import pair
from hessfn.losses.samples import length
from hessfn.losses.skeleton import bare
from hessfn.losses.weights import Weigher, refuse_parts
from hessfn.quantization.forms import Forms

Criterion = Callable[[Any, Any], Tensor]
ByName = dict[str, Tensor]
Point = dict[str, ByName]
Probes = Callable[[Any], Sequence[Any]]
Transform = Callable[[MatVec[Any]], MatVec[Any]]


def activation_traces(
    model: nn.Module,
    criterion: Criterion,
    batches: Iterable[Any],
    layers: Layers,
    num_probes: int,
    *,
    at: Edge = "input",
    blockwise: bool = False,
    seed: int = 0,
    weights: Weights = None,
    microbatch: int | None = None,
    transform: Transform = lambda matvec: matvec,
) -> Estimate[ByName]:
    """The trace of each layer's activation Hessian, over all samples of all batches: the mean of the samples' traces.

    Args:
        model, criterion: as for :func:`hessfn.functionalize`.
        batches, weights, microbatch: as for :func:`hessfn.mean_hvp`, but for one pass only.
        layers, at: as for :func:`hessfn.activation_loss`.
        num_probes: Rademacher probes for each batch, which has its own.
        blockwise: probe one layer at a time, so that the blocks between layers add nothing to the variance.
        seed: of the probes.
        transform: applied to each batch's function from a probe z to ``z'Hz`` by leaf, such as ``hf.progress`` or
            ``hf.journal``.

    Returns:
        ``mean`` and ``stderr``, dicts by shift in the order of the calls, and ``num_matvecs``. The errors are those of
        the probes, for these data. Divide by ``shifts[name][0].numel()`` for the average traces of HAWQ-V2.

    Cost: ``num_probes`` products with each batch, ``blockwise`` so many for each layer (cheaper ones: only what comes
    after the layer is in them); what :func:`hessfn.linearized_hvp` keeps of one batch.

    Raises:
        ValueError: as these functions do, or ``num_probes`` is less than 1.

    Source: HAWQ-V2 (Dong et al., 2020).

    >>> net = nn.Sequential(nn.Linear(1, 1, bias=False))
    >>> batches = [(torch.ones(5, 1), torch.zeros(5, 1)), (torch.ones(2, 1), torch.zeros(2, 1))]
    >>> trace = activation_traces(net, nn.MSELoss(), batches, "0", 2).mean["0"]
    >>> torch.allclose(trace, 2 * net[0].weight.double() ** 2)
    True
    """
    _require_kinds(model, batches, "activation_traces(model, criterion, batches, layers, num_probes)")

    loss, shifts_of = joint_loss(model, criterion, layers, at, strict=True)
    forms = Forms(lambda shifts, batch: loss({}, shifts, batch), shifts_of)

    def samples(batch: Any, probes: Probes) -> ByName:
        shifts = shifts_of(batch)
        parts = [{name: shift} for name, shift in shifts.items()] if blockwise else [shifts]
        return {name: x for part in parts for name, x in forms(part, batch, probes, transform).items()}

    result = _over(batches, samples, num_probes, seed, weights, microbatch, model, criterion)
    return result._replace(num_matvecs=result.num_matvecs * (len(result.mean) if blockwise else 1))


def sensitivities(
    model: nn.Module,
    criterion: Criterion,
    batches: Iterable[Any],
    layers: Layers | None = None,
    num_probes: int = 50,
    *,
    at: Edge = "input",
    seed: int = 0,
    weights: Weights = None,
    microbatch: int | None = None,
    transform: Transform = lambda matvec: matvec,
) -> Sensitivities:
    """The traces of the Hessian by each layer's weights and by its activations, from the same products.

    Independent errors of variance ``s`` in the weights (or activations) of a layer, such as rounding errors, raise the
    mean loss by ``s / 2`` times the trace, to second order. HAWQ-V2 ranks layers by the average trace, trace / numel.

    Args:
        layers: as for :func:`hessfn.activation_loss`, each with a parameter ``weight``. By default all whose weight has
            at least two axes and whose input is a floating-point tensor.
        model, criterion, batches, num_probes, at, seed, weights, microbatch, transform: as for
            :func:`activation_traces`.

    Returns:
        :class:`Sensitivities`, dicts by layer in the order of the calls. Several calls of a layer, and several input
        tensors, are added up; entries of activations are those of one sample.

    Cost: ``num_probes`` products with each batch, with the Hessian by weights and activations together; what
    :func:`hessfn.linearized_hvp` keeps of one batch.

    Raises:
        ValueError: as these functions do, or a layer has no parameter ``weight``.

    Source: HAWQ-V2 (Dong et al., 2020).

    >>> net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))
    >>> found = sensitivities(net, nn.MSELoss(), [(torch.ones(5, 3), torch.zeros(5, 1))], num_probes=4)
    >>> found.weight_numel, found.activation_numel
    ({'0': 6, '2': 2}, {'0': 3, '2': 2})
    """
    _require_kinds(model, batches, "sensitivities(model, criterion, batches)")
    model = bare(model)
    modules, params = dict(model.named_modules()), dict(model.named_parameters())
    names = {id(p): name for name, p in params.items()}
    chosen = has_matrix if layers is None else layers
    loss, shifts_of = joint_loss(model, criterion, chosen, at, strict=layers is not None)

    def point_of(batch: Any) -> Point:
        shifts = shifts_of(batch)
        used = {names[id(_weight(_layer_of(flow, modules), modules))] for flow in shifts}
        return {"weights": {w: as_real(params[w].detach()) for w in params if w in used}, "activations": shifts}

    forms = Forms(lambda point, batch: loss(point["weights"], point["activations"], batch), point_of)

    def samples(batch: Any, probes: Probes) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        point = point_of(batch)
        shifts, found = point["activations"], forms(point, batch, probes, transform)
        flows: dict[str, list[str]] = {}
        for flow in shifts:
            flows.setdefault(_layer_of(flow, modules), []).append(flow)
        forms_of: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        for layer, own in flows.items():
            of_weights = found["weights"][names[id(_weight(layer, modules))]]
            of_activations = torch.stack([found["activations"][flow] for flow in own]).sum(0)
            entries = sum(shifts[flow].numel() for flow in own) / length(batch)
            forms_of[layer] = of_weights, of_activations, torch.full_like(of_weights, entries)
        return forms_of

    result = _over(batches, samples, num_probes, seed, weights, microbatch, model, criterion)

    def part(i: int) -> Estimate[ByName]:
        mean, stderr = ({layer: x[i] for layer, x in found.items()} for found in (result.mean, result.stderr))
        return Estimate(mean, stderr, result.num_matvecs.clone(), tree.map(torch.clone, result.df))

    activation_numel = {layer: round(float(entries)) for layer, (_, _, entries) in result.mean.items()}
    weight_numel = {layer: as_real(_weight(layer, modules).detach()).numel() for layer in activation_numel}
    return Sensitivities(part(0), part(1), weight_numel, activation_numel)


def exact_sensitivities(
    model: nn.Module, weights: ByName, activations: ByName, numel: Mapping[str, int]
) -> Sensitivities | None:
    """:class:`Sensitivities` of traces that are exact; None where that of a layer's weight is not among them.

    Args:
        weights: by parameter.
        activations, numel: by shift (:func:`hessfn.activation_loss`), the trace and the entries of one sample.
    """
    model = bare(model)
    modules = dict(model.named_modules())
    names = {id(p): name for name, p in model.named_parameters()}
    flows: dict[str, list[str]] = {}
    for flow in activations:
        flows.setdefault(_layer_of(flow, modules), []).append(flow)
    own = {layer: names[id(_weight(layer, modules))] for layer in flows}
    if not set(own.values()) <= weights.keys():
        return None

    def exact(found: ByName) -> Estimate[ByName]:
        return Estimate(
            found, {layer: torch.zeros_like(x) for layer, x in found.items()}, torch.tensor(0, device="cpu")
        )

    return Sensitivities(
        exact({layer: weights[name] for layer, name in own.items()}),
        exact({layer: torch.stack([activations[x] for x in some]).sum() for layer, some in flows.items()}),
        {layer: as_real(_weight(layer, modules).detach()).numel() for layer in flows},
        {layer: sum(numel[x] for x in some) for layer, some in flows.items()},
    )


def _require_kinds(model: nn.Module, batches: Iterable[Any], call: str) -> None:
    require_model(model, call)
    require_batches(batches, call)


def _over(
    batches: Iterable[Any],
    samples: Callable[[Any, Probes], S],
    num_probes: int,
    seed: int,
    weights: Weights,
    microbatch: int | None,
    model: nn.Module,
    criterion: Criterion,
) -> Estimate[S]:
    """The estimate from samples ``(num_probes,)`` of every batch, each with probes of its own."""
    if num_probes < 1:
        raise InvalidInput(f"num_probes={num_probes} must be at least 1")
    known = about(model, criterion)
    if microbatch is not None:
        refuse_parts(known)
    if weights is None:
        weights = Weigher(_values(model, criterion), known, None, list(model.parameters()))
    numbers = itertools.count(*share_of(batches))

    def of_batch(batch: Any) -> S:
        start = next(numbers) * num_probes
        return samples(batch, lambda point: rademacher(point, start + num_probes, seed=seed)[start:])

    device = next((p.device for p in model.parameters()), None)
    found = mean(of_batch, batches, weights=weights, microbatch=microbatch, device=device, state=(known.state,))()
    df = torch.tensor(max(1.0, num_probes - 1.0), dtype=torch.float64, device="cpu")
    return Estimate(
        tree.map(torch.mean, found),
        tree.map(lambda x: x.std() / num_probes**0.5 if num_probes > 1 else torch.full_like(x[0], torch.inf), found),
        torch.tensor(num_probes, device="cpu"),
        df,
    )


def _values(model: nn.Module, criterion: Criterion) -> Callable[[Any], Tensor]:
    _, run = private(model)

    def value_of(batch: Any) -> Tensor:
        inputs, targets = pair(batch)
        return criterion(run({}, inputs), targets)

    return value_of


def has_matrix(name: str, module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() > 1


def _weight(layer: str, modules: Mapping[str, nn.Module]) -> nn.Parameter:
    weight = getattr(modules[layer], "weight", None)
    if not isinstance(weight, nn.Parameter):
        raise InvalidInput(f"layer {layer!r} ({type(modules[layer]).__name__}) has no parameter 'weight': leave it out")
    return weight


def _layer_of(flow: str, modules: Mapping[str, nn.Module]) -> str:
    """The layer of a shift: without the tensor's name, and without the number of the call."""
    if flow in modules:
        return flow
    layer = flow.partition(":")[0]
    return layer if layer in modules else layer.rpartition("#")[0]
