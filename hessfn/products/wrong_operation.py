"""Which operation in the graph of a loss has a wrong second derivative, for a warning to name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from hessfn.core import tree
from hessfn.core.torch_private import OpOverload
from hessfn.core.tree import Tree
from hessfn.products.first_check import evidence, verdict
from hessfn.products.wide import widened


def wrong_operation(graph: fx.GraphModule, params: Tree, args: tuple[Any, ...]) -> str:
    """The first operation whose product is not what differences of its gradient say; empty where none is found."""
    with torch.no_grad():
        search = _Search(graph)
        search.run(*[widened(x) for x in tree.leaves((params, args)) if isinstance(x, Tensor)])
    return search.found


class _Search(fx.Interpreter):
    """Runs the graph of a loss in float64, and asks of every operation for itself."""

    found = ""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = tree.map(widened, (tuple(args), dict(kwargs)))
        inputs = [x for x in tree.leaves((args, kwargs)) if isinstance(x, Tensor) and x.is_floating_point()]
        if not self.found and inputs and isinstance(target, OpOverload) and _is_wrong(target, args, kwargs, inputs):
            self.found = str(target)
        return super().call_function(target, args, kwargs)


def _is_wrong(target: Any, args: Any, kwargs: Any, inputs: list[Tensor]) -> bool:
    def results(given: list[Tensor]) -> list[Tensor]:
        left = iter(given)
        again = tree.map(lambda x: next(left) if any(x is i for i in inputs) else x, (args, kwargs))
        return [x for x in tree.leaves(target(*again[0], **again[1])) if x.is_floating_point()]

    weights, v = [x.cos() + 0.5 for x in results(inputs)], [x.cos() for x in inputs]

    def total(given: list[Tensor]) -> Tensor:
        return torch.stack([(w * x).sum() for w, x in zip(weights, results(given), strict=True)]).sum()

    try:
        found = torch.func.jvp(torch.func.grad(total), (inputs,), (v,))[1]
    except Exception:  # it has no rule at all, or no gradient
        return False
    seen = evidence(total, inputs, (), v, total(inputs))
    return seen is not None and verdict(found, seen) in ("wrong", "kink")
