"""What was found out about a function, remembered as long as that function lives."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

V = TypeVar("V")


class Remembered(Generic[V]):
    """Values by owner; of an owner without weak references nothing is remembered, and it is found out anew.

    A method is one with its object, which makes it anew at each ``object.method``. A value must not lead back to its
    owner, which would then live for ever.
    """

    def __init__(self) -> None:
        self._found: WeakKeyDictionary[Any, dict[Any, V]] = WeakKeyDictionary()

    def get(self, owner: Any) -> V | None:
        owner, part = _owner(owner)
        try:
            return self._found.get(owner, {}).get(part)
        except TypeError:
            return None

    def put(self, owner: Any, value: V) -> None:
        owner, part = _owner(owner)
        try:
            self._found.setdefault(owner, {})[part] = value
        except TypeError:
            return

    def get_or_make(self, owner: Any, make: Callable[[], V]) -> V:
        value = self.get(owner)
        if value is None:
            value = make()
            self.put(owner, value)
        return value


def _owner(x: Any) -> tuple[Any, Any]:
    """What lives as long as a function, and which part of it that is."""
    return (x.__self__, x.__func__) if isinstance(x, types.MethodType) else (x, None)
