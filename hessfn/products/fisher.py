"""From a model and its criterion to a matvec: the Fisher matrix, of the data's targets or of drawn ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.core.arguments import kind, require_forward
from hessfn.core.errors import InvalidInput
from hessfn.core.flatten import flatten
from hessfn.core.func import gradient, vjp
from hessfn.core.torch_state import is_observed, recorded
from hessfn.core.tree import MatVec, T
from hessfn.engine.op_definitions import by_definition
from hessfn.losses.criteria import known_criterion, summed
from hessfn.losses.model_inputs import fresh, is_one
from hessfn.losses.samples import length
from hessfn.losses.weights import knowing, of_criterion
from hessfn.products.gauss_newton import call_of, says_what_is_missing
from hessfn.products.modes import differentiating
from hessfn.products.outputs import outputs_of, pushforward, refuse_own_loss, sides, targets_of, value_of
from hessfn.products.predictive import mean_of_draws, require_distribution, seed_of


@says_what_is_missing
def fvp(
    forward: Callable[[T, Any], Any],
    criterion: Callable[[Any, Any], Tensor],
    params: T,
    batch: Any,
    *,
    num_samples: int | None = None,
    seed: int | Tensor = 0,
    check: bool = True,
) -> MatVec[T]:
    """Products with the empirical Fisher matrix ``1/B sum_i g_i g_i'``, ``g_i`` the gradient of sample ``i``'s loss.

    The loss of a sample is B times its share of the mean loss, so that the mean of the ``g_i`` is the gradient of the
    mean loss. For ``CrossEntropyLoss`` and ``NLLLoss`` with class weights or ignored targets it is
    ``B w_i l_i / sum_j w_j``. For a criterion that is a sum over samples it is the criterion of the sample alone.

    With ``num_samples`` it is the Monte-Carlo Fisher matrix: targets are drawn from the model's predictions, classes
    for ``CrossEntropyLoss`` and ``NLLLoss``, normal numbers for ``MSELoss``, zeros and ones for ``BCEWithLogitsLoss``.
    The mean over draws is the Fisher matrix, which for these criteria is the Gauss-Newton matrix of :func:`ggnvp`. The
    rank is at most B times ``num_samples``. The batch's own targets matter only where they are ignored or weighted.

    Args:
        forward, criterion, params, batch: as for :func:`ggnvp`. Samples lie along the first axis of outputs and
            targets, and the output of a sample depends on that sample alone.
        num_samples: draws for each sample; None for the targets of the batch.
        seed: of the draws, which depend on it and on the data alone: every product has the same, on every device. An
            integer, or an integer tensor ``()``, over which ``vmap`` may go.
        check: whether the first product checks that the criterion is the mean, or the sum, over single samples.

    Returns:
        A matvec on trees like ``params``, symmetric and positive semidefinite.

    Cost: a product costs what that of :func:`ggnvp` costs, for any number of draws. Nothing is kept between products.

    Raises:
        ValueError: the criterion is neither a mean nor a sum over samples, such as a weighted mean that is none of
            torch's; or targets cannot be drawn for it; or as for :func:`ggnvp`.

    Source: Martens (2020), for both matrices and their relation to the Gauss-Newton matrix.

    >>> x = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    >>> square = lambda out, y: (out - y).square().mean()
    >>> matvec = fvp(lambda w, x: x @ w, square, torch.zeros(2), (x, torch.ones(2)))
    >>> matvec(torch.tensor([1.0, 0.0]))
    tensor([2., 4.])
    """
    require_forward(forward, criterion, params, call_of(fvp))
    both = sides(batch, call_of(fvp))
    about, loss = of_criterion(criterion, targets_of), value_of(forward, criterion, params)
    if num_samples is not None:
        matvec = _monte_carlo(forward, criterion, params, batch, both, num_samples, seed)
        return knowing(matvec, about, loss)
    if about.weight_of is not None:
        about = about._replace(weight_of=_alike(about.weight_of))
    return knowing(_empirical(forward, criterion, params, batch, both, check), about, loss)


def _alike(weight_of: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The weight of a batch, where it counts as much a sample as the first one does."""
    first: list[float] = []

    def checked(batch: Any) -> Any:
        weight, targets = weight_of(batch), targets_of(batch)
        each = float(weight) / length(targets)
        if not first:
            first.append(each)
        if not math.isclose(each, first[0], rel_tol=1e-5):
            raise InvalidInput(
                f"fvp: the criterion counts {first[0]:.4g} a sample in one batch, and {each:.4g} in another, by class "
                "weights or ignored targets. In the empirical Fisher matrix a sample's gradient is by its share of its "
                "batch, so that the mean over batches is not the matrix of the data: take num_samples= or ggnvp, or "
                "any weights= for the mean as it is"
            )
        return weight

    return checked


