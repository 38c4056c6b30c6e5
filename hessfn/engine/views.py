"""Alias analysis of a trace: what each tensor's node is, also after somebody wrote into memory that tensors share.

A tensor is a *root*, which owns its memory, or a view of its parent, made by one operation. Who writes into a view
gives it a new node, scatters that back into its parent, and so on up to the root. Every other view of the root is then
stale: its node is made again, from its parent's, when it is next asked for.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
Call = Callable[..., fx.Node]


class Alias:
    """What a trace knows of one tensor.

    Of a root: ``is_fake`` (its memory holds no values), ``is_own`` (it may be written to) and how often it has been.
    """

    __slots__ = ("home", "how", "index", "is_fake", "is_own", "node", "parent", "root", "seen", "writes", "zero_at")

    def __init__(self, home: Any, node: fx.Node | None, *, is_fake: bool = False, is_own: bool = True) -> None:
        self.home, self.node, self.is_fake, self.is_own = home, node, is_fake, is_own
        self.root, self.parent = self, None
        self.writes = self.seen = 0
        self.zero_at = -1

    def of(self, parent: Alias, shape: torch.Size, how: tuple[Any, Any, Any], index: int | None) -> Alias:
        """This one as a view of its parent: by an operation with its other arguments, or one of the results of it."""
        self.root, self.seen = parent.root, parent.root.writes
        self.parent, self.how, self.index = (parent, shape), how, index  # type: ignore[assignment]
        return self

    @property
    def is_zero(self) -> bool:
        return self.zero_at == self.root.writes

    def note_zero(self) -> None:
        self.zero_at = self.root.writes

    def current(self, call: Call, val: Any = None) -> fx.Node:
        """Its node, made again where somebody wrote into the memory since."""
        if self.seen != self.root.writes and self.parent is not None:
            function, args, kwargs = self.how
            meta, above = self.node.meta, self.parent[0].current(call)  # type: ignore[union-attr]
            node = call(function, (above, *args[1:]), kwargs)
            node = node if self.index is None else call(operator.getitem, (node, self.index), {})
            node.meta.setdefault("val", meta.get("val"))
            self.node, self.seen = node, self.root.writes
        return self.node  # type: ignore[return-value]

    def can_be_written(self) -> bool:
        if self.parent is None:
            return self.is_own
        above, function = self.parent[0], self.how[0]
        if function is aten.as_strided.default and above.parent is not None:
            return False  # it counts from the beginning of the root's memory
        return function in _SCATTER and above.can_be_written()

    def write(self, node: fx.Node, call: Call) -> None:
        """Its new node, and those of all that it is a view of."""
        above: list[fx.Node] = []
        each: Alias = self
        while each.parent is not None:
            each = each.parent[0]
            above.append(each.current(call))
        self.root.writes += 1
        each = self
        for whole in (*above, None):
            each.node, each.seen = node, self.root.writes
            if whole is not None and each.parent is not None:
                _, args, kwargs = each.how
                each, shape, how, index = each.parent[0], each.parent[1], each.how[0], each.index
                meta, node = whole.meta, _SCATTER[how](call, whole, node, shape, args, kwargs, index)
                node.meta.setdefault("val", meta.get("val"))


# From the node of the whole, that of the part, the shape of the whole, and the arguments of the view.


def _scattered(target: Any) -> Any:
    return lambda call, whole, part, shape, args, kwargs, index: call(target, (whole, part, *args[1:]), kwargs)


def _reshaped(call: Call, whole: Any, part: Any, shape: Any, args: Any, kwargs: Any, index: Any) -> fx.Node:
    return call(aten.reshape.default, (part, list(shape)), {})


def _transposed(call: Call, whole: Any, part: Any, shape: Any, args: Any, kwargs: Any, index: Any) -> fx.Node:
    return call(aten.transpose.int, (part, *args[1:]), {})


def _permuted(call: Call, whole: Any, part: Any, shape: Any, args: Any, kwargs: Any, index: Any) -> fx.Node:
    order = [d % len(shape) for d in args[1]]
    return call(aten.permute.default, (part, [order.index(i) for i in range(len(order))]), {})


def _nth(call: Call, whole: Any, part: Any, shape: Any, args: Any, kwargs: Any, index: Any) -> fx.Node:
    return call(aten.select_scatter.default, (whole, part, *(args[1:] or (0,)), index), {})


def _cut(call: Call, whole: Any, part: Any, shape: Any, args: Any, kwargs: Any, index: int) -> fx.Node:
    size, dim = args[1], args[2] if len(args) > 2 else kwargs.get("dim", 0)
    start = sum(size[:index]) if isinstance(size, (list, tuple)) else index * size
    stop = start + size[index] if isinstance(size, (list, tuple)) else min(start + size, shape[dim])
    return call(aten.slice_scatter.default, (whole, part, dim, start, stop), {})


def _same(call: Call, whole: Any, part: Any, *_: Any) -> fx.Node:
    return part


def _inverse(target: Any) -> Any:
    return lambda call, whole, part, *_: call(target, (part,), {})


_SCATTER: dict[Any, Any] = {
    aten.slice.Tensor: _scattered(aten.slice_scatter.default),
    aten.select.int: _scattered(aten.select_scatter.default),
    aten.diagonal.default: _scattered(aten.diagonal_scatter.default),
    aten.as_strided.default: _scattered(aten.as_strided_scatter.default),
    aten.split.Tensor: _cut,
    aten.split_with_sizes.default: _cut,
    aten.unbind.int: _nth,
    aten.transpose.int: _transposed,
    aten.t.default: _inverse(aten.t.default),
    aten.permute.default: _permuted,
    aten.view_as_real.default: _inverse(aten.view_as_complex.default),
    aten.view_as_complex.default: _inverse(aten.view_as_real.default),
    **dict.fromkeys([aten.alias.default, aten.detach.default, aten.lift_fresh.default], _same),
    **dict.fromkeys(
        [
            aten.view.default,
            aten.reshape.default,
            aten._reshape_alias.default,
            aten.unsqueeze.default,
            aten.squeeze.default,
            aten.squeeze.dim,
            aten.squeeze.dims,
        ],
        _reshaped,
    ),
}
