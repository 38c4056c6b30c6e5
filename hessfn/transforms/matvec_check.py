"""Whether a matvec is one: deterministic, linear, symmetric."""

from __future__ import annotations

from torch import Tensor

from hessfn.core import tree
from hessfn.core.arguments import require_matvec, require_vector
from hessfn.core.errors import InvalidInput
from hessfn.core.probes import gaussian
from hessfn.core.tree import MatVec, T
from hessfn.core.watched import Watched


def check_matvec(matvec: MatVec[T], like: T, *, seed: int = 0, rtol: float | None = None) -> None:
    """Asks a matvec whether it is one: the same for the same vector, linear, symmetric. Four products.

    Args:
        rtol: how much relative error is rounding; by default the cube root of the dtype's resolution, since products
            of a net that fits its data well lose digits to cancellation.

    Raises:
        ValueError: it is not, with the size of the error and what usually causes it.

    >>> import torch
    >>> check_matvec(lambda v: 2 * v, torch.zeros(3))
    >>> check_matvec(lambda v: v.abs(), torch.zeros(3))
    Traceback (most recent call last):
    hessfn.core.errors.InvalidInput: the matvec is not linear: ...
    """
    call = "check_matvec(matvec, like)"
    require_matvec(matvec, call)
    require_vector(like, "like", call)
    x, y = gaussian(like, 2, seed=seed)
    if rtol is None:
        rtol = tree.eps(like) ** (1 / 3)
    product = Watched(matvec)
    ax, again, ay = tree.aligned(product(x), like, "the product"), product(x), product(y)
    product.finished((ax, ay))
    size = tree.norm(ax) + tree.norm(ay)

    def require(error: Tensor, scale: Tensor, what: str, cause: str) -> None:
        if error > rtol * scale:
            raise InvalidInput(
                f"the matvec is not {what}: relative error {float(error / scale):.1e} > rtol={rtol:.1e}. {cause}"
            )

    require(
        tree.norm(tree.add(ax, again, -1.0)),
        size,
        "deterministic",
        "Two products of one vector differ: look for dropout in training mode (call model.eval()), a loader that "
        "shuffles or augments at random (use list(loader)), or an operation that is random on this device.",
    )
    combination = tree.add(product(tree.add(x, y, -2.0)), tree.add(ax, ay, -2.0), -1.0)
    product.finished(combination)
    require(tree.norm(combination), size, "linear", "A(x - 2y) differs from Ax - 2Ay: this is no matrix.")
    require(
        (tree.dot(x, ay) - tree.dot(y, ax)).abs(),
        (tree.norm(x) * tree.norm(ay) + tree.norm(y) * tree.norm(ax)) / tree.numel(like) ** 0.5,
        "symmetric",
        "x'Ay differs from y'Ax: look for a torch.no_grad() block or .detach() inside the model, for a custom backward "
        "that is not the derivative of its forward, or for a matrix that is not a Hessian.",
    )
