"""What torch keeps once for the whole process: threads take turns where they would change it under each other."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def turn() -> AbstractContextManager[Any]:
    """Entered while a loss is traced or differentiated, and while a loader draws from the global generator.

    The level of forward-mode derivatives, the rules of a trace and the choice of kernels belong to the process: the
    tangents of one thread would be cleared by another's end, and what a thread puts back may not be what it found. So
    does the random state, by which a loss is found to be random.
    """
    return nullcontext() if torch.compiler.is_compiling() else _TURN


_TURN = threading.RLock()
