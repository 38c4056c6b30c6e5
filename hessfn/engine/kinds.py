"""What kinds of operation there are, as torch's schemas and tags tell."""

from __future__ import annotations

import re
from functools import cache
from typing import Any, NamedTuple

import torch

from hessfn.core.torch_private import arguments_of, is_composite, is_mutable, is_view

aten = torch.ops.aten


class Kind(NamedTuple):
    """What an operation is."""

    mutable: bool
    composite: bool
    view: bool
    reads_values: bool
    shaped_by_values: bool
    plain: Any  # what an operation in place is without that


@cache
def kind_of(func: Any) -> Kind:
    tags = func.tags
    return Kind(
        is_mutable(func),
        is_composite(func),
        is_view(func),
        torch.Tag.data_dependent_output in tags,
        torch.Tag.dynamic_output_shape in tags,
        _plain(func),
    )


def _plain(func: Any) -> Any:
    """That of the same arguments, whose overload may have another name: ``pow_.Scalar`` is ``pow.Tensor_Scalar``."""
    name = str(func).removeprefix("aten.").partition(".")[0]
    found = getattr(aten, name[:-1], None) if name.endswith("_") else None
    overloads = [getattr(found, overload) for overload in found.overloads()] if found is not None else []
    return next((plain for plain in overloads if arguments_of(plain) == arguments_of(func)), None)


@cache
def name_of(func: Any) -> str:
    """What a node of it is called, but for a number: ``mm_default``."""
    return re.sub(r"(?<=[a-z])([A-Z])", r"_\1", func.__name__).replace(".", "_").lower()
