"""The derivative of a loss's gradient as one linear graph: what does not depend on the vector is computed once."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from hessfn import tree
from hessfn.graph import aten, clean
from hessfn.tree import MatVec, Tree


def linearized(loss: Callable[..., Tensor], params: Tree, *args: Any, compile: bool = False) -> MatVec:
    """Hessian-vector products of ``loss(params, *args)`` at two gradients' work each, after one trace.

    Args:
        loss, params, args: as for :func:`hessfn.graph.clean`.
        compile: whether ``torch.compile`` makes the products: a minute once, then about a tenth less time each.

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
    # Copies: of parameters that an optimiser then steps in place, some constants would be old and some new.
    params, args = tree.map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, (params, args))
    point = tuple(tree.leaves(params))

    def gradient(*leaves: Tensor) -> tuple[Tensor, ...]:
        return torch.func.grad(lambda ls: graph(tree.unflatten(ls, params), *args))(leaves)

    def derivative(*v: Tensor) -> list[Tensor]:
        result: Any = torch.func.jvp(gradient, point, v)
        return [t.contiguous() if p.is_contiguous() else t for t, p in zip(result[1], point, strict=True)]

    module = record(torch.func.functionalize(derivative, remove="mutations"), [torch.zeros_like(p) for p in point])

    product = _compiled(module, point) if compile else module

    def matvec(v: Tree) -> Tree:
        with torch.no_grad():
            return tree.unflatten(product(*tree.leaves(v)), params)

    matvec.module = module  # type: ignore[attr-defined]
    return matvec


def _compiled(module: fx.GraphModule, like: tuple[Tensor, ...]) -> Callable[..., list[Tensor]]:
    """The module through ``torch.compile``, once one product has been seen to be the same."""
    product = torch.compile(module, fullgraph=True, dynamic=False)
    v = [torch.arange(p.numel(), device=p.device).cos().to(p.dtype).view_as(p) for p in like]
    with torch.no_grad():
        plain, compiled = module(*v), product(*v)
    error = tree.norm(tree.add(compiled, plain, -1.0)) / tree.norm(plain).clamp(min=torch.finfo(torch.float64).tiny)
    allowed = max(torch.finfo(p.dtype).eps for p in like) ** 0.5
    if not error <= allowed:
        raise RuntimeError(
            f"the compiled product differs from the uncompiled one by {float(error):.1e} of its norm, more than "
            f"{allowed:.1e}: take compile=False"
        )
    return product


def record(function: Callable[..., list[Tensor]], inputs: list[Tensor]) -> fx.GraphModule:
    """The graph of a linear function, with all that does not depend on the inputs folded into constants."""
    recorder = _Recorder(inputs)
    with recorder:
        outputs = function(*inputs)
    nodes = [recorder.node_of(output) for output in outputs]
    for i, node in enumerate(nodes):
        if node.op != "call_function" or node in nodes[:i]:  # a result shares memory with nothing
            nodes[i] = recorder.graph.call_function(aten.clone.default, (node,))
    recorder.graph.output(nodes)
    recorder.graph.eliminate_dead_code()
    module = fx.GraphModule(recorder.constants, recorder.graph)
    return module


class _Recorder(TorchDispatchMode):
    """Runs operations and writes down those whose inputs vary: they must be linear in what varies, and out of place."""

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.constants = torch.nn.Module()
        self.varying = WeakTensorKeyDictionary()
        self.known = WeakTensorKeyDictionary()
        for i, tensor in enumerate(inputs):
            self.varying[tensor] = self.graph.placeholder(f"v{i}")

    def node_of(self, tensor: Tensor) -> fx.Node:
        if tensor in self.varying:
            return self.varying[tensor]
        if tensor not in self.known:
            name = f"constant{len(self.known)}"
            self.constants.register_buffer(name, tensor)
            self.known[tensor] = self.graph.get_attr(name)
        return self.known[tensor]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        varying = [t for t in tree.leaves((args, kwargs)) if isinstance(t, Tensor) and t in self.varying]
        if not varying or func in _FORGETS or not isinstance(out, (Tensor, tuple, list)):
            return out
        if self._hands_on(func, args, kwargs, varying[0], out):
            self.varying[out] = self.varying[varying[0]]
            return out
        func = aten.reshape.default if func in _VIEWS else func  # under vmap the layout may be another
        call = self.graph.call_function(func, *tree_map_only(Tensor, self.node_of, (args, kwargs)))
        if isinstance(out, Tensor):
            self.varying[out] = call
        else:
            for i, part in enumerate(out):
                if isinstance(part, Tensor):
                    self.varying[part] = self.graph.call_function(operator.getitem, (call, i))
        return out

    def _hands_on(self, func: Any, args: Any, kwargs: Any, varying: Tensor, out: Any) -> bool:
        """Whether the result is what varies in it, unchanged: derivative rules leave many of these behind."""
        if func is aten.add.Tensor:
            others = [t for t in args if t is not varying]
            if (
                kwargs
                or len(others) != 1
                or not isinstance(others[0], Tensor)
                or others[0] in self.varying
                or others[0].any()
            ):
                return False
        elif func not in _MAY_HAND_ON:
            return False
        return (varying.shape, varying.stride(), varying.dtype) == (out.shape, out.stride(), out.dtype)


_VIEWS = {aten.view.default, aten._unsafe_view.default}
_FORGETS = {
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.new_zeros.default,
    aten._new_zeros_with_same_feature_meta.default,
}
_MAY_HAND_ON = {
    aten.expand.default,
    aten._to_copy.default,
    aten.alias.default,
    aten.detach.default,
    aten.clone.default,
    aten.copy.default,
}
