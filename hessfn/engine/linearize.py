"""Linearisation: the graph of a loss becomes that of its Hessian-vector product, then the constants are folded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor, fx

from hessfn.core import tree
from hessfn.core.errors import WrongProduct
from hessfn.engine.fused.outputs import Cut
from hessfn.engine.graph_module import GraphModule, interpreted
from hessfn.engine.heap import trim_heap
from hessfn.engine.meta_shapes import looks
from hessfn.engine.rewrites import drop_dead, fixed_nodes
from hessfn.engine.trace import Record, graph_of

aten = torch.ops.aten


def differentiate(
    loss: fx.GraphModule, point: list[Tensor], others: list[Tensor], record: Record = graph_of
) -> fx.GraphModule:
    """Forward-over-reverse: the graph of the Hessian-vector product of a clean loss.

    Where outputs are marked in it (``fused/outputs.py``), it is that of the Gauss-Newton product.

    Args:
        loss: from the parameters and what else it takes, tensors in a row.
        point, others: what these look like; nothing is computed with them.

    Returns:
        A graph from the parameters, the others and the vector, in a row, to the product.
    """

    def product(*inputs: Tensor) -> list[Tensor]:
        at, rest, v = inputs[: len(point)], inputs[len(point) : -len(point)], inputs[-len(point) :]
        cut = Cut()
        with fwAD.dual_level(), torch.enable_grad():
            duals = [fwAD.make_dual(p.detach().requires_grad_(), t) for p, t in zip(at, v, strict=True)]
            (value,) = interpreted(loss, *duals, *rest, instead=cut.instead)
            # With create_graph, derivatives are made of operations that have derivatives.
            options: dict[str, Any] = {"create_graph": True, "allow_unused": True, "materialize_grads": True}
            one = torch.ones(value.shape, dtype=value.dtype, device=value.device)  # nothing needs the value itself
            slopes = torch.autograd.grad(value, cut.inner or duals, one, **options)
            tangents: Sequence[Tensor | None] = [fwAD.unpack_dual(g).tangent for g in slopes]
            images = cut.images(slopes) if cut.inner else []
        if cut.inner:
            tangents = cut.pulled_back(images, duals)
        found = [torch.zeros_like(p) if t is None else t for t, p in zip(tangents, at, strict=True)]
        return [t.contiguous() if p.is_contiguous() else t for t, p in zip(found, point, strict=True)]

    return record(product, [*point, *others, *map(torch.empty_like, point)], lean=True)


def fold_constants(module: fx.GraphModule, values: list[Tensor]) -> fx.GraphModule:
    """Constant folding: the graph with its first inputs fixed; all that depends on nothing else is computed now, once.

    Memory that was freed on the way goes back to the system: what the products will keep must not come on top of it.
    """
    graph = module.graph
    given = graph.find_nodes(op="placeholder")[: len(values)]
    fixed = fixed_nodes(graph, len(values))
    known: dict[fx.Node, Any] = dict(zip(given, values, strict=True))
    constants: dict[fx.Node, fx.Node] = {}
    waiting = {node: set(node.users) for node in graph.nodes}
    trim_heap()
    freed = 0
    for node in list(graph.nodes):
        if freed > _WORTH_TRIMMING:
            trim_heap()
            freed = 0
        inputs = node.all_input_nodes
        if node.op == "get_attr":
            known[node] = module.get_buffer(node.target).clone()  # what the loss closed over may change in place
        elif node.op == "call_function" and node in fixed:
            args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
            with torch.no_grad():
                known[node] = node.target(*args, **kwargs)
        else:
            for i in inputs:
                if i in fixed and i not in constants:
                    module.register_buffer(f"folded{len(constants)}", known[i])
                    with graph.inserting_before(node):
                        constants[i] = graph.get_attr(f"folded{len(constants)}")
                    constants[i].meta = dict(i.meta)
                if i in fixed:
                    node.replace_input_with(i, constants[i])
            _leave_out_zeros(node, module)
        for i in inputs:
            waiting[i].discard(node)
            if not waiting[i] and i in known:
                freed += known[i].nbytes if isinstance(known[i], Tensor) else 0
                known[i] = None  # its memory is free
    drop_dead(graph)
    for node in given:
        graph.erase_node(node)
    trim_heap()
    return GraphModule(module, graph)  # with the buffers that it still uses


_WORTH_TRIMMING = 2**24  # bytes: each time takes some milliseconds


def _leave_out_zeros(node: fx.Node, module: fx.GraphModule) -> None:
    """Derivative rules add zeros."""
    inputs: Any = node.args
    if node.target is not aten.add.Tensor or node.kwargs or not all(isinstance(i, fx.Node) for i in inputs):
        return
    for zeros, other in (inputs, inputs[::-1]):
        same = looks(other.meta["val"]) == looks(node.meta["val"])
        if zeros.op == "get_attr" and same and not module.get_buffer(zeros.target).any():
            node.replace_all_uses_with(other)
            return


def compiled(module: fx.GraphModule, like: list[Tensor]) -> Callable[..., list[Tensor]]:
    """The module through ``torch.compile``, once one product has been seen to be the same."""
    product = torch.compile(module, fullgraph=True, dynamic=False)
    v = [torch.arange(p.numel(), device=p.device).cos().to(p.dtype).view_as(p) for p in like]
    with torch.no_grad():
        plain, made = module(*v), product(*v)
    error = tree.norm(tree.add(made, plain, -1.0)) / tree.norm(plain).clamp(min=torch.finfo(torch.float64).tiny)
    allowed = tree.eps(like) ** 0.5
    if not error <= allowed:
        raise WrongProduct(
            f"the compiled product differs from the uncompiled one by {float(error):.1e} of its norm, more than "
            f"{allowed:.1e}: take compile=False"
        )
    return product
