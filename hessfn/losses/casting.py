"""Copies of an object graph with other tensors in it, wherever a tensor stands: in a module, a list or a closure.

``torch.func.functional_call`` swaps what is registered with a module, and only while it runs. A model may hold a tensor
a second time elsewhere, or run again in its backward pass. A copy has its tensors everywhere, and for good.
"""

from __future__ import annotations

import collections
import functools
import types
import weakref
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hessfn.core.torch_private import uncompiled_part
from hessfn.losses.makers import (
    Maker,
    Memo,
    attributes_of,
    contents_of,
    copied_shallow,
    is_made_of_attributes,
    maker_of,
)

Other = Callable[[Any, Memo], Any]


class Mould(NamedTuple):
    """What copies are made from."""

    root: Any
    replaced: Sequence[Tensor]
    makers: dict[int, Maker]  # of what is copied, by id
    objects: dict[int, Any]  # all that the root leads to, by id, which keeps the ids valid

    def __reduce__(self) -> Any:
        return mould, (self.root, self.replaced)  # another process has other ids

    def cast(self, values: Mapping[int, Any], other: Other | None = None) -> Any:
        """A copy with ``values[id(x)]`` for x. All else that is not copied is shared, or is ``other(x, memo)``."""
        return _Casting(self.makers, dict(values), other)(self.root)


class _Casting:
    """From an object to what stands for it; no closure, which would refer to itself and so keep the values for long."""

    __slots__ = ("makers", "memo", "other")

    def __init__(self, makers: Mapping[int, Maker], memo: Memo, other: Other | None) -> None:
        self.makers, self.memo, self.other = makers, memo, other

    def __call__(self, x: Any) -> Any:
        key = id(x)
        if key in self.memo:
            return self.memo[key]
        make = self.makers.get(key)
        if make is None:
            return x if self.other is None else self.other(x, self.memo)
        return make(x, self.memo, self)


def mould(root: Any, replaced: Sequence[Tensor] = (), *, whole: bool = False) -> Mould:
    """The mould of an object graph in which the tensors ``replaced`` will be others.

    Copied are modules, what they keep in lists, dicts and sets, and whatever else leads to a module or to a tensor that
    is replaced: tuples, objects, bound methods, ``functools.partial``, functions with closures, weak
    references. What ``torch.compile`` made is what it was made from.

    Args:
        whole: whether objects that modules keep, and what leads to any tensor, are copied as well.
    """
    will_be_others = set(map(id, replaced))
    objects: dict[int, Any] = {}
    users: dict[int, list[int]] = collections.defaultdict(list)
    live: list[int] = []  # to be copied, as are its users
    visited: set[tuple[int, bool]] = set()
    waiting = [(root, True)]
    while waiting:
        x, is_owned = waiting.pop()
        key = id(x)
        if isinstance(x, _ATOMS) or (key, is_owned) in visited or (key, True) in visited:
            continue
        visited.add((key, is_owned))
        objects[key] = x
        owns = isinstance(x, _CONTAINERS) or (whole and _is_plain(x) and not hasattr(type(x), "__deepcopy__"))
        is_replaced = key in will_be_others or (whole and isinstance(x, Tensor))
        if is_replaced or isinstance(x, nn.Module) or (is_owned and owns):
            live.append(key)
        # What a closure or an object keeps is not the module's own.
        keeps = is_owned and (owns or isinstance(x, (nn.Module, tuple)))
        for part in _parts(x):
            if type(part) not in _MOST:
                users[id(part)].append(key)
                waiting.append((part, keeps))
    makers: dict[int, Maker] = {}
    while live:
        key = live.pop()
        if key not in makers:
            makers[key] = maker_of(objects[key])
            live.extend(users[key])
    for key in () if whole else makers:
        if isinstance(objects[key], _CONTAINERS) and not any(id(part) in makers for part in _parts(objects[key])):
            makers[key] = copied_shallow
    return Mould(root, replaced, makers, objects)


def leads_to(x: Any, tensors: Container[int]) -> bool:
    """Whether an object leads to one of the tensors, by their ids, and not by way of a module."""
    seen: set[int] = set()
    waiting = [x]
    while waiting:
        x = waiting.pop()
        if id(x) in tensors:
            return True
        if id(x) not in seen and not isinstance(x, (nn.Module, *_ATOMS)):
            seen.add(id(x))
            waiting.extend(_parts(x))
    return False


_ATOMS = (bool, int, float, complex, str, bytes, type, type(None), types.ModuleType, types.BuiltinFunctionType)
_MOST = {type(None), bool, int, float, str}  # of which a list may hold a million
_CONTAINERS = (dict, list, set, collections.deque)


def _parts(x: Any) -> Iterator[Any]:
    """What an object leads to, in one step."""
    if isinstance(x, Tensor):
        return
    if (inner := uncompiled_part(x)) is not None:
        yield inner
    elif isinstance(x, torch.jit.ScriptModule):
        yield from (*x.parameters(), *x.buffers())
    elif isinstance(x, dict):
        yield from x.keys()
        yield from x.values()
    elif isinstance(x, (list, tuple, set, frozenset, collections.deque)):
        yield from x
    elif isinstance(x, functools.partial):
        yield from (x.func, x.args, x.keywords)
    elif isinstance(x, types.MethodType):
        yield from (x.__self__, x.__func__)
    elif isinstance(x, types.FunctionType):
        yield from (x.__closure__, x.__defaults__, x.__kwdefaults__, x.__dict__)
    elif isinstance(x, types.CellType):
        yield from contents_of(x)
    elif isinstance(x, weakref.ref):
        # Torch's recurrent layers see by these whether their weights are others, and would then move them in memory.
        yield from (target for target in (x(),) if isinstance(target, (nn.Module, Tensor)))
    elif _is_plain(x) or isinstance(x, types.SimpleNamespace):
        yield from (part for _, part in attributes_of(x))


def _is_plain(x: Any) -> bool:
    """Whether it is made of its attributes, and no singleton; a module always is."""
    kind = type(x)
    by_attributes = kind.__reduce_ex__ is object.__reduce_ex__ and kind.__reduce__ is object.__reduce__
    return is_made_of_attributes(kind) and (by_attributes or isinstance(x, nn.Module))
