"""Degree analysis of a traced network: whether it is linear in each leaf alone, piecewise, as networks of ReLUs are."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, fx

from hessfn.core.torch_private import OpOverload


class _Leaves(NamedTuple):
    """Sets of leaves, as bits of an integer, by which a tensor has a derivative."""

    linear: int = 0  #: at least the first
    bent: int = 0  #: perhaps the second by one of these alone

    def __or__(self, other: Any) -> _Leaves:
        return _Leaves(self.linear | other.linear, self.bent | other.bent)

    def __mul__(self, other: Any) -> _Leaves:
        """Of a product, which is bent by what both factors depend on."""
        both = self | other
        return both._replace(bent=both.bent | (self.linear & other.linear))


_NONE = _Leaves()


def is_linear_by_leaf(graph: fx.Graph, num_leaves: int) -> bool:
    """Whether no leaf, of the first inputs of the graph, meets itself in a product or is in an operation that bends.

    A leaf may meet another: a convolution is linear in its input and in its kernel, which come from two leaves. Kinks
    have no curvature. What is not in the lists below counts as bent.

    Source: Botev, Ritter and Barber (2017), for networks that are so.
    """
    found: dict[fx.Node, _Leaves] = {}
    for index, node in enumerate(graph.find_nodes(op="placeholder")):
        found[node] = _Leaves(1 << index) if index < num_leaves else _NONE
    for node in graph.nodes:
        if node.op == "call_function":
            found[node] = _of_call(node, found)
    (results,) = graph.find_nodes(op="output")
    return not any(found.get(x, _NONE).bent for x in results.all_input_nodes)


def _of_call(node: fx.Node, found: dict[fx.Node, _Leaves]) -> _Leaves:
    if not _has_derivative(node):
        return _NONE
    factors = list(_factors(node))
    every = _NONE
    for x in node.all_input_nodes:
        every = every | found.get(x, _NONE)
    if not factors:
        return every._replace(bent=every.bent | every.linear)
    total = _NONE
    for group in factors:
        product = _NONE
        for x in group:
            product = product * found.get(x, _NONE)
        total = total | product
    return total


def _has_derivative(node: fx.Node) -> bool:
    """Masks and indices have none, nor what is detached; of several results some may."""
    value = node.meta.get("val")
    is_constant = "cut" in node.meta or _name(node) in _CONSTANT
    return not is_constant and not (isinstance(value, Tensor) and not value.is_floating_point())


def _factors(node: fx.Node) -> Iterator[list[fx.Node]]:
    """The terms of an operation that is a sum of products of its arguments; nothing where it is something else."""
    args = node.args
    name = _name(node)
    if (
        node.target is operator.getitem
        or name in _LINEAR
        or name in _KINKED
        or (name == "div" and not isinstance(args[1], fx.Node))
    ):
        yield from ([x] for x in node.all_input_nodes)
    elif name in _PRODUCTS and not (name == "native_batch_norm" and args[5]):
        for term in _PRODUCTS[name]:
            yield [x for x in (args[i] for i in term if i < len(args)) if isinstance(x, fx.Node)]


def _name(node: fx.Node) -> str | None:
    return node.target._opname if isinstance(node.target, OpOverload) else None


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_CONSTANT = _names("ones_like zeros_like full_like empty_like new_zeros new_ones new_full new_empty sign argmax")
_LINEAR = _names(
    "add sub rsub neg sum mean cumsum cat stack view _unsafe_view reshape permute transpose t expand squeeze unsqueeze "
    "select slice narrow split split_with_sizes unbind clone _to_copy alias contiguous flip roll repeat diagonal tril "
    "triu index gather index_select embedding avg_pool2d avg_pool1d avg_pool3d _adaptive_avg_pool2d im2col col2im "
    "constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d pixel_shuffle "
    "channel_shuffle masked_fill where upsample_nearest2d upsample_bilinear2d lift_fresh_copy as_strided"
)
_KINKED = _names(
    "relu threshold hardtanh softshrink hardshrink leaky_relu abs clamp clamp_min clamp_max maximum minimum amax amin "
    "max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool2d"
)
_PRODUCTS: dict[str, tuple[tuple[int, ...], ...]] = {
    **dict.fromkeys(["mul", "mm", "bmm", "mv", "dot", "_prelu_kernel"], ((0, 1),)),
    **dict.fromkeys(["convolution", "native_batch_norm"], ((0, 1), (2,))),
    **dict.fromkeys(["addmm", "baddbmm", "addbmm", "addmv"], ((0,), (1, 2))),
}
