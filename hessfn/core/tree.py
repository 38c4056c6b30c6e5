"""Trees as vectors: any pytree of tensors is a point of one flat space, with dot products, norms and flat copies."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import TypeVar  # typing's own has no default before Python 3.13

from hessfn.core.containers import is_closed, opened, paths
from hessfn.core.dtensor import layout, over_ranks, place, whole
from hessfn.core.errors import InvalidInput
from hessfn.core.flatten import IsLeaf, flatten, leaves
from hessfn.core.memory import own
from hessfn.core.torch_state import known

Tree = Any
T = TypeVar("T", default=Tree)
MatVec = Callable[[T], T]  # MatVec[dict[str, Tensor]] is one on dicts


def map(function: Callable[..., Any], tree: Tree, *others: Tree, is_leaf: IsLeaf = None) -> Tree:
    """``function`` of every leaf, and of those of other trees of the same structure.

    It is torch's ``tree_map``, but that objects that hold tensors come out as copies, and ``None`` as it is.

    >>> map(lambda a, b: a + b, {"x": 1, "y": None}, {"x": 2, "y": None})
    {'x': 3, 'y': None}
    """
    flat, structure = flatten(tree, is_leaf)
    if not structure.holes:
        rest = [structure.spec.flatten_up_to(other) for other in others]
    else:
        rest = [_paired(other, tree) for other in others]
    return structure.unflatten([function(*each) for each in zip(flat, *rest, strict=True)])


def _paired(other: Tree, tree: Tree) -> list[Any]:
    """The leaves of another tree in the order of this one, whose keys may come in another order."""
    given = leaves(other)
    if structure(other) == structure(tree):
        return given
    by_name = dict(zip(names(other), given, strict=True))
    return _in_order(by_name, len(given), names(tree), "the second tree", "the first")


def names(tree: Tree) -> list[str]:
    """The dotted names of all leaves, in leaf order.

    >>> names({"conv.weight": torch.ones(2), "head": [torch.ones(1), torch.ones(1)]})
    ['conv.weight', 'head.0', 'head.1']
    """
    return [".".join(str(key) for key in path) for path in paths(tree)]


def structure(tree: Tree) -> Hashable:
    """The structure of a tree without its leaves: classes, keys, names of attributes, places of ``None``. No tensor."""
    return flatten(tree)[1].key


def is_object(x: Any) -> bool:
    """Whether it is an object that holds tensors in its attributes: none of torch's pytrees, and yet a tree."""
    return not is_closed(x) and opened(x) is not None


def unflatten(new_leaves: Iterable[Any], like: T) -> T:
    """A tree with the structure of ``like`` and other leaves, in the order of ``leaves(like)``; objects are copied."""
    return flatten(like)[1].unflatten(new_leaves)


def numel(tree: Tree) -> int:
    """The number of entries of a tree: its dimension n as a vector.

    >>> numel({"weight": torch.ones(2, 3), "bias": torch.ones(2)})
    8
    """
    return sum(leaf.numel() for leaf in leaves(tree))


def eps(tree: Tree) -> float:
    """The resolution of the coarsest dtype in a tree.

    >>> eps({"a": torch.ones(2, dtype=torch.float64), "b": torch.ones(2)}) == torch.finfo(torch.float32).eps
    True
    """
    return max(torch.finfo(leaf.dtype).eps for leaf in leaves(tree))


def wide(x: Tensor) -> Tensor:
    """``x`` in float64, where its device has float64: the small numbers (dot products, tridiagonals) deserve it."""
    return x.to(_wide_dtype(x))


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64


def dot(x: T, y: T) -> Tensor:
    """The inner product of two trees with the same leaves: a scalar, multiplied and summed in float64.

    So values of float32 neither overflow nor underflow. Leaves are matched by name; other names raise ``ValueError``.

    >>> dot({"a": torch.ones(2), "b": torch.ones(1)}, {"a": torch.ones(2), "b": 2 * torch.ones(1)})
    tensor(4., dtype=torch.float64)
    """
    y = matched(y, x, "the second tree", "the first")
    if any(layout(a) for a in leaves(x)):
        return over_ranks(dot, torch.sum, leaves(x), leaves(y))
    pairs = zip(leaves(x), leaves(y), strict=True)
    blocks = (block for a, b in pairs for block in zip(_blocks(a), _blocks(b), strict=True))
    return torch.stack([(wide(a) * wide(b)).sum() for a, b in blocks]).sum()


