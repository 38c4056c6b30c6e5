"""What torch's pytrees leave closed: mappings, dataclasses and other objects that hold tensors are nodes of a tree too.

An object is opened by its attributes, without a call of any of its methods, and rebuilt as a copy with others; the
user's own stays as it is. In a copy, what points back to an object above it points to that object's copy.
"""

from __future__ import annotations

import contextlib
import enum
import types
import weakref
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hessfn.core.torch_private import pytree

# What a value of is known by its ``repr``.
PLAIN = (
    type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, enum.Enum, slice, range,
)  # fmt: skip

Path = tuple[Any, ...]


def is_closed(x: Any) -> bool:
    """Whether it is certainly a leaf, which most are."""
    return isinstance(x, Tensor) or type(x) in _CLOSED


_CLOSED = {bool, int, float, complex, str, bytes}


class Node(NamedTuple):
    """A value within an object, and how a copy of it is made.

    ``kind`` is "leaf"; "constant", the same in a copy; "above", an object that was met before, or "weak", a reference
    to one; "container", one of torch's pytrees; "object", with its entries and attributes.
    """

    kind: str
    x: Any = None
    names: tuple[Any, ...] = ()
    nodes: tuple[Node, ...] = ()
    place: int = 0  # of an object met before

    @property
    def key(self) -> Hashable:
        above = self.kind in ("above", "weak")
        what = None if above else self.x if isinstance(self.x, type) else type(self.x)
        return self.kind, what, self.names, tuple(node.key for node in self.nodes), self.place

    def rebuilt(self, leaves: Iterator[Any], copies: dict[int, Any]) -> Any:
        """A copy with other leaves. ``copies`` are those of the objects above, by the identity of the original."""
        if self.kind == "leaf":
            return next(leaves)
        if self.kind == "constant":
            return self.x
        if self.kind in ("above", "weak"):
            above = copies[id(self.x)]
            return above if self.kind == "above" else weakref.ref(above)
        if self.kind == "container":
            return _container([node.rebuilt(leaves, copies) for node in self.nodes], self.x)
        copies[id(self.x)] = empty = _empty(self.x)
        _fill(empty, self.x, self.names, [node.rebuilt(leaves, copies) for node in self.nodes])
        return empty


class Opened(NamedTuple):
    """An object that holds tensors: its leaves, where they are, and what it is without them."""

    leaves: list[Any]
    paths: list[Path]
    node: Node


def opened(x: Any) -> Opened | None:
    """None for what holds no tensor, and for modules, functions and whatever else is not made of attributes."""
    if not _is_object(x):
        return None
    walk = _Walk()
    try:
        node = walk.visit(x, ())
    except RecursionError:  # a list within itself, or a chain of a thousand links
        return None
    return Opened(walk.leaves, walk.paths, node) if any(isinstance(leaf, Tensor) for leaf in walk.leaves) else None


class _Walk:
    def __init__(self) -> None:
        self.leaves: list[Any] = []
        self.paths: list[Path] = []
        self.met: dict[int, int] = {}  # objects by identity, each with its place in the order of the walk
        self.num_back = 0  # references to those

    def visit(self, x: Any, path: Path) -> Node:
        if x is None or isinstance(x, type):
            return Node("constant", x)
        back = x() if type(x) is weakref.ref else x
        if is_closed(x):
            return self._leaf(x, path)
        if id(back) in self.met:
            self.num_back += 1
            return Node("above" if back is x else "weak", back, place=self.met[id(back)])
        if not pytree.tree_is_leaf(x) or type(x) is types.MappingProxyType:
            names, values = _children(x)
            return Node("container", x, names, self._all(names, values, path))
        return self._object(x, path) if _is_object(x) else self._leaf(x, path)

    def _leaf(self, x: Any, path: Path) -> Node:
        self.leaves.append(x)
        self.paths.append(path)
        return Node("leaf")

    def _all(self, names: tuple[Any, ...], values: list[Any], path: Path) -> tuple[Node, ...]:
        return tuple(self.visit(value, (*path, name)) for name, value in zip(names, values, strict=True))

    def _object(self, x: Any, path: Path) -> Node:
        entries, attributes = _entries(x), _attributes(x)
        start = self._mark()
        self.met[id(x)] = len(self.met)
        nodes = self._all(tuple(entries), list(entries.values()), path)
        if isinstance(x, UserDict):
            attributes = {"data": attributes.pop("data"), **attributes}
            nodes += (self.visit(attributes["data"], path),)
            nodes += tuple(self._beside(value, (*path, name)) for name, value in list(attributes.items())[1:])
        else:
            nodes += self._all(tuple(attributes), list(attributes.values()), path)
        if self._is_known(start):
            return Node("object", x, (*entries, *attributes), nodes)
        self._back_to(start)
        return self._leaf(x, path)

    def _beside(self, x: Any, path: Path) -> Node:
        """What a mapping has besides its entries, by which it is read: it may be a tokenizer's encodings, say."""
        start = self._mark()
        node = self.visit(x, path)
        if self._is_known(start):
            return node
        self._back_to(start)
        return Node("constant", x)

    def _is_known(self, start: _Mark) -> bool:
        """Whether what was met since then has to be opened, or can be: it leads to tensors, or is plain all through."""
        found = self.leaves[start.num_leaves :]
        leads_on = self.num_back > start.num_back or any(isinstance(leaf, Tensor) for leaf in found)
        return leads_on or all(isinstance(leaf, PLAIN) for leaf in found)

    def _mark(self) -> _Mark:
        return _Mark(len(self.leaves), dict(self.met), self.num_back)

    def _back_to(self, start: _Mark) -> None:
        del self.leaves[start.num_leaves :], self.paths[start.num_leaves :]
        self.met = start.met


