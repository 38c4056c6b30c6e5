"""From the matvec of one batch to that of a data set: any function that makes one for a batch will do."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.core.arguments import require_batches, require_function, require_matvec
from hessfn.core.probes import gaussian
from hessfn.core.torch_state import on_cpu
from hessfn.core.tree import MatVec, T, Tree
from hessfn.losses.batches import Weights, mean_of_kept, weighted_mean
from hessfn.losses.samples import length
from hessfn.losses.weights import MeanOver, Weigher, of_loss

_CALL = "batch_mean(make, batches)"


def batch_mean(
    make: Callable[[Any], MatVec[T]],
    batches: Iterable[Any],
    *,
    weights: Weights = None,
    microbatch: int | None = None,
    keep: bool = False,
) -> MatVec[T]:
    """Products with the weighted mean of the matrices of batches, ``sum_b w_b A_b v / sum_b w_b``.

    It turns a matvec of one batch into that of a data set: for :func:`ggnvp`, :func:`fvp`, :func:`linearized_hvp` or
    your own, as ``batch_mean(lambda batch: ggnvp(forward, criterion, params, batch), batches)``. With :func:`hvp` it is
    :func:`mean_hvp`.

    Args:
        make: a function from a batch to its matvec, which is symmetric.
        batches, microbatch: as for :func:`mean_hvp`. Batches are moved to the device of the vector.
        weights: one number a batch, or a function of the batch. By default, if ``make`` returns a product of hessfn
            with one of torch's criteria, what that criterion divides by; otherwise the number of samples. In the second
            case the first batch is compared once with two parts of it, to find out whether the loss is a mean: by their
            losses, or, for a matvec of your own, by three products. ``keep`` skips this for a matvec of your own.
        keep: call ``make`` once for each batch, at the first product, and keep the results: for
            :func:`linearized_hvp`, which does most of its work when it is made. Afterwards ``batches`` are not read
            again, so they may be an iterator. A trace cannot be made under ``vmap`` or ``torch.func.grad``: make the
            first product outside.

    Returns:
        A matvec on trees like those of ``make``. The batches are read at every product, unless ``keep``.

    Cost: one product with each batch; one batch in memory at a time; with ``keep``, what all matvecs keep together.

    Raises:
        ValueError: an argument is of another kind; ``make`` returns no matvec; or as :func:`mean_hvp` does.

    >>> batches = [torch.ones(3, 1), torch.zeros(1, 1)]
    >>> matvec = batch_mean(lambda x: lambda v: x.T @ (x @ v) / len(x), batches)
    >>> matvec(torch.ones(1))
    tensor([0.7500])
    """
    require_function(make, "make", _CALL)
    require_batches(batches, _CALL)
    if weights is not None:
        return mean_of(make, batches, weights=weights, microbatch=microbatch, keep=keep)
    probe: list[T] = []
    made, weigher = weighed(make, probe, keep)
    averaged = mean_of(made, batches, weights=weigher, microbatch=microbatch, keep=keep)

    def matvec(v: T) -> T:
        if not probe:
            probe.append(gaussian(v, 1)[0])
        return averaged(v)

    return matvec


def weighed(
    make: Callable[[Any], MatVec[T]], probe: list[T], keep: bool = False
) -> tuple[Callable[[Any], MatVec[T]], Weigher]:
    """``make``, and what weighs its batches where no weights are given: it looks at the first along ``probe[0]``."""
    made, before = _with_foresight(make)

    def form(batch: Any) -> Tensor:
        return tree.dot(probe[0], before(batch)(probe[0]))

    def about(batch: Any) -> MeanOver:
        found = of_loss(before(batch))
        # Its parts would be made too, and each batch is to be made once.
        return found._replace(weight_of=found.weight_of or length) if keep and found.value_of is None else found

    return made, Weigher(form, about, make, probe)


def mean_of(
    make: Callable[[Any], MatVec[T]],
    batches: Iterable[Any],
    *,
    weights: Weights,
    microbatch: int | None,
    keep: bool = False,
    state: Tree = None,
) -> MatVec[T]:
    """As :func:`batch_mean`, with ``state`` for the processes that share the batches to compare."""
    kept: list[tuple[float | Tensor, MatVec[T]]] = []
    checked: list[bool] = []  # once a pass has had finite products

    def product(args: tuple[Any, ...], part: Any, weight: float | Tensor) -> T:
        (v,) = args
        matvec = make(part)
        if keep:
            kept.append((weight, matvec))
        return product_of_batch(matvec, v, is_checked=bool(checked))

    weighted = weighted_mean(
        product,
        batches,
        weights=weights,
        microbatch=microbatch,
        device=home_of,
        state=state,
        passes=1 if keep else None,
    )

    def averaged(v: T) -> T:
        result: T = weighted(v)
        checked[:] = [True]
        return result

    if not keep:
        return averaged
    later: list[MatVec[T]] = []

    def matvec(v: T) -> T:
        if later:
            return later[0](v)
        kept.clear()  # of a pass that failed
        result = averaged(v)
        products = [functools.partial(product_of_batch, matvec, is_checked=True) for _, matvec in kept]
        later.append(mean_of_kept(products, [float(weight) for weight, _ in kept], batches))
        return result

    return matvec


def product_of_batch(matvec: MatVec[T], v: T, *, is_checked: bool = False) -> T:
    """A product that is finite. One that ``is_checked`` was so before, and is not asked again where that is to wait."""
    require_matvec(matvec, f"{_CALL}: make(batch)")
    product = tree.matched(matvec(v), v, "the product", "its vector")
    is_asked = on_cpu(product) or not is_checked
    return tree.owned(tree.require_finite(product, "the product") if is_asked else product)


def home_of(v: Tree) -> torch.device | None:
    return next((leaf.device for leaf in tree.leaves(v)), None)


def _with_foresight(make: Callable[[Any], MatVec[T]]) -> tuple[Callable[[Any], MatVec[T]], Callable[[Any], MatVec[T]]]:
    """``make``, and another that is called before it: what that has made of a batch is not made again."""
    seen: list[tuple[Any, MatVec[T]]] = []

    def before(batch: Any) -> MatVec[T]:
        found = next((matvec for other, matvec in seen if other is batch), None)
        if found is None:
            seen.append((batch, found := make(batch)))
        return found

    def made(batch: Any) -> MatVec[T]:
        found = next((matvec for other, matvec in seen if other is batch), None)
        seen.clear()
        return make(batch) if found is None else found

    return made, before
