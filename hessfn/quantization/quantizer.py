"""Weights rounded to few bits, as deployed nets have them: uniform levels, symmetric about zero."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.core.arguments import kind, require_vector
from hessfn.core.errors import InvalidInput
from hessfn.core.tree import T

Bits = int | Mapping[str, int]
MOST = 32


def quantized(params: T, bits: Bits, *, per_channel: bool = True, num_scales: int = 64) -> T:
    """Parameters rounded to the nearest of uniform levels: ``s * round(w / s)``, up to the last level.

    The levels are symmetric about 0: ``s * (-m, ..., m)`` with ``m = 2^(bits - 1) - 1``. For a leaf without negative
    entries, such as the output of a ReLU, they are ``s * (0, ..., 2^bits - 1)``. The scale ``s`` is the one with the
    smallest squared error among ``1 / num_scales, 2 / num_scales, ..., 1`` of the scale whose last level is the largest
    entry.

    Args:
        params: a tree of floating-point tensors, or one of them.
        bits: from 2 to 32, one number for all leaves; or a dict of them by leaf, or by layer as :func:`allocate_bits`
            returns it, which stands for the leaf ``"<layer>.weight"``. Leaves that a dict does not name stay as they
            are.
        per_channel: a scale for each entry of the first axis, of leaves with two axes or more; else one for the leaf.
        num_scales: 1 takes the largest entry for the range, without a search.

    Returns:
        A tree like ``params``, in memory of its own. Its derivative is that of the formula: 0 of rounding, and through
        the scale that of the largest entry. It runs under ``vmap``.

    Cost: no product; ``num_scales`` passes over the parameters, three copies of the largest leaf in float64.

    Raises:
        ValueError: ``params`` is of another kind, ``bits`` or ``num_scales`` is out of range, or a name is no leaf's.

    >>> quantized(torch.tensor([-1.0, 0.1, 0.4, 1.0]), 3, num_scales=1)
    tensor([-1.0000,  0.0000,  0.3333,  1.0000])
    """
    call = "quantized(params, bits)"
    require_vector(params, "params", call)
    if num_scales < 1:
        raise InvalidInput(f"num_scales={num_scales} must be at least 1")
    names = tree.names(params)
    if isinstance(bits, Mapping):
        given = {leaf_of(name, names): require_bits(number) for name, number in bits.items()}
    else:
        given = dict.fromkeys(names, require_bits(bits))
    leaves = [
        rounded(leaf, given[name], per_channel, num_scales) if name in given else leaf.clone()
        for name, leaf in zip(names, tree.leaves(params), strict=True)
    ]
    return tree.owned(tree.unflatten(leaves, params))


def leaf_of(layer: str, names: list[str]) -> str:
    """The name of a layer's weight, or of the leaf itself."""
    found = next((name for name in (layer, f"{layer}.weight") if name in names), None)
    if found is None:
        raise InvalidInput(
            f"{layer!r} is neither a leaf of params nor a layer whose 'weight' is one; there are: "
            f"{', '.join(names[:12])}{', ...' * (len(names) > 12)}; weights that layers share are under each of their "
            "names in dict(model.named_parameters(remove_duplicate=False))"
        )
    return found


def require_bits(bits: Any) -> int:
    try:
        number = operator.index(bits)
    except TypeError:
        raise InvalidInput(f"bits: {kind(bits)} is no whole number from 2 to {MOST}") from None
    if not 2 <= number <= MOST:
        raise InvalidInput(
            f"bits={number} must be between 2 and {MOST}: levels that are symmetric about 0 are 3 or more"
        )
    return number


def rounded(x: Tensor, bits: int, per_channel: bool, num_scales: int) -> Tensor:
    if x.is_complex():
        real = rounded(torch.view_as_real(x.resolve_conj()), bits, per_channel and x.dim() > 1, num_scales)
        return torch.view_as_complex(real.contiguous())
    if x.numel() == 0:
        return x
    wide = tree.wide(x)
    rows = wide.reshape(len(x), -1) if per_channel and x.dim() > 1 else wide.reshape(1, -1)
    one_sided, most = (rows >= 0).all(), float(2 ** (bits - 1) - 1)
    low = torch.where(one_sided, 0.0, -most).to(rows)
    high = torch.where(one_sided, float(2**bits - 1), most).to(rows)
    whole = rows.abs().amax(1, keepdim=True) / high
    whole = torch.where(whole > 0, whole, torch.ones_like(whole))  # a row of zeros, whose every scale is right

    def at(scale: Tensor) -> Tensor:
        return scale * (rows / scale).round().clamp(low, high)

    best = whole
    if num_scales > 1:
        least = (at(best) - rows).square().sum(1, keepdim=True)
        for number in range(1, num_scales):
            scale = whole * (number / num_scales)
            error = (at(scale) - rows).square().sum(1, keepdim=True)
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return at(best).reshape(x.shape).to(x.dtype)


def squared_error(x: Tensor, bits: int, per_channel: bool) -> float:
    """``||x - Q(x)||^2``, of what :func:`quantized` does to one leaf by default."""
    with torch.no_grad():
        pair = [rounded(x, bits, per_channel, 64), x]
        ends = [tree.wide(torch.view_as_real(end.resolve_conj()) if end.is_complex() else end) for end in pair]
        return float((ends[0] - ends[1]).square().sum())
