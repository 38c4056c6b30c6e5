"""The loss of every group of the data: what the mean loss would be of other data follows from their spread."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hessfn.core.tree import Tree
from hessfn.losses.batches import weighted_mean
from hessfn.reporting.problem import Prepared
from hessfn.reporting.products import Parts


def losses_by_group(problem: Prepared, parts: Parts) -> Tensor:
    """``(g,)`` float64: the mean loss of each group of parts; one forward pass over the data."""
    num_parts = 0

    def of_part(_: tuple[Any, ...], part: Any, weight: float | Tensor) -> Tree:
        nonlocal num_parts
        group, num_parts = (parts.first + num_parts) % parts.num_groups, num_parts + 1
        found = torch.zeros(2, parts.num_groups, dtype=torch.float64, device="cpu")
        # Not under no_grad: a loss may take derivatives of its own, by the inputs.
        found[0, group] = problem.loss(problem.params, part).detach().to(found)
        found[1, group] = 1
        return found

    found: Tensor = weighted_mean(
        of_part, problem.batches, weights=problem.weights, microbatch=parts.size, state=problem.params
    )()
    losses, weights = found
    return losses / weights.where(weights > 0, 1.0)
