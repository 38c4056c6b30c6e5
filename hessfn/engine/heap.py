"""The heap of the C library, which keeps what is freed: the system gets it back where it would add to a peak."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from hessfn.engine.liveness import live_bytes, owners_of

_WORTH = 2**24  # bytes freed: each time takes some milliseconds


@functools.cache
def _trim() -> Callable[[int], Any] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def trim_heap() -> None:
    """Gives the system what was freed, holes in the middle as well."""
    if torch.compiler.is_compiling():
        return
    trim = _trim()
    if trim is not None:
        trim(0)


def trim_where_it_peaks(module: fx.GraphModule) -> None:
    """The heap is trimmed on the way up to the peak of a graph: holes among what lives would come on top of it.

    What the system has taken back it clears before it gives it again. So it is done a few times: of a GPT's product of
    1024 tokens it saves a third of the memory for about 5 % of the time.
    """
    graph = module.graph
    nodes = list(graph.nodes)
    sizes, dying = live_bytes(nodes, owners_of(nodes))
    peak, freed = max(sizes), 0
    least = max(_WORTH, peak // 3)
    for node, size in zip(nodes, sizes, strict=True):
        freed += dying.get(node, 0)
        if freed > least and node.op == "call_function":
            freed = 0
            if size > 0.7 * peak:
                with graph.inserting_after(node):
                    graph.call_function(trim_heap)
    module.recompile()
