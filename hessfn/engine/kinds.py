"""What kinds of operation there are, as torch's schemas and tags tell."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch

from hessfn.core.torch_private import is_composite, is_mutable, is_view

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
    name, _, overload = str(func).removeprefix("aten.").partition(".")
    plain = getattr(getattr(aten, name[:-1], None), overload, None) if name.endswith("_") else None
    plain = aten.transpose.int if func is aten.transpose_.default else plain
    tags = func.tags
    return Kind(
        is_mutable(func),
        is_composite(func),
        is_view(func),
        torch.Tag.data_dependent_output in tags,
        torch.Tag.dynamic_output_shape in tags,
        plain,
    )
