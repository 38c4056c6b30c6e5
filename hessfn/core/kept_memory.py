"""How much memory a function keeps: the tensors that it reaches."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx

from hessfn.core.torch_private import is_functorch_wrapped_tensor


def bytes_kept(function: Any, beside: Any = ()) -> int:
    """How many bytes the tensors take that are in memory as long as ``function`` is, and not for ``beside`` anyway.

    Of a matvec of :func:`hessfn.linearized_hvp` these are the constants of its graph, the block of memory in which its
    results lie, and its own copies of parameters and data: what every further batch takes that is kept.

    Args:
        function: whatever holds tensors: a function by what it closes over, an object by its attributes, containers.
        beside: what does not count, such as the loss, the parameters and the batch.

    >>> import torch
    >>> x = torch.zeros(10)
    >>> bytes_kept(lambda x=x: x[2:]), bytes_kept(lambda x=x: x[2:], beside=x)
    (40, 0)
    """
    counted = _storages(beside)
    return sum(size for place, size in _storages(function).items() if place not in counted)


def _storages(start: Any) -> dict[tuple[str, int], int]:
    """Bytes of each block of memory that is reached, by where it is."""
    found: dict[tuple[str, int], int] = {}
    waiting, seen, held = [start], set(), []
    while waiting:
        x = waiting.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        held.append(x)  # an object made on the way must not leave its identity to another
        if isinstance(x, Tensor):
            if x.device.type != "meta" and not is_functorch_wrapped_tensor(x) and not x.is_sparse:
                storage = x.untyped_storage()
                found[str(x.device), storage.data_ptr()] = storage.nbytes()
        else:
            waiting.extend(_inside(x))
    return found


def _inside(x: Any) -> Iterator[Any]:
    # The nodes of a graph have examples of their results, in no memory; its constants are the module's.
    if isinstance(x, (type, types.ModuleType, fx.Graph, str, bytes, int, float)):
        return
    if isinstance(x, functools.partial):
        yield from (x.func, x.args, x.keywords)
    elif isinstance(x, types.MethodType):
        yield from (x.__self__, x.__func__)
    elif isinstance(x, types.FunctionType):
        yield from (cell.cell_contents for cell in x.__closure__ or () if cell != types.CellType())
        yield from (x.__defaults__, x.__kwdefaults__, x.__dict__)
    elif isinstance(x, dict):
        yield from x.values()
    elif isinstance(x, (list, tuple, set, frozenset)):
        yield from x
    else:
        yield getattr(x, "__dict__", None)
