"""The engine's graphs, as tests look at them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from hessfn.core import tree
from hessfn.engine import memory_plan, pipeline, recorder, reference, rewrites


def loss_graph(loss: Any, params: Any, *args: Any) -> fx.GraphModule:
    """What the stages make of a loss before it is differentiated."""
    return pipeline.run(pipeline.LOSS, None, pipeline.Job(loss, params, args))


def derivative_graph(loss: Any, params: Any, *args: Any, **options: Any) -> fx.GraphModule:
    """The graph of the product, from the tensors of ``(params, args, v)`` in a row, before it is lowered."""
    return pipeline.run(pipeline.LOSS + pipeline.PRODUCT, None, pipeline.Job(loss, params, args, **options))


def folded_graph(loss: Any, params: Any, *args: Any) -> fx.GraphModule:
    """The graph of the linearized product, from the tensors of ``v`` in a row, in operations of torch."""
    job = pipeline.Job(loss, params, args, linearized=True)
    until = [stage.name for stage in pipeline.STAGES].index("lower_to_kernel")
    return pipeline.run(pipeline.STAGES[:until], None, job)


def linear_graph(loss: Any, params: Any, *args: Any, at_least: int = 1, **options: Any) -> fx.GraphModule:
    """What a linearized product runs, with all results of so many bytes or more in the block that is kept."""
    job = pipeline.Job(loss, params, args, linearized=True, **options)
    module = pipeline.run([stage for stage in pipeline.STAGES if stage.name != "keep_block"], None, job)
    memory_plan.keep_block(module, at_least)
    return module


def linearized(loss: Any, params: Any, *args: Any, at_least: int = 1) -> Callable[[Any], Any]:
    """The product that :func:`linear_graph` computes; nothing is asked of the loss."""
    module = linear_graph(loss, params, *args, at_least=at_least)

    def matvec(v: Any) -> Any:
        with torch.no_grad():
            return tree.unflatten(module(*tree.leaves(v)), params)

    return matvec


def by_recorder(function: Any, inputs: Any, *, lean: bool, rules: Any = None) -> fx.GraphModule:
    """A graph by the recorder alone."""
    return recorder.Recorder(fx.Graph(), rules=rules, lean=lean).run(function, inputs)


def by_reference(function: Any, inputs: Any, *, lean: bool, rules: Any = None) -> fx.GraphModule:
    """A graph by ``make_fx`` alone."""
    return reference.run(function, inputs, rules)


def record(function: Callable[..., list[Tensor]], inputs: list[Tensor]) -> fx.GraphModule:
    """The recorder's lean graph of a function, with what makes its results their own."""
    module = by_recorder(function, inputs, lean=True)
    for rewrite in (rewrites.own_results, rewrites.only_used_gradients, rewrites.copies_under_vmap):
        rewrite(module.graph)
    module.recompile()
    return module
