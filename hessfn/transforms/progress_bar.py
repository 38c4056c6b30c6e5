"""Products that are counted on a progress bar."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from hessfn.core.arguments import require_function
from hessfn.core.locks import OfThisProcess

P = ParamSpec("P")
R = TypeVar("R")


def progress(
    matvec: Callable[P, R], total: int | None = None, desc: str = "", *, unit: str = "product"
) -> Callable[P, R]:
    """The same products, counted by a progress bar, with the time left where ``total`` is known.

    Any other function will do, such as the loss of a landscape, with ``unit="point"``: what is counted are its calls. A
    group under ``vmap`` is one call. Where it is unpickled, another bar counts from 0.
    """
    require_function(matvec, "matvec", "progress(matvec)")
    bars: dict[str, Any] = OfThisProcess()

    def bar() -> Any:
        if "" not in bars:
            from tqdm.auto import tqdm

            bars[""] = tqdm(total=total, desc=desc, unit=unit)
        return bars[""]

    def counted(*args: P.args, **kwargs: P.kwargs) -> R:
        result = matvec(*args, **kwargs)
        here = bar()
        here.update()
        if here.n == total:
            here.close()
        return result

    bar()  # it is seen before the first product is done
    return counted
