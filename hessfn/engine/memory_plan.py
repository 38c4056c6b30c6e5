"""The memory plan: where the results of a graph go.

Three steps. *Alias analysis*: whose memory a result is in, its own or that of what it is a view of. *Out-variant
rewrite*: what is added to, multiplied or masked for the last time has the result where it was itself. *Liveness*: all
large results of a linearized product lie in one block that is kept, each in the smallest gap that is free from the
operation that makes it to the last one that reads it.

To ask for memory and to give it back in every call costs a tenth of the time, since the system clears each page anew.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from hessfn.core.torch_private import is_view
from hessfn.core.torch_state import is_observed
from hessfn.engine.meta_shapes import looks

aten = torch.ops.aten


def use_out_variants(module: fx.GraphModule) -> None:
    """Out-variant rewrite: what is added to, multiplied or masked for the last time has the result in its place."""
    for node in module.graph.nodes:
        if node.target in _ONTO_FIRST and not node.kwargs:
            first = node.args[0]
            if _is_own(first) and _looks_like(first, node):
                node.target, node.args = call_out, (node.target, first, *node.args)
    module.recompile()


def add_products(graph: fx.Graph) -> None:
    """A product that is only added to something is one operation with it."""
    for add in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        first, second = add.args[:2]
        if add.kwargs or first is second:
            continue
        for total, product in ((first, second), (second, first)):
            if _is_own_product(product) and _looks_like(product, add) and _dtype(total) == _dtype(add):
                add.target, add.args = _ADDING[product.target], (total, *product.args)
                graph.erase_node(product)
                break


def _is_own_product(node: Any) -> bool:
    if not _is_own(node) or node.target not in _ADDING or node.kwargs:
        return False
    return all(_dtype(i) == _dtype(node) for i in node.args)


def _is_own(node: Any) -> bool:
    """Whether its memory is its own, and it is used once."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or len(node.users) != 1 or "val" not in node.meta:
        return False
    source = node.args[0].target if node.target is operator.getitem else node.target  # type: ignore[union-attr]
    return not shares_memory(source)


def shares_memory(func: Any) -> bool:
    """Whether the result may be another name for the memory of the first argument."""
    return func in _UNSAFE_VIEWS or is_view(func)


def _dtype(x: Any) -> torch.dtype | None:
    return x.meta["val"].dtype if isinstance(x, fx.Node) else None


def _looks_like(node: fx.Node, other: fx.Node) -> bool:
    return looks(node.meta["val"]) == looks(other.meta["val"])


def call_out(function: Any, place: Tensor, *args: Any, **how: Any) -> Tensor:
    """The result of an operation in a place that is given (its out variant), unless it has to be elsewhere."""
    inputs = args[0] if function is aten.cat.default else args
    if torch.compiler.is_compiling() or is_observed(*inputs):
        return function(*args, **how)  # a compiler sees to memory itself, autograd needs inputs, vmap has many results
    with_out, name = _WITH_OUT[function]
    return with_out(*args, **how, **{name: place})


def keep_block(module: fx.GraphModule, at_least: int = 1 << 16) -> None:
    """Results of so many bytes or more go into one block of memory, which stays: not to be called twice at once.

    On the CPU, that is: elsewhere torch itself keeps what is freed.
    """
    nodes = list(module.graph.nodes)
    owners, planned = _storages(nodes, at_least)
    last = {owners[i]: node for node in nodes for i in node.all_input_nodes}  # liveness
    layout = Layout()
    taken: dict[fx.Node, int] = {}
    for node in nodes:
        if node in planned:
            taken[node] = layout.take(_size(node.meta["val"]))
        for owner in {owners[i] for i in node.all_input_nodes}:
            if owner in taken and last[owner] is node:
                layout.release(taken[owner], _size(owner.meta["val"]))
    block = Block(layout.size, {f"place_of_{node.name}": (start, node.meta["val"]) for node, start in taken.items()})
    for name, memory in block.places().items():
        module.register_buffer(name, memory)
    module.meta["block"] = block
    for node in taken:
        with module.graph.inserting_before(node):
            place = module.graph.get_attr(f"place_of_{node.name}")
        if takes_out(node.target):
            node.kwargs = {"out": place}
            continue
        if node.target is not call_out:
            node.args = (node.target, None, *node.args)  # type: ignore[arg-type]
            node.target = call_out
        node.update_arg(1, place)
    module.recompile()


