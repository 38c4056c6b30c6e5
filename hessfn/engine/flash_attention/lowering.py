"""Lowering: in the graph of a product, attention by tiles becomes calls of the compiled kernel.

Where others are to see operations of torch (autograd, ``torch.func``, a compiler), it is ``fused/attention.py`` again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx

from hessfn.engine.flash_attention import kernel
from hessfn.engine.fused import attention as fused
from hessfn.engine.fused.operation import is_followed, sees_operations

Function = Callable[..., Any]


def lower_attention(module: fx.GraphModule) -> None:
    """It may wait for the compiler, once on a machine, if there is something to compile for."""
    found = [node for node in module.graph.nodes if node.target in _LOWERED and _is_profitable(node)]
    if found and kernel.KERNEL.library() is not None:
        for node in found:
            node.target = _LOWERED[node.target]  # type: ignore[index]
        module.recompile()


def _is_profitable(node: fx.Node) -> bool:
    q, k, v, mask = cast(Any, node.args[:4])
    return kernel.is_profitable(q.meta["val"], k.meta["val"], v.meta["val"], None if mask is None else mask.meta["val"])


def attention(*args: Any) -> Any:
    return _done(fused.attention, args, "", ("out", "lse"))


def tangent(*args: Any) -> Any:
    return _done(fused.tangent, args, "out lse dq dk dv", ("dout", "dlse"))


def attention_with_tangent(*args: Any) -> Any:
    return _done(fused.attention_with_tangent, args, "dq dk dv", ("out", "lse", "dout", "dlse"))


def gradient(*args: Any) -> Any:
    return _done(fused.gradient, args, "out lse g", ("gq", "gk", "gv"))


def tangent_of_gradient(*args: Any) -> Any:
    return _done(fused.tangent_of_gradient, args, _OF_TANGENT, ("dgq", "dgk", "dgv"))


def gradient_with_tangent(*args: Any) -> Any:
    return _done(fused.gradient_with_tangent, args, _OF_TANGENT, ("gq", "gk", "gv", "dgq", "dgk", "dgv"))


def _done(plain: Function, args: tuple[Any, ...], names: str, results: tuple[str, ...]) -> Any:
    q, k, v, mask, causal, scale, *rest = args
    made = None if sees_operations() or is_followed(*args) else kernel.KERNEL.library()
    if made is None or not kernel.is_profitable(q, k, v, mask):
        return plain(*args)
    if mask is not None:
        mask = mask.expand(*q.shape[:-1], k.shape[-2])
    given = {"q": q, "k": k, "v": v, "mask": mask, **dict(zip(names.split(), rest, strict=True))}
    found = {name: _empty(name, q, k, v) for name in results}
    kernel.call(made, causal, scale, "lse" in given, {**given, **found})
    return tuple(found.values())


def _empty(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if name.endswith("lse"):
        return q.new_empty(*q.shape[:-1], 1)
    if name.endswith("out"):
        return q.new_empty(*q.shape[:-1], v.shape[-1])
    return torch.empty_like({"q": q, "k": k, "v": v}[name[-1]], memory_format=torch.contiguous_format)


_OF_TANGENT = "out lse g dq dk dv dout dlse dg"
_LOWERED: dict[Any, Function] = {
    fused.attention: attention,
    fused.tangent: tangent,
    fused.attention_with_tangent: attention_with_tangent,
    fused.gradient: gradient,
    fused.tangent_of_gradient: tangent_of_gradient,
    fused.gradient_with_tangent: gradient_with_tangent,
}
