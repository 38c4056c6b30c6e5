"""The products of a report: with the mean Hessian, and of the same pass the quadratic form of every part of the data.

Most are made batch by batch, which is fastest; those that tell the data's own error, by the spread over parts, are made
part by part. As many batches and parts as memory allows keep their linearized product from the first pass on.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.core.errors import Untraceable
from hessfn.core.free_memory import free_bytes
from hessfn.core.kept_memory import bytes_kept
from hessfn.core.results import Forms
from hessfn.core.tree import MatVec, Tree
from hessfn.losses.batches import share_of, weighted_mean
from hessfn.losses.samples import two_parts
from hessfn.losses.weights import of_loss
from hessfn.products.hessian import hvp, linearized_hvp
from hessfn.reporting.problem import Loss, Prepared
from hessfn.reporting.progress import kept_and_counted
from hessfn.reporting.workspace import Keep

_LEAST_PARTS = 8  # of which a spread can be told
_MOST_GROUPS = 64  # parts beyond are taken together: no more numbers are kept for a product
_FEW = 100  # products in float64, which are not worth a trace
_SLOW_FIRST = 3  # products, which are made linear at the first
_SHARE = 0.5  # of the memory that is free, for linearized products; the rest is for vectors and for others


class Parts(NamedTuple):
    """How the data are cut."""

    size: int | None  #: samples in a part at most; None where a batch is a part
    num_groups: int
    first: int = 0  #: the number of this process's first part: those of lower ranks come before

    def only(self, start: int, step: int) -> Tensor:
        """A mask ``(g,)`` of every so-many-th group."""
        chosen = torch.zeros(self.num_groups, dtype=torch.float64, device="cpu")
        chosen[start::step] = 1
        return chosen


def batch_by_batch(problem: Prepared, batch_sizes: list[int]) -> Parts:
    """Every batch is a part. The sizes are in the order of the processes that share the batches."""
    rank, num_ranks = share_of(problem.batches)
    num_batches = max(1, len(batch_sizes))
    before = sum(len(range(lower, num_batches, num_ranks)) for lower in range(rank))
    return Parts(None, min(_MOST_GROUPS, num_batches), before)


def cut(problem: Prepared, batch_sizes: list[int]) -> Parts:
    """Parts of batches where there are few batches, if samples do not meet in them and each has its own."""
    num_batches = max(1, len(batch_sizes))
    share = -(-_LEAST_PARTS // num_batches)
    largest = max(batch_sizes, default=1)
    size, whole = -(-largest // share), batch_by_batch(problem, batch_sizes)
    if size == largest or of_loss(problem.loss).mixing or not _is_even(problem):
        return whole
    before = whole.first
    num_parts = [-(-length // size) for length in batch_sizes]
    return Parts(size, min(_MOST_GROUPS, sum(num_parts)), sum(num_parts[:before]))


def _is_even(problem: Prepared) -> bool:
    """Whether the tensors of a batch have the samples along their first axis, so that it has parts."""
    return all(two_parts(batch) is not None for batch in itertools.islice(problem.batches, 1))


class Product(NamedTuple):
    """A product with the mean over the groups of parts that were chosen."""

    image: Tree  #: like the vector v: ``A v``
    forms: Tensor  #: (g, l) float64: ``v_l'(A_g v)_l`` of every group of parts g and leaf l; 0 where not chosen
    weights: Tensor  #: (g,) float64: what each group counts in the mean; they sum to 1


def linearized(loss: Loss, params: Tree, part: Any) -> MatVec | None:
    """None where no trace can stand for the loss. Where its first product is wrong, all are made from the loss."""
    instead: list[MatVec] = []
    try:
        linear = linearized_hvp(loss, params, part)
    except Untraceable:
        return None

    def matvec(v: Tree) -> Tree:
        if not instead:
            try:
                return linear(v)
            except Untraceable:
                instead.append(hvp(loss, params, part, trace_after=0))
        return instead[0](v)

    return matvec


def no_rounding(params: Tree) -> Tensor | None:
    """What is said of rounding where nothing finer can be had: 0 of float64, nothing of what is coarser."""
    exact = all(leaf.dtype == torch.float64 for leaf in tree.leaves(params))
    return torch.zeros((), dtype=torch.float64, device="cpu") if exact else None


class OfLoss:
    """Products with the mean Hessian of a loss over the groups of parts that are chosen by a mask ``(g,)``."""

    def __init__(
        self, problem: Prepared, loss: Loss, params: Tree, parts: Parts, bytes_free: float, trace_after: int = 0
    ) -> None:
        """``bytes_free``: how much may be kept; 0 where each product is to be computed from the loss.

        By default that is traced at once: a report that is resumed has the products of one that is not, to the bit.
        """
        self._loss, self._params, self._parts, self._most = loss, params, parts, bytes_free
        self._trace_after, self.bytes_kept = trace_after, 0
        self._made: dict[int, MatVec] = {}
        self._num_parts, self._is_traceable = 0, True
        self._averaged = weighted_mean(
            self._of_part,
            problem.batches,
            weights=problem.weights,
            microbatch=parts.size,
            state=(params, of_loss(loss).state),
        )

    def __call__(self, v: Tree, chosen: Tensor) -> Product:
        self._num_parts = 0
        found = self._averaged(v, chosen)
        weights = found["weights"]
        forms = found["forms"] / weights.where(weights > 0, 1.0)[:, None]
        share = float(weights.sum())
        return Product(tree.scale(1 / share, found["image"]), forms, weights / share)

    @property
    def mode(self) -> str:
        """How products are made, in words."""
        if not self._is_traceable or not self._made:
            return "each computed from the loss"
        kept, num_parts = len(self._made), self._num_parts
        return "linearized and kept" if kept >= num_parts else f"linearized and kept for {kept} of {num_parts} parts"

    def _of_part(self, args: tuple[Any, ...], part: Any, weight: float | Tensor) -> Tree:
        v, chosen = args
        index, self._num_parts = self._num_parts, self._num_parts + 1
        group = (self._parts.first + index) % self._parts.num_groups
        weights = torch.zeros_like(chosen)
        weights[group] = chosen[group]
        forms = chosen.new_zeros(self._parts.num_groups, len(tree.leaves(v)))
        if not chosen[group]:
            return {"image": tree.map(torch.zeros_like, v), "forms": forms, "weights": weights}
        image = tree.require_finite(self._matvec_of(index, part)(v), "the product")
        forms[group] = torch.stack([x.to(forms) for x in map(tree.dot, tree.leaves(v), tree.leaves(image))])
        return {"image": image, "forms": forms, "weights": weights}

    def _matvec_of(self, index: int, part: Any) -> MatVec:
        if index in self._made:
            return self._made[index]
        if self._is_traceable and self.bytes_kept < self._most:
            matvec = linearized(self._loss, self._params, part)
            if matvec is not None:
                self._made[index] = matvec
                self.bytes_kept += bytes_kept(matvec, beside=(self._loss, self._params))
                return matvec
            self._is_traceable = False
        return hvp(self._loss, self._params, part, trace_after=self._trace_after)


class Measured:
    """The products of one report: kept in its journal, counted, and of some of the data where these are chosen."""

    def __init__(self, problem: Prepared, sizes: list[int], keep: Keep) -> None:
        self.parts, self.params, self.sizes = cut(problem, sizes), problem.params, sizes
        self.bar: Any = None  # on which products are counted, one bar a stage
        self.num_products = 0
        self.pace = 0.0  # seconds of a product with all data, lately
        self._problem, self._keep = problem, keep
        room = _SHARE * free_bytes(tree.leaves(self.params)[0].device)
        whole = batch_by_batch(problem, sizes)
        by_batch = OfLoss(problem, problem.loss, self.params, whole, room / (1 if whole == self.parts else 2))
        by_part = by_batch if whole == self.parts else OfLoss(problem, problem.loss, self.params, self.parts, room / 2)
        self._made = [by_batch] if by_part is by_batch else [by_batch, by_part]
        self._of_batches = self._kept(by_batch, whole, "products")
        self._of_parts = self._of_batches if by_part is by_batch else self._kept(by_part, self.parts, "parts")
        self._precisions: tuple[MatVec, MatVec] | None = None
        self._whole = whole

    def __call__(self, v: Tree) -> Product:
        """With all of the data, and the forms of its parts."""
        return self._of_parts(v, self.parts.only(0, 1))

    def by_batch(self, v: Tree) -> Product:
        """The same, faster, with the forms of its batches."""
        begun = time.monotonic()
        found = self._of_batches(v, self._whole.only(0, 1))
        seconds = time.monotonic() - begun
        self.pace = seconds if self.num_products < _SLOW_FIRST else 0.8 * self.pace + 0.2 * seconds
        return found

    def matvec(self, v: Tree) -> Tree:
        return self.by_batch(v).image

    def half(self, which: int) -> MatVec:
        """Of every other group of the data."""
        return lambda v: self._of_parts(v, self.parts.only(which, 2)).image

    def forms_of_half(self, which: int) -> Callable[[Tree], Forms]:
        chosen = self.parts.only(which, 2)

        def forms(v: Tree) -> Forms:
            found = self._of_parts(v, chosen)
            there = found.weights > 0
            return Forms(found.forms[there].sum(1), found.weights[there])

        return forms

    @property
    def mode(self) -> str:
        return self._made[0].mode

    @property
    def bytes_kept(self) -> int:
        return sum(made.bytes_kept for made in self._made)

    def precisions(self) -> tuple[MatVec, MatVec] | None:
        """The matvec of one group of the data, and the same in float64; None where nothing finer can be had."""
        if self._precisions is None and self._problem.finer is not None:
            loss, params = self._problem.finer()
            few = OfLoss(self._problem, loss, params, self.parts, 0.0, trace_after=_FEW)
            exact = self._kept(few, self.parts, "exact")
            one = self.parts.only(0, self.parts.num_groups)
            self._precisions = (
                lambda v: self._of_parts(v, one).image,
                lambda v: exact(tree.map(Tensor.double, v), one).image,
            )
        return self._precisions

    def update(self) -> None:
        """One more product is done."""
        self.num_products += 1
        self.bar.update()

    @property
    def initial(self) -> int:
        """How many were done before: read from the journal."""
        return self.bar.initial

    @initial.setter
    def initial(self, number: int) -> None:
        self.bar.initial = number

    def _kept(self, products: OfLoss, parts: Parts, name: str) -> Any:
        """Products put through a journal, which takes a function from a tree to one of the same names."""

        def function(given: Tree) -> Tree:
            found = products(given["vector"], given["groups"])
            return {"vector": found.image, "groups": found.weights, "forms": found.forms}

        through = kept_and_counted(function, self._keep, name, self)

        def product(v: Tree, chosen: Tensor) -> Product:
            blank = chosen.new_zeros(parts.num_groups, len(tree.leaves(v)))
            found = through({"vector": v, "groups": chosen, "forms": blank})
            return Product(found["vector"], found["forms"], found["groups"])

        return product
