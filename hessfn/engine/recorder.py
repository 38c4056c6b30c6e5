"""The recorder: a function as a graph of its operations (an ``fx.Graph``), without computing any of them.

It sees each operation below autograd, writes a node for it, and hands on a *fake* result: a tensor that looks right
(shape, strides, dtype, from ``meta_shapes``) and has memory that nobody touches.

What depends on constants and on integer arguments alone is computed besides, so that code may branch on it. Nodes are
written for it all the same, and the graph serves other integers as long as its guard holds (``decisions.py``).

An operation in place is recorded as the plain one (``views.py``), unless it writes into an argument or a constant: that
raises :class:`Unsupported`, and ``trace.graph_of`` turns to the reference, ``make_fx``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from hessfn.core.errors import Untraceable
from hessfn.core.torch_private import TorchDispatchMode
from hessfn.engine import meta_shapes, zero_propagation
from hessfn.engine.decisions import Decision, Guard, contents, is_known, seen
from hessfn.engine.explain import READS_VALUES, SHAPED_BY_VALUES
from hessfn.engine.graph_module import GraphModule
from hessfn.engine.kinds import Kind, kind_of, name_of
from hessfn.engine.meta_shapes import MASKS, key_of, like, looks, on_meta, tensors, with_tensors
from hessfn.engine.views import Alias

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
        self.outside: dict[int, tuple[Tensor, Alias]] = {}  # of tensors that are not the trace's own
        self.seen, self.calls = dict[Any, Any](), dict[Any, fx.Node]()
        self.decisions: list[Decision] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or else every operation goes through the compiler, and the first one imports it

    def run(self, function: Callable[..., list[Tensor]], inputs: list[Tensor]) -> fx.GraphModule:
        """The graph of a function of tensors; its guard is among ``meta["guards"]``.

        Raises:
            Untraceable: an operation depends on the value of a floating-point tensor.
            Unsupported: an operation in place changes memory that is not the function's.
        """
        inputs = [t.detach().view_as(t) for t in inputs]  # each is itself, also where two are the same tensor
        given = [self.graph.placeholder(f"in{i}") for i in range(len(inputs))]
        for tensor, node in zip(inputs, given, strict=True):
            node.meta["val"] = on_meta(tensor)
            self.keep(tensor, Alias(self, node, is_fake=not is_known(tensor), is_own=False))
        try:
            with self:
                outputs = function(*inputs)
            guard = Guard(self.decisions, self.constants, given)
            self.graph.output([self.node_of(output) for output in outputs])
            module = GraphModule(self.constants, self.graph)
            module.meta["guards"] = [guard] if guard else []
            return module
        finally:
            self.outside.clear()  # tensors would lead to each other by way of autograd, which no collector sees

    # What is known of a tensor lies on the tensor, and goes with it.

    def keep(self, tensor: Tensor, alias: Alias) -> Alias:
        tensor._hessfn_alias = alias  # type: ignore[attr-defined]
        return alias

    def alias(self, tensor: Tensor) -> Alias:
        alias = getattr(tensor, "_hessfn_alias", None)
        if alias is not None and alias.home is self:
            return alias
        if id(tensor) not in self.outside:
            self.outside[id(tensor)] = tensor, Alias(self, None, is_own=False)
        return self.outside[id(tensor)][1]

    def is_fake(self, tensor: Tensor) -> bool:
        return self.alias(tensor).root.is_fake

    def is_zero(self, tensor: Tensor) -> bool:
        return self.alias(tensor).is_zero

    def node_of(self, tensor: Tensor) -> fx.Node:
        alias = self.alias(tensor)
        if alias.node is None:
            alias.node = self._constant(tensor.detach())
        return alias.current(self.call)

    def _constant(self, value: Tensor) -> fx.Node:
        name = f"constant{len(self.constants)}"
        self.constants[name] = value
        node = self.graph.get_attr(name)
        node.meta["val"] = on_meta(value)
        return node

    def decide_by(self, tensor: Tensor) -> None:
        """Notes that the function reads all of a tensor where the recorder cannot see what for.

        Raises:
            Untraceable: it has no values.
        """
        if self.is_fake(tensor):
            raise Untraceable(READS_VALUES)
        self._decide(contents, (tensor,), {}, contents(tensor))

    def _decide(self, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        args, kwargs = with_tensors((args, kwargs), self.node_of)
        self.decisions.append(Decision(function, args, kwargs, seen(result)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._efficientzerotensor.default:
            func = aten.zeros.default  # the rules for the other one run operations on meta
        if func in self.rules:
            with self:
                return self.rules[func](*args, **kwargs)
        kind = kind_of(func)
        if kind.mutable:
            return self._in_place(func, args, kwargs)
        if kind.composite:
            with self:
                return func.decompose(*args, **kwargs)
        if self.lean and (other := zero_propagation.remaining_summand(func, args, kwargs, self.is_zero)) is not None:
            return self._same_as(other)
        fake = any(map(self.is_fake, tensors(args) + tensors(kwargs) if kwargs else tensors(args)))
        out = self._run(func, args, kwargs, kind, fake)
        if not isinstance(out, (Tensor, tuple, list)):
            return out
        parent = self.alias(args[0]) if kind.view else None
        if func is aten.lift_fresh.default and isinstance(out, Tensor) and not fake:  # of numbers, and made in here
            self.keep(out, Alias(self, self._constant(out.clone())))
            return out

        def kept(part: Tensor, node: fx.Node, index: int | None = None) -> Alias:
            alias = Alias(self, node, is_fake=fake)
            if parent is not None:
                alias.of(parent, args[0].shape, (func, (None, *args[1:]), kwargs), index)
            if "val" not in node.meta:
                node.meta["val"] = on_meta(part)
            return self.keep(part, alias)

        if self.lean and isinstance(out, Tensor):
            same = args[func is aten.copy.default] if func in _MAY_HAND_ON else None
            if same is not None and looks(same) == looks(out):
                kept(out, self.node_of(same))
                return out
            is_zero = zero_propagation.is_zero(func, args, self.is_zero)
            if is_zero or func is aten._new_zeros_with_same_feature_meta.default:  # it would keep what it is like
                options: Any = {"dtype": out.dtype, "device": out.device}
                kept(out, self.call(aten.zeros.default, (list(out.shape),), options)).note_zero()
                return out
        plain = aten.reshape.default if func in _VIEWS else func  # under vmap the layout may be another
        call = self.call(plain, *with_tensors((args, kwargs), self.node_of))
        if isinstance(out, Tensor):
            alias = kept(out, call)
            if func in zero_propagation.MAKERS:
                alias.note_zero()
            return out
        for i, part in enumerate(out):
            if isinstance(part, Tensor):
                kept(part, self.call(operator.getitem, (call, i), {}), i)
        return out

    def call(self, func: Any, args: Any, kwargs: Any) -> fx.Node:
        """The node of a call: in a lean graph the one that is there already (derivative rules repeat themselves)."""
        if not self.lean:
            node = self._new(func, args, kwargs)
            if not torch.is_grad_enabled():  # as in a backward pass without create_graph
                node.meta["switched_off"] = True
            return node
        key = func, key_of(args), key_of(kwargs)
        if key not in self.calls:
            self.calls[key] = self._new(func, args, kwargs)
        return self.calls[key]

    def _new(self, func: Any, args: Any, kwargs: Any) -> fx.Node:
        """As ``graph.call_function``, which looks into all arguments first and takes most of the time of a trace."""
        node = self.graph.create_node("call_function", func, name=name_of(func))
        node.args = args
        if kwargs:
            node.kwargs = kwargs
        return node

    def _run(self, func: Any, args: Any, kwargs: Any, kind: Kind, fake: bool) -> Any:
        """The result of an operation on what has values; else a fake one."""
        # By numbers the shape of what is indexed is known, by a mask it is not.
        masks = [i for i in args[1] if i is not None and i.dtype in MASKS] if func is aten.index.Tensor else []
        shaped = kind.shaped_by_values and func is not aten.index.Tensor
        if fake and kind.reads_values:
            raise Untraceable(READS_VALUES)
        if (fake and shaped) or any(map(self.is_fake, masks)):
            raise Untraceable(SHAPED_BY_VALUES)
        out = self._fake_result(func, args, kwargs) if fake and not masks and not kind.view else func(*args, **kwargs)
        for mask in masks:
            self._decide(aten.nonzero.default, (mask,), {}, mask.nonzero())
        if shaped or kind.reads_values:
            self._decide(func, args, kwargs, out)
        return out

    def _in_place(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        """The plain operation, and what it changes in all that shares memory with its target."""
        target, plain = args[0], kind_of(func).plain
        if plain is None or not self.alias(target).can_be_written():
            raise Unsupported(f"it changes a tensor that is not its own ({func})")
        if kind_of(plain).view:  # another view of the same memory, which takes the target's place
            before, shape, node = self.alias(target), target.shape, self.node_of(target)
            func(*args, **kwargs)
            node = self.call(plain, (node, *args[1:]), kwargs)
            node.meta.setdefault("val", on_meta(target))
            self.keep(target, Alias(self, node).of(before, shape, (plain, args, kwargs), None))
            return target
        given = tensors((args, kwargs))
        fake = any(map(self.is_fake, given))
        if plain is aten.copy.default and looks(args[1]) == looks(target):
            node = self.node_of(args[1])
        else:
            node = self.call(plain, *with_tensors((args, kwargs), self.node_of))
            if any(t.dtype != target.dtype for t in given) and plain is not aten.copy.default:
                node.meta.setdefault("val", self._look(plain, args, kwargs))
                if node.meta["val"].dtype != target.dtype:  # the plain operation promotes
                    node = self.call(aten._to_copy.default, (node,), {"dtype": target.dtype})
            node.meta.setdefault("val", on_meta(target))
        if not fake:
            func(*args, **kwargs)
        alias = self.alias(target)
        alias.write(node, self.call)
        alias.root.is_fake = fake
        return target

    def _look(self, func: Any, args: Any, kwargs: Any) -> Any:
        key = func, key_of(args), key_of(kwargs)
        if key not in self.seen:  # nets repeat themselves
            self.seen[key] = meta_shapes.result(func, args, kwargs)
        return self.seen[key]

    def _fake_result(self, func: Any, args: Any, kwargs: Any) -> Any:
        home = kwargs.get("device") or tensors((args, kwargs))[0].device
        return with_tensors(self._look(func, args, kwargs), partial(like, device=home))

    def _same_as(self, tensor: Tensor) -> Tensor:
        """Another tensor of the same node."""
        fake, was_zero = self.is_fake(tensor), self.is_zero(tensor)
        out = like(tensor, device=tensor.device) if fake else tensor.clone()
        alias = self.keep(out, Alias(self, self.node_of(tensor), is_fake=fake))
        if was_zero:
            alias.note_zero()
        return out


_VIEWS = {aten.view.default, aten._unsafe_view.default}
_MAY_HAND_ON = {
    aten.expand.default,
    aten._to_copy.default,
    aten.alias.default,
    aten.detach.default,
    aten.clone.default,
    aten.copy.default,
}
