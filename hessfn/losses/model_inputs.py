"""What of a batch a model is called with, and what its criterion is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hessfn.core.errors import InvalidInput


def pair(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, Mapping):
        return batch, batch
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        found = f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else type(batch).__name__
        raise InvalidInput(
            f"a batch must be a pair (inputs, targets) or a mapping, not a {found}; for others write your own loss"
        )
    return batch[0], batch[1]


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {}
