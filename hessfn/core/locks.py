"""What belongs to a process and is not handed on: locks that others hold, and what was found out or opened here."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar
from weakref import WeakSet

R = TypeVar("R")


class Lock:
    """A reentrant lock. A forked child, unless the thread that forks holds it, and who unpickles it find it open."""

    def __init__(self) -> None:
        self._lock, self._owner = threading.RLock(), 0
        _ALL.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()
        self._owner = threading.get_ident()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Lock], tuple[()]]:
        return Lock, ()

    def forget_other_threads(self) -> None:
        """In a child, which has none of them: no other thread will ever open it."""
        if self._owner != threading.get_ident():
            self._lock = threading.RLock()


class MadeHere(Generic[R]):
    """What a function of the library makes; where it is unpickled, it is made again of the same arguments."""

    def __init__(self, make: Callable[..., R], *args: Any) -> None:
        self.made = make(*args)
        self._how = make, *args

    def __reduce__(self) -> tuple[Any, ...]:
        return MadeHere, self._how


class OfThisProcess(dict[Any, Any]):
    """A dict that is empty where it is unpickled."""

    def __reduce__(self) -> tuple[type[OfThisProcess], tuple[()]]:
        return OfThisProcess, ()


_ALL: WeakSet[Lock] = WeakSet()

# What torch has only once, see ``torch_state_lock``. A child would go on with another thread's half of a derivative, so
# that a fork waits until that is done. The other locks guard what every user begins anew.
TORCH = Lock()


def _in_the_child() -> None:
    TORCH.__exit__()
    for lock in list(_ALL):
        lock.forget_other_threads()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=TORCH.__enter__, after_in_parent=TORCH.__exit__, after_in_child=_in_the_child)
