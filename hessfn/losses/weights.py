"""What a batch weighs in a mean over batches: what its loss is a mean over, which is known, found out or checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hessfn.core import tree
from hessfn.core.dtensor import layout
from hessfn.core.errors import InvalidInput
from hessfn.core.remembered import Remembered
from hessfn.core.torch_private import BatchStatistics
from hessfn.core.torch_state import is_observed
from hessfn.core.tree import MatVec, T, Tree
from hessfn.losses.criteria import Known, known_criterion
from hessfn.losses.samples import length, rows, two_parts

Rule = Callable[[Any], float | Tensor]  # from a batch to its weight
IGNORED = -100  # the label that Hugging Face's models leave out of their means


class MeanOver(NamedTuple):
    """What is known of a loss from its model and its criterion; it is left on the loss, and on a matvec made of it."""

    weight_of: Rule | None = None  # None where it is not known
    summed: str = ""  # the criterion of torch's that is a sum, not a mean
    mixing: str = ""  # a layer in which samples meet, such as BatchNorm in training mode
    state: dict[str, Tensor] | None = None  # all tensors of the model, also those that are constants of the loss
    value_of: Callable[[Any], Tensor] | None = None  # of a matvec: the loss of a batch


def mean_over(model: nn.Module, criterion: Any, targets_of: Callable[[Any], Any], state: dict[str, Tensor]) -> MeanOver:
    mixing = next((f"{type(m).__name__} {name!r}" for name, m in model.named_modules() if _mixes(m)), "")
    return of_criterion(criterion, targets_of)._replace(mixing=mixing, state=state)


def of_criterion(criterion: Any, targets_of: Callable[[Any], Any]) -> MeanOver:
    known = known_criterion(criterion)
    if known is None:
        return MeanOver()
    if known.reduction not in ("mean", "batchmean"):
        return MeanOver(summed=_named(known) if known.reduction == "sum" else "")
    return MeanOver(lambda batch: known.weight_of(batch, targets_of(batch)))


def _named(known: Known) -> str:
    return f'{known.name}(reduction="sum")' if known.name[0].isupper() else f'{known.name}(..., reduction="sum")'


def _mixes(module: nn.Module) -> bool:
    # InstanceNorm has statistics of each sample alone.
    mixing = isinstance(module, BatchStatistics) and not isinstance(
        module, nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d
    )
    return mixing and (module.training or module.running_mean is None)


def of_loss(loss: Any) -> MeanOver:
    found = getattr(loss, "mean_over", None)
    return found if isinstance(found, MeanOver) else MeanOver()


def knowing(matvec: MatVec[T], about: MeanOver, value_of: Callable[[Any], Tensor]) -> MatVec[T]:
    """A matvec with what a mean over batches has to know of it."""
    if not torch.compiler.is_compiling():
        matvec.mean_over = about._replace(value_of=value_of)  # type: ignore[attr-defined]
    return matvec


def refuse_parts(about: MeanOver) -> None:
    """Raises where a batch cannot be cut into parts."""
    if about.mixing:
        raise InvalidInput(
            f"microbatch: {about.mixing} takes the statistics of the batch, so samples meet, and a part of a batch has "
            "another loss: call model.eval() first, or leave microbatch out"
        )


def sum_refused(criterion: str) -> InvalidInput:
    return InvalidInput(
        f'{criterion} is a sum over samples, of which there is no mean over batches: take reduction="mean", or say '
        "by weights= what each batch counts"
    )


class Weigher:
    """The weights of batches where none are given; the first batch of two samples tells whether they are right.

    Args:
        value_of: the loss of a batch, or another number that is a mean where the loss is.
        about: what is known of it, or a function of the first batch that tells.
        key: the loss, to be checked once as long as it lives.
        like: what it is computed from, whose coarsest dtype says how exact it is.
        check: whether to check what is not known.
    """

    def __init__(
        self,
        value_of: Callable[[Any], Tensor],
        about: MeanOver | Callable[[Any], MeanOver],
        key: Any,
        like: Tree,
        check: bool = True,
    ) -> None:
        self.value_of, self.key, self.like, self.is_checked = value_of, key, like, check
        self.rule: Rule | None = None
        self.is_settled = self.is_used = False
        self.find_out: Callable[[Any], MeanOver] | None = None
        if isinstance(about, MeanOver):
            self._learn(about)
        else:
            self.find_out = about

    def _learn(self, about: MeanOver) -> None:
        self.about, self.find_out = about, None
        self.value_of = about.value_of or self.value_of
        self.rule = about.weight_of or _SETTLED.get(self.key)
        self.is_settled = self.rule is not None or not self.is_checked

    def __call__(self, batch: Any) -> float | Tensor:
        self.is_used = True
        return (self.rule or length)(batch)

    def look_at(self, batch: Any, microbatch: int | None) -> None:
        """Finds out what the loss is a mean over, on a batch that comes before any weight is asked for.

        Raises:
            InvalidInput: it is none, by the number of samples.
        """
        if self.find_out is not None:
            self._learn(self.find_out(batch if microbatch is None else rows(batch, 0, microbatch)))
            if microbatch is not None:
                refuse_parts(self.about)
        if self.about.summed:
            raise sum_refused(self.about.summed)
        if self.is_settled or is_observed() or any(layout(x) for x in tree.leaves(batch)):
            return
        parts = two_parts(batch, microbatch and 3 * microbatch)
        if self.rule is None:
            self.rule = _by_labels(self.value_of, parts[0] if parts else batch)
        if parts is None and length(batch) < 2:
            return  # the next one may tell
        if parts is not None and not self.about.mixing:
            self._check(self.rule, parts)
        self.is_settled = True
        _SETTLED.put(self.key, self.rule)

    def _check(self, rule: Rule, parts: tuple[Any, Any, Any]) -> None:
        values = _values(self.value_of, parts)
        if not values:
            return
        eps = tree.eps([x for x in tree.leaves((values, self.like)) if isinstance(x, Tensor) and x.is_floating_point()])
        wrong = _disagreement(values, rule, parts, eps)
        if not wrong:
            return
        if not self.is_used and not _disagreement(values, length, parts, eps):
            self.rule = length  # several labels a sample, and yet a mean over samples
            return
        again = _values(self.value_of, parts[:1])
        if again and torch.equal(again[0], values[0]):  # else it draws on another device
            raise InvalidInput(wrong)


def _disagreement(values: list[Tensor], rule: Rule, parts: tuple[Any, Any, Any], eps: float) -> str:
    """What is wrong, if the loss of some samples is not the mean of those of two parts of them."""
    numbers, shares = [float(x) for x in values], [float(rule(part)) for part in parts[1:]]
    if not sum(shares) > 0:
        return ""
    mean = sum(w * x for w, x in zip(shares, numbers[1:], strict=True) if w) / sum(shares)
    tolerance = max(eps**0.5, 1e-5)  # some losses are computed in float32 within
    if abs(mean - numbers[0]) <= tolerance * max(map(abs, numbers)):
        return ""
    return (
        f"the loss is no mean over samples by these weights: it is {numbers[0]:.6g} on {length(parts[0])} samples, and "
        f"{mean:.6g} as the mean of two parts of them that weigh {shares[0]:.6g} and {shares[1]:.6g}. Give weights=, a "
        "function from a batch to what its mean is divided by (such as the class weights of its targets, or its tokens "
        "that count), or a loss that is a mean. If samples are meant to meet (BatchNorm in training mode, a "
        "contrastive loss), mean_hvp(..., check=False) or any weights= take the mean over batches as they are"
    )


def _values(value_of: Callable[[Any], Tensor], batches: Sequence[Any]) -> list[Tensor] | None:
    """The losses, or None where they cannot be had: the product will say why, or parts of a batch make none."""
    before = torch.get_rng_state()
    try:
        with torch.no_grad():
            values = [value_of(batch) for batch in batches]
            good = all(isinstance(x, Tensor) and x.numel() == 1 and x.is_floating_point() for x in values)
            # Where nothing counts in a part, its mean is 0 / 0. A loss that draws is refused by its product.
            good = good and bool(values[0].isfinite()) and torch.equal(before, torch.get_rng_state())
            return values if good else None
    except Exception:
        return None
    finally:
        torch.set_rng_state(before)


def _by_labels(value_of: Callable[[Any], Tensor], batch: Any) -> Rule:
    """By the labels that count in a batch of Hugging Face's, of several labels a sample; by samples in all others."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dim() < 1:
        return length
    first = 1 if labels.dim() > 1 and _is_first_label_unused(value_of, batch, labels) else 0
    return lambda batch: (batch["labels"][:, first:] if first else batch["labels"]).ne(IGNORED).sum()


def _is_first_label_unused(value_of: Callable[[Any], Tensor], batch: Mapping[Any, Any], labels: Tensor) -> bool:
    """Causal models predict the next token, so the first label of a sample is the target of nothing: it may be any."""
    there = labels[labels != IGNORED].unique()
    if len(there) < 2:
        return False
    other = labels.clone()
    other[:, 0] = torch.where(labels[:, 0] == there[0], there[1], there[0])
    values = _values(value_of, [batch, {**batch, "labels": other}])
    return values is not None and bool(torch.isclose(values[0], values[1], rtol=1e-6, atol=0.0))


_SETTLED: Remembered[Rule] = Remembered()
