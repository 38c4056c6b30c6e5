"""A loss as a function of what flows through named layers: its Hessian is the activation Hessian of those layers."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from hessfn.core import tree
from hessfn.core.errors import InvalidInput
from hessfn.core.torch_state import recorded, value_of
from hessfn.losses.functional import Params, private
from hessfn.losses.layer_selection import Edge, Layers, choose, refuse_missing
from hessfn.losses.model_inputs import pair
from hessfn.losses.samples import length
from hessfn.losses.skeleton import bare

Shifts = dict[str, Tensor]
Reduction = Literal["mean", "sum"]


def activation_loss(
    model: nn.Module,
    criterion: Callable[[Any, Any], Tensor],
    batch: Any,
    layers: Layers,
    *,
    at: Edge = "input",
    reduction: Reduction = "mean",
) -> tuple[Callable[[Shifts], Tensor], Shifts]:
    """The loss of one batch as a function of shifts, each added to what enters (or leaves) one layer and no other.

    ``hvp(loss, shifts)`` is the activation Hessian of all these layers, including the blocks between them; ``restrict``
    and ``block`` give single blocks. In eval mode and with a mean over B samples the block of one layer is
    block-diagonal over the samples, with blocks ``H_i / B``: its trace is the mean of the traces of the ``H_i``, its
    eigenvalues are theirs divided by B.

    Args:
        model, criterion, batch: as for :func:`hessfn.functionalize`. All parameters are constants.
        layers: names and glob patterns (``"*.conv"``), types of modules, several of these, or a predicate
            ``(name, module) -> bool``.
        at: ``"input"``: the shift is added to the tensor as this layer gets it, not as others get it; or ``"output"``.
        reduction: ``"sum"`` multiplies the loss by B, so that the blocks are ``H_i`` and eigenvalues those of samples.

    Returns:
        ``(loss, shifts)``: ``loss(shifts)``, and zeros to call it with, one tensor a layer, by name. A layer that is
        called twice has two, ``"name#1"`` and ``"name#2"``; one that several tensors enter or leave has one for each,
        such as ``"attention:query"``. These names too can be asked for.

    Cost: three forward passes, when it is called.

    Raises:
        ValueError: an entry of ``layers`` is not in the model; a layer is not reached, or no floating-point tensor
            enters it; a layer changes its input in place and others look at it afterwards.

    >>> net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))
    >>> loss, shifts = activation_loss(net, nn.MSELoss(), (torch.ones(5, 3), torch.zeros(5, 1)), nn.Linear)
    >>> {name: tuple(shift.shape) for name, shift in shifts.items()}
    {'0': (5, 3), '2': (5, 2)}
    """
    if reduction not in ("mean", "sum"):
        raise InvalidInput(f"reduction={reduction!r} must be 'mean' or 'sum'")
    factor = length(batch) if reduction == "sum" else 1
    of_both, shifts_of = joint_loss(model, criterion, layers, at)
    return lambda shifts: factor * of_both({}, shifts, batch), shifts_of(batch)


def activation_shapes(
    model: nn.Module, inputs: Any, layers: Layers = "*", *, at: Edge = "input"
) -> dict[str, torch.Size]:
    """The shapes of what enters (or leaves) the layers, in the order in which they are called.

    Args:
        model, layers, at: as for :func:`activation_loss`.
        inputs: what the model takes, as in the batches of :func:`hessfn.functionalize`, without the targets.

    Returns:
        A dict from the names of :func:`activation_loss` to ``torch.Size``. Layers that are not called are left out.

    Cost: one forward pass.

    Raises:
        ValueError: an entry of ``layers`` is not in the model.

    >>> net = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
    >>> for name, shape in activation_shapes(net, torch.ones(5, 3)).items():
    ...     print(name, tuple(shape), shape.numel())
    0 (5, 3) 15
    1 (5, 2) 10
    """
    return {name: x.shape for name, x in shifted_forward(model, layers, at, strict=False)[1](inputs)[0].items()}


def joint_loss(
    model: nn.Module, criterion: Callable[[Any, Any], Tensor], layers: Layers, at: Edge, strict: bool = True
) -> tuple[Callable[[Params, Shifts, Any], Tensor], Callable[[Any], Shifts]]:
    """``loss(params, shifts, batch)``, and from a batch its shifts of zero; what is not given is as it is."""
    forward, zeros = shifted_forward(model, layers, at, strict)

    def loss(params: Params, shifts: Shifts, batch: Any) -> Tensor:
        inputs, targets = pair(batch)
        return criterion(forward(params, shifts, inputs), targets)

    @recorded
    def shifts_of(batch: Any) -> Shifts:
        inputs, targets = pair(batch)
        shifts, outputs = zeros(inputs)
        plain, value = value_of(lambda: criterion(outputs, targets)), value_of(lambda: loss({}, shifts, batch))
        if (value - plain).abs().max() > torch.finfo(value.dtype).eps ** 0.5 * plain.abs().max():
            raise InvalidInput(
                f"shifts of 0 change the loss from {float(plain):.6g} to {float(value):.6g}: one of {list(shifts)[:5]} "
                "changes its input in place, and others look at it later. Make it work out of place, or leave it out"
            )
        return shifts

    return loss, shifts_of


def shifted_forward(
    model: nn.Module, layers: Layers, at: Edge, strict: bool
) -> tuple[Callable[[Params, Shifts, Any], Any], Callable[[Any], tuple[Shifts, Any]]]:
    """``forward(params, shifts, inputs)``, and ``zeros(inputs)`` to shifts of zero and the outputs without them.

    Unless ``strict``, layers without shifts are left out.
    """
    if at not in ("input", "output"):
        raise InvalidInput(f"at={at!r} must be 'input' or 'output'")
    model = bare(model)
    _, run = private(model)
    modules = {name: m for name, m in model.named_modules(remove_duplicate=False) if name}

    def forward(params: Params, shifts: Shifts, inputs: Any) -> Any:
        def shift(flow: _Flow, x: Tensor) -> Tensor:
            found = next((shifts[name] for name in flow.names() if name in shifts), None)
            return x if found is None else x + found

        return run(params, inputs, lambda skeleton: _visiting(skeleton, at, shift, Counter()))

    def zeros(inputs: Any) -> tuple[Shifts, Any]:
        seen: dict[_Flow, Tensor] = {}
        calls: Counter[str] = Counter()

        def note(flow: _Flow, x: Tensor) -> Tensor:
            seen[flow] = x.new_zeros(()).expand(x.shape)
            return x

        with torch.enable_grad():  # a model may take derivatives by its inputs
            outputs = run({}, inputs, lambda skeleton: _visiting(skeleton, at, note, calls))
        flows = {flow.name(calls): x for flow, x in seen.items()}
        layer_of = {flow.name(calls): flow.layer for flow in seen}
        chosen = choose(modules, layer_of, layers)
        if strict:
            refuse_missing(modules, layer_of, chosen, calls, at)
        return {name: x.contiguous() for name, x in flows.items() if {name, layer_of[name]} & chosen}, outputs

    return forward, zeros


class _Flow(NamedTuple):
    """Where a tensor enters or leaves a layer: at which of its calls, and which tensor, if there are several."""

    layer: str
    call: int
    tensor: str

    def name(self, calls: Mapping[str, int]) -> str:
        call = f"#{self.call}" if calls[self.layer] > 1 else ""
        return self.layer + call + f":{self.tensor}" * bool(self.tensor)

    def names(self) -> list[str]:
        """Those it may have: what the number of calls is shows only after the last."""
        return [self.name({self.layer: number}) for number in (1, 2)]


@contextmanager
def _visiting(
    skeleton: nn.Module, at: Edge, visit: Callable[[_Flow, Tensor], Tensor], calls: Counter[str]
) -> Iterator[None]:
    """Meanwhile every floating-point tensor that enters (or leaves) a layer is replaced by ``visit(flow, tensor)``."""

    def visited(name: str, values: Any) -> Any:
        calls[name] += 1
        leaves = tree.leaves(values)
        where = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.is_floating_point()]
        several = tree.names(values) if len(where) > 1 else None
        new = list(leaves)
        for i in where:
            new[i] = visit(_Flow(name, calls[name], several[i] if several else ""), leaves[i])
        same = all(a is b for a, b in zip(new, leaves, strict=True))
        return None if same else tree.unflatten(new, values)

    def on_entry(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            new = visited(name, _by_argument(module, args, kwargs))
            if new is None:
                return None
            values = tuple(new.values())
            return values[: len(args)], dict(zip(kwargs, values[len(args) :], strict=True))

        return hook

    handles = []
    try:
        for name, module in skeleton.named_modules():
            if name and at == "input":
                handles.append(module.register_forward_pre_hook(on_entry(name), with_kwargs=True))
            elif name:
                handles.append(module.register_forward_hook(lambda _, __, output, name=name: visited(name, output)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _by_argument(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(module.forward).parameters.values()
    known = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return {**{known[i] if i < len(known) else str(i): x for i, x in enumerate(args)}, **kwargs}
