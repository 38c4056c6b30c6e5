"""A matvec as what other libraries understand: a dense matrix, a SciPy operator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.core.arguments import require_matvec, require_vector
from hessfn.core.tree import MatVec, T

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


def dense(matvec: MatVec[T], like: T) -> Tensor:
    """The whole matrix ``(n, n)``, column by column: n matvecs and n^2 numbers, for small n.

    >>> dense(lambda v: 2 * v, torch.zeros(2))
    tensor([[2., 0.],
            [0., 2.]])
    """
    _require_kinds(matvec, like, "dense(matvec, like)")
    flat, unravel = tree.ravel(like)
    columns = [
        tree.ravel(matvec(unravel(unit)))[0] for unit in torch.eye(len(flat), dtype=flat.dtype, device=flat.device)
    ]
    return torch.stack(columns, dim=1)


def as_linear_operator(matvec: MatVec[T], like: T) -> LinearOperator:
    """The matrix as SciPy knows it, for ``scipy.sparse.linalg``: flat NumPy vectors, in the entries' order of ``like``.

    >>> import numpy, scipy.sparse.linalg
    >>> operator = as_linear_operator(lambda v: 2 * v, torch.zeros(3, dtype=torch.float64))
    >>> scipy.sparse.linalg.cg(operator, numpy.ones(3))[0]
    array([0.5, 0.5, 0.5])
    """
    from scipy.sparse.linalg import LinearOperator

    _require_kinds(matvec, like, "as_linear_operator(matvec, like)")
    flat, unravel = tree.ravel(like)
    kind = torch.empty((), dtype=flat.dtype).numpy().dtype

    def product(v: Any) -> Any:
        vector = torch.as_tensor(v.reshape(-1), dtype=flat.dtype, device=flat.device)
        return tree.ravel(matvec(unravel(vector)))[0].detach().cpu().numpy()

    return LinearOperator((len(flat), len(flat)), matvec=product, rmatvec=product, dtype=kind)


def _require_kinds(matvec: MatVec[T], like: T, call: str) -> None:
    require_matvec(matvec, call)
    require_vector(like, "like", call, floating=False)
