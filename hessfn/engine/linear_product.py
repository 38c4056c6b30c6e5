"""Linearized products: the graph of a derivative, lowered once for parameters and data of all values."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from hessfn.core import tree
from hessfn.core.locks import Lock
from hessfn.core.torch_state import is_observed
from hessfn.engine import linearize, pipeline, symmetric_map
from hessfn.engine.graph_module import compiled, copied, with_tensors
from hessfn.engine.heap import trim_heap
from hessfn.engine.linearize import Folding
from hessfn.engine.memory_plan import Block
from hessfn.engine.same_operations import operations_in


class Plan(NamedTuple):
    """A lowered graph without its constants, what computes these, and the block of memory that it uses."""

    folding: Folding
    vanishing: frozenset[str]  # the constants that are zero: for others, the graph would be another
    block: Block | None
    graph: fx.Graph
    code: Callable[..., Any]

    def filled(self, constants: dict[str, Tensor]) -> fx.GraphModule:
        places = self.block.places() if self.block is not None else {}
        return with_tensors(self.graph, self.code, {**constants, **places})


MOST_PLANS = 4  # of a trace: more sets of constants do not vanish in turn


def linear_product(
    derivative: fx.GraphModule, job: pipeline.Job, plans: list[Plan]
) -> tuple[Callable[..., list[Tensor]], frozenset[str]]:
    """The linearized product that the graph of a derivative is lowered to, and the names of the operations in it.

    The product is a function of a vector's tensors in a row. It has derivatives by the vector, which are products
    again: the graph itself is not to be differentiated. Not under ``torch_state_lock``: it may wait for a compiler.

    Args:
        plans: what this graph was lowered to before. A new one is added.
    """
    module = _by_plan(plans, job.values) if plans and not job.compile else None
    if module is None:
        module = compiled(pipeline.run(pipeline.LOWERING, copied(derivative), job))
        if not job.compile and len(plans) < MOST_PLANS:
            plans.append(_plan_of(module))
            module.meta.clear()
        trim_heap()  # of what the stages leave behind, before the first product needs memory
    product = linearize.compiled(module, tree.leaves(job.params)) if job.compile else module
    lock = Lock()  # the block of memory is one product's at a time

    def plain(*v: Tensor) -> list[Tensor]:
        with torch.no_grad(), nullcontext() if torch.compiler.is_compiling() else lock:
            return product(*v)

    def linear(*v: Tensor) -> list[Tensor]:
        if torch.compiler.is_compiling():
            observed = torch.is_grad_enabled() and any(x.requires_grad for x in v)
        else:
            observed = is_observed(*v)
        return symmetric_map.differentiable(plain, *v) if observed else plain(*v)

    return linear, operations_in(module.graph)


def _by_plan(plans: list[Plan], values: list[Tensor]) -> fx.GraphModule | None:
    folding = plans[0].folding
    constants = folding.constants(values)
    vanishing = folding.vanishing(constants)
    return next((plan.filled(constants) for plan in plans if plan.vanishing == vanishing), None)


def _plan_of(module: Any) -> Plan:
    graph, meta = module.graph, module.meta
    graph.owning_module = None  # which has the constants
    return Plan(meta["folding"], meta["vanishing"], meta.get("block"), graph, module.compiled())
