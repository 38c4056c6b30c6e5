"""Targets drawn from what a model itself predicts, of which the Fisher matrix is a mean: by torch's own criteria."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hessfn.core.errors import InvalidInput
from hessfn.core.fingerprints import checksum
from hessfn.core.probes import gaussian, require_seed, uniform
from hessfn.core.tree import wide
from hessfn.losses.criteria import parts_of

Settings = dict[str, Any]


class Predicted(NamedTuple):
    """The distribution that a criterion makes of outputs."""

    mass: Tensor  # what an entry counts, by class weights and such: of its variance a factor
    divisor: float | Tensor  # of the mean
    numbers: Callable[..., Sequence[Tensor]]  # uniform or normal ones
    like: Tensor  # the shape of the numbers for one draw, and where they are drawn
    draw: Callable[[Tensor], Tensor]  # from them to a slope of the negative log-likelihood, like the outputs


def require_distribution(criterion: Any, call: str) -> Callable[[Tensor, Tensor], Predicted]:
    """From outputs and targets to what the outputs predict.

    Raises:
        InvalidInput: the criterion is not the negative logarithm of a likelihood that is known.
    """
    found = parts_of(criterion)
    made = None if found is None else _LIKELIHOODS.get(found[1])
    if found is None or made is None or found[2].get("reduction", "mean") not in ("mean", "sum"):
        name = found[0] if found else getattr(criterion, "__name__", type(criterion).__name__)
        raise InvalidInput(
            f"{call}: targets cannot be drawn by {name}, of which no likelihood is known: take CrossEntropyLoss, "
            "NLLLoss, MSELoss or BCEWithLogitsLoss of torch, or their functions; or draw targets yourself, give them "
            "in the batch, and leave num_samples out"
        )
    settings = found[2]
    return lambda outputs, targets: made(outputs, targets, settings)


def seed_of(seed: int | Tensor, batch: Any, call: str) -> Tensor:
    """A function of the seed and the data, ``()`` on the CPU: other batches have other draws, on every device the same.

    Raises:
        InvalidInput: the seed is negative, or not one whole number.
    """
    require_seed(seed, call)
    if not isinstance(seed, Tensor):
        if seed < 0:
            raise InvalidInput(f"{call}: seed={seed} must not be negative")
        seed = torch.tensor(seed % 2**63, device="cpu")
    of_data = checksum(batch).sum().cpu()
    return (_FACTOR * (seed.cpu() + 1) + of_data).bitwise_and(2**63 - 1)


# Odd, and no size that sums of bits have: seed and data do not make up for each other, nor are both 0.
_FACTOR = 0x4BE98134A5976FD3


def mean_of_draws(predicted: Predicted, tangent: Tensor, num_samples: int, seed: Tensor) -> Tensor:
    """``E_s r_s (r_s' t)`` of every sample, with ``r_s`` the slopes of draws: on average the criterion's Hessian."""
    root, total = predicted.mass.sqrt().to(tangent), torch.zeros_like(tangent)
    for numbers in predicted.numbers(predicted.like, num_samples, seed=seed):
        slope = root * predicted.draw(numbers).to(tangent)
        along = (slope * tangent).reshape(len(tangent), -1).sum(1)
        total = total + slope * along.reshape(-1, *[1] * (tangent.dim() - 1))
    return total / (num_samples * predicted.divisor)


def _categorical(outputs: Tensor, targets: Tensor, settings: Settings, logits: bool = True) -> Predicted:
    if outputs.dim() < 2:
        raise InvalidInput(f"classes lie along the second axis of outputs, but these have shape {tuple(outputs.shape)}")
    mass, divisor = _class_mass(outputs, targets, settings)
    probabilities = wide(outputs.detach()).softmax(1)
    to_now = probabilities.cumsum(1)

    def draw(numbers: Tensor) -> Tensor:
        drawn = (to_now < numbers).sum(1, keepdim=True).clamp(max=outputs.shape[1] - 1)
        chosen = torch.zeros_like(probabilities).scatter(1, drawn, 1.0)
        return probabilities - chosen if logits else -chosen

    divisor = divisor if settings.get("reduction", "mean") == "mean" else 1.0
    return Predicted(mass.unsqueeze(1), divisor, uniform, to_now[:, :1], draw)


def _class_mass(outputs: Tensor, targets: Tensor, settings: Settings) -> tuple[Tensor, float | Tensor]:
    """What each target counts, all of its classes together, and what the mean is divided by."""
    count = outputs.shape[1]
    smoothing = settings.get("label_smoothing", 0.0)
    given = settings.get("weight")
    weight = wide(outputs.new_ones(count) if given is None else given.detach())
    if targets.is_floating_point():
        shares = (1 - smoothing) * wide(targets) + smoothing / count
        return (shares * weight.reshape(-1, *[1] * (targets.dim() - 2))).sum(1), targets.numel() / count
    counted = targets != settings.get("ignore_index", -100)
    own = weight[targets.clamp(0, count - 1)] * counted
    return (1 - smoothing) * own + smoothing * weight.mean() * counted, own.sum()


def _log_categorical(outputs: Tensor, targets: Tensor, settings: Settings) -> Predicted:
    return _categorical(outputs, targets, settings, logits=False)


def _normal(outputs: Tensor, targets: Tensor, settings: Settings) -> Predicted:
    """Of variance 1/2, as (o - y)^2 has it."""
    if settings.get("weight") is not None:
        raise InvalidInput("mse_loss with a weight is of no known likelihood: leave it out")
    mass = torch.ones_like(outputs)
    return Predicted(mass, _numel(outputs, settings), gaussian, mass, lambda numbers: 2**0.5 * numbers)


def _bernoulli(outputs: Tensor, targets: Tensor, settings: Settings) -> Predicted:
    mass = wide(torch.ones_like(outputs))
    if settings.get("pos_weight") is not None:
        mass = 1 + (settings["pos_weight"].detach() - 1) * wide(targets)
    if settings.get("weight") is not None:
        mass = mass * settings["weight"].detach()
    probability = wide(outputs.detach()).sigmoid()

    def draw(numbers: Tensor) -> Tensor:
        return probability - (numbers < probability).to(probability)

    return Predicted(mass, _numel(outputs, settings), uniform, probability, draw)


def _numel(outputs: Tensor, settings: Settings) -> float:
    return outputs.numel() if settings.get("reduction", "mean") == "mean" else 1.0


_LIKELIHOODS: dict[Any, Callable[..., Predicted]] = {
    F.cross_entropy: _categorical,
    F.nll_loss: _log_categorical,
    F.mse_loss: _normal,
    F.binary_cross_entropy_with_logits: _bernoulli,
}
