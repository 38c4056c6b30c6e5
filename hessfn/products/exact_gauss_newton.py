"""The diagonal of the Gauss-Newton matrix and the traces of its blocks, exactly: by one backward pass an output."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.core.arguments import kind, require_batches, require_forward
from hessfn.core.arrays import as_tensors
from hessfn.core.dtensor import layout
from hessfn.core.errors import InvalidInput, Untraceable
from hessfn.core.flatten import flatten
from hessfn.core.torch_state import recorded
from hessfn.core.tree import T
from hessfn.engine.linear_leaves import is_linear_by_leaf
from hessfn.engine.op_definitions import by_definition
from hessfn.engine.trace import trace
from hessfn.losses.batches import Weights, mean
from hessfn.losses.model_inputs import fresh
from hessfn.losses.weights import Weigher, of_criterion
from hessfn.products.modes import differentiating
from hessfn.products.outputs import outputs_of, sides, targets_of, value_of
from hessfn.products.sample_curvature import ALONE, Criterion, Curved, Samples, curvature_of, refuse_mixing


def ggn_diagonal(
    forward: Callable[[T, Any], Any],
    criterion: Criterion,
    params: T,
    batches: Iterable[Any],
    *,
    weights: Weights = None,
    microbatch: int | None = None,
    chunk_size: int | None = None,
) -> T:
    """The diagonal of the generalized Gauss-Newton matrix ``J' H_out J`` of a data set, without sampling error.

    ``d_i = sum_n sum_cd H_n,cd J_n,ci J_n,di``, with ``J_n`` the Jacobian of the outputs of sample n and ``H_n`` the
    Hessian of the criterion by them, which may be indefinite. For ``CrossEntropyLoss``, ``MSELoss`` and
    ``BCEWithLogitsLoss`` it is that of the Fisher matrix as well.

    Args:
        forward, criterion, params: as for :func:`ggnvp`. Samples lie along the first axis of the inputs, and the
            outputs of one depend on it alone. Positions of a sample are outputs of it.
        batches: ``[(inputs, targets)]`` for one batch, or a list or a loader of them.
        weights, microbatch: as for :func:`batch_mean`. Memory needs no ``microbatch``.
        chunk_size: samples at a time, under ``vmap``; by default as many as fill 128 backward passes or 256 MB.

    Returns:
        A tree like ``params``, in the unit of the matrix's entries. It has derivatives by the parameters, and runs
        under ``vmap``.

    Cost: for D outputs a sample (classes times positions), a forward pass and D backward passes of every sample: about
    D gradients of the batch, 8 to 11 on ResNet20 with ten classes. Where the D gradients of one sample, or the Hessians
    of all samples by their outputs, take more than 256 MB, it takes twice as many backward passes, in groups with a
    forward pass each. Memory: one forward pass of a batch, and the gradients and intermediate results of
    ``chunk_size`` samples for D outputs.

    Raises:
        ValueError: an argument is of another kind; samples depend on each other in the model (BatchNorm in training
            mode) or in the criterion; the outputs that the criterion takes have no axis of samples; or as
            :func:`batch_mean` does.

    Source: Schraudolph (2002); Dangel, Kunstner and Hennig (2020) for exact diagonals.

    >>> x = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    >>> square = lambda out, y: (out - y).square().sum()
    >>> ggn_diagonal(lambda w, x: x @ w, square, torch.zeros(2), [(x, torch.ones(2))], weights=[1])
    tensor([ 2., 10.])
    """
    found = _mean(forward, criterion, params, batches, weights, microbatch, chunk_size, "ggn_diagonal", lambda x: x)
    return tree.map(lambda x, p: x.to(p.dtype), found, params)


def ggn_traces(
    forward: Callable[[T, Any], Any],
    criterion: Criterion,
    params: T,
    batches: Iterable[Any],
    *,
    weights: Weights = None,
    microbatch: int | None = None,
    chunk_size: int | None = None,
) -> T:
    """The trace of every leaf's block of the Gauss-Newton matrix of a data set, without sampling error.

    ``hutchinson_per_leaf(ggnvp(...), probes)`` estimates the same numbers. They are sums of :func:`ggn_diagonal`.

    Args:
        forward, criterion, params, batches, weights, microbatch, chunk_size: as for :func:`ggn_diagonal`.

    Returns:
        A tree like ``params`` of float64 scalars, in the unit of the eigenvalues; their sum is the trace of the whole.
        Where the network is linear in each leaf alone, piecewise, they are the traces of the Hessian as well: networks
        of convolutions, linear layers, ReLUs, pooling, and BatchNorm in eval mode are so.

    Cost: as for :func:`ggn_diagonal`.

    Raises:
        ValueError: as for :func:`ggn_diagonal`.

    Source: as for :func:`ggn_diagonal`; Botev, Ritter and Barber (2017) for networks that are piecewise linear.

    >>> x = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    >>> square = lambda out, y: (out - y).square().sum()
    >>> ggn_traces(lambda w, x: x @ w, square, torch.zeros(2), [(x, torch.ones(2))], weights=[1])
    tensor(12., dtype=torch.float64)
    """
    return _mean(forward, criterion, params, batches, weights, microbatch, chunk_size, "ggn_traces", lambda x: x.sum())


def has_blocks_of_the_hessian(forward: Callable[[T, Any], Any], params: T, inputs: Any) -> bool:
    """Whether each leaf's block of the Hessian is that of the Gauss-Newton matrix, whatever the criterion.

    Of ``J' H_out J + sum_c r_c D^2 f_c`` it is so where no output bends along a single leaf; where no trace can tell,
    it is not known to be so. Cost: the trace of a forward pass.
    """

    def total(params: T, inputs: Any) -> Tensor:
        outputs, _ = flatten(by_definition(forward)(params, fresh(inputs)))
        found = [x for x in outputs if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())]
        return torch.stack([(torch.view_as_real(x) if x.is_complex() else x).sum() for x in found]).sum()

    try:
        with differentiating():
            graph = trace(total, params, (inputs,)).graph
    except Untraceable:
        return False
    return is_linear_by_leaf(graph, len(tree.leaves(params)))


def _mean(
    forward: Callable[[T, Any], Any],
    criterion: Criterion,
    params: T,
    batches: Iterable[Any],
    weights: Weights,
    microbatch: int | None,
    chunk_size: int | None,
    name: str,
    reduced: Callable[[Tensor], Tensor],
) -> T:
    call = f"{name}(forward, criterion, params, batches)"
    require_forward(forward, criterion, params, call)
    require_batches(batches, call)
    if isinstance(batches, (tuple, list)) and any(isinstance(x, Tensor) for x in batches):
        raise InvalidInput(f"{call}: batches is {kind(batches)} with a tensor in it, one batch, it seems: give [batch]")
    if chunk_size is not None and chunk_size < 1:
        raise InvalidInput(f"{call}: chunk_size={chunk_size} must be at least 1")
    if any(layout(leaf) for leaf in tree.leaves(params)):
        raise InvalidInput(f"{call}: vmap does not know DTensors: give hutchinson_diag(ggnvp(...), probes) a try")
    if weights is None:
        weights = Weigher(value_of(forward, criterion, params), of_criterion(criterion, targets_of), forward, params)

    @recorded
    def of_batch(params: T, batch: Any) -> T:
        with differentiating():
            diagonal = _diagonal(by_definition(forward), criterion, params, batch, chunk_size, call)
            return tree.owned(tree.map(reduced, diagonal))

    device = next((leaf.device for leaf in tree.leaves(params)), None)
    averaged = mean(of_batch, batches, weights=weights, microbatch=microbatch, device=device, state=params)
    found: T = averaged(params)
    return found


def _diagonal(forward: Any, criterion: Criterion, params: T, batch: Any, chunk_size: int | None, call: str) -> T:
    """In float64: the sum over samples, a few at a time."""
    inputs, targets = sides(batch, call)
    inputs = as_tensors(inputs)
    samples = Samples(inputs)
    curved = curvature_of(forward, criterion, params, inputs, targets, samples.number, call)
    total = tree.map(lambda p: torch.zeros_like(tree.wide(p)), params)
    if not curved.width:  # the criterion is linear in its outputs
        return total
    size = max(sum(leaf.numel() * leaf.element_size() for leaf in tree.leaves(params)), 1)
    row = max(2 * size, curved.outputs.numel() * curved.outputs.element_size())  # in gradients, and in the Hessians
    rows = min(curved.width, max(_MOST_BYTES // row, 1))
    chunk = chunk_size or max(min(_MOST_PASSES // rows, _MOST_BYTES // (2 * size * rows)), 1)
    chunk = -(-samples.number // -(-samples.number // chunk))  # all of one length
    for first in range(0, curved.width, rows):
        group = range(first, min(first + rows, curved.width))
        hessian = curved.columns(group)  # (N, r, D), a row for every output of the group
        for start in range(0, samples.number, chunk):
            each = slice(start, start + chunk)
            parts, seen = _squares(forward, params, samples, each, hessian[each], group, curved, call)
            refuse_mixing(seen, curved.outputs[each], call)
            total = tree.map(lambda t, x: t + tree.wide(x.sum(0)), total, tree.unflatten(parts, params))
    return total


_MOST_BYTES = 2**28
_MOST_PASSES = 128


def _squares(
    forward: Any, params: T, samples: Samples, each: slice, hessian: Tensor, group: range, curved: Curved, call: str
) -> tuple[list[Tensor], Tensor]:
    """Of every sample, its part of the diagonal from some rows of its Hessian; and its outputs."""

    def of_sample(sample: list[Tensor], rows: Tensor) -> tuple[list[Tensor], Tensor]:
        out = outputs_of(forward, params, samples.whole(sample))

        def pull(row: Tensor) -> list[Tensor]:
            return tree.leaves(out.pullback(curved.apart(row, out.parts)))

        unit = torch.eye(curved.width, dtype=rows.dtype, device=rows.device)[group.start : group.stop]
        left = torch.func.vmap(pull, chunk_size=_MOST_PASSES)(unit)
        if len(group) == curved.width:
            right = [torch.tensordot(rows.to(x.dtype), x, 1) for x in left]
        else:
            right = torch.func.vmap(pull, chunk_size=_MOST_PASSES)(rows)
        return [(a * b).sum(0) for a, b in zip(left, right, strict=True)], curved.joined(out.parts)

    some = [x[each] for x in samples.tensors]
    if not samples.one_by_one:
        try:
            return torch.func.vmap(of_sample)(some, hessian)
        except (RuntimeError, NotImplementedError, ValueError):  # what vmap has no rule for may do sample by sample
            samples.one_by_one = True
    return _one_by_one(of_sample, some, hessian, call)


def _one_by_one(of_sample: Any, some: list[Tensor], hessian: Tensor, call: str) -> tuple[list[Tensor], Tensor]:
    try:
        found = [of_sample([x[i] for x in some], rows) for i, rows in enumerate(hessian)]
    except Exception as error:
        raise InvalidInput(
            f"{call}: the model takes the batch, but not a sample alone ({type(error).__name__}: {error}). {ALONE}"
        ) from error
    parts = [torch.stack(leaves) for leaves in zip(*(parts for parts, _ in found), strict=True)]
    return parts, torch.stack([seen for _, seen in found])
