"""What is kept with a loss as long as it lives: its traces, the modes that were found, and what the check has shown.

A training loop makes a product of the same loss at every step, at other parameters. What was found out belongs to the
loss, so that nothing is found out twice.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from tqdm import tqdm

from hessfn.core import tree
from hessfn.core.errors import Untraceable
from hessfn.core.remembered import Remembered
from hessfn.core.tree import Tree
from hessfn.engine import pipeline
from hessfn.engine.linear_product import Plan
from hessfn.engine.op_definitions import by_definition
from hessfn.engine.same_operations import digest_of
from hessfn.engine.trace import graph_of
from hessfn.products.guards import PLAIN, Snapshot, snapshot
from hessfn.products.loss_checks import Loss

MOST_TRACES = 16  # of a loss: batches of many lengths neither trace for ever nor fill the memory


class Trace(NamedTuple):
    """The graphs of a loss for arguments of some shapes, and what they take for constants."""

    guard: Snapshot
    loss: fx.GraphModule
    product: fx.GraphModule | None
    reason: str  # why there is no product: a derivative rule looks at values, say
    operations: str  # what the product consists of, for samples of any number
    plans: list[Plan]  # what linearized products of it are lowered to

    def holds(self, params: Tree, args: tuple[Any, ...]) -> bool:
        """Whether the loss decides by these integers and masks what it has decided in the trace."""
        try:
            return pipeline.holds(self.product or self.loss, params, args)
        except Exception:  # an index out of its range, or values that nobody may look at, under vmap
            return False


class Memory:
    """Of one loss. It holds graphs and no function, which could lead back to the loss."""

    def __init__(self) -> None:
        self.is_right: dict[Any, bool] = {}  # by mode and shapes: what the check has found
        self.modes: dict[Any, list[Any]] = {}  # by shapes: what the ladder has found
        self.said: set[str] = set()
        self.traces: dict[Any, list[Trace]] = {}  # by shapes

    def __reduce__(self) -> tuple[type[Memory], tuple[()]]:
        """Another process finds out anew."""
        return Memory, ()

    def trace(self, loss: Loss, params: Tree, args: tuple[Any, ...], for_ever: bool = True) -> Trace:
        """The trace of a loss, from memory where it holds. Under ``modes.differentiating``.

        Args:
            for_ever: whether a new one is of no use unless it can be kept.

        Raises:
            Untraceable: no graph can stand for the loss, or there are as many as are kept.
        """
        key = shapes_of((params, args))
        now = snapshot(loss, params)
        kept = [t for t in self.traces.get(key, []) if t.guard == now]
        for trace in kept:
            if trace.holds(params, args):
                return trace
        self.traces[key] = kept  # without those whose constants have changed
        is_full = sum(map(len, self.traces.values())) >= MOST_TRACES
        if is_full and for_ever:
            raise Untraceable(f"{MOST_TRACES} traces are kept of this loss, for other batches")
        trace = make_trace(loss, params, args)
        if not is_full:
            self.traces[key] = [*kept, trace]
        return trace


def make_trace(loss: Loss, params: Tree, args: tuple[Any, ...]) -> Trace:
    for name, leaf in zip(tree.names(args), tree.leaves(args), strict=True):
        if not isinstance(leaf, (Tensor, *PLAIN)):
            raise Untraceable(f"a trace cannot see into {name!r} of the batch, a {type(leaf).__name__}")
    # On a terminal, once it takes longer than two seconds.
    with tqdm(desc="tracing the loss", unit=" operations", delay=2, leave=False, disable=None) as bar:
        job = pipeline.Job(by_definition(loss), params, args, record=partial(graph_of, on_node=bar.update))
        graph = pipeline.run(pipeline.LOSS, None, job)
        guard = snapshot(loss, params)  # afterwards: a loss may count its calls
        try:
            product = pipeline.run(pipeline.PRODUCT, graph, job)
        except Untraceable as error:
            return Trace(guard, graph, None, str(error), "", [])
    return Trace(guard, graph, product, "", digest_of(product.graph), [])


def memory_of(loss: Loss) -> Memory:
    return _MEMORIES.get_or_make(loss, Memory)


_MEMORIES: Remembered[Memory] = Remembered()


def shapes_of(arguments: Any) -> Any:
    """What a product is good for: the structure, the shapes and dtypes of tensors, the values of what has one.

    Of other objects the type: a product that has seen into them, as a trace would, is not made. And what of torch's
    state decides which operations a loss consists of.
    """
    flat = tree.leaves(arguments)
    devices = {x.device.type for x in flat if isinstance(x, Tensor)}
    casts = [torch.get_autocast_dtype(d) for d in devices if d != "meta" and torch.is_autocast_enabled(d)]
    return (tree.structure(arguments), *map(_kind, flat), *casts, torch.get_default_dtype())


def _kind(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.shape, x.dtype, x.device
    return type(x), repr(x) if isinstance(x, PLAIN) else ""
