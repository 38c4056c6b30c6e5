"""The path of a training run, seen in the few directions it keeps closest to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.core.arguments import require_sequence
from hessfn.core.errors import InvalidInput
from hessfn.core.memory import own
from hessfn.core.results import Trajectory
from hessfn.core.torch_state import known
from hessfn.core.tree import T, Tree

CHUNK = 2**16  # entries of each checkpoint worked on at a time


def principal_directions(checkpoints: Sequence[T], k: int = 2, *, origin: T | None = None) -> Trajectory[T]:
    """The principal directions of a training trajectory, and its coordinates along them.

    The first k singular vectors of the rows ``checkpoint - origin``, from their Gram matrix ``(T, T)``: for
    ``plane(loss, origin, directions, ...)``.

    Args:
        checkpoints: T trees of one shape, in the order of training. ``torch.load(path, mmap=True, weights_only=True)``
            leaves them on disk until they are needed, a part at a time.
        k: how many directions.
        origin: where the plane passes through, and step 0 of every direction; by default the last checkpoint.

    Returns:
        ``directions``, k orthonormal trees; ``coordinates (T, k)`` of the checkpoints along them, in the order given;
        ``fractions (k,)`` of the squared distances from the origin that each direction explains. A random walk also has
        high fractions in a few directions: they do not show that the training is low-dimensional (Antognini and
        Sohl-Dickstein, 2018).

    Cost: T^2 n operations, no loss; k vectors kept.

    Raises:
        ValueError: the checkpoints differ in their leaves, or span fewer than k directions from the origin.

    Source: Li, Xu, Taylor, Studer and Goldstein (2018).

    >>> path = [torch.tensor([2.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0.0, 0.0, 1.0])]
    >>> principal_directions(path, k=1).coordinates.T
    tensor([[2., 1., 0.]], dtype=torch.float64)
    """
    require_sequence(checkpoints, "checkpoints", "principal_directions(checkpoints)")
    if len(checkpoints) == 0:
        raise InvalidInput("there is no checkpoint: the sequence is empty")
    origin = checkpoints[-1] if origin is None else origin
    _, unravel = tree.ravel(origin)
    gram = torch.zeros((), dtype=torch.float64, device="cpu")
    for part in _displacements(checkpoints, origin):
        gram = gram.to(part) + part @ part.T
    values, vectors = (x.flip(-1) for x in torch.linalg.eigh(gram))
    spanned = values > len(gram) * torch.finfo(gram.dtype).eps * values[0]
    if not 1 <= k <= len(gram) or known(spanned[k - 1]) is False:
        raise InvalidInput(
            f"k={k} must be between 1 and {int(spanned.sum())}, the number of directions that these {len(gram)} "
            "checkpoints span from the origin"
        )
    lengths, axes = values[:k].sqrt(), vectors[:, :k]
    axes = axes * torch.where(axes.gather(0, axes.abs().argmax(0)[None]) < 0, -1.0, 1.0)  # eigh leaves the sign open
    weights = (axes / lengths).T
    rows = torch.cat([weights @ part for part in _displacements(checkpoints, origin)], dim=1)
    fractions = values[:k] / values.clamp(min=0).sum()
    return Trajectory(tuple(unravel(row) for row in rows), own(axes * lengths), fractions)


def _displacements(checkpoints: Sequence[Tree], origin: Tree) -> Iterator[Tensor]:
    """The rows ``checkpoint - origin`` in float64, ``(T, some columns)`` at a time, all columns in order."""
    rows = [tree.leaves(tree.aligned(point, origin, f"checkpoint {i}")) for i, point in enumerate(checkpoints)]
    for base, *leaves in zip(tree.leaves(origin), *rows, strict=True):
        for start in range(0, base.numel(), CHUNK):
            zero, *points = (tree.wide(x.reshape(-1)[start : start + CHUNK]) for x in (base, *leaves))
            yield torch.stack(points) - zero
