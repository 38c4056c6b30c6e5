"""The transforms of ``torch.func`` for our trees, in which ``None`` may stand: torch's own take tensors alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hessfn.core.flatten import Structure, flatten, leaves
from hessfn.core.tree import T, Tree


def vjp(function: Callable[[T], Any], point: T) -> tuple[Any, Callable[[Any], T]]:
    """``function(point)``, to tensors without ``None``, and ``u -> J' u``."""
    flat, structure = flatten(point)
    if not structure.holes:
        value, pullback = _vjp(function, point)
        return value, lambda u: pullback(u)[0]
    value, pullback = _vjp(lambda *x: function(structure.unflatten(x)), *flat)
    return value, lambda u: structure.unflatten(pullback(u))


_vjp: Callable[..., Any] = torch.func.vjp  # as it is annotated, it always returns an auxiliary output too


def vjp_with(function: Callable[[T], tuple[list[Tensor], list[Tensor]]], point: T) -> tuple[Any, Any, list[Tensor]]:
    """As :func:`vjp` of a function to outputs and other tensors, which are not differentiated; and those tensors."""
    flat, structure = flatten(point)
    value, pullback, others = _vjp(lambda *x: function(structure.unflatten(x)), *flat, has_aux=True)
    return value, lambda u: structure.unflatten(pullback(u)), others


def jvp(function: Callable[[T], Any], point: T, v: T) -> Any:
    """``J v`` of a function to tensors without ``None``."""
    flat, structure = flatten(point)
    if not structure.holes:
        return torch.func.jvp(function, (point,), (v,))[1]
    return torch.func.jvp(lambda *x: function(structure.unflatten(x)), tuple(flat), tuple(leaves(v)))[1]


def gradient(function: Callable[[T], Tensor], point: T) -> T:
    value, pullback = vjp(function, point)
    return pullback(torch.ones_like(value))


def gradients(outputs: Any, by: list[Tensor], directions: Any = None, *, create_graph: bool = False) -> list[Tensor]:
    """``torch.autograd.grad``, zero by what was not used: the zeros of ``materialize_grads`` may require gradients."""
    found = torch.autograd.grad(outputs, by, directions, allow_unused=True, create_graph=create_graph)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, by, strict=True)]


def vmap(function: Callable[[Tree], Any], stack: Tree) -> Any:
    """``function`` of each entry along the leading axis of the leaves of a tree."""
    flat, structure = flatten(stack)
    if not structure.holes:
        return torch.func.vmap(function)(stack)
    found: list[Structure] = []

    def of_leaves(*x: Tensor) -> list[Tensor]:
        out, like = flatten(function(structure.unflatten(x)))
        found.append(like)
        return out

    out = torch.func.vmap(of_leaves)(*flat)
    return found[0].unflatten(out)
