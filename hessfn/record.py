"""A function as a graph of its operations, without computing any of them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from hessfn import passes
from hessfn.graph import Untraceable, aten


def record(function: Callable[..., list[Tensor]], inputs: list[Tensor]) -> fx.GraphModule:
    """The graph of a function of tensors; every result is laid out in memory that nobody touches.

    So there is no cost of the size of the data, and only what the results need is in the graph.

    Raises:
        Untraceable: an operation depends on the value of a tensor.
    """
    recorder = _Recorder()
    inputs = [t.view_as(t) for t in inputs]  # each is itself, also where two are the same tensor
    for i, tensor in enumerate(inputs):
        recorder.nodes[tensor] = node = recorder.graph.placeholder(f"in{i}")
        recorder.hollow[tensor] = True
        node.meta["looks"] = looks(tensor)
    with recorder:
        outputs = torch.func.functionalize(function, remove="mutations")(*inputs)
    recorder.graph.output([recorder.node_of(output) for output in outputs])
    passes.own_results(recorder.graph)
    passes.only_used_gradients(recorder.graph)
    return fx.GraphModule(recorder.constants, recorder.graph)


class _Recorder(TorchDispatchMode):
    """Writes down operations, which must be out of place, instead of running them."""

    def __init__(self) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.constants = torch.nn.Module()
        self.nodes = WeakTensorKeyDictionary()
        self.hollow = WeakTensorKeyDictionary()
        self.zeros = WeakTensorKeyDictionary()
        self.seen: dict[Any, Any] = {}

    def node_of(self, tensor: Tensor) -> fx.Node:
        if tensor not in self.nodes:
            name = f"constant{sum(1 for _ in self.constants.buffers())}"
            self.constants.register_buffer(name, tensor)
            self.nodes[tensor] = self.graph.get_attr(name)
        return self.nodes[tensor]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._efficientzerotensor.default:
            return func(*args, **kwargs)  # it takes no memory, and torch leaves out what is done with it
        out = self._run(func, args, kwargs)
        if not isinstance(out, (Tensor, tuple, list)):
            return out
        same = self._handed_on(func, args, kwargs)
        if same is not None and isinstance(out, Tensor) and looks(same) == looks(out):
            self.nodes[out] = self.node_of(same)
            return out
        func = aten.reshape.default if func in _VIEWS else func  # under vmap the layout may be another
        call = self.graph.call_function(func, *_with_tensors((args, kwargs), self.node_of))
        if isinstance(out, Tensor):
            self.nodes[out] = call
            call.meta["looks"] = looks(out)
            if func in _ZEROS:
                self.zeros[out] = True
        else:
            for i, part in enumerate(out):
                if isinstance(part, Tensor):
                    self.nodes[part] = self.graph.call_function(operator.getitem, (call, i))
                    self.nodes[part].meta["looks"] = looks(part)
        return out

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of an operation on constants; else only what looks like it."""
        if not any(t in self.hollow for t in _tensors((args, kwargs))):
            return func(*args, **kwargs)
        masks = func is aten.index.Tensor and [i for i in args[1] if i is not None and i.dtype in _OF_MASKS]
        if any(mask in self.hollow for mask in masks) if masks is not False else _depends_on_values(func):
            raise Untraceable(f"a derivative of the loss depends on the values of a tensor ({func})")
        out = func(*args, **kwargs) if masks or _is_view(func) else self._hollow(func, args, kwargs)
        for t in _tensors(out):
            self.hollow[t] = True
        return out

    def _hollow(self, func: Any, args: Any, kwargs: Any) -> Any:
        key = func, _key(args), _key(kwargs)
        if key not in self.seen:  # nets repeat themselves
            self.seen[key] = _on_meta(func, args, kwargs)
        home = kwargs.get("device") or _tensors((args, kwargs))[0].device
        return _with_tensors(self.seen[key], partial(_like, device=home))

    def _handed_on(self, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        """The argument that the result is, if it looks the same: derivative rules leave many of these behind."""
        if func is aten.add.Tensor and not kwargs and all(isinstance(t, Tensor) for t in args):
            return next((args[1 - i] for i in (0, 1) if args[i] in self.zeros), None)
        return args[func is aten.copy.default] if func in _MAY_HAND_ON else None


def looks(t: Tensor) -> Any:
    return t.shape, t.stride(), t.dtype, t.device


def _depends_on_values(func: Any) -> bool:
    return not {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}.isdisjoint(func.tags)


def _is_view(func: Any) -> bool:
    return any(result.alias_info is not None for result in func._schema.returns)


def _on_meta(func: Any, args: Any, kwargs: Any) -> Any:
    """What looks like the operation's result, but for the device."""
    # Only fake tensors know the layout that a convolution's kernel returns, but meta tensors are much faster.
    fake = func in (aten.convolution.default, aten.convolution_backward.default)
    stand_in = partial(_like, device=None if fake else "meta")
    options = {**kwargs, "device": "meta"} if "device" in kwargs else kwargs
    try:
        with FakeTensorMode() if fake else nullcontext():
            out = func(*_with_tensors(args, stand_in), **_with_tensors(options, stand_in))
    except NotImplementedError:
        out = func(*args, **kwargs)
    return _with_tensors(out, partial(_like, device="meta"))


def _like(t: Tensor, *, device: Any) -> Tensor:
    return torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=device or t.device)


# An operation's arguments, which are simpler than trees and many.


def _with_tensors(x: Any, function: Callable[[Tensor], Any]) -> Any:
    if isinstance(x, Tensor):
        return function(x)
    if isinstance(x, (tuple, list)):
        return type(x)(_with_tensors(part, function) for part in x)
    return {name: _with_tensors(part, function) for name, part in x.items()} if isinstance(x, dict) else x


def _tensors(x: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _with_tensors(x, found.append)
    return found


def _key(x: Any) -> Any:
    if isinstance(x, (tuple, list)):
        return tuple(map(_key, x))
    if isinstance(x, dict):
        return tuple((name, _key(part)) for name, part in x.items())
    return looks(x) if isinstance(x, Tensor) else (type(x), x)


_OF_MASKS = (torch.bool, torch.uint8)
_VIEWS = {aten.view.default, aten._unsafe_view.default}
_ZEROS = {
    aten.zeros.default,
    aten.zeros_like.default,
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
