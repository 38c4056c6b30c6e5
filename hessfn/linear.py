"""The derivative of a loss's gradient as one linear graph: everything that does not depend on the vector is done once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from hessfn import tree
from hessfn.graph import clean
from hessfn.tree import MatVec, Tree


def linearized(loss: Callable[..., Tensor], params: Tree, *args: Any, compile: bool = False) -> MatVec:
    """Hessian-vector products of ``loss(params, *args)`` at two gradients' work each, after one trace.

    Args:
        loss, params, args: as for :func:`hessfn.graph.clean`.
        compile: whether ``torch.compile`` makes the products; tens of seconds once, then a tenth to a third less a product.

    Returns:
        ``matvec(v)``, for trees ``v`` like the parameters in order, shapes and dtypes. Kept: what the products need of
        the forward and backward pass.

    Raises:
        Untraceable: see :func:`hessfn.graph.clean`.

    >>> matvec = linearized(lambda w: (w**3).sum(), torch.tensor([1.0, 2.0]))
    >>> matvec(torch.tensor([1.0, 1.0]))
    tensor([ 6., 12.])
    """
    graph = clean(loss, params, *args)
    point = [leaf.detach() for leaf in tree.leaves(params)]

    def derivative(*v: Tensor) -> list[Tensor]:
        def gradient(*leaves: Tensor) -> tuple[Tensor, ...]:
            return torch.func.grad(lambda ls: graph(tree.unflatten(ls, params), *args))(leaves)

        return torch.func.jvp(gradient, tuple(point), v)[1]

    module = make_fx(derivative)(*(torch.zeros_like(leaf) for leaf in point))
    module.graph.eliminate_dead_code()
    product = _fold_constants(module)

    def matvec(v: Tree) -> Tree:
        with torch.no_grad():
            return tree.unflatten(product(*tree.leaves(v)), params)

    matvec.module = product
    return matvec


def _fold_constants(module: fx.GraphModule) -> fx.GraphModule:
    """What does not depend on the inputs, computed now."""
    varies: set[fx.Node] = set()
    values: dict[fx.Node, Any] = {}
    new = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    constants = torch.nn.Module()
    run = fx.Interpreter(module)
    last_use = {i: node for node in module.graph.nodes for i in node.all_input_nodes}

    def hand_over(node: fx.Node) -> fx.Node:
        if node not in copies:
            name = f"constant{len(copies)}"
            constants.register_buffer(name, values[node])
            copies[node] = new.get_attr(name)
        return copies[node]

    for node in module.graph.nodes:
        if node.op in ("placeholder", "output") or any(i in varies for i in node.all_input_nodes):
            varies.add(node)
            copies[node] = new.node_copy(node, hand_over)
        else:
            run.env = values
            values[node] = run.run_node(node)
        for i in node.all_input_nodes:
            if last_use[i] is node:
                values.pop(i, None)
    return fx.GraphModule(constants, new)
