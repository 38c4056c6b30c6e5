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
    """The same function, with a progress bar (tqdm, on standard error) that counts its calls.

    Args:
        matvec: a matvec, or any other function, such as the loss of a landscape with ``unit="point"``.
        total: how many calls are to come: the bar then shows the time left, and closes after the last one.
        desc: the words before the bar.
        unit: what one call is.

    Returns:
        A function with the arguments and results of ``matvec``. Under ``vmap`` a group of vectors is one call. A copy
        that is unpickled counts from 0 on a bar of its own.

    Cost: no product.

    Raises:
        ValueError: ``matvec`` is no function.

    >>> matvec = progress(lambda v: 2 * v, total=2, desc="trace")
    >>> matvec(1.0), matvec(2.0)
    (2.0, 4.0)
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
