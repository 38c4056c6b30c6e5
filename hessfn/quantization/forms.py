"""Quadratic forms by leaf of the Hessian of one batch after another, of a loss whose point is made for each batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Generic

import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.core.errors import Untraceable
from hessfn.core.probes import gaussian
from hessfn.core.torch_state import value_of
from hessfn.core.tree import MatVec, T
from hessfn.core.watched import Watched
from hessfn.losses.samples import few
from hessfn.products.first_check import evidence, verdict
from hessfn.products.hessian import hvp, linearized_hvp


class Forms(Generic[T]):
    """``z * Hz`` summed over each leaf, for every probe z: by the linearized product of a batch.

    The rules of derivatives are the same for every batch, so that they are held against gradients once, and on few
    samples: on all of them that would take longer than the products.
    """

    def __init__(self, loss: Callable[[T, Any], Tensor], point_of: Callable[[Any], T]) -> None:
        """``loss(point, batch)``, and the point for a batch."""
        self._loss, self._point_of = loss, point_of
        self._is_right: dict[Any, bool] = {}  # by the names of the leaves

    def __call__(
        self, point: T, batch: Any, probes: Callable[[T], Iterable[T]], transform: Callable[[MatVec[T]], MatVec[T]]
    ) -> T:
        """The forms ``(p,)`` by leaf. ``point`` is that of the batch, or a part of it."""
        names = tuple(tree.names(point))
        if names not in self._is_right:
            self._is_right[names] = self._is_right_on_few(point, batch)
        try:
            product = Watched(linearized_hvp(self._loss, point, batch, check=not self._is_right[names]))
        except Untraceable:
            product = Watched(hvp(self._loss, point, batch))
        forms = transform(lambda z: tree.map(tree.dot, z, product(z)))
        each = [forms(z) for z in probes(point)]
        return product.finished(tree.map(lambda *values: torch.stack(values), *each))

    def _is_right_on_few(self, point: T, batch: Any) -> bool:
        """Whether the product on some samples is what gradients say; False also where they say too little."""
        some = few(batch)
        if some is None:
            return False
        try:
            whole = dict(zip(tree.names(small := self._point_of(some)), tree.leaves(small), strict=True))
            at = tree.unflatten([whole[name] for name in tree.names(point)], point)
            v = gaussian(at, 1)[0]
            value = value_of(lambda: self._loss(at, some))
            seen = evidence(self._loss, at, (some,), v, value, narrow=False)
            if seen is None or 10 * seen.error > float(tree.norm(seen.product)):
                return False
            return verdict(linearized_hvp(self._loss, at, some, check=False)(v), seen) == "agrees"
        except Exception:  # the loss may not take so few: then all samples are asked
            return False
