"""Products that are counted on a progress bar."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def progress(
    matvec: Callable[..., Any], total: int | None = None, desc: str = "", *, unit: str = "product"
) -> Callable[..., Any]:
    """The same products, counted by a progress bar, with the time left where ``total`` is known.

    Any other function will do, such as the loss of a landscape, with ``unit="point"``: what is counted are its calls. A
    group under ``vmap`` is one call.
    """
    from tqdm.auto import tqdm

    bar = tqdm(total=total, desc=desc, unit=unit)

    def counted(*args: Any) -> Any:
        result = matvec(*args)
        bar.update()
        if bar.n == total:
            bar.close()
        return result

    return counted
