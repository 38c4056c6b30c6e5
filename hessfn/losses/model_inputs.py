"""What of a batch a model is called with, and what its criterion is."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from hessfn.core import tree
from hessfn.core.arrays import as_tensors
from hessfn.core.errors import InvalidInput


def pair(batch: Any) -> tuple[Any, Any]:
    """What the model gets, and what its criterion. A batch that is one mapping or one object goes to both.

    Arrays of NumPy become tensors, which share their memory. A model may write into what it gets: it is a copy.
    """
    batch = fresh(as_tensors(batch))
    if is_one(batch):
        return batch, batch
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        found = f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else type(batch).__name__
        raise InvalidInput(
            f"a batch must be a pair (inputs, targets), a mapping or an object that holds tensors, not a {found}; for "
            "others write your own loss"
        )
    return batch[0], batch[1]


def fresh(x: Any) -> Any:
    """A tree with containers and objects of its own, and the same tensors."""
    if isinstance(x, Tensor) or (isinstance(x, (tuple, list)) and all(isinstance(part, Tensor) for part in x)):
        return x
    return tree.unflatten(tree.leaves(x), x)


def is_one(batch: Any) -> bool:
    """Whether a batch is one mapping or one object, which both the model and its criterion take what they need of."""
    return isinstance(batch, Mapping) or tree.is_object(batch)


def taken(loss: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments as a loss takes them: one that is made of a model takes tensors for arrays, one's own what is given."""
    return as_tensors(arguments) if hasattr(loss, "mean_over") else arguments


class Signature(NamedTuple):
    """Which arguments the forward of a model has by name: whether a mapping is its arguments or one of them."""

    names: frozenset[str]
    required: frozenset[str]
    has_others: bool  # **kwargs

    def takes(self, given: Mapping[Any, Any]) -> bool:
        """Whether the entries of a mapping are the arguments, or are meant to be: the error is then Python's own."""
        names = set(given)
        if not all(isinstance(name, str) for name in names):
            return False
        if self.required <= names and (self.has_others or names <= self.names):
            return True
        return len(self.names) != 1 and bool(names & self.names)


def signature_of(model: nn.Module) -> Signature:
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):  # it is no Python function
        return Signature(frozenset(), frozenset(), True)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return Signature(
        frozenset(p.name for p in named),
        frozenset(p.name for p in needed),
        any(p.kind == p.VAR_KEYWORD for p in parameters),
    )


def arguments(inputs: Any, signature: Signature) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A tuple is ``*args``; a mapping is ``**kwargs`` where the model has arguments of these names, else one argument.

    So is anything else, also what is more than a tuple, such as a packed sequence.
    """
    inputs = as_tensors(inputs)
    if isinstance(inputs, Mapping) and signature.takes(inputs):
        return (), dict(inputs)
    return (tuple(inputs) if _is_list(inputs) else (inputs,)), {}


def _is_list(x: Any) -> bool:
    """A tuple or a list, or a named tuple, but not a class of its own made of one."""
    return type(x) in (tuple, list) or (
        isinstance(x, tuple) and type(x).__bases__ == (tuple,) and hasattr(x, "_fields")
    )
