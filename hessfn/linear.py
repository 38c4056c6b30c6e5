"""The derivative of a loss's gradient as one linear graph: what does not depend on the vector is computed once."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from contextlib import nullcontext
from threading import Lock
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor, fx

from hessfn import memory, passes, tree
from hessfn.graph import aten, clean, on_cpu, tensors
from hessfn.native import by_tiles
from hessfn.record import record
from hessfn.scaling import multiply_once
from hessfn.shapes import looks
from hessfn.tree import MatVec, Tree
from hessfn.winograd import add_overlaps


def linearized(loss: Callable[..., Tensor], params: Tree, *args: Any, compile: bool = False) -> MatVec:
    """Hessian-vector products of ``loss(params, *args)`` at two gradients' work each, after one trace.

    Args:
        loss, params, args: as for :func:`hessfn.graph.clean`.
        compile: whether ``torch.compile`` makes the products: a minute once, then up to a tenth less time each.

    Returns:
        ``matvec(v)``, for trees ``v`` like the parameters in order, shapes and dtypes. Kept: what the products need of
        the forward and backward pass, and on the CPU the memory for what they compute on the way.

    Raises:
        Untraceable: see :func:`hessfn.graph.clean`.

    >>> matvec = linearized(lambda w: (w**3).sum(), torch.tensor([1.0, 2.0]))
    >>> matvec(torch.tensor([1.0, 1.0]))
    tensor([ 6., 12.])
    """
    # Copies: of parameters that an optimiser then steps in place, some constants would be old and some new.
    params, args = tree.map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, (params, args))
    module = derivative(clean(loss, params, *args), params, args)
    _give_back()
    module = _folded(module, tensors((params, args))[0])
    faster = by_tiles(module) if on_cpu((params, args)) else module
    memory.accumulate(faster)
    if on_cpu((params, args)) and not compile:
        memory.keep_memory(faster)
    _give_back()
    product = _compiled(faster, module, tree.leaves(params)) if compile else faster
    lock = Lock()

    def matvec(v: Tree) -> Tree:
        with torch.no_grad(), nullcontext() if torch.compiler.is_compiling() else lock:
            return tree.unflatten(product(*tree.leaves(v)), params)

    return matvec


def derivative(graph: Callable[..., Tensor], params: Tree, args: tuple[Any, ...]) -> fx.GraphModule:
    """The Hessian-vector product of a clean loss, from the tensors of ``params``, ``args`` and ``v`` in a row."""
    point = tree.leaves(params)
    given = tensors((params, args))[0]

    def product(*inputs: Tensor) -> list[Tensor]:
        at, others, v = inputs[: len(point)], inputs[len(point) : len(given)], inputs[len(given) :]

        with fwAD.dual_level(), torch.enable_grad():
            duals = [fwAD.make_dual(p.detach().requires_grad_(), t) for p, t in zip(at, v, strict=True)]
            (value,) = graph.module(*duals, *others)  # type: ignore[attr-defined]
            # With create_graph, derivatives are made of operations that have derivatives.
            options: dict[str, Any] = {"create_graph": True, "allow_unused": True, "materialize_grads": True}
            tangents = [fwAD.unpack_dual(g).tangent for g in torch.autograd.grad(value, duals, **options)]
        found = [torch.zeros_like(p) if t is None else t for t, p in zip(tangents, at, strict=True)]
        return [t.contiguous() if p.is_contiguous() else t for t, p in zip(found, point, strict=True)]

    module = record(product, [*given, *map(torch.empty_like, point)])
    add_overlaps(module.graph)
    passes.drop_dead(module.graph)
    module.recompile()
    return module


def _folded(module: fx.GraphModule, values: list[Tensor]) -> fx.GraphModule:
    """The graph with its first inputs fixed: all that depends on nothing else is computed now, once."""
    graph = module.graph
    given = graph.find_nodes(op="placeholder")[: len(values)]
    fixed = set(given)
    for node in graph.nodes:
        if node.op in ("get_attr", "call_function") and all(i in fixed for i in node.all_input_nodes):
            fixed.add(node)
    multiply_once(graph, fixed)

    known: dict[fx.Node, Any] = dict(zip(given, values, strict=True))
    constants: dict[fx.Node, fx.Node] = {}
    waiting = {node: set(node.users) for node in graph.nodes}
    for count, node in enumerate(list(graph.nodes)):
        if count % 100 == 0:
            _give_back()
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
                known[i] = None  # its memory is free
    passes.own_results(graph)
    passes.drop_dead(graph)
    for node in given:
        graph.erase_node(node)
    return fx.GraphModule(module, graph)  # with the buffers that it still uses


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


def _give_back() -> None:
    """Gives the system what was freed: glibc keeps it, and the products would come on top of it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _compiled(module: fx.GraphModule, exact: fx.GraphModule, like: list[Tensor]) -> Callable[..., list[Tensor]]:
    """The module through ``torch.compile``, once one product has been seen to be the same."""
    product = torch.compile(module, fullgraph=True, dynamic=False)
    v = [torch.arange(p.numel(), device=p.device).cos().to(p.dtype).view_as(p) for p in like]
    with torch.no_grad():
        plain, compiled = exact(*v), product(*v)
    error = tree.norm(tree.add(compiled, plain, -1.0)) / tree.norm(plain).clamp(min=torch.finfo(torch.float64).tiny)
    allowed = tree.eps(like) ** 0.5
    if not error <= allowed:
        raise RuntimeError(
            f"the compiled product differs from the uncompiled one by {float(error):.1e} of its norm, more than "
            f"{allowed:.1e}: take compile=False"
        )
    return product
