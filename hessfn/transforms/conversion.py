"""A matvec as what other libraries understand: a dense matrix, a SciPy operator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.core.arguments import require_matvec, require_vector
from hessfn.core.errors import HessfnError, InvalidInput
from hessfn.core.probes import each
from hessfn.core.tree import MatVec, T
from hessfn.core.watched import Watched

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


def dense(matvec: MatVec[T], like: T, *, batch_size: int | None = None) -> Tensor:
    """The whole matrix, computed column by column; for small matrices.

    Args:
        matvec: products with the matrix; it need not be symmetric.
        like: a tree like the vectors; n is its number of entries.
        batch_size: this many columns at once, under ``vmap``. The matrix is the same up to rounding. For a net of 1,002
            parameters, 64 at once take an eighth of the time; for large nets on a CPU it saves nothing. None takes one
            column at a time, and works for every matvec.

    Returns:
        A tensor ``(n, n)``; row and column i belong to entry i of ``tree.ravel(like)``. It can be differentiated.

    Cost: n products; 3 n^2 numbers at the peak, and the intermediate results of ``batch_size`` products.

    Raises:
        ValueError: a product is not finite, or its leaves are not those of ``like``; or, with ``batch_size``, ``vmap``
            cannot run the matvec: it branches on values, or leaves torch, or has DTensors.

    >>> dense(lambda v: 2 * v, torch.zeros(2))
    tensor([[2., 0.],
            [0., 2.]])
    """
    _require_kinds(matvec, like, "dense(matvec, like)")
    flat, unravel = tree.ravel(like)
    product = Watched(matvec)
    units = torch.eye(len(flat), dtype=flat.dtype, device=flat.device)

    def column(unit: Tensor) -> Tensor:
        return tree.ravel(product(unravel(unit)))[0]

    try:
        columns = list(each(column, units, 1 if batch_size is None else batch_size))
    except HessfnError:
        raise
    except (RuntimeError, NotImplementedError, TypeError) as error:
        if batch_size in (None, 1):
            raise
        why = (str(error) or type(error).__name__).splitlines()[0].partition(". ")[0]
        raise InvalidInput(
            f"dense(batch_size={batch_size}): the matvec cannot be put under vmap, as several columns at once are "
            f"({why}): leave batch_size out, for one at a time"
        ) from error
    return product.finished(torch.stack(columns, dim=1))


def as_linear_operator(matvec: MatVec[T], like: T) -> LinearOperator:
    """The matrix as a SciPy ``LinearOperator``, for the solvers of ``scipy.sparse.linalg``.

    Args:
        matvec: products with the matrix, which must be symmetric: ``rmatvec`` is the same function.
        like: a tree like the vectors; n is its number of entries.

    Returns:
        An operator of shape ``(n, n)`` on flat NumPy vectors, with the entries in the order of ``tree.ravel(like)``.
        Its dtype is that of ``like``; half precision becomes float32.

    Cost: one product for each vector, two for a complex one; each vector is copied to the device of ``like`` and back.

    Raises:
        ValueError: at a product, it is not finite, or its leaves are not those of ``like``.

    >>> import numpy, scipy.sparse.linalg
    >>> operator = as_linear_operator(lambda v: 2 * v, torch.zeros(3, dtype=torch.float64))
    >>> scipy.sparse.linalg.cg(operator, numpy.ones(3))[0]
    array([0.5, 0.5, 0.5])
    """
    from scipy.sparse.linalg import LinearOperator

    _require_kinds(matvec, like, "as_linear_operator(matvec, like)")
    flat, unravel = tree.ravel(like)
    seen = _seen_by_numpy(flat.dtype)
    kind = torch.empty((), dtype=seen, device="cpu").numpy().dtype
    watched = Watched(matvec)

    def real(v: Any) -> Any:
        # A copy: SciPy's vectors may run backwards, or be read-only.
        vector = torch.from_numpy(v.reshape(-1).copy()).to(device=flat.device, dtype=flat.dtype)
        image = watched.finished(tree.ravel(watched(unravel(vector)))[0])
        return image.detach().to(seen).cpu().numpy()

    def product(v: Any) -> Any:
        return real(v.real) + 1j * real(v.imag) if v.dtype.kind == "c" and kind.kind != "c" else real(v)

    return LinearOperator((len(flat), len(flat)), matvec=product, rmatvec=product, dtype=kind)


def _seen_by_numpy(dtype: torch.dtype) -> torch.dtype:
    """Half precision is widened: NumPy has no bfloat16, and SciPy's solvers no float16."""
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype


def _require_kinds(matvec: MatVec[T], like: T, call: str) -> None:
    require_matvec(matvec, call)
    require_vector(like, "like", call, floating=False)
