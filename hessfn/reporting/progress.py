"""The progress of a report: bars on the first process, and products that are counted on them."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm

from hessfn.core.tree import MatVec, Tree
from hessfn.reporting.options import Options
from hessfn.reporting.workspace import Keep


def progress_bar(options: Options, total: int | None, unit: str, desc: str = "") -> Any:
    """A bar whose time left follows from the mean rate so far. Processes but the first one show none."""
    quiet = not options.is_first_process
    return tqdm(
        total=total or None, unit=unit, desc=desc, disable=quiet, dynamic_ncols=True, mininterval=0.5, smoothing=0
    )


def kept_and_counted(matvec: MatVec, keep: Keep, name: str, bar: Any) -> MatVec:
    """The products, kept in the journal ``name`` and counted on the bar.

    One that is read from the journal counts as done, and says nothing of the time left.
    """
    num_computed = 0

    def computed(v: Tree) -> Tree:
        nonlocal num_computed
        num_computed += 1
        return matvec(v)

    kept = keep(name, computed)

    def counted(v: Tree) -> Tree:
        before = num_computed
        product = kept(v)
        if num_computed == before:
            bar.initial += 1
        bar.update()
        return product

    return counted
