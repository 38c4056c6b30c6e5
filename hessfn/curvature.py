"""From a loss to a matvec: the Hessian, its mean over a data set, the Gauss-Newton matrix, the Fisher matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hessfn import tree
from hessfn.batches import Weights, mean
from hessfn.definitions import by_definition
from hessfn.linear import linearized
from hessfn.record import Untraceable
from hessfn.tree import MatVec, Tree
from hessfn.turns import turn
from hessfn.ways import Loss, check_loss, product_of, vjp


def hvp(loss: Loss, params: Tree, *args: Any, mode: str = "auto") -> MatVec:
    """Hessian-vector products of ``loss(params, *args)`` by its first argument, forward-over-reverse.

    ``H v = d/dt grad loss(params + t v)`` at ``t = 0``. Nothing is kept between products.

    Args:
        loss: a function to a scalar tensor.
        params: a tree of floating-point tensors, where the Hessian is taken.
        args: what else the loss takes, such as a batch.
        mode: how. ``"auto"`` takes the first way of this list that the loss's operations allow, and says so in one
            warning where it is not exact forward-over-reverse:

            - ``"traced"``: forward-over-reverse through one cleaned trace of the loss, made at the first product (see
              :func:`hessfn.graph.clean`); the fastest, and right on nearly every net. Not within ``vmap`` and such.
            - ``"forward"``: forward-over-reverse through the loss itself: ``jvp`` of a ``vjp``-built gradient.
            - ``"reverse"``: ``vjp`` of the gradient, exact as well, with the whole graph in memory.
            - ``"double_backward"``: ``torch.autograd.grad`` twice, for what ``torch.func`` refuses.
            - ``"difference"``: central differences of gradients, for what has no second derivative in torch.

    Returns:
        A matvec on trees like ``params``.

    Raises:
        ValueError: the loss is not one finite number, or draws random numbers, or a vector does not match ``params``.

    Source: Pearlmutter (1994).

    >>> matvec = hvp(lambda w: (w**3).sum(), torch.tensor([1.0, 2.0]))
    >>> matvec(torch.tensor([1.0, 1.0]))
    tensor([ 6., 12.])
    """
    product = product_of(loss, mode)

    def matvec(v: Tree) -> Tree:
        return product(params, args, tree.aligned(v, params))

    return matvec


def linearized_hvp(loss: Loss, params: Tree, *args: Any, compile: bool = False) -> MatVec:
    """The products of :func:`hvp`, with all that does not depend on the vector computed once, here: the fastest ones.

    A product costs about 2 gradients instead of 3. Kept in memory are the intermediate results of one gradient, and on
    the CPU the memory for those of a product, for which threads take turns. The matrix is that of the parameters and
    data as they are now, also if they change in place later.

    On the CPU, convolutions by 3 x 3 in float32 are computed in C, if a compiler is found (``CXX``, g++ or clang++);
    products of ResNet20 take half as long again without one. So are those of :func:`hvp`.

    Args:
        loss, params, args: as for :func:`hvp`.
        compile: put the products through ``torch.compile`` and compare one with the uncompiled product: tens of seconds
            once, then up to a tenth less time each; on small nets none.

    Returns:
        A matvec on trees like ``params``; it can be put under ``vmap``.

    Raises:
        Untraceable: one trace cannot stand for this loss, and why (it branches on values, say): take :func:`hvp`.
        ValueError: the loss is not one finite number.

    >>> matvec = linearized_hvp(lambda w: (w**3).sum(), torch.tensor([1.0, 2.0]))
    >>> matvec(torch.tensor([1.0, 1.0]))
    tensor([ 6., 12.])
    """
    with turn():
        check_loss(loss, params, args)
        try:
            product = linearized(by_definition(loss), params, *args, compile=compile)
        except Untraceable as error:
            raise Untraceable(f"{error}; hvp finds another way") from error
    return lambda v: product(tree.aligned(v, params))


def mean_hvp(
    loss: Loss,
    params: Tree,
    batches: Iterable[Any],
    *,
    weights: Weights = None,
    microbatch: int | None = None,
    mode: str = "auto",
) -> MatVec:
    """Products with the mean Hessian over batches, ``sum_b w_b H_b v / sum_b w_b``; one batch is in memory at a time.

    Args:
        loss: ``loss(params, batch)``, a mean over its batch.
        params: a tree of tensors. Batches are moved to its device.
        batches: gives the same batches at each pass: a list, a ``DataLoader`` that does not shuffle; or
            ``hessfn.distributed.Dealt(batches)``, of which each process of a group takes its share.
        weights: one number a batch, or a function of the batch, such as its number of tokens. By default the size of
            the batch (length of its first tensor), so that the result is the Hessian of the mean over all samples.
        microbatch: cut batches into parts of so many samples, for less memory and the same product; for losses in
            which samples do not meet (not BatchNorm in training mode). ``weights`` as a function then sees the parts.
        mode: as for :func:`hvp`.

    Raises:
        ValueError: there is no batch, ``batches`` can be run through only once, shuffles, or changes between products,
            or a product is not finite: the message names the batch and the leaf.

    >>> batches = [torch.ones(3, 1), torch.zeros(1, 1)]
    >>> matvec = mean_hvp(lambda w, x: (w * x).square().sum(1).mean(), torch.ones(1), batches)
    >>> matvec(torch.ones(1))
    tensor([1.5000])
    """
    product = product_of(loss, mode)
    averaged = mean(
        lambda v, batch: tree.require_finite(product(params, (batch,), v), "the product"),
        batches,
        weights=weights,
        microbatch=microbatch,
        device=next((leaf.device for leaf in tree.leaves(params)), None),
    )
    return lambda v: averaged(tree.aligned(v, params))


def ggnvp(
    forward: Callable[[Tree, Any], Any], criterion: Callable[[Any, Any], Tensor], params: Tree, batch: Any
) -> MatVec:
    """Products with the generalized Gauss-Newton matrix ``J' H_out J``.

    ``J`` is the Jacobian of the outputs by the parameters, ``H_out`` the Hessian of the criterion by the outputs. It is
    positive semidefinite where the criterion is convex in the outputs, and the Hessian where the model is linear in its
    parameters.

    Args:
        forward: ``forward(params, inputs)`` to a tensor or a tree of them, such as :func:`hessfn.stateless` returns.
        criterion: ``criterion(outputs, targets)`` to a scalar.
        params: a tree of tensors.
        batch: ``(inputs, targets)``.

    Source: Schraudolph (2002).

    >>> x = torch.tensor([[1.0, 2.0]])
    >>> matvec = ggnvp(lambda w, x: x @ w, lambda out, y: (out - y).square().sum(), torch.zeros(2), (x, torch.ones(1)))
    >>> matvec(torch.tensor([1.0, 0.0]))
    tensor([2., 4.])
    """
    inputs, targets = batch

    def loss_of(out: Any) -> Tensor:
        return criterion(out, targets)

    def matvec(v: Tree) -> Tree:
        v = tree.aligned(v, params)
        defined = by_definition(forward)

        def outputs(p: Tree) -> Any:
            return defined(p, inputs)

        with turn(), sdpa_kernel(SDPBackend.MATH):
            out, pullback = vjp(outputs, params)
            # Reverse mode: the criterion is cheap, and the common ones lack a forward rule.
            _, curvature = vjp(torch.func.grad(loss_of), out)
            return pullback(curvature(_pushforward(outputs, params, v))[0])[0]

    return matvec


def fvp(
    forward: Callable[[Tree, Any], Any], criterion: Callable[[Any, Any], Tensor], params: Tree, batch: Any
) -> MatVec:
    """Products with the empirical Fisher matrix ``1/B sum_i g_i g_i'``, ``g_i`` the gradient of sample ``i``'s loss.

    Arguments as :func:`ggnvp`. Samples lie along the first axis of outputs and targets, and the output of a sample must
    depend on that sample alone. With targets drawn from the model's own predictions it is a Monte-Carlo estimate of the
    Fisher matrix itself.

    >>> x = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    >>> square = lambda out, y: (out - y).square().mean()
    >>> matvec = fvp(lambda w, x: x @ w, square, torch.zeros(2), (x, torch.ones(2)))
    >>> matvec(torch.tensor([1.0, 0.0]))
    tensor([2., 4.])
    """
    inputs, targets = batch

    def alone(output: Any, target: Any) -> Tensor:
        one = tree.map(lambda leaf: leaf.unsqueeze(0), (output, target))
        return criterion(*one)

    def matvec(v: Tree) -> Tree:
        v = tree.aligned(v, params)
        defined = by_definition(forward)

        def losses(p: Tree) -> Tensor:
            return torch.func.vmap(alone)(defined(p, inputs), targets)

        with turn(), sdpa_kernel(SDPBackend.MATH):
            each, pullback = vjp(losses, params)
            return pullback(_pushforward(losses, params, v) / each.numel())[0]

    return matvec


def _pushforward(function: Callable[[Tree], Any], point: Tree, v: Tree) -> Any:
    """``J v``; without forward rules as the derivative of ``u -> J' u``, which is linear, so any ``u`` will do."""
    try:
        return torch.func.jvp(function, (point,), (v,))[1]
    except (RuntimeError, NotImplementedError):
        out, pullback = vjp(function, point)
        return vjp(lambda u: pullback(u)[0], tree.map(torch.zeros_like, out))[1](v)[0]
