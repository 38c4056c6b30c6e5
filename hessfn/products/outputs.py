"""What a model returns: the tensors that a criterion can be differentiated by, and all else as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.core.flatten import flatten
from hessfn.core.func import jvp, vjp, vjp_with
from hessfn.core.tree import T, Tree


class Outputs(NamedTuple):
    """The outputs at a point: their floating-point tensors (complex ones as real views) and products with ``J``."""

    parts: list[Tensor]
    whole: Callable[[list[Tensor]], Any]  # what the model returns, with these parts
    pushforward: Callable[[Any], list[Tensor]]  # v -> J v
    pullback: Callable[[list[Tensor]], Any]  # u -> J' u


def outputs_of(forward: Callable[[T, Any], Any], params: T, inputs: Any) -> Outputs:
    """One forward pass; a product with ``J`` is another, one with ``J'`` is not."""
    seen: list[Any] = []

    def split(p: T) -> tuple[list[Tensor], list[Tensor]]:
        flat, structure = flatten(forward(p, inputs))
        seen[:] = [[None if isinstance(x, Tensor) else x for x in flat], list(map(_kind, flat)), structure]
        parts = [torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in flat if _kind(x) in _PARTS]
        return parts, [x for x in flat if _kind(x) == "constant"]

    parts, pullback, constants = vjp_with(split, params)
    values, kinds, structure = seen

    def whole(parts: list[Tensor]) -> Any:
        rest, others = iter(parts), iter(constants)
        take = {
            "real": lambda _: next(rest),
            "complex": lambda _: torch.view_as_complex(next(rest)),
            "constant": lambda _: next(others),
            "value": lambda x: x,
        }
        return structure.unflatten([take[kind](x) for kind, x in zip(kinds, values, strict=True)])

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
