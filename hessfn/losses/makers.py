"""One maker a kind of object: from an object to its copy, whose parts are cast.

What may lead back to itself is in the memo before its parts are cast.
"""

from __future__ import annotations

import collections
import copy
import functools
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from hessfn.core.torch_private import set_scripted, uncompiled_part

Memo = dict[int, Any]  # what stands for an object, by its id
Cast = Callable[[Any], Any]
Maker = Callable[[Any, Memo, Cast], Any]


def maker_of(x: Any) -> Maker:
    if isinstance(x, Tensor):
        return lambda x, memo, cast: x  # of one that is replaced, the memo has another
    if uncompiled_part(x) is not None:
        return lambda x, memo, cast: memo.setdefault(id(x), cast(uncompiled_part(x)))
    if isinstance(x, torch.jit.ScriptModule):
        return _scripted
    of_kind = (maker for kind, maker in _MAKERS.items() if isinstance(x, kind))
    return next(of_kind, _with_slots if any(_slots(x)) else _object)


def is_made_of_attributes(kind: type) -> bool:
    """Whether a type is written in Python all the way, so that attributes are all that is in its instances."""
    return kind is not object and all(base is object or _is_python(base) for base in kind.__mro__)


def _is_python(kind: type) -> bool:
    makes_itself = isinstance(vars(kind).get("__new__"), types.BuiltinFunctionType)
    return kind.__flags__ & _PYTHON == _PYTHON and not makes_itself


_PYTHON = 1 << 9 | 1 << 10  # Python's own flags of a class that is not compiled in, and may have subclasses


def attributes_of(x: Any) -> Iterator[tuple[str, Any]]:
    """Those of an instance, also in slots."""
    yield from ((name, part) for name, part in getattr(x, "__dict__", {}).items() if name != _COMPILED_CALL)
    yield from ((slot.__name__, part) for slot, part in _slots(x))


def _slots(x: Any) -> Iterator[tuple[Any, Any]]:
    """The slots of an instance that are set, and what is in them."""
    slots = [slot for base in type(x).__mro__ if is_made_of_attributes(base) for slot in vars(base).values()]
    for slot in slots:
        if isinstance(slot, types.MemberDescriptorType):
            with suppress(AttributeError):  # not set
                yield slot, slot.__get__(x)


_COMPILED_CALL = "_compiled_call_impl"  # what module.compile() leaves on a module


def contents_of(cell: types.CellType) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:  # not bound yet
        return ()


def copied_shallow(x: Any, memo: Memo, cast: Cast) -> Any:
    """Of a container in which nothing is copied."""
    is_empty = not x and type(x) in (dict, collections.OrderedDict)  # as nearly all that a module has: the faster way
    new = memo[id(x)] = type(x)() if is_empty else x.copy()
    return new


def _object(x: Any, memo: Memo, cast: Cast) -> Any:
    new = memo[id(x)] = object.__new__(type(x))
    if (attributes := getattr(x, "__dict__", None)) is not None:
        new.__dict__.update({name: cast(part) for name, part in attributes.items() if name != _COMPILED_CALL})
    return new


def _with_slots(x: Any, memo: Memo, cast: Cast) -> Any:
    new = _object(x, memo, cast)
    for slot, part in _slots(x):
        slot.__set__(new, cast(part))
    return new


def _dict(x: Any, memo: Memo, cast: Cast) -> Any:
    new = memo[id(x)] = type(x)() if type(x) in (dict, collections.OrderedDict) else copy.copy(x)
    if new:
        new.clear()
    for key, part in x.items():
        new[cast(key)] = cast(part)
    return new


def _list(x: Any, memo: Memo, cast: Cast) -> Any:
    new = memo[id(x)] = copy.copy(x)
    for i, part in enumerate(x):
        new[i] = cast(part)
    return new


def _set(x: Any, memo: Memo, cast: Cast) -> Any:
    return memo.setdefault(id(x), type(x)(map(cast, x)))


def _tuple(x: Any, memo: Memo, cast: Cast) -> Any:
    parts = [cast(part) for part in x]
    return memo.setdefault(id(x), tuple.__new__(type(x), parts))


def _partial(x: Any, memo: Memo, cast: Cast) -> Any:
    new = type(x)(cast(x.func), *map(cast, x.args), **{name: cast(part) for name, part in x.keywords.items()})
    return memo.setdefault(id(x), new)


def _method(x: Any, memo: Memo, cast: Cast) -> Any:
    return memo.setdefault(id(x), types.MethodType(cast(x.__func__), cast(x.__self__)))


def _function(x: Any, memo: Memo, cast: Cast) -> Any:
    closure = x.__closure__ and tuple(map(cast, x.__closure__))
    if id(x) in memo:  # it is in its own closure
        return memo[id(x)]
    new = memo[id(x)] = types.FunctionType(x.__code__, x.__globals__, x.__name__, None, closure)
    new.__defaults__, new.__kwdefaults__ = cast(x.__defaults__), cast(x.__kwdefaults__)
    new.__module__, new.__qualname__, new.__doc__ = x.__module__, x.__qualname__, x.__doc__
    new.__dict__.update({name: cast(part) for name, part in x.__dict__.items()})
    return new


def _cell(x: Any, memo: Memo, cast: Cast) -> Any:
    new = memo[id(x)] = types.CellType()
    for part in contents_of(x):
        new.cell_contents = cast(part)
    return new


def _reference(x: Any, memo: Memo, cast: Cast) -> Any:
    return memo.setdefault(id(x), weakref.ref(cast(x())))


def _namespace(x: Any, memo: Memo, cast: Cast) -> Any:
    new = memo[id(x)] = types.SimpleNamespace()
    new.__dict__.update({name: cast(part) for name, part in vars(x).items()})
    return new


def _scripted(x: Any, memo: Memo, cast: Cast) -> Any:
    new = memo[id(x)] = copy.deepcopy(x)
    for name, tensor in (*x.named_parameters(), *x.named_buffers()):
        set_scripted(new, name, cast(tensor))
    return new


_MAKERS: dict[type, Maker] = {
    dict: _dict,
    tuple: _tuple,
    frozenset: _set,
    set: _set,
    list: _list,
    collections.deque: _list,
    functools.partial: _partial,
    types.MethodType: _method,
    types.FunctionType: _function,
    types.CellType: _cell,
    weakref.ref: _reference,
    types.SimpleNamespace: _namespace,
}