def _monte_carlo(
    forward: Any, criterion: Any, params: T, batch: Any, both: tuple[Any, Any], num_samples: int, seed: int | Tensor
) -> MatVec[T]:
    if num_samples < 1:
        raise InvalidInput(f"num_samples={num_samples} must be at least 1")
    predict, own_seed = require_distribution(criterion, call_of(fvp)), seed_of(seed, batch, call_of(fvp))
    inputs, targets = both

    @recorded
    def matvec(v: T) -> T:
        v = tree.aligned(v, params)
        with differentiating():
            out = outputs_of(by_definition(forward), params, inputs)
            predictions = out.whole(out.parts)
            if not isinstance(predictions, Tensor) or not predictions.dim() or not predictions.is_floating_point():
                raise InvalidInput(f"{call_of(fvp)}: targets are drawn by a tensor of outputs, not {kind(predictions)}")
            (tangent,) = out.pushforward(v)
            slopes = [mean_of_draws(predict(predictions, targets), tangent, num_samples, own_seed)]
            return tree.owned(out.pullback(slopes))

    return matvec


def _empirical(forward: Any, criterion: Any, params: T, batch: Any, both: tuple[Any, Any], check: bool) -> MatVec[T]:
    inputs, targets = both
    known = known_criterion(criterion)
    is_weighed = known is not None and known.by_class and known.reduction == "mean"
    # A mean of one sample has its weight divided out, and of one that is ignored it is 0 / 0.
    of_sample = summed(criterion) if is_weighed else criterion
    weight = known.weight_of(batch, targets) if known is not None and is_weighed else None
    unchecked = [check]

    @recorded
    def matvec(v: T) -> T:
        v = tree.aligned(v, params)
        defined = by_definition(forward)

        def losses(p: T) -> Tensor:
            each = _by_sample(of_sample, defined(p, fresh(inputs)), targets, may_differ=is_one(batch))
            return (
                each if weight is None else each * torch.as_tensor(each.numel() / weight, device=each.device).to(each)
            )

        with differentiating():
            each, pullback = vjp(losses, params)
            if unchecked[0] and not is_observed(each):
                out = outputs_of(defined, params, inputs)
                if known is None:
                    with torch.no_grad():
                        _require_shares(each, criterion(out.whole(out.parts), targets))
                if any(x.dim() == 0 for x in out.parts):
                    slope = gradient(lambda parts: criterion(out.whole(parts), targets), out.parts)
                    refuse_own_loss(fvp, slope)
                unchecked[0] = False
            return tree.owned(pullback(pushforward(losses, params, v) / each.numel()))

    return matvec


def _by_sample(of_sample: Callable[[Any, Any], Tensor], outputs: Any, targets: Any, may_differ: bool) -> Tensor:
    """The criterion of each sample alone, as a batch of one; what has no axis of samples is the same for all."""
    (found, structure), (wanted, like) = flatten(outputs), flatten(targets)
    size = length(outputs)
    if not may_differ and any(isinstance(x, Tensor) and x.dim() and len(x) != size for x in wanted):
        raise InvalidInput(f"fvp: there are outputs of {size} samples, but targets of {length(targets)}")
    flat = [*found, *wanted]
    where = [i for i, x in enumerate(flat) if isinstance(x, Tensor) and x.dim() and len(x) == size]

    def alone(*samples: Tensor) -> Tensor:
        one = list(flat)
        for i, sample in zip(where, samples, strict=True):
            one[i] = sample.unsqueeze(0)
        return of_sample(structure.unflatten(one[: len(found)]), like.unflatten(one[len(found) :]))

    return torch.func.vmap(alone)(*[flat[i] for i in where])


def _require_shares(each: Tensor, whole: Tensor) -> None:
    tolerance = max(torch.finfo(whole.dtype).eps ** 0.5, 1e-5)
    mean, total, value = float(each.mean()), float(each.sum()), float(whole)
    size = float(each.abs().max())
    if math.isfinite(value) and not (abs(mean - value) <= tolerance * size or abs(total - value) <= tolerance * size):
        raise InvalidInput(
            f"fvp: the criterion is {value:.6g} on the batch, and {mean:.6g} is the mean of it on single samples: what "
            "one adds to it depends on the others, as with class weights or ignored targets. Take CrossEntropyLoss or "
            "NLLLoss of torch, or a criterion that is a mean over samples; with check=False a sample's loss is the "
            "criterion of it alone"
        )
