"""A function as a graph of its operations, without computing any of them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from hessfn import passes, shapes, zeros
from hessfn.shapes import like, looks, on_meta, tensors, with_tensors

aten = torch.ops.aten


class Untraceable(RuntimeError):
    """A graph of this loss would not be this loss; the message says why. Its products can still be had untraced."""


def record(function: Callable[..., list[Tensor]], inputs: list[Tensor]) -> fx.GraphModule:
    """The graph of a function of tensors, with only what the results need.

    Every result is laid out in memory that nobody touches, so there is no cost of the size of the data.

    Raises:
        Untraceable: an operation depends on the value of a tensor.
    """
    recorder = Recorder(fx.Graph(), lean=True)
    module = recorder.run(function, inputs)
    passes.own_results(module.graph)
    passes.only_used_gradients(module.graph)
    passes.copies_under_vmap(module.graph)
    module.recompile()
    return module


class Recorder(TorchDispatchMode):
    """Writes down operations instead of running them.

    Args:
        graph: where to.
        rules: what takes the place of an operation.
        lean: leave out what only hands on an argument, and what is there already.
    """

    def __init__(self, graph: fx.Graph, *, rules: Mapping[Any, Callable[..., Any]] | None = None, lean: bool) -> None:
        super().__init__()
        self.graph, self.rules, self.lean = graph, rules or {}, lean
        self.constants: dict[str, Tensor] = {}
        self.nodes = WeakTensorKeyDictionary()
        self.hollow = WeakTensorKeyDictionary()
        self.zeros = WeakTensorKeyDictionary()
        self.shared = WeakTensorKeyDictionary()
        # The one view that something has, and which part that is.
        self.parts, self.cuts = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()
        self.seen: dict[Any, Any] = {}
        self.calls: dict[Any, fx.Node] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or else every operation goes through the compiler, and the first one imports it

    def run(self, function: Callable[..., list[Tensor]], inputs: list[Tensor]) -> fx.GraphModule:
        inputs = [t.detach().view_as(t) for t in inputs]  # each is itself, also where two are the same tensor
        for i, tensor in enumerate(inputs):
            self._name(tensor, self.graph.placeholder(f"in{i}"))
            self.hollow[tensor] = self.shared[tensor] = True
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
            self.shared[tensor] = True
        return self.nodes[tensor]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._efficientzerotensor.default:
            func = aten.zeros.default  # the rules for the other one run operations on meta
        if func in self.rules:
            with self:
                return self.rules[func](*args, **kwargs)
        if func._schema.is_mutable:
            return self._in_place(func, args, kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                return func.decompose(*args, **kwargs)
        if self.lean and (other := zeros.beside(func, args, kwargs, self.zeros)) is not None:
            return self._again(other)
        out = self._run(func, args, kwargs)
        if not isinstance(out, (Tensor, tuple, list)):
            return out
        same = self._handed_on(func, args, kwargs) if self.lean else None
        if same is not None and isinstance(out, Tensor) and looks(same) == looks(out):
            self.nodes[out] = self.node_of(same)
            return out
        if self.lean and isinstance(out, Tensor) and zeros.vanishes(func, args, self.zeros):
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
            if func in zeros.MAKERS:
                self.zeros[out] = True
        else:
            for i, part in enumerate(out):
                if isinstance(part, Tensor):
                    self._name(part, self._call(operator.getitem, (call, i), {}))
        return out

    def _call(self, func: Any, args: Any, kwargs: Any) -> fx.Node:
        """In a lean graph, what was called before is not called again: derivative rules repeat themselves."""
        key = _key((func, args, kwargs)) if self.lean else len(self.graph.nodes)
        if key not in self.calls:
            self.calls[key] = self.graph.call_function(func, args, kwargs)
        return self.calls[key]

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of an operation on constants; else only what looks like it."""
        known = not any(t in self.hollow for t in tensors((args, kwargs)))
        masks = func is aten.index.Tensor and [i for i in args[1] if i is not None and i.dtype in _OF_MASKS]
        if not known and torch.Tag.data_dependent_output in func.tags:
            raise Untraceable(f"it branches on, or takes out, the value of a tensor ({func})")
        # By numbers the shape of what is indexed is known, by a mask it is not.
        unshaped = masks is False and not known and torch.Tag.dynamic_output_shape in func.tags
        if unshaped or any(m in self.hollow for m in masks or ()):
            raise Untraceable(f"the shape of a result depends on values ({func})")
        view = passes.is_view(func)
        out = func(*args, **kwargs) if known or masks or view else self._hollow(func, args, kwargs)
        for t in tensors(out):
            if not known:
                self.hollow[t] = True
            if view:
                self._note_view(t, func, args)
        return out

    def _note_view(self, view: Tensor, func: Any, args: Any) -> None:
        whole = args[0]
        for seen in (whole, self.parts.pop(whole, whole)):
            self.cuts.pop(seen, None)
        if func in _PUTS_BACK and whole not in self.shared:
            self.cuts[view], self.parts[whole] = (_PUTS_BACK[func], *args), view
        self.shared[view] = self.shared[whole] = True

    def _in_place(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        """Where nothing else shares the memory, the plain operation does the same."""
        base, (name, overload) = args[0], str(func).removeprefix("aten.").split(".")
        plain = getattr(getattr(aten, name[:-1], None), overload, None) if name.endswith("_") else None
        own = base not in self.shared or base in self.cuts
        if plain is None or not own or base not in self.nodes:
            raise Untraceable(f"it changes a tensor that is not its own ({func})")
        if plain is aten.copy.default and isinstance(args[1], Tensor) and looks(args[1]) == looks(base):
            self.nodes[base] = self.node_of(args[1])
        else:
            self._name(base, self.graph.call_function(plain, *with_tensors((args, kwargs), self.node_of)))
        changed = [base]
        if base in self.cuts:
            put_back, whole, *part = self.cuts[base]
            self._name(whole, self.graph.call_function(put_back, (self.node_of(whole), self.nodes[base], *part)))
            changed.append(whole)
        known = not any(t in self.hollow for t in tensors((args, kwargs)))
        if known:
            func(*args, **kwargs)
        for tensor in changed:
            self.zeros.pop(tensor, None)
            if not known:
                self.hollow[tensor] = True
        return base

    def _hollow(self, func: Any, args: Any, kwargs: Any) -> Any:
        key = func, _key(args), _key(kwargs)
        if key not in self.seen:  # nets repeat themselves
            self.seen[key] = shapes.result(func, args, kwargs)
        home = kwargs.get("device") or tensors((args, kwargs))[0].device
        return with_tensors(self.seen[key], partial(like, device=home))

    def _again(self, tensor: Tensor) -> Tensor:
        """Another tensor of the same node."""
        hollow = tensor in self.hollow
        out = like(tensor, device=tensor.device) if hollow else tensor.clone()
        self.nodes[out] = self.node_of(tensor)
        for marks in (self.hollow, self.zeros):
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


_PUTS_BACK = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
    aten.as_strided.default: aten.as_strided_scatter.default,
}
_OF_MASKS = (torch.bool, torch.uint8)
_VIEWS = {aten.view.default, aten._unsafe_view.default}
_MAY_HAND_ON = {
    aten.expand.default,
    aten._to_copy.default,
    aten.alias.default,
    aten.detach.default,
    aten.clone.default,
    aten.copy.default,
}