class _Mark(NamedTuple):
    num_leaves: int
    met: dict[int, int]
    num_back: int


def paths(x: Any, path: Path = ()) -> Iterator[Path]:
    """The path of every leaf of a tree."""
    if is_closed(x):
        yield path
    elif x is None:
        return
    elif pytree.tree_is_leaf(x):
        found = opened(x)
        yield from ((*path, *rest) for rest in found.paths) if found else [path]
    else:
        for name, child in zip(*_children(x), strict=True):
            yield from paths(child, (*path, name))


# One level of each kind: its parts with their names, and how to put them together.


def _children(x: Any) -> tuple[tuple[Any, ...], list[Any]]:
    """Of a node of torch's, whose class need not have been registered with names."""
    if type(x) in (dict, OrderedDict, defaultdict, types.MappingProxyType):
        return tuple(x), list(x.values())
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return tuple(x._fields), list(x)
    children = pytree.tree_flatten(x, is_leaf=lambda part: part is not x)[0]
    if type(x) not in (list, tuple):
        try:
            found = pytree.tree_flatten_with_path(x, is_leaf=lambda part: part is not x)[0]
            keys = [path[-1] for path, _ in found]
            return tuple(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k))) for k in keys), children
        except ValueError:
            pass
    return tuple(range(len(children))), children


def _container(children: list[Any], like: Any) -> Any:
    if type(like) is types.MappingProxyType:
        return types.MappingProxyType(dict(zip(like, children, strict=True)))
    return pytree.tree_flatten(like, is_leaf=lambda part: part is not like)[1].unflatten(children)


def _is_object(x: Any) -> bool:
    """Whether it is what its attributes and entries are, so that a copy with others is one of its kind."""
    if isinstance(x, (*PLAIN, type, types.ModuleType, types.FunctionType, nn.Module, *_DATA)):
        return False
    if type(x) is types.MappingProxyType or not pytree.tree_is_leaf(x):
        return type(x) is types.MappingProxyType
    try:
        _empty(x)
    except TypeError:  # what is written in C has more to it
        return False
    return not hasattr(type(x), "__del__") and bool(_entries(x) or _attributes(x))


_DATA = (torch.utils.data.Dataset, torch.utils.data.DataLoader)


def _entries(x: Any) -> dict[Any, Any]:
    if isinstance(x, dict):
        return dict(dict.items(x))
    return dict(enumerate(list.__iter__(x))) if isinstance(x, list) else {}


def _attributes(x: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for base in type(x).__mro__:
        slots = base.__dict__.get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            name = f"_{base.__name__.lstrip('_')}{slot}" if slot.startswith("__") and slot[-2:] != "__" else slot
            if name not in ("__dict__", "__weakref__"):
                with contextlib.suppress(AttributeError):  # nothing is in it
                    found[name] = base.__dict__[name].__get__(x)
    own = getattr(x, "__dict__", {})
    return found | ({} if own is x else own)


def _empty(x: Any) -> Any:
    """One of the same class with no attributes, for which nobody's ``__init__`` is called."""
    if isinstance(x, defaultdict):
        made = defaultdict.__new__(type(x))
        defaultdict.__init__(made, x.default_factory)
        return made
    kinds = (OrderedDict, dict, list, types.SimpleNamespace)
    base = next((kind for kind in kinds if isinstance(x, kind)), object)
    return base.__new__(type(x))


def _fill(empty: Any, like: Any, names: tuple[Any, ...], values: list[Any]) -> None:
    count = len(_entries(like))
    if isinstance(like, list):
        list.extend(empty, values[:count])
    elif isinstance(like, dict):
        for name, value in zip(names[:count], values[:count], strict=True):
            (OrderedDict if isinstance(like, OrderedDict) else dict).__setitem__(empty, name, value)
    if getattr(like, "__dict__", None) is like:
        object.__setattr__(empty, "__dict__", empty)
    own = getattr(empty, "__dict__", {})
    for name, value in zip(names[count:], values[count:], strict=True):
        if name in getattr(like, "__dict__", {}):
            own[name] = value  # whatever the class makes of assignment
        else:
            object.__setattr__(empty, name, value)
