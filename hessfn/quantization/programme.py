"""The integer programme of a choice for each item: the least sum of costs within a size, exactly."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hessfn.core.errors import HessfnError


class Item(NamedTuple):
    numel: int
    bits: list[int]  #: the choices, ascending
    costs: list[float]  #: of each choice, at least 0


def least(items: list[Item], size: int) -> list[int]:
    """The choice of every item with the least sum of costs, of those with ``sum numel bits <= size``; one must fit."""
    sizes = [np.array([item.numel * bits for bits in item.bits]) for item in items]
    costs = [np.array(item.costs) for item in items]
    most, chosen = np.inf, [0] * len(items)
    # The solver's tolerances are absolute, and costs may lie decades apart. No choice that alone costs more than a sum
    # one has already is in the best sum: without these, costs can be in the unit of that sum.
    for gap in (1e-3, 1e-7):
        allowed = [cost <= most for cost in costs]
        unit = most if np.isfinite(most) else max(float(cost.max()) for cost in costs)
        if unit <= 0:
            break
        chosen = _solved([1e3 * cost / unit for cost in costs], sizes, allowed, size, gap)
        most = float(sum(cost[i] for cost, i in zip(costs, chosen, strict=True)))
    return [item.bits[i] for item, i in zip(items, chosen, strict=True)]


def _solved(
    costs: list[np.ndarray], sizes: list[np.ndarray], allowed: list[np.ndarray], size: int, gap: float
) -> list[int]:
    from scipy.optimize import Bounds, LinearConstraint, milp

    owner = np.repeat(np.arange(len(costs)), [len(cost) for cost in costs])
    one_each = (owner == np.arange(len(costs))[:, None]).astype(float)
    flat_sizes, scale = np.concatenate(sizes).astype(float), float(np.gcd.reduce(np.concatenate(sizes)))
    constraints = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(flat_sizes[None] / scale, -np.inf, np.floor(size / scale)),
    ]
    for _ in range(_MOST_CUTS):
        found = milp(
            np.where(np.concatenate(allowed), np.concatenate(costs), 0.0),
            integrality=np.ones(len(owner)),
            bounds=Bounds(0, np.concatenate(allowed).astype(float)),
            constraints=constraints,
            options={"mip_rel_gap": gap, "presolve": False},  # which takes longer than the programme
        )
        if found.x is None:
            raise HessfnError(f"SciPy's milp finds no bits: {found.message}")
        chosen = [int(found.x[owner == i].argmax()) for i in range(len(costs))]
        if sum(int(own[i]) for own, i in zip(sizes, chosen, strict=True)) <= size:
            return chosen
        # Of a large size the solver lets some entries more pass, by its tolerance: this choice is cut off.
        one = np.concatenate([np.arange(len(cost)) == i for cost, i in zip(costs, chosen, strict=True)]).astype(float)
        constraints.append(LinearConstraint(one[None], -np.inf, len(costs) - 1))
    raise HessfnError(
        f"SciPy's milp lets {_MOST_CUTS} choices pass that take more than the {size} bits there are: ask for a few less"
    )


_MOST_CUTS = 100
