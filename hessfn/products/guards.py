"""Guards: what a traced loss takes for constant, so that a change of it leads to a new trace.

A graph holds the numbers and tensors that the loss closed over when it was traced. These are found where Python finds
them: in the cells, defaults and globals of a function, and in the attributes of the objects there.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from hessfn.core.containers import PLAIN
from hessfn.core.tree import Tree

Snapshot = tuple[Any, ...]


def snapshot(loss: Callable[..., Any], params: Tree) -> Snapshot:
    """What a loss closes over: its numbers, and its tensors with their versions. Equal while nothing changes.

    A function can say itself what that is: ``function.closes_over(params)`` gives the objects. Of more than
    ``MOST`` things the rest is left out: it would cost more than a product.
    """
    found: list[Any] = []
    waiting, seen = [loss], set()
    while waiting and len(found) < MOST:
        x = waiting.pop()
        if type(x) in _AT_ONCE:
            found.append((type(x), x))
        elif isinstance(x, Tensor):
            found.append((weakref.ref(x), -1 if x.is_inference() else x._version))
        elif isinstance(x, PLAIN):
            found.append((type(x), x))
        elif id(x) not in seen:
            seen.add(id(x))
            waiting.extend(_inside(x, params))
    return tuple(found)


MOST = 5000
_AT_ONCE = {type(None), bool, int, float, str}


def _inside(x: Any, params: Tree) -> Iterator[Any]:
    if isinstance(x, functools.partial):
        yield from (x.func, *x.args, *x.keywords.values())
    elif isinstance(x, types.MethodType):
        yield from (x.__self__, x.__func__)
    elif isinstance(x, types.FunctionType):
        yield from x.closes_over(params) if hasattr(x, "closes_over") else _of_function(x)
    elif isinstance(x, dict):
        yield from (part for pair in x.items() for part in pair)
    elif isinstance(x, (list, tuple, set, frozenset)):
        yield len(x)
        yield from x
    elif isinstance(x, nn.Module) or not _is_library(type(x)):
        attributes = getattr(x, "__dict__", None)
        yield from _slots(x) if attributes is None else attributes.values()


def _of_function(x: types.FunctionType) -> Iterator[Any]:
    if _is_library(x):
        return
    yield from map(_contents, x.__closure__ or ())
    yield from (*(x.__defaults__ or ()), *(x.__kwdefaults__ or {}).values())
    for name in _names(x.__code__):
        if name in x.__globals__:
            yield x.__globals__[name]


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not bound yet
        return None


def _names(code: types.CodeType) -> Iterator[str]:
    """What a function, and those that are defined in it, may look up in its module."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _names(inner)


def _is_library(x: Any) -> bool:
    """Whether it is code that nobody changes while a program runs, and types and modules of it."""
    home = (getattr(x, "__module__", None) or "").partition(".")[0]
    return isinstance(x, types.ModuleType) or home in _LIBRARIES


_LIBRARIES = {
    "builtins",
    "torch",
    "numpy",
    "scipy",
    "functools",
    "collections",
    "typing",
    "threading",
    "_thread",
    "types",
}


def _slots(x: Any) -> Iterator[Any]:
    for base in type(x).__mro__:
        names = base.__dict__.get("__slots__", ())
        yield from (getattr(x, name, None) for name in ((names,) if isinstance(names, str) else names))
