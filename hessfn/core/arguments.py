"""What a routine asks of its arguments before anything else: that each is of the right kind.

Types, dtypes and numbers of axes are looked at, never values, so ``vmap``, autograd and ``torch.compile`` see nothing
of it. Whatever can be meant passes. An error names what was given and the remedy. ``call`` is the routine as a user
writes it, such as ``"eigsh(matvec, v0)"``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from hessfn.core import tree
from hessfn.core.errors import InvalidInput
from hessfn.core.flatten import flatten
from hessfn.core.results import EigenPair, EigenPairs

_LOSS = "loss, params = functionalize(model, criterion)"
_FORWARD = "forward, params = stateless(model)"


def require_matvec(x: Any, call: str) -> None:
    """A function. Also a module, as a linear map; a SciPy operator is callable too, but not on tensors."""
    if callable(x) and not _is_scipy(x):
        return
    remedy = "hvp(loss, params, batch) makes one"
    if isinstance(x, Tensor):
        remedy = "for a matrix A write lambda v: A @ v"
    elif _is_array(x):
        remedy = "for a matrix A write lambda v: torch.from_numpy(A @ v.numpy())"
    raise InvalidInput(f"{call}: matvec is {kind(x)}, not a function from a vector to its product; {remedy}")


def require_function(x: Any, name: str, call: str) -> None:
    if not callable(x):
        raise InvalidInput(f"{call}: {name} is {kind(x)}, not a function")


def require_vector(x: Any, name: str, call: str, *, floating: bool = True) -> None:
    """A tree of tensors, of floating-point ones unless any will do; ``torch.func`` knows no other containers."""
    closed = next((found.node.x for _, found in flatten(x)[1].holes if found), None)
    if closed is not None:
        remedy = f"give dict({name})" if isinstance(closed, Mapping) else "give a dict of its tensors"
        raise InvalidInput(
            f"{call}: {name} {'is' if closed is x else 'has'} {kind(closed)}, and a vector is a dict, list or tuple of "
            f"tensors: {remedy}"
        )
    for index, leaf in enumerate(tree.leaves(x)):
        if not isinstance(leaf, Tensor) or (floating and not (leaf.is_floating_point() or leaf.is_complex())):
            raise InvalidInput(f"{call}: {_why_no_vector(x, index, name)}")


def _why_no_vector(x: Any, index: int, name: str) -> str:
    leaf, path = tree.leaves(x)[index], tree.names(x)[index]
    part = f"leaf {path!r} of {name}" if path else name
    if isinstance(leaf, Tensor):
        return f"{part} is {leaf.dtype}, not floating-point: convert it, or leave it out"
    if leaf is not x:
        return f"{part} is {kind(leaf)}, not a tensor"
    if isinstance(x, nn.Module):
        return f"{name} is {kind(x)}, not a tree of its parameters; {_LOSS}"
    if isinstance(x, Sequence) and not isinstance(x, str):
        return f"{name} is {kind(x)} vectors, not one of them: take gaussian(params, 1)[0]"
    return f"{name} is {kind(x)}, not a tensor or a tree of tensors, such as gaussian(params, 1)[0]"


def require_vectors(x: Any, name: str, call: str) -> None:
    """Several vectors in one tree, whose leaves carry a leading axis."""
    if isinstance(x, (EigenPair, EigenPairs)):
        raise InvalidInput(f"{call}: {name} is {kind(x)}; take the .vectors of eigsh(...)")
    require_vector(x, name, call)
    if any(leaf.dim() == 0 for leaf in tree.leaves(x)):
        raise InvalidInput(f"{call}: {name} has no leading axis of k vectors; a single one is v.unsqueeze(0)")


def require_eigenpairs(x: Any, call: str) -> None:
    if not isinstance(getattr(x, "values", None), Tensor) or not hasattr(x, "vectors"):
        raise InvalidInput(f"{call}: eigenpairs is {kind(x)}; give what eigsh(matvec, v0, k) returns")


def require_estimate(x: Any, name: str, call: str) -> None:
    if not all(hasattr(x, field) for field in ("mean", "stderr", "num_matvecs")):
        raise InvalidInput(f"{call}: {name} is {kind(x)}; give what hutchinson_per_leaf(matvec, probes) returns")


def require_probes(x: Any, call: str) -> None:
    """An iterable of trees. A dict, a named tuple and a tensor of one axis are one vector each."""
    single = isinstance(x, (Mapping, str, nn.Module, np.ndarray)) or hasattr(x, "_fields")
    if isinstance(x, Tensor):
        single = x.dim() < 2
    if single or not (hasattr(x, "__iter__") or hasattr(x, "__getitem__")):
        raise InvalidInput(f"{call}: probes is {kind(x)}, not several vectors; give rademacher(params, 100)")
    if isinstance(x, (list, tuple, range)) and len(x) > 0:
        require_vector(x[0], "probes[0]", call, floating=False)


def require_loss(loss: Any, params: Any, call: str) -> None:
    """A function of ``params``. A model is one of its inputs, so it may be a loss of a tensor, not of a tree."""
    if not callable(loss):
        pair = isinstance(loss, tuple) and len(loss) > 0 and callable(loss[0])
        remedy = f"unpack the pair, {_LOSS}" if pair else _LOSS
        raise InvalidInput(f"{call}: loss is {kind(loss)}, not a function of the parameters; {remedy}")
    if _is_model(loss) and not isinstance(params, Tensor):
        remedy = f"{_LOSS}; or, by its inputs, lambda x: model(x)"
        raise InvalidInput(f"{call}: loss is {kind(loss)}, not a function of the parameters; {remedy}")


def require_forward(forward: Any, criterion: Any, params: Any, call: str) -> None:
    """``forward(params, inputs)`` and ``criterion(outputs, targets)``."""
    origin = (getattr(forward, "__module__", None), getattr(forward, "__name__", None))
    if origin == ("hessfn.losses.functional", "loss"):
        raise InvalidInput(f"{call}: forward is the loss of functionalize, criterion and all; {_FORWARD}")
    if not callable(forward) or (_is_model(forward) and not isinstance(params, Tensor)):
        raise InvalidInput(f"{call}: forward is {kind(forward)}, not a function of parameters and inputs; {_FORWARD}")
    require_function(criterion, "criterion", call)
    require_vector(params, "params", call)


def require_pair(x: Any, name: str, call: str) -> tuple[Any, Any]:
    if not isinstance(x, Mapping):
        with contextlib.suppress(TypeError, ValueError):
            first, second = x
            return first, second
    raise InvalidInput(f"{call}: {name} is {kind(x)}, not a pair")


def require_batches(x: Any, call: str) -> None:
    if isinstance(x, Mapping) or not (hasattr(x, "__iter__") or hasattr(x, "__getitem__")):
        raise InvalidInput(f"{call}: batches is {kind(x)}; give a DataLoader or a list, [batch] for a single one")


def require_sequence(x: Any, name: str, call: str) -> None:
    if isinstance(x, (Mapping, nn.Module)) or not (hasattr(x, "__len__") and hasattr(x, "__getitem__")):
        raise InvalidInput(f"{call}: {name} is {kind(x)}, not a sequence of trees; give a list")


def require_model(x: Any, call: str) -> None:
    if not isinstance(x, nn.Module):
        raise InvalidInput(f"{call}: model is {kind(x)}, not an nn.Module")


def require_quadrature(x: Any, call: str) -> None:
    """``(nodes, weights)``, each ``(p, m)``."""
    pair = isinstance(x, (tuple, list)) and len(x) == 2
    if not pair or not all(isinstance(part, Tensor) and part.dim() == 2 for part in x):
        remedy = "slq(matvec, gaussian(params, 10), num_matvecs=90) makes one"
        raise InvalidInput(f"{call}: quadrature is {kind(x)}, not nodes and weights (p, m); {remedy}")


def _is_model(x: Any) -> bool:
    return isinstance(x, nn.Module) and next(x.parameters(), None) is not None


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _is_scipy(x: Any) -> bool:
    return hasattr(x, "rmatvec") and any(base.__module__.startswith("scipy.") for base in type(x).__mro__)


def kind(x: Any) -> str:
    """What was given, in a few words."""
    name = type(x).__name__
    if isinstance(x, nn.Module):
        return f"the model {name}"
    if _is_array(x):
        return f"{'a tensor' if isinstance(x, Tensor) else f'of type {name} and'} of shape {tuple(x.shape)}"
    if x is None or isinstance(x, (bool, int, float, str)):
        return repr(x)
    if callable(x):
        return f"the function {getattr(x, '__name__', name)}"
    if isinstance(x, Mapping):
        return f"a {name} of {len(x)}"
    if isinstance(x, Sequence) and not hasattr(x, "_fields"):
        return f"a {name if isinstance(x, (list, tuple)) else 'sequence'} of {len(x)}"
    return f"of type {name}"
