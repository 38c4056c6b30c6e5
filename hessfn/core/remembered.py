"""What was found out about a function, remembered as long as that function lives."""

from __future__ import annotations

from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

V = TypeVar("V")


class Remembered(Generic[V]):
    """Values by owner; of an owner without weak references nothing is remembered, and it is found out anew."""

    def __init__(self) -> None:
        self._found: WeakKeyDictionary[Any, V] = WeakKeyDictionary()

    def get(self, owner: Any) -> V | None:
        try:
            return self._found.get(owner)
        except TypeError:
            return None

    def put(self, owner: Any, value: V) -> None:
        try:
            self._found[owner] = value
        except TypeError:
            return
