"""The modes in which a loss is differentiated twice: what each computes, and what it asks of a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hessfn.core import tree
from hessfn.core.errors import Untraceable
from hessfn.core.func import gradient, gradients, jvp, vjp
from hessfn.core.torch_private import uncompiled
from hessfn.core.torch_state import is_differentiated, torch_state_lock
from hessfn.core.tree import Tree
from hessfn.engine import pipeline
from hessfn.engine.graph_module import copied
from hessfn.engine.linear_product import linear_product
from hessfn.engine.op_definitions import by_definition
from hessfn.engine.trace import tensors
from hessfn.products.loss_checks import Graph, Loss, plain_graph, two_differences
from hessfn.products.loss_memory import Trace

Product = Callable[[Tree, tuple[Any, ...], Tree], Tree]
ModeName = Literal["auto", "traced", "forward", "reverse", "double_backward", "difference"]


def of_trace(trace: Trace, params: Tree, args: tuple[Any, ...]) -> Product:
    """The product that a trace is lowered to; where it is to be differentiated, that of the loss's graph as it is."""
    graph = pipeline.as_function(trace.loss)  # in place of the loss, which the product would keep alive
    if trace.product is None or is_differentiated(params, args):
        return lambda params, args, v: forward(graph, params, args, v)
    module = pipeline.run(pipeline.LOWERING, copied(trace.product), pipeline.Job(graph, params, args))
    return lambda params, args, v: tree.unflatten(module(*tensors((params, args, v))[0]), params)


class Linear(NamedTuple):
    """A linearized product, and what it consists of."""

    product: Callable[..., list[Tensor]]  # of a vector's tensors in a row
    traced: str  # the operations of its trace
    lowered: frozenset[str]  # and those that these were lowered to


def linear_of_trace(trace: Trace, loss: Loss, params: Tree, args: tuple[Any, ...], *, compile: bool = False) -> Linear:
    """The linearized product that a trace is lowered to. Not under ``differentiating``: it may wait for a compiler.

    Raises:
        Untraceable: there is none, and the message says why.
    """
    if trace.product is None:
        raise Untraceable(trace.reason)
    job = pipeline.Job(loss, params, args, linearized=True, compile=compile)
    product, lowered = linear_product(trace.product, job, trace.plans)
    return Linear(product, trace.operations, lowered)


def forward(loss: Loss, params: Tree, args: tuple[Any, ...], v: Tree) -> Tree:
    return tree.unflatten(jvp(lambda p: _gradient(loss, p, args), params, v), params)


def reverse(loss: Loss, params: Tree, args: tuple[Any, ...], v: Tree) -> Tree:
    return vjp(lambda p: _gradient(loss, p, args), params)[1](tree.leaves(v))


def double_backward(loss: Loss, params: Tree, args: tuple[Any, ...], v: Tree) -> Tree:
    return double_backward_of(plain_graph(loss, params, args), params, v)


def double_backward_of(graph: Graph, params: Tree, v: Tree) -> Tree:
    pairs = [(g, d) for g, d in zip(graph.gradient(create_graph=True), tree.leaves(v), strict=True) if g.requires_grad]
    if not pairs:
        return tree.map(torch.zeros_like, params)
    outputs, directions = zip(*pairs, strict=True)
    by_vector = is_differentiated(directions)  # which the product is linear in
    return tree.unflatten(gradients(outputs, graph.leaves, directions, create_graph=by_vector), params)


def difference(loss: Loss, params: Tree, args: tuple[Any, ...], v: Tree) -> Tree:
    return two_differences(loss, params, args, v)[0]


# Of the loss as it is, which is run anew for every product.
OF_LOSS: dict[str, Callable[..., Tree]] = {
    "forward": forward,
    "reverse": reverse,
    "double_backward": double_backward,
    "difference": difference,
}
MODES = ("traced", *OF_LOSS)  # in the order of preference


def _gradient(loss: Loss, params: Tree, args: tuple[Any, ...]) -> list[Tensor]:
    return tree.leaves(gradient(lambda p: loss(p, *args), params))


def of_loss(name: str, loss: Loss) -> Product:
    """The product in a mode that takes the loss as it is, by definitions of its operations."""
    defined = by_definition(loss)
    return lambda params, args, v: OF_LOSS[name](defined, params, args, v)


def math_attention() -> AbstractContextManager[None]:
    """Attention by its math kernel: the others have no second derivatives."""
    return sdpa_kernel(SDPBackend.MATH)


@contextmanager
def differentiating() -> Iterator[None]:
    """Holds what torch has only once, with attention's math kernel.

    What ``torch.compile`` made runs as it was written: compiled code has no second derivatives.
    """
    with torch_state_lock(), math_attention(), uncompiled():
        yield
