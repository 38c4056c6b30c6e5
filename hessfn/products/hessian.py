"""From a loss to a matvec: its Hessian, linearized or not, and the mean over a data set."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from hessfn.core import tree
from hessfn.core.arguments import require_batches, require_loss, require_vector
from hessfn.core.errors import InvalidInput, Untraceable
from hessfn.core.locks import MadeHere
from hessfn.core.torch_state import carries_derivative, recorded
from hessfn.core.tree import MatVec, T, Tree
from hessfn.engine.op_definitions import by_definition
from hessfn.losses.batches import Weights
from hessfn.losses.model_inputs import taken
from hessfn.losses.weights import Weigher, knowing, of_loss, refuse_parts
from hessfn.products.batch_mean import mean_of
from hessfn.products.just_in_time import PATIENCE, product_of
from hessfn.products.linear_check import LinearCheck
from hessfn.products.loss_checks import Loss, inspect
from hessfn.products.loss_memory import memory_of
from hessfn.products.modes import Linear, ModeName, differentiating, linear_of_trace


def hvp(
    loss: Loss, params: T, *args: Any, mode: ModeName = "auto", check: bool = True, trace_after: int = PATIENCE
) -> MatVec[T]:
    """Hessian-vector products of ``loss(params, *args)`` by its first argument, forward-over-reverse.

    ``H v = d/dt grad loss(params + t v)`` at ``t = 0``. A loss is traced once for the shapes of its arguments. The
    trace is kept with the loss, for all its products: a training loop may make a new ``hvp(loss, params, batch)`` at
    each step.

    Args:
        loss: a function to a scalar tensor.
        params: a tree of floating-point tensors, where the Hessian is taken. If they require gradients, as an
            ``nn.Parameter`` does, a product has derivatives by them and keeps its graph: give them detached, or use
            ``torch.no_grad()``, if you need none.
        args: what else the loss takes, such as a batch.
        mode: how to differentiate. ``"auto"`` takes the first mode of this list that the operations of the loss allow,
            with one warning if it is not exact forward-over-reverse:

            - ``"traced"``: forward-over-reverse through one cleaned trace of the loss (see
              :func:`hessfn.engine.pipeline.clean`); the fastest, and right on nearly every net. Not within ``vmap``.
            - ``"forward"``: forward-over-reverse through the loss itself: ``jvp`` of a ``vjp``-built gradient.
            - ``"reverse"``: ``vjp`` of the gradient, exact as well, with the whole graph in memory.
            - ``"double_backward"``: ``torch.autograd.grad`` twice, for what ``torch.func`` refuses.
            - ``"difference"``: central differences of gradients, for what has no second derivative in torch.
        check: whether the first product of this loss, for these shapes, is compared with a difference of gradients of
            the loss, in float64 if the loss runs in it. It costs two gradients, once, of a few samples if they suffice.
            If they disagree, the next mode that agrees is taken, and a warning says so, or that the loss has a kink at
            these parameters. There is no check under ``vmap``, autograd and ``torch.compile``.
        trace_after: in mode ``"auto"`` this many products are made from the loss without a trace, since a trace takes
            as long as a few products. The products before and after differ by rounding. 0 makes the trace at once, and
            all products the same to the bit. At most 16 traces of a loss are kept.

    Returns:
        A matvec on trees like ``params``. Where numbers or tensors that the loss closes over change, the loss is
        traced anew.

    Cost: a product takes the arithmetic of about 3 gradients (measured: the time of 1.4 to 3.3), and the intermediate
    results of one gradient and its tangent while it runs. The first adds the check, the fourth the trace, which is
    kept.

    Raises:
        ValueError: an argument is of another kind, such as a model for the loss; or, at the first product, the loss is
            not one finite number, or draws random numbers, or a vector does not match ``params``.

    Source: Pearlmutter (1994).

    >>> import torch
    >>> matvec = hvp(lambda w: (w**3).sum(), torch.tensor([1.0, 2.0]))
    >>> matvec(torch.tensor([1.0, 1.0]))
    tensor([ 6., 12.])
    """
    _require_kinds(loss, params, "hvp(loss, params, ...)")
    args = taken(loss, args)
    product = product_of(loss, mode, check, trace_after)

    def matvec(v: T) -> T:
        return tree.owned(product(params, args, tree.aligned(v, params)))

    return knowing(matvec, of_loss(loss), lambda batch: loss(params, batch))


@recorded
def linearized_hvp(loss: Loss, params: T, *args: Any, compile: bool = False, check: bool = True) -> MatVec[T]:
    """The products of :func:`hvp`, with all that does not depend on the vector computed once: the fastest ones.

    The matrix is that of the parameters and data as they are now, even if they change in place later.

    On the CPU, convolutions by 3 x 3 and attention of long sequences, in float32, run in compiled C kernels if a
    compiler is found (``CXX``, g++, clang++ or c++); so do those of :func:`hvp`. Without them, products of ResNet20
    take half as long again, those of a GPT of 4096 tokens 1.6 times as long. ``HESSFN_NATIVE=0`` switches them off,
    and :func:`hessfn.show_config` says what is in use.

    Args:
        loss, params, args: as for :func:`hvp`.
        compile: run the products through ``torch.compile``, and compare one with the uncompiled product. It takes tens
            of seconds once, and saves up to a tenth of the time of a product, nothing for small nets.
        check: as for :func:`hvp`, along a random direction, once for the operations that the product consists of. And
            the first product of every matvec must be finite.

    Returns:
        A matvec on trees like ``params``. It runs under ``vmap`` and has all derivatives by its vector, none by the
        parameters and the data: where these require gradients, give them detached, or take :func:`hvp`.

    Cost: once for a loss, the trace and the check; once for each matvec, a gradient and an evaluation of the loss; then
    the arithmetic of about 2 gradients a product instead of 3 (measured: the time of 0.9 to 2.4). It keeps the
    intermediate results of one gradient, and on the CPU the memory for those of a product, which threads use in turn.

    Raises:
        Untraceable: the loss cannot be traced, and the message says why; or the check has found that its product is
            wrong: take :func:`hvp`.
        ValueError: an argument is of another kind, the loss is not one finite number, or the parameters or the data
            are being differentiated; or, at the first product, the curvature is not finite.

    Source: Pearlmutter (1994).

    >>> import torch
    >>> matvec = linearized_hvp(lambda w: (w**3).sum(), torch.tensor([1.0, 2.0]))
    >>> matvec(torch.tensor([1.0, 1.0]))
    tensor([ 6., 12.])
    """
    _require_kinds(loss, params, "linearized_hvp(loss, params, ...)")
    args = taken(loss, args)
    if carries_derivative(params, args):
        raise InvalidInput(_CONSTANT)
    # Copies: of parameters that an optimiser then steps in place, some constants would be old and some new. A loss may
    # differentiate by what requires gradients.
    params, args = tree.map(lambda x: _copied(x) if isinstance(x, Tensor) else x, (params, args))
    with differentiating():
        inspected = inspect(by_definition(loss), params, args)._replace(graph=None)
    linear = MadeHere(_linear_product, loss, params, args, compile)

    def product(v: T) -> T:
        return tree.owned(tree.unflatten(linear.made.product(*tree.leaves(tree.aligned(v, params))), params))

    held = LinearCheck(loss, params, args, inspected, product) if check else None
    if held is not None:
        held.when_made(linear.made)

    def matvec(v: T) -> T:
        found = product(v)
        if held is not None:
            held.of_product(found)
        return found

    return knowing(matvec, of_loss(loss), lambda batch: loss(params, batch))


def _copied(x: Tensor) -> Tensor:
    copy = x.detach().clone()
    return copy.requires_grad_() if x.requires_grad else copy  # which transforms of torch.func refuse, even as False


def _linear_product(loss: Loss, params: Tree, args: tuple[Any, ...], compile: bool) -> Linear:
    try:
        with differentiating():
            trace = memory_of(loss).trace(loss, params, args, for_ever=False)
        return linear_of_trace(trace, loss, params, args, compile=compile)
    except Untraceable as error:
        raise Untraceable(f"{error}; hvp finds another way") from error


_CONSTANT = (
    "linearized_hvp(loss, params, ...): the parameters or the data are being differentiated, of which its products "
    "know nothing: take hvp; or, where no derivative by them is wanted, detach them or use torch.no_grad()"
)


def mean_hvp(
    loss: Loss,
    params: T,
    batches: Iterable[Any],
    *,
    weights: Weights = None,
    microbatch: int | None = None,
    mode: ModeName = "auto",
    check: bool = True,
    trace_after: int = PATIENCE,
) -> MatVec[T]:
    """Products with the mean Hessian over batches, ``sum_b w_b H_b v / sum_b w_b``; one batch is in memory at a time.

    Args:
        loss: ``loss(params, batch)``, a mean over its batch. With BatchNorm in training mode samples depend on each
            other, and the result is the mean, weighted by size, of the losses of the batches as they are.
        params: a tree of tensors. Batches are moved to its device.
        batches: gives the same batches at each pass: a list, a ``DataLoader`` that does not shuffle; or
            :class:`hessfn.ShardedBatches`, of which each process of a group takes its share.
        weights: one number a batch, or a function of the batch, such as its number of tokens; a batch of weight 0 is
            left out. By default the result is the Hessian of the mean over all samples: the weight is what the loss
            divides by for torch's criteria (such as the class weights of targets that are not ignored), the number of
            labels that count for Hugging Face models, and for other losses the length of the first tensor.
        microbatch: cut batches into parts of this many samples, for less memory and the same product; for losses in
            which samples do not depend on each other. ``weights`` as a function then gets the parts.
        mode, check, trace_after: as for :func:`hvp`. Unless the weights are known or given, the check also compares the
            loss of the first batch with the mean over two parts of it, once for a loss.

    Returns:
        A matvec on trees like ``params``.

    Cost: a product takes one pass over the batches, with the cost of :func:`hvp` for each. In memory are one batch (or
    part) with what its product needs, and one vector.

    Raises:
        ValueError: an argument is of another kind; there is no batch; ``batches`` can be run through only once,
            shuffles, or changes between products (on a device from the third on, to ask is to wait: the product is NaN
            there); a product is not finite (the message names the batch and the leaf; there, of the first alone);
            the loss is no mean over samples by these weights; samples of a batch that is cut depend on each other; or
            processes that share the batches have different ones, or different parameters.

    Source: Pearlmutter (1994).

    >>> import torch
    >>> batches = [torch.ones(3, 1), torch.zeros(1, 1)]
    >>> matvec = mean_hvp(lambda w, x: (w * x).square().sum(1).mean(), torch.ones(1), batches)
    >>> matvec(torch.ones(1))
    tensor([1.5000])
    """
    call = "mean_hvp(loss, params, batches)"
    _require_kinds(loss, params, call)
    require_batches(batches, call)
    product, about = product_of(loss, mode, check, trace_after), of_loss(loss)
    if microbatch is not None:
        refuse_parts(about)
    if weights is None:
        weights = Weigher(lambda batch: loss(params, batch), about, loss, params, check)
    averaged = mean_of(
        lambda batch: lambda v: product(params, taken(loss, (batch,)), v),
        batches,
        weights=weights,
        microbatch=microbatch,
        state=(params, about.state),
    )
    return lambda v: averaged(tree.aligned(v, params))


def _require_kinds(loss: Loss, params: T, call: str) -> None:
    require_loss(loss, params, call)
    require_vector(params, "params", call)
