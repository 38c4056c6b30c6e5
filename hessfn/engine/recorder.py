"""The recorder: a function as a graph of its operations (an ``fx.Graph``), without computing any of them.

It sees each operation below autograd, writes a node for it, and hands on a *fake* result: a tensor that looks right
(shape, strides, dtype, from ``meta_shapes``) and has memory that nobody touches. What depends on no input is computed,
as a constant.

Alias analysis. An operation in place is recorded as the plain one where nobody else can see the difference:

- the tensor's memory is its own: it is no view, and no view was taken of it (``is_shared``);
- or it is the one view that was taken of its base (``view_of``, and ``only_view`` from the base to it), and that view
  can be scattered back. Then the base, too, gets a new node: the base with this part replaced.

All else raises :class:`Unsupported`, and ``trace.graph_of`` turns to the reference, ``make_fx``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.weak import WeakTensorKeyDictionary

from hessfn.core.errors import Untraceable
from hessfn.core.torch_private import TorchDispatchMode, is_composite, is_mutable, is_view
from hessfn.engine import meta_shapes, zero_propagation
from hessfn.engine.meta_shapes import MASKS, like, looks, on_meta, tensors, with_tensors

aten = torch.ops.aten


class Unsupported(Exception):
    """The recorder cannot write this down; it says nothing of the function."""


class Recorder(TorchDispatchMode):
    """Writes down operations instead of running them.

    Args:
        graph: where to.
        rules: what takes the place of an operation.
        lean: leave out what only hands on an argument, what is known to be zero, and what is there already (common
            subexpressions).
    """

    def __init__(self, graph: fx.Graph, *, rules: Mapping[Any, Callable[..., Any]] | None = None, lean: bool) -> None:
        super().__init__()
        self.graph, self.rules, self.lean = graph, rules or {}, lean
        self.constants: dict[str, Tensor] = {}
        self.nodes = WeakTensorKeyDictionary()  # tensor -> the node that makes it
        self.is_fake = WeakTensorKeyDictionary()
        self.zeros = WeakTensorKeyDictionary()
        self.is_shared = WeakTensorKeyDictionary()
        self.view_of = WeakTensorKeyDictionary()  # view -> (how to scatter it back, its base, which part it is)
        self.only_view = WeakTensorKeyDictionary()  # base -> that view
        self.seen: dict[Any, Any] = {}
        self.calls: dict[Any, fx.Node] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or else every operation goes through the compiler, and the first one imports it

    def run(self, function: Callable[..., list[Tensor]], inputs: list[Tensor]) -> fx.GraphModule:
        """The graph of a function of tensors.

        Raises:
            Untraceable: an operation depends on the value of a tensor.
            Unsupported: an operation in place changes memory that others see.
        """
        inputs = [t.detach().view_as(t) for t in inputs]  # each is itself, also where two are the same tensor
        for i, tensor in enumerate(inputs):
            self._name(tensor, self.graph.placeholder(f"in{i}"))
            self.is_fake[tensor] = self.is_shared[tensor] = True
        with self:
            outputs = function(*inputs)
        self.graph.output([self.node_of(output) for output in outputs])
        return fx.GraphModule(self.constants, self.graph)

    def _name(self, tensor: Tensor, node: fx.Node) -> None:
        self.nodes[tensor] = node
        node.meta["val"] = on_meta(tensor)

    def node_of(self, tensor: Tensor) -> fx.Node:
        if tensor not in self.nodes:
            name = f"constant{len(self.constants)}"
            self.constants[name] = tensor.detach()
            self._name(tensor, self.graph.get_attr(name))
            self.is_shared[tensor] = True
        return self.nodes[tensor]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._efficientzerotensor.default:
            func = aten.zeros.default  # the rules for the other one run operations on meta
        if func in self.rules:
            with self:
                return self.rules[func](*args, **kwargs)
        if is_mutable(func):
            return self._in_place(func, args, kwargs)
        if is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        if self.lean and (other := zero_propagation.remaining_summand(func, args, kwargs, self.zeros)) is not None:
            return self._same_as(other)
        out = self._run(func, args, kwargs)
        if not isinstance(out, (Tensor, tuple, list)):
            return out
        same = self._handed_on(func, args, kwargs) if self.lean else None
        if same is not None and isinstance(out, Tensor) and looks(same) == looks(out):
            self.nodes[out] = self.node_of(same)
            return out
        if self.lean and isinstance(out, Tensor) and zero_propagation.is_zero(func, args, self.zeros):
            options: Any = {"dtype": out.dtype, "device": out.device}
            self._name(out, self.graph.call_function(aten.zeros.default, (list(out.shape),), options))
            self.zeros[out] = True
            return out
        func = aten.reshape.default if func in _VIEWS else func  # under vmap the layout may be another
        if func is aten._new_zeros_with_same_feature_meta.default and self.lean and isinstance(out, Tensor):
            # It would keep what it is like.
            func, args, kwargs = aten.zeros.default, (list(out.shape),), {"dtype": out.dtype, "device": out.device}
        call = self._call(func, *with_tensors((args, kwargs), self.node_of))
        if isinstance(out, Tensor):
            self._name(out, call)
            if func in zero_propagation.MAKERS:
                self.zeros[out] = True
        else:
            for i, part in enumerate(out):
                if isinstance(part, Tensor):
                    self._name(part, self._call(operator.getitem, (call, i), {}))
        return out

    def _call(self, func: Any, args: Any, kwargs: Any) -> fx.Node:
        """The node of a call: in a lean graph the one that is there already (derivative rules repeat themselves)."""
        key = _key((func, args, kwargs)) if self.lean else len(self.graph.nodes)
        if key not in self.calls:
            self.calls[key] = self.graph.call_function(func, args, kwargs)
        return self.calls[key]

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of an operation on constants; else a fake one."""
        constant = not any(t in self.is_fake for t in tensors((args, kwargs)))
        masks = func is aten.index.Tensor and [i for i in args[1] if i is not None and i.dtype in MASKS]
        if not constant and torch.Tag.data_dependent_output in func.tags:
            raise Untraceable(f"it branches on, or takes out, the value of a tensor ({func})")
        # By numbers the shape of what is indexed is known, by a mask it is not.
        unshaped = masks is False and not constant and torch.Tag.dynamic_output_shape in func.tags
        if unshaped or any(m in self.is_fake for m in masks or ()):
            raise Untraceable(f"the shape of a result depends on values ({func})")
        view = is_view(func)
        out = func(*args, **kwargs) if constant or masks or view else self._fake_result(func, args, kwargs)
        for t in tensors(out):
            if not constant:
                self.is_fake[t] = True
            if view:
                self._note_view(t, func, args)
        return out

    def _note_view(self, view: Tensor, func: Any, args: Any) -> None:
        base = args[0]
        for seen in (base, self.only_view.pop(base, base)):
            self.view_of.pop(seen, None)
        if func in _SCATTER_OF and base not in self.is_shared:
            self.view_of[view], self.only_view[base] = (_SCATTER_OF[func], *args), view
        self.is_shared[view] = self.is_shared[base] = True

    def _in_place(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        """The plain operation, where the alias analysis finds nobody who could tell it from the one in place."""
        target, (name, overload) = args[0], str(func).removeprefix("aten.").split(".")
        plain = getattr(getattr(aten, name[:-1], None), overload, None) if name.endswith("_") else None
        own = target not in self.is_shared or target in self.view_of
        if plain is None or not own or target not in self.nodes:
            raise Unsupported(f"it changes a tensor that is not its own ({func})")
        if plain is aten.copy.default and isinstance(args[1], Tensor) and looks(args[1]) == looks(target):
            self.nodes[target] = self.node_of(args[1])
        else:
            self._name(target, self.graph.call_function(plain, *with_tensors((args, kwargs), self.node_of)))
        changed = [target]
        if target in self.view_of:
            scatter, base, *part = self.view_of[target]
            self._name(base, self.graph.call_function(scatter, (self.node_of(base), self.nodes[target], *part)))
            changed.append(base)
        constant = not any(t in self.is_fake for t in tensors((args, kwargs)))
        if constant:
            func(*args, **kwargs)
        for tensor in changed:
            self.zeros.pop(tensor, None)
            if not constant:
                self.is_fake[tensor] = True
        return target

    def _fake_result(self, func: Any, args: Any, kwargs: Any) -> Any:
        key = func, _key(args), _key(kwargs)
        if key not in self.seen:  # nets repeat themselves
            self.seen[key] = meta_shapes.result(func, args, kwargs)
        home = kwargs.get("device") or tensors((args, kwargs))[0].device
        return with_tensors(self.seen[key], partial(like, device=home))

    def _same_as(self, tensor: Tensor) -> Tensor:
        """Another tensor of the same node."""
        is_fake = tensor in self.is_fake
        out = like(tensor, device=tensor.device) if is_fake else tensor.clone()
        self.nodes[out] = self.node_of(tensor)
        for marks in (self.is_fake, self.zeros):
            if tensor in marks:
                marks[out] = True
        return out

    def _handed_on(self, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        """The argument that the result is, if it looks the same: derivative rules leave many of these behind."""
        return args[func is aten.copy.default] if func in _MAY_HAND_ON else None


def _key(x: Any) -> Any:
    if isinstance(x, (tuple, list)):
        return tuple(map(_key, x))
    if isinstance(x, dict):
        return tuple((name, _key(part)) for name, part in x.items())
    return looks(x) if isinstance(x, Tensor) else (type(x), x)


_SCATTER_OF = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
    aten.as_strided.default: aten.as_strided_scatter.default,
}
_VIEWS = {aten.view.default, aten._unsafe_view.default}
_MAY_HAND_ON = {
    aten.expand.default,
    aten._to_copy.default,
    aten.alias.default,
    aten.detach.default,
    aten.clone.default,
    aten.copy.default,
}
