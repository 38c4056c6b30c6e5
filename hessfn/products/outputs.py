"""What a model returns, and a criterion takes: tensors that can be differentiated by, and all else as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.core.arguments import require_pair
from hessfn.core.arrays import as_tensors
from hessfn.core.errors import InvalidInput
from hessfn.core.flatten import Structure, flatten
from hessfn.core.func import jvp, vjp, vjp_with
from hessfn.core.tree import T, Tree
from hessfn.losses.model_inputs import fresh, is_one
from hessfn.losses.samples import tensors


class Outputs(NamedTuple):
    """The outputs at a point: their floating-point tensors (complex ones as real views) and products with ``J``."""

    parts: list[Tensor]
    whole: Callable[[list[Tensor]], Any]  # what the model returns, with these parts
    pushforward: Callable[[Any], list[Tensor]]  # v -> J v
    pullback: Callable[[list[Tensor]], Any]  # u -> J' u


class Apart(NamedTuple):
    """What a model has returned, taken apart: its floating-point tensors (complex ones as real views), and the rest."""

    parts: list[Tensor]
    constants: list[Tensor]
    rest: tuple[list[Any], list[str], Structure]  # by leaf: values that are no tensors, and kinds; the structure

    def whole(self, parts: list[Tensor]) -> Any:
        """What the model returns, with these parts."""
        values, kinds, structure = self.rest
        rest, others = iter(parts), iter(self.constants)
        take = {
            "real": lambda _: next(rest),
            "complex": lambda _: torch.view_as_complex(next(rest)),
            "constant": lambda _: next(others),
            "value": lambda x: x,
        }
        return structure.unflatten([take[kind](x) for kind, x in zip(kinds, values, strict=True)])


def taken_apart(outputs: Any) -> Apart:
    flat, structure = flatten(outputs)
    parts = [torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in flat if _kind(x) in _PARTS]
    values = [None if isinstance(x, Tensor) else x for x in flat]
    return Apart(parts, [x for x in flat if _kind(x) == "constant"], (values, list(map(_kind, flat)), structure))


def outputs_of(forward: Callable[[T, Any], Any], params: T, inputs: Any) -> Outputs:
    """One forward pass; a product with ``J`` is another, one with ``J'`` is not."""
    seen: list[Any] = []

    def split(p: T) -> tuple[list[Tensor], list[Tensor]]:
        apart = taken_apart(forward(p, fresh(inputs)))
        seen[:] = [apart.rest]
        return apart.parts, apart.constants

    parts, pullback, constants = vjp_with(split, params)
    whole = Apart([], constants, seen[0]).whole
    return Outputs(parts, whole, lambda v: pushforward(lambda p: split(p)[0], params, v), pullback)


_PARTS = ("real", "complex")


def _kind(x: Any) -> str:
    if not isinstance(x, Tensor):
        return "value"
    return "real" if x.is_floating_point() else "complex" if x.is_complex() else "constant"


def pushforward(function: Callable[[Tree], Any], point: Tree, v: Tree) -> Any:
    """``J v``; without forward rules as the derivative of ``u -> J' u``, which is linear, so any ``u`` will do."""
    try:
        return jvp(function, point, v)
    except (RuntimeError, NotImplementedError):
        out, pullback = vjp(function, point)
        return vjp(lambda u: tree.leaves(pullback(u)), tree.map(torch.zeros_like, out))[1](tree.leaves(v))


def sides(batch: Any, call: str = "") -> tuple[Any, Any]:
    """Inputs and targets; what is one goes to both sides. A criterion of torch's takes tensors, not arrays."""
    is_both = is_one(batch) and tensors(batch)
    inputs, targets = (batch, batch) if is_both else require_pair(batch, "batch (inputs, targets)", call)
    return inputs, as_tensors(targets)


def targets_of(batch: Any) -> Any:
    return sides(batch)[1]


def value_of(forward: Callable[..., Any], criterion: Callable[..., Tensor], params: Any) -> Callable[[Any], Tensor]:
    def of_batch(batch: Any) -> Tensor:
        inputs, targets = sides(batch)
        return criterion(forward(params, inputs), targets)

    return of_batch


def has_entries(x: Tensor) -> bool:
    return bool((x != 0).any())


def refuse_own_loss(make: Callable[..., Any], slope: list[Tensor], is_linear: bool = True) -> None:
    """Raises where a criterion is of a single number among larger outputs, such as the loss that the model computed."""
    used = [x for x in slope if has_entries(x)]
    if is_linear and used and all(x.dim() == 0 for x in used) and any(x.dim() for x in slope):
        raise InvalidInput(
            f"{make.__name__}: what the criterion takes of the outputs is a single number, such as the loss that the "
            "model has computed itself, and not the predictions. Give the criterion of these, such as lambda out, "
            "batch: cross_entropy(out.logits.flatten(0, 1), batch['labels'].flatten())"
        )
