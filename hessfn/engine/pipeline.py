"""The pipeline: from a loss to the graph of its Hessian-vector product, by the one list of passes, in order.

``hvp`` and ``linearized_hvp`` both run :data:`STAGES`. What differs between them is said at the stage (``when``).
README.md shows a small loss after every stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor, fx

from hessfn.core import tree
from hessfn.core.tree import Tree
from hessfn.engine import decisions, heap, linearize, memory_plan, rewrites
from hessfn.engine.fused import passes
from hessfn.engine.graph_module import without_collections
from hessfn.engine.rematerialize import rematerialize
from hessfn.engine.trace import Record, graph_of, refuse_other_functions, tensors, trace

try:
    from hessfn.engine.conv3x3.lowering import lower_to_kernel
    from hessfn.engine.conv3x3.winograd import add_overlaps, use_winograd
except ModuleNotFoundError:  # a guest: without its folder, convolutions stay torch's own
    lower_to_kernel = add_overlaps = use_winograd = None  # type: ignore[assignment]

try:
    from hessfn.engine.flash_attention.lowering import lower_attention
except ModuleNotFoundError:  # another guest: without its folder, attention is by tiles of torch's operations
    lower_attention = None  # type: ignore[assignment]


class Job(NamedTuple):
    """What a product is of. The tensors say what it looks like; only a linearized product is computed with them."""

    loss: Callable[..., Tensor]
    params: Tree
    args: tuple[Any, ...]
    linearized: bool = False  # fold all that does not depend on the vector
    compile: bool = False  # by torch.compile
    record: Record = graph_of  # what makes graphs: the recorder, or its reference

    @property
    def values(self) -> list[Tensor]:
        return tensors((self.params, self.args))[0]

    @property
    def on_cpu(self) -> bool:
        return all(t.device.type == "cpu" for t in self.values)


class Stage(NamedTuple):
    name: str
    does: str
    run: Callable[[fx.GraphModule, Job], fx.GraphModule | None] | None  # None for a result: it was done in place
    when: Callable[[Job], bool] = lambda job: True


def _rewrite(*functions: Callable[[fx.Graph], None] | None) -> Any:
    return None if None in functions else lambda module, job: [f(module.graph) for f in functions if f] and None


def _differentiate(module: fx.GraphModule, job: Job) -> fx.GraphModule:
    module.recompile()
    point = tree.leaves(job.params)
    product = linearize.differentiate(module, point, job.values[len(point) :], job.record)
    rewrites.drop_dead(product.graph)
    return product


LOSS: tuple[Stage, ...] = (
    Stage(
        "trace",
        "The loss is recorded as a graph of aten operations; those without a derivative rule are decomposed.",
        lambda _, job: trace(job.loss, job.params, job.args, job.record),
    ),
    Stage("functional_copies", "Assignments to slices become their sources.", _rewrite(rewrites.functional_copies)),
    Stage(
        "drop_same_views", "Views that change strides of single entries only go.", _rewrite(rewrites.drop_same_views)
    ),
    Stage("drop_dead", "Dead code elimination: what the loss does not depend on goes.", _rewrite(rewrites.drop_dead)),
    Stage("fuse_heads", "The product that makes many logits goes into their loss.", _rewrite(passes.fuse_heads)),
    Stage(
        "refuse_other_functions",
        "A graph that would be another function than the loss, or have other derivatives, is refused.",
        lambda module, job: refuse_other_functions(module.graph, len(tree.leaves(job.params))),
    ),
    Stage(
        "fold_batch_norm",
        "BatchNorm in eval mode goes into the convolution before it; the parameters stay what they are.",
        _rewrite(rewrites.fold_batch_norm),
    ),
    Stage(
        "use_winograd",
        "Wide convolutions by 3 x 3 take a quarter of the multiplications, where no compiled kernel will do better.",
        _rewrite(use_winograd),
        lambda job: job.on_cpu,
    ),
    Stage(
        "channels_last",
        "Convolutions of images have the channels innermost, and what follows keeps the layout.",
        _rewrite(rewrites.channels_last),
    ),
    Stage("drop_dead", "Dead code elimination, again.", _rewrite(rewrites.drop_dead)),
)

PRODUCT: tuple[Stage, ...] = (
    Stage(
        "differentiate",
        "Forward-over-reverse: the graph of the loss becomes that of the product; zeros, common subexpressions and "
        "dead code are left out.",
        _differentiate,
    ),
    Stage(
        "own_results",
        "A result shares its memory with no other and with no input: it is copied where it would.",
        _rewrite(rewrites.own_results),
    ),
    Stage(
        "only_used_gradients",
        "Gradients of convolutions, and of fused cross-entropy, that nobody takes are not computed.",
        _rewrite(rewrites.only_used_gradients, passes.only_wanted),
    ),
    Stage(
        "copies_under_vmap",
        "Copies for which vmap has no rule are written so that it has one.",
        _rewrite(rewrites.copies_under_vmap),
    ),
    Stage(
        "add_overlaps",
        "The derivative of cutting an image into Winograd's tiles is one operation.",
        _rewrite(add_overlaps),
        lambda job: job.on_cpu,
    ),
    Stage("drop_dead", "Dead code elimination, again.", _rewrite(rewrites.drop_dead)),
)

LOWERING: tuple[Stage, ...] = (
    Stage(
        "reassociate_constants",
        "What is multiplied by one constant after another is multiplied once, by their product.",
        lambda module, job: rewrites.reassociate_constants(module.graph, len(job.values)),
        lambda job: job.linearized,
    ),
    Stage(
        "with_tangents",
        "A fused operation and its tangent become one.",
        _rewrite(passes.with_tangents),
        lambda job: not job.linearized,
    ),
    Stage(
        "lower_attention",
        "Attention of long sequences, with its derivatives, is calls of compiled code.",
        None if lower_attention is None else lambda module, _: lower_attention(module),
        lambda job: job.on_cpu and not job.compile,
    ),
    Stage(
        "fold_constants",
        "Constant folding: all that does not depend on the vector is computed now, once.",
        lambda module, job: linearize.fold_constants(passes.keep_softmax(module), job.values),
        lambda job: job.linearized,
    ),
    Stage(
        "own_results",
        "A result that has become a constant is copied.",
        _rewrite(rewrites.own_results),
        lambda job: job.linearized,
    ),
    Stage(
        "lower_to_kernel",
        "Convolutions by 3 x 3 and their derivatives are calls of compiled code, two of them in one pass.",
        None if lower_to_kernel is None else lambda module, _: lower_to_kernel(module),
        lambda job: job.on_cpu,
    ),
    Stage(
        "add_products",
        "A product that is only added to something is one operation with it.",
        _rewrite(memory_plan.add_products),
    ),
    Stage(
        "rematerialize",
        "What is cheap is computed again behind the peak of memory, instead of being kept over it.",
        _rewrite(rematerialize),
        lambda job: job.on_cpu and not job.compile,
    ),
    Stage(
        "use_out_variants",
        "What is added to, multiplied or masked for the last time has the result in its place.",
        lambda module, _: memory_plan.use_out_variants(module),
    ),
    Stage(
        "trim_where_it_peaks",
        "On the way to the peak of memory, what was freed goes back to the system.",
        lambda module, _: heap.trim_where_it_peaks(module),
        lambda job: not job.linearized and job.on_cpu,
    ),
    Stage(
        "keep_block",
        "Large results lie in one block of memory, which the product keeps.",
        lambda module, _: memory_plan.keep_block(module),
        lambda job: job.linearized and job.on_cpu and not job.compile,
    ),
)

STAGES = LOSS + PRODUCT + LOWERING


def run(
    stages: Iterable[Stage], module: Any, job: Job, after: Callable[[str, fx.GraphModule], None] | None = None
) -> fx.GraphModule:
    """The graph that the stages make of a graph, which they change; ``after`` sees it after each of them.

    It is good for arguments of the same shapes and dtypes for which it :func:`holds`: integers among them may have
    decided which branch was taken.

    Raises:
        Untraceable: at ``trace``, ``refuse_other_functions`` or ``differentiate``, with the reason.
    """
    with without_collections():
        for stage in stages:
            if stage.run is not None and stage.when(job):
                given, module = module, stage.run(module, job) or module
                if given is not None and given is not module:  # what was decided on the way to it has made it, too
                    guards = [*given.meta.get("guards", ()), *module.meta.get("guards", ())]
                    module.meta = {**given.meta, **module.meta, "guards": guards}
                if after is not None:
                    after(stage.name, module)
    module.recompile()
    return module


def clean(loss: Callable[..., Tensor], params: Tree, *args: Any) -> Callable[..., Tensor]:
    """The loss as one pure aten graph: the same function of the same trees, twice differentiable in any mode.

    Args:
        loss: ``loss(params, *args)`` to a scalar tensor; it is called once.
        params: a tree of tensors.
        args: what else the loss takes. Tensors in it are inputs of the graph, all else is fixed.

    Returns:
        ``graph(params, *args)``, for arguments of these shapes and dtypes only.

    Raises:
        Untraceable: the loss branches on values, draws random numbers, has custom derivatives or switches them off.

    >>> import torch
    >>> graph = clean(lambda w, x: (w * x).relu_().sum(), torch.ones(2), torch.ones(2))
    >>> graph(torch.tensor([2.0, -1.0]), torch.ones(2))
    tensor(2.)
    """
    return as_function(run(LOSS, None, Job(loss, params, args)))


def holds(module: fx.GraphModule, params: Tree, args: tuple[Any, ...]) -> bool:
    """Whether a graph is that of its loss, or of its product, for these integer arguments too.

    What the loss has decided by the values of its integer and boolean arguments, on the way to this graph, is decided
    anew and compared: a small part of the graph is computed. Floating-point values decide nothing in a graph.
    """
    return decisions.holds(module, tensors((params, args))[0])


def as_function(module: fx.GraphModule) -> Callable[..., Tensor]:
    """The graph of a loss as a function of its trees, with derivatives by all of them.

    Raises:
        Untraceable: at a call for integers that would take another branch.
    """

    def graph(params: Tree, *args: Any) -> Tensor:
        given = tensors((params, args))[0]
        decisions.require(module, given)
        return module(*given)[0]

    return graph
