"""Products that are counted on a progress bar."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from hessfn.core.arguments import require_function

P = ParamSpec("P")
R = TypeVar("R")


def progress(
    matvec: Callable[P, R], total: int | None = None, desc: str = "", *, unit: str = "product"
) -> Callable[P, R]:
    """The same products, counted by a progress bar, with the time left where ``total`` is known.

    Any other function will do, such as the loss of a landscape, with ``unit="point"``: what is counted are its calls. A
    group under ``vmap`` is one call.
    """
    require_function(matvec, "matvec", "progress(matvec)")
    from tqdm.auto import tqdm

    bar = tqdm(total=total, desc=desc, unit=unit)

    def counted(*args: P.args, **kwargs: P.kwargs) -> R:
        result = matvec(*args, **kwargs)
        bar.update()
        if bar.n == total:
            bar.close()
        return result

    return counted
