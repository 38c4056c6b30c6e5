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


class Folding:
    """The part of a graph that depends on its first inputs alone: it computes the constants of what is left.

    Args:
        constants: the nodes that are constants for the others, and their names.
    """

    def __init__(self, module: fx.GraphModule, given: list[fx.Node], steps: list[fx.Node], constants: dict[Any, str]):
        self.given, self.names = given, constants
        last = {i: node for node in steps for i in node.all_input_nodes}
        ending: dict[fx.Node, list[fx.Node]] = {node: [] for node in steps}
        for i, node in last.items():
            ending[node].append(i)
        self.steps = list(ending.items())
        self.closed_over = {str(n.target): module.get_buffer(str(n.target)) for n in steps if n.op == "get_attr"}
        self.may_vanish: set[str] = set()  # what is added to something, as derivative rules add zeros

    def constants(self, values: list[Tensor]) -> dict[str, Any]:
        """The constants for these inputs.

        Memory that was freed on the way goes back to the system: what the products will keep must not come on top.
        """
        known: dict[fx.Node, Any] = dict(zip(self.given, values, strict=True))
        found = {name: known[node] for node, name in self.names.items() if node in known}
        trim_heap()
        freed = 0
        for node, ending in self.steps:
            if freed > _WORTH_TRIMMING:
                trim_heap()
                freed = 0
            known[node] = self._computed(node, known)
            if node in self.names:
                found[self.names[node]] = known[node]
            for i in ending:
                value = known.pop(i)
                freed += value.nbytes if isinstance(value, Tensor) and i not in self.names else 0
                del value  # its memory is free
        trim_heap()
        return found

    def _computed(self, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
        if node.op == "get_attr":
            return self.closed_over[str(node.target)].clone()  # what the loss closed over may change in place
        args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
        with torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def vanishing(self, constants: dict[str, Any]) -> frozenset[str]:
        """Which of the constants that may be left out are zero."""
        return frozenset(name for name in self.may_vanish if not constants[name].any())


def fold_constants(module: fx.GraphModule, values: list[Tensor]) -> fx.GraphModule:
    """Constant folding: the graph with its first inputs fixed; all that depends on nothing else is computed now, once.

    In ``meta["folding"]`` is what computes the constants for other inputs, and in ``meta["vanishing"]`` which are left
    out, being zero here: for inputs with which the same vanish, the graph is the same.
    """
    given = module.graph.find_nodes(op="placeholder")[: len(values)]
    fixed = fixed_nodes(module.graph, len(values))
    graph, new, names = fx.Graph(), dict[fx.Node, fx.Node](), dict[fx.Node, str]()
    steps, sums = [], []
    for node in module.graph.nodes:
        if node in fixed:
            steps += [node] if node.op != "placeholder" else []
            continue
        for i in node.all_input_nodes:
            if i in fixed and i not in names:
                names[i] = name = f"folded{len(names)}"
                new[i] = graph.create_node("get_attr", name, name=name)
                new[i].meta = dict(i.meta)
        new[node] = graph.create_node(node.op, node.target, name=node.name)
        new[node].args, new[node].kwargs = fx.map_arg((node.args, node.kwargs), new.__getitem__)
        new[node].meta = dict(node.meta)
        if _may_add_zeros(new[node]):
            sums.append(new[node])
    folding = Folding(module, given, steps, names)
    folding.may_vanish = {str(i.target) for node in sums for i in node.all_input_nodes if i.op == "get_attr"}
    constants = folding.constants(values)
    vanishing = folding.vanishing(constants)
    for node in sums:
        inputs: Any = node.args
        for zeros, other in (inputs, inputs[::-1]):
            if zeros.op == "get_attr" and zeros.target in vanishing:
                node.replace_all_uses_with(other)
    drop_dead(graph)
    folded = GraphModule(constants, graph)  # with those that it still uses
    folded.meta |= {"folding": folding, "vanishing": vanishing}
    return folded


_WORTH_TRIMMING = 2**24  # bytes: each time takes some milliseconds


def _may_add_zeros(node: fx.Node) -> bool:
    """Whether it is a constant, and something that looks like the sum."""
    inputs: Any = node.args
    if node.target is not aten.add.Tensor or node.kwargs or not all(isinstance(i, fx.Node) for i in inputs):
        return False
    of_sum = looks(node.meta["val"])
    return any(a.op == "get_attr" and looks(b.meta["val"]) == of_sum for a, b in (inputs, inputs[::-1]))


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
