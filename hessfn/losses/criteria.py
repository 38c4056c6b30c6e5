"""Torch's own criteria: what each is a mean over, and so what a batch weighs in the mean over all batches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from hessfn.core import tree
from hessfn.core.arrays import as_tensor
from hessfn.losses.samples import length

# Modules, and the functions that they call.
_BY_CLASS: dict[type[nn.Module], Callable[..., Tensor]] = {nn.CrossEntropyLoss: F.cross_entropy, nn.NLLLoss: F.nll_loss}
_BY_SAMPLE: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.MSELoss: F.mse_loss,
    nn.L1Loss: F.l1_loss,
    nn.SmoothL1Loss: F.smooth_l1_loss,
    nn.HuberLoss: F.huber_loss,
    nn.BCELoss: F.binary_cross_entropy,
    nn.BCEWithLogitsLoss: F.binary_cross_entropy_with_logits,
    nn.KLDivLoss: F.kl_div,
    nn.PoissonNLLLoss: F.poisson_nll_loss,
    nn.SoftMarginLoss: F.soft_margin_loss,
    nn.HingeEmbeddingLoss: F.hinge_embedding_loss,
    nn.MultiMarginLoss: F.multi_margin_loss,
    nn.MultiLabelMarginLoss: F.multilabel_margin_loss,
    nn.MultiLabelSoftMarginLoss: F.multilabel_soft_margin_loss,
}
_ALL = {**_BY_CLASS, **_BY_SAMPLE}


class Known(NamedTuple):
    """One of torch's criteria, with its settings."""

    name: str
    reduction: str
    by_class: bool  # a mean by the weights of classes, over targets that are not ignored
    weight: Tensor | None
    ignore_index: int

    def weight_of(self, batch: Any, targets: Any) -> float | Tensor:
        """What the mean is divided by, up to a factor that is the same for all batches."""
        targets = as_tensor(targets)
        if not isinstance(targets, Tensor):
            return length(batch)
        if not self.by_class:
            return length(targets if targets.dim() else batch)  # the nodes of graphs are more than their targets
        if targets.is_floating_point():  # probabilities of classes: none is ignored, and no weight is divided by
            return targets.numel() / targets.shape[min(1, targets.dim() - 1)]
        counted = targets != self.ignore_index
        if self.weight is None:
            return counted.sum()
        weight = tree.wide(self.weight.detach().to(targets.device))
        return (weight[targets.long().clamp(0, len(weight) - 1)] * counted).sum()


def known_criterion(criterion: Any) -> Known | None:
    """None for a criterion that is not torch's, or one in which samples may meet."""
    found = parts_of(criterion)
    if found is None:
        return None
    name, function, settings = found
    by_class = any(function is other for other in _BY_CLASS.values())
    weight = settings.get("weight")
    return Known(name, settings.get("reduction", "mean"), by_class, weight, settings.get("ignore_index", -100))


def parts_of(criterion: Any) -> tuple[str, Callable[..., Tensor], dict[str, Any]] | None:
    """Its name, the function of torch's that it is, and with which settings; None for one that is not torch's."""
    return _module(criterion) or _function(criterion)


def summed(criterion: Any) -> Callable[[Any, Any], Tensor]:
    """A criterion of torch's with ``reduction="sum"``, which no sample's weight is divided out of."""
    module = _module(criterion)
    if module is None:
        return functools.partial(criterion, reduction="sum")
    _, function, settings = module
    return functools.partial(function, **{**settings, "reduction": "sum"})


def _module(criterion: Any) -> tuple[str, Callable[..., Tensor], dict[str, Any]] | None:
    for kind, function in _ALL.items():
        # A subclass with a forward of its own may be anything.
        if isinstance(criterion, kind) and type(criterion).forward is kind.forward:
            names = ("weight", "ignore_index", "label_smoothing", "pos_weight", "reduction")
            settings = {name: getattr(criterion, name) for name in names if hasattr(criterion, name)}
            return kind.__name__, function, settings
    return None


def _function(criterion: Any) -> tuple[str, Callable[..., Tensor], dict[str, Any]] | None:
    settings: dict[str, Any] = {}
    if isinstance(criterion, functools.partial) and not criterion.args:
        criterion, settings = criterion.func, criterion.keywords
    if settings.keys() & {"size_average", "reduce"}:  # what reduction was before
        return None
    for function in _ALL.values():
        if criterion is function:
            return function.__name__, function, settings
    return None