def _storages(nodes: list[fx.Node], at_least: int) -> tuple[dict[fx.Node, fx.Node], set[fx.Node]]:
    """Alias analysis: which node owns the memory each result is in; and the owners to get theirs from the block."""
    sources = {node: source for node in nodes if (source := source_of(node)) is not None}
    results = set(nodes[-1].all_input_nodes)
    for node in reversed(nodes):
        if node in results and node in sources:
            results.add(sources[node])
    owners: dict[fx.Node, fx.Node] = {}
    planned: set[fx.Node] = set()
    for node in nodes:
        owners[node] = owners[sources[node]] if node in sources else node
        elsewhere = node.target is call_out and owners[node] not in planned  # onto what an operation had to allocate
        has_place = not node.kwargs or node.target is aten.clone.default
        own = (node.target in _WITH_OUT and has_place) or takes_out(node.target)
        if (own or elsewhere) and node not in results and _is_large(node.meta["val"], at_least):
            owners[node] = node
            planned.add(node)
    return owners, planned


def takes_out(function: Any) -> bool:
    """Whether a function of our own writes its result into ``out=`` where it is given one, as compiled kernels do."""
    return getattr(function, "takes_out", False)


def source_of(node: fx.Node) -> Any:
    """What a result is a view of, or is written into."""
    if node.target is call_out:
        return node.args[1]
    return node.args[0] if node.target is operator.getitem or shares_memory(node.target) else None


def _is_large(x: Tensor, at_least: int) -> bool:
    dense = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) == x.numel()
    return dense and x.numel() * x.element_size() >= at_least


def _size(x: Tensor) -> int:
    """In bytes, with what is between it and the next one: torch has them begin at multiples of 64."""
    return -(-x.numel() * x.element_size() // 64) * 64


class Layout:
    """Which bytes of a block are taken: best-fit allocation."""

    def __init__(self) -> None:
        self.size = 0
        self.free: list[tuple[int, int]] = []  # from where to where

    def take(self, size: int) -> int:
        """The start of so many free bytes: of the smallest gap that has them, else at the end."""
        gaps = [gap for gap in self.free if gap[1] - gap[0] >= size]
        last = self.free[-1] if self.free and self.free[-1][1] == self.size else (self.size, self.size)
        start, stop = min(gaps, key=lambda gap: gap[1] - gap[0], default=last)
        self.free = [gap for gap in self.free if gap[0] != start]
        self.size = max(self.size, start + size)
        if stop > start + size:
            self.release(start + size, stop - start - size)
        return start

    def release(self, start: int, size: int) -> None:
        merged: list[tuple[int, int]] = []
        for gap in sorted([*self.free, (start, start + size)]):
            if merged and merged[-1][1] == gap[0]:
                gap = merged.pop()[0], gap[1]
            merged.append(gap)
        self.free = merged


class Block(NamedTuple):
    """A block of memory, and what lies in it."""

    size: int  # bytes
    contents: dict[str, tuple[int, Tensor]]  # by name: where it begins, and what it looks like

    def places(self) -> dict[str, Tensor]:
        """The places in a new block, by name."""
        block = torch.empty(self.size, dtype=torch.uint8, device="cpu")
        return {
            name: block[start:][: x.numel() * x.element_size()].view(x.dtype).as_strided(x.shape, x.stride())
            for name, (start, x) in self.contents.items()
        }


# They say that they are none; whoever calls them promises not to use the whole again.
_UNSAFE_VIEWS = {aten._unsafe_view.default, aten.unsafe_split.Tensor, aten.unsafe_split_with_sizes.default}
_ADDING: dict[Any, Any] = {
    aten.mm.default: aten.addmm.default,
    aten.bmm.default: aten.baddbmm.default,
    aten.mul.Tensor: aten.addcmul.default,
}
_WITH_OUT = {
    aten.add.Tensor: (aten.add.out, "out"),
    aten.sub.Tensor: (aten.sub.out, "out"),
    aten.mul.Tensor: (aten.mul.out, "out"),
    aten.addcmul.default: (aten.addcmul.out, "out"),
    aten.addmm.default: (aten.addmm.out, "out"),
    aten.baddbmm.default: (aten.baddbmm.out, "out"),
    aten.threshold_backward.default: (aten.threshold_backward.grad_input, "grad_input"),
    aten.mm.default: (aten.mm.out, "out"),
    aten.bmm.default: (aten.bmm.out, "out"),
    aten.neg.default: (aten.neg.out, "out"),
    aten.cat.default: (aten.cat.out, "out"),
    aten.clone.default: (aten.clone.out, "out"),
}
_ONTO_FIRST = _WITH_OUT.keys() - {aten.mm.default, aten.bmm.default, aten.cat.default, aten.clone.default}
