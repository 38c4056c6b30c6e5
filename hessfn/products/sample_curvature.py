"""Samples one by one: their inputs, the outputs that a criterion is curved in, and its Hessian by those of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.core.errors import InvalidInput
from hessfn.core.flatten import flatten
from hessfn.core.func import gradient, vjp
from hessfn.core.probes import gaussian
from hessfn.core.torch_state import is_observed, known
from hessfn.losses.samples import length
from hessfn.products.gauss_newton import ggnvp
from hessfn.products.outputs import has_entries, outputs_of, refuse_own_loss

Criterion = Callable[[Any, Any], Tensor]

ALONE = (
    "The outputs of a sample must depend on that sample alone: call model.eval() if there is BatchNorm in training "
    "mode, and have the samples along the first axis of the inputs. Without that, take hutchinson_diag(ggnvp(...), "
    "probes)"
)


class Samples:
    """The inputs of a batch, cut into samples; what has no axis of samples is the same for all."""

    def __init__(self, inputs: Any) -> None:
        self.number = length(inputs)
        self._flat, self._structure = flatten(inputs)
        self._where = [
            i for i, x in enumerate(self._flat) if isinstance(x, Tensor) and x.dim() and len(x) == self.number
        ]
        self.tensors = [self._flat[i] for i in self._where]
        self.one_by_one = False  # whether vmap has failed on them

    def whole(self, sample: list[Tensor]) -> Any:
        """One sample as a batch of one."""
        flat = list(self._flat)
        for i, x in zip(self._where, sample, strict=True):
            flat[i] = x.unsqueeze(0)
        return self._structure.unflatten(flat)


class Curved(NamedTuple):
    """The outputs that the criterion is curved in, sample by sample, and its Hessian by them."""

    used: list[int]  # which tensors of the outputs
    width: int  # D, their entries for one sample
    outputs: Tensor  # (N, D)
    product: Callable[[Tensor], Tensor]  # (N, D) -> (N, D)

    def columns(self, group: range) -> Tensor:
        """``(N, r, D)``: the Hessians of all samples at once, since it is zero between them."""
        unit = torch.eye(self.width, dtype=self.outputs.dtype, device=self.outputs.device)[group.start : group.stop]
        return torch.stack([self.product(row.expand_as(self.outputs)) for row in unit], 1)

    def joined(self, parts: list[Tensor]) -> Tensor:
        """The entries of one sample in a row."""
        return torch.cat([parts[i].reshape(-1).to(self.outputs.dtype) for i in self.used])

    def apart(self, row: Tensor, parts: list[Tensor]) -> list[Tensor]:
        """And back, with zeros for all that is not used."""
        apart = [torch.zeros_like(x) for x in parts]
        pieces = row.split([parts[i].numel() for i in self.used])
        for i, piece in zip(self.used, pieces, strict=True):
            apart[i] = piece.reshape(parts[i].shape).to(parts[i].dtype)
        return apart


def curvature_of(
    forward: Any, criterion: Criterion, params: Any, inputs: Any, targets: Any, number: int, call: str
) -> Curved:
    out = outputs_of(forward, params, inputs)
    parts, whole = out.parts, out.whole
    del out  # the graph of the whole batch

    def slope_at(parts: list[Tensor]) -> list[Tensor]:
        return gradient(lambda parts: criterion(whole(parts), targets), parts)

    slope, curvature = vjp(slope_at, parts)
    probe = gaussian(parts, 1)[0]
    image = curvature(probe)
    if not is_observed(*slope, *image):
        refuse_own_loss(ggnvp, slope, is_linear=not any(map(has_entries, image)))
    used = [i for i, x in enumerate(image) if known((x != 0).any()) is not False]
    for i in used:
        if not parts[i].dim() or len(parts[i]) % number:
            raise InvalidInput(
                f"{call}: the criterion takes an output of shape {tuple(parts[i].shape)}, which has no axis of "
                f"{number} samples. {ALONE}"
            )

    def joined(parts: list[Tensor]) -> Tensor:
        rows = [parts[i].reshape(number, -1) for i in used]
        return torch.cat(rows, 1) if rows else torch.zeros(number, 0, device="cpu")

    def product(u: Tensor) -> Tensor:
        pieces = iter(u.split([parts[i].numel() // number for i in used], 1))
        return joined(
            curvature(
                [
                    next(pieces).reshape(x.shape).to(x.dtype) if i in used else torch.zeros_like(x)
                    for i, x in enumerate(parts)
                ]
            )
        )

    curved = Curved(used, sum(parts[i].numel() // number for i in used), joined(parts), product)
    if used:
        _refuse_coupling(curved, joined(probe), call)
    return curved


def _refuse_coupling(curved: Curved, probe: Tensor, call: str) -> None:
    """Raises where the criterion has curvature between samples. Any two differ in some digit of their numbers."""
    number = len(probe)
    digits = torch.arange(number, device=probe.device)
    for bit in range((number - 1).bit_length()):
        inside = ((digits >> bit) & 1).bool()[:, None]
        image = curved.product(torch.where(inside, probe, 0.0))
        allowed = tree.eps([image]) ** 0.5 * torch.linalg.vector_norm(image)
        if known(torch.linalg.vector_norm(torch.where(inside, 0.0, image)) > allowed):
            raise InvalidInput(
                f"{call}: samples meet in the criterion, whose second derivative couples their outputs, so that there "
                "is no Hessian of each sample. Without that, take hutchinson_diag(ggnvp(...), probes)"
            )


def refuse_mixing(alone: Tensor, together: Tensor, call: str) -> None:
    """Raises where the outputs of samples alone are not those of the batch."""
    error = torch.linalg.vector_norm(alone.detach() - together.detach())
    allowed = min(10 * tree.eps([together]) ** 0.5, 0.1) * torch.linalg.vector_norm(together.detach())
    if known(error > allowed):
        raise InvalidInput(
            f"{call}: samples meet in the model: outputs of one alone and of the same one in its batch are "
            f"{float(error):.2g} apart, by norm, of {float(torch.linalg.vector_norm(together)):.2g}. {ALONE}"
        )
