"""Whether a matvec is one: deterministic, linear, symmetric."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.core.arguments import require_matvec, require_vector
from hessfn.core.errors import InvalidInput
from hessfn.core.probes import gaussian
from hessfn.core.tree import MatVec, T
from hessfn.core.watched import Watched


def check_matvec(matvec: MatVec[T], like: T, *, seed: int = 0, rtol: float | None = None) -> None:
    """Checks that a matvec is deterministic, linear and symmetric, along two random vectors.

    Args:
        matvec: the function to check.
        like: a tree like its vectors.
        seed: of the two Gaussian vectors.
        rtol: the largest relative error that counts as rounding; by default the cube root of the dtype's resolution,
            since products of a net that fits its data well lose digits to cancellation.

    Returns:
        None, if the three properties hold to ``rtol``.

    Cost: four products; five vectors at the peak.

    Raises:
        ValueError: one of them does not hold: the message names it, the size of the error and the usual cause. Or a
            product is not finite, or its leaves are not those of ``like``.

    >>> import torch
    >>> check_matvec(lambda v: 2 * v, torch.zeros(3))
    >>> check_matvec(lambda v: v.abs(), torch.zeros(3))
    Traceback (most recent call last):
    hessfn.core.errors.InvalidInput: the matvec is not linear: ...
    """
    call = "check_matvec(matvec, like)"
    require_matvec(matvec, call)
    require_vector(like, "like", call)
    if rtol is None:
        rtol = tree.eps(like) ** (1 / 3)
    product = Watched(matvec)
    probes = gaussian(like, 2, seed=seed)

    def require(error: Tensor, scale: Tensor, what: str, cause: str) -> None:
        if error > rtol * scale:
            raise InvalidInput(
                f"the matvec is not {what}: relative error {float(error / scale):.1e} > rtol={rtol:.1e}. {cause}"
            )

    # What is not needed any more is let go of before the next product: vectors may fill a device.
    x = probes[0]
    ax = tree.aligned(product(x), like, "the product")
    change, size = _distance(product(x), ax), tree.norm(ax)
    y = probes[1]
    ay = product(y)
    product.finished((ax, ay))
    size = size + tree.norm(ay)
    require(
        change,
        size,
        "deterministic",
        "Two products of one vector differ: look for dropout in training mode (call model.eval()), a loader that "
        "shuffles or augments at random (use list(loader)), or an operation that is random on this device.",
    )
    asymmetry = (tree.dot(x, ay) - tree.dot(y, ax)).abs()
    scale = (tree.norm(x) * tree.norm(ay) + tree.norm(y) * tree.norm(ax)) / tree.numel(like) ** 0.5
    combination = tree.map(lambda a, b: torch.sub(a, b, alpha=2.0), x, y)
    del x, y
    image = product(combination)
    del combination
    product.finished(image)
    image = tree.map(torch.sub, image, ax)
    del ax
    error = _distance(image, tree.matched(ay, image, "the product", "another"), -2.0)
    require(error, size, "linear", "A(x - 2y) differs from Ax - 2Ay: this is no matrix.")
    require(
        asymmetry,
        scale,
        "symmetric",
        "x'Ay differs from y'Ax: look for a torch.no_grad() block or .detach() inside the model, for a custom backward "
        "that is not the derivative of its forward, or for a matrix that is not a Hessian.",
    )


def _distance(a: Any, b: Any, factor: float = 1.0) -> Tensor:
    """``||a - factor b||``, leaf by leaf."""
    pairs = zip(tree.leaves(a), tree.leaves(b), strict=True)
    norms = [tree.norm(torch.sub(x, y.to(x.dtype), alpha=factor)) for x, y in pairs]
    return torch.linalg.vector_norm(torch.stack(norms))
