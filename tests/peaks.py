"""The most memory that is in use at once: bytes of all tensors alive, counted as operations make them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Peak(TorchDispatchMode):
    """Sees every operation below autograd; a storage counts from the operation that made it until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(out):
            if isinstance(x, Tensor):
                self._seen(x.untyped_storage())
        if self.now > self.most:
            gc.collect()  # when Python collects cycles is not the routine's doing
        self.most = max(self.most, self.now)
        return out

    def known(self, x: Tensor) -> None:
        """What was there before counts for nothing."""
        self.alive[x.untyped_storage()._cdata] = 0

    def _seen(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.now -= self.alive.pop(key)


def peak_in_vectors(run: Callable[[], Any], *before: Tensor, vector: int) -> float:
    """The peak of a call in vectors of so many bytes, without the tensors that were there before it."""
    gc.collect()
    gc.freeze()  # what is there already need not be looked through at every operation
    try:
        with Peak() as peak:
            for x in before:
                peak.known(x)
            kept = run()
    finally:
        gc.unfreeze()
    del kept
    return peak.most / vector