def _blocks(leaf: Tensor) -> Sequence[Tensor]:
    size = max(1 << 18, -(-leaf.numel() // 64))  # so much is widened at a time, or a 64th
    return (leaf,) if leaf.numel() <= size else leaf.reshape(-1).split(size)


def norm(x: Tree) -> Tensor:
    """The Euclidean norm of a tree: a float64 scalar, which values of float32 can neither overflow nor underflow.

    >>> norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])})
    tensor(5., dtype=torch.float64)
    """
    if any(layout(leaf) for leaf in leaves(x)):
        return over_ranks(norm, torch.linalg.vector_norm, leaves(x))
    real = (torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf for leaf in leaves(x))
    blocks = (block for leaf in real for block in _blocks(leaf))  # of the whole, torch makes a wide copy
    parts = [torch.linalg.vector_norm(block, dtype=_wide_dtype(block)) for block in blocks]
    return torch.linalg.vector_norm(torch.stack(parts))


def add(x: T, y: T, alpha: float | Tensor = 1.0) -> T:
    """``x + alpha y``, each leaf in the dtype of x. Leaves are matched by name; other names raise ``ValueError``.

    >>> add({"a": torch.ones(2)}, {"a": torch.ones(2)}, -1.0)
    {'a': tensor([0., 0.])}
    """
    return map(lambda a, b: a + _times(alpha, b).to(a.dtype), x, matched(y, x, "the second tree", "the first"))


def scale(c: float | Tensor, x: T) -> T:
    """``c x``, each leaf in its own dtype.

    >>> scale(0.5, {"a": torch.ones(2)})
    {'a': tensor([0.5000, 0.5000])}
    """
    return map(lambda leaf: _times(c, leaf).to(leaf.dtype), x)


def _times(c: float | Tensor, leaf: Tensor) -> Tensor:
    return (c.cpu() if isinstance(c, Tensor) and leaf.is_cpu else c) * leaf  # values of eigenpairs are on the CPU


def ravel(tree: T) -> tuple[Tensor, Callable[[Tensor], T]]:
    """The entries of a tree as one flat vector ``(n,)``, and the inverse function.

    The inverse also takes stacks of vectors ``(..., n)``: each leaf then carries the leading axes. The dtype is the
    widest of the leaves. For sharded leaves the flat vector is the whole one, on every process.

    >>> flat, unravel = ravel({"a": torch.zeros(2), "b": torch.ones(1, 2)})
    >>> flat
    tensor([0., 0., 1., 1.])
    >>> unravel(torch.ones(3, 4))["b"].shape
    torch.Size([3, 1, 2])
    """
    parts = leaves(tree)
    layouts = [layout(part) for part in parts]
    shapes = [part.shape for part in parts]
    dtypes = [part.dtype for part in parts]
    sizes = [part.numel() for part in parts]
    structure = flatten(tree)[1]

    def unravel(flat: Tensor) -> T:
        lead = flat.shape[:-1]
        pieces = flat.split(sizes, dim=-1)
        restored = [p.reshape((*lead, *s)).to(d) for p, s, d in zip(pieces, shapes, dtypes, strict=True)]
        placed = [place(own(x), where, len(lead)) for x, where in zip(restored, layouts, strict=True)]
        return structure.unflatten(placed)

    return torch.cat([whole(part).reshape(-1) for part in parts]), unravel


def owned(tree: T) -> T:
    """The tree with every leaf contiguous and in memory of its own: copies of those that are parts of more."""
    return map(lambda x: own(x) if isinstance(x, Tensor) else x, tree)


def select(tree: Tree, patterns: str | Iterable[str]) -> dict[str, Tensor]:
    """The leaves whose dotted names match any of the glob patterns, by name; ``ValueError`` if a pattern matches none.

    >>> list(select({"conv.weight": torch.ones(2), "conv.bias": torch.ones(1)}, "*.bias"))
    ['conv.bias']
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    there = names(tree)
    for pattern in patterns:
        if not fnmatch.filter(there, pattern):
            raise InvalidInput(
                f"no leaf matches {pattern!r}; there are: {', '.join(there[:12])}{', ...' * (len(there) > 12)}"
            )
    chosen = zip(there, leaves(tree), strict=True)
    return {name: leaf for name, leaf in chosen if any(fnmatch.fnmatchcase(name, p) for p in patterns)}


def matched(x: Tree, like: T, what: str, other: str) -> T:
    """``x`` in the leaf order of ``like``, once its names and shapes are found to be the same; dtypes may differ.

    Dicts may come in any order of keys: this is the one place where the leaves of two trees are paired.

    >>> matched({"b": torch.zeros(1), "a": torch.ones(2)}, {"a": torch.zeros(2), "b": torch.zeros(1)}, "x", "y")
    {'a': tensor([1., 1.]), 'b': tensor([0.])}
    """
    given, structure = flatten(x)
    wanted, order = flatten(like)
    if structure.key != order.key:
        given = _in_order(dict(zip(names(x), given, strict=True)), len(given), names(like), what, other)
    if any(not isinstance(a, Tensor) or a.shape != b.shape for a, b in zip(given, wanted, strict=True)):
        for name, a, b in zip(names(like), given, wanted, strict=True):
            part = f"leaf {name!r} of {what}" if name else what
            if not isinstance(a, Tensor):
                raise InvalidInput(f"{part} is a {type(a).__name__}, not a tensor")
            if a.shape != b.shape:
                raise InvalidInput(f"{part} has shape {tuple(a.shape)}, but {tuple(b.shape)} in {other}")
    return x if structure.key == order.key else order.unflatten(given)


def _in_order(by_name: dict[str, Any], count: int, expected: list[str], what: str, other: str) -> list[Any]:
    missing = [name for name in expected if name not in by_name]
    extra = [name for name in by_name if name not in set(expected)]
    if missing or extra:
        raise InvalidInput(
            f"{what} is a tree of other leaves than {other}: missing {missing[:4]}, unexpected {extra[:4]}"
        )
    if not len(by_name) == count == len(expected):  # as {"a": {"b": x}, "a.b": y}
        raise InvalidInput(f"two leaves of {what} have the same dotted name, and cannot be told apart")
    return [by_name[name] for name in expected]


def aligned(vector: Tree, like: T, what: str = "the vector") -> T:
    """``vector`` in the leaf order of ``like``, once its names, shapes and dtypes are found to be the same.

    Dicts may come in any order of keys. Raises ``ValueError`` that names the first leaf that differs.
    """
    vector = matched(vector, like, what, "the parameters")
    pairs = zip(leaves(vector), leaves(like), strict=True)
    if any(a.dtype != b.dtype or a.device != b.device for a, b in pairs):
        for name, a, b in zip(names(like), leaves(vector), leaves(like), strict=True):
            if a.dtype != b.dtype:
                raise InvalidInput(f"leaf {name!r} of {what} is {a.dtype}, the parameters are {b.dtype}: cast it first")
            if a.device != b.device:
                raise InvalidInput(
                    f"leaf {name!r} of {what} is on {a.device}, the parameters on {b.device}: move it first"
                )
    return vector


def require_finite(x: T, what: str) -> T:
    """``x``, or ``ValueError`` that names the first leaf known to hold a NaN or an infinity."""
    if any(layout(leaf) for leaf in leaves(x)):
        sums = [norm(x)]
    else:
        sums = [leaf.detach().sum(dtype=torch.promote_types(leaf.dtype, torch.float32)) for leaf in leaves(x)]
    if sums and known(torch.stack(sums).isfinite().all()) is False:
        bad = [name for name, leaf in zip(names(x), leaves(x), strict=True) if not whole(leaf).isfinite().all()]
        if bad:  # else only the sum overflows
            raise InvalidInput(why_not_finite(what, bad, x))
    return x


def why_not_finite(what: str, bad: list[str], like: Tree) -> str:
    """Names the first of some bad leaves of a tree, and the likely cause."""
    count, half = len(names(like)), any(leaf.dtype == torch.float16 for leaf in leaves(like))
    others = f" and {len(bad) - 1} more of {count} leaves" if len(bad) > 1 else ""
    where = f" in leaf {bad[0]!r}{others}" if bad and bad[0] else ""
    cause = "float16 ends at 65504, take float32" if half else "are the loss and its curvature finite there?"
    return f"{what} is not finite{where}: {cause}"
