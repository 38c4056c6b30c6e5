"""From a tree to its leaves and back: torch's pytrees, with the objects in them that hold tensors opened.

``None`` is an empty tree, as in JAX. Ordinary trees cost what torch's own functions cost.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

from hessfn.core.containers import Opened, is_closed, opened
from hessfn.core.errors import InvalidInput
from hessfn.core.torch_private import pytree


class Structure(NamedTuple):
    """A tree without its leaves."""

    spec: Any
    holes: tuple[tuple[int, Opened | None], ...] = ()  # leaves of torch's that are none: None, or what was opened

    @property
    def key(self) -> Hashable:
        """Equal for trees of one structure, plain attributes of objects not looked at. It holds no tensor."""
        return self.spec, tuple((place, found and found.node.key) for place, found in self.holes)

    def unflatten(self, leaves: Iterable[Any]) -> Any:
        """The tree with these leaves; of an object, a copy."""
        rest = list(leaves)
        expected = self.spec.num_leaves + sum((len(found.leaves) if found else 0) - 1 for _, found in self.holes)
        if len(rest) != expected:
            raise InvalidInput(f"a tree of {expected} leaves cannot be made of {len(rest)}")
        if not self.holes:
            return pytree.tree_unflatten(rest, self.spec)
        holes, source = dict(self.holes), iter(rest)
        flat: list[Any] = []
        for place in range(self.spec.num_leaves):
            if place not in holes:
                flat.append(next(source))
            else:
                found = holes[place]
                flat.append(found.node.rebuilt(source, {}) if found else None)
        return pytree.tree_unflatten(flat, self.spec)


IsLeaf = Callable[[Any], bool] | None


def flatten(x: Any, is_leaf: IsLeaf = None) -> tuple[list[Any], Structure]:
    """The leaves of a tree, and the rest of it. What ``is_leaf`` finds to be one is not opened."""
    flat, spec = pytree.tree_flatten(x, is_leaf)
    if all(map(is_closed, flat)):
        return flat, Structure(spec)
    out: list[Any] = []
    holes: list[tuple[int, Opened | None]] = []
    for place, leaf in enumerate(flat):
        kept = is_closed(leaf) or (is_leaf is not None and is_leaf(leaf))
        found = None if leaf is None or kept else opened(leaf)
        if found or (leaf is None and not kept):
            holes.append((place, found))
            out.extend(found.leaves if found else ())
        else:
            out.append(leaf)
    return out, Structure(spec, tuple(holes))


def leaves(x: Any, is_leaf: IsLeaf = None) -> list[Any]:
    """The leaves of a tree, in order; objects that hold tensors are opened, and ``None`` is an empty tree.

    >>> leaves({"a": 1, "b": [2, None]})
    [1, 2]
    """
    flat = pytree.tree_leaves(x, is_leaf)
    return flat if all(map(is_closed, flat)) else flatten(x, is_leaf)[0]
