"""Preconditioners for ``solve``, made of what one has of a matrix: its diagonal, or some of its eigenpairs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.core.arguments import kind, require_eigenpairs, require_vector
from hessfn.core.dtensor import whole
from hessfn.core.errors import InvalidInput
from hessfn.core.func import vmap
from hessfn.core.results import EigenPairs, Estimate
from hessfn.core.torch_state import known
from hessfn.core.tree import MatVec, T

_LEAST = 1e-3  # of the mean magnitude: what an entry of the diagonal counts at least


def one_number(x: float | Tensor, name: str, call: str) -> Tensor:
    """A number, or a tensor of one, as a scalar."""
    if isinstance(x, Tensor):
        if x.numel() != 1:
            raise InvalidInput(f"{call}: {name} is {kind(x)}, not one number")
        return x.reshape(())
    if not math.isfinite(x):
        raise InvalidInput(f"{call}: {name}={x} must be finite")
    return torch.tensor(x, dtype=torch.float64, device="cpu")


def diagonal_preconditioner(diagonal: T, damping: float | Tensor = 0.0) -> MatVec[T]:
    """The diagonal preconditioner ``v -> v / (|d| + |damping|)``, entry by entry, for :func:`hessfn.solve`.

    It saves products where the entries of the diagonal differ by orders of magnitude. It is always positive definite:
    each entry counts by its magnitude, at least 0.001 of the mean magnitude, so that a zero, or a random estimate near
    zero, makes no entry of the solution too large.

    Args:
        diagonal: a tree like the right-hand side, such as ``hutchinson_diag(matvec, probes).mean``. Half precision is
            widened.
        damping: that of the system.

    Returns:
        A function on trees like ``diagonal``, for ``solve(..., precondition=...)``.

    Cost: no product; one vector kept.

    Raises:
        ValueError: the diagonal is no vector, is not finite, or is zero without damping.

    Source: Wathen (2015), a survey.

    >>> diagonal_preconditioner(torch.tensor([3.0, -1.0]), damping=1.0)(torch.ones(2))
    tensor([0.2500, 0.5000])
    """
    call = "diagonal_preconditioner(diagonal)"
    if isinstance(diagonal, Estimate):
        raise InvalidInput(f"{call}: diagonal is {kind(diagonal)}; take the .mean of hutchinson_diag(...)")
    require_vector(diagonal, "diagonal", call)
    added = one_number(damping, "damping", call).abs()
    tree.require_finite(diagonal, "the diagonal")
    sizes = tree.map(lambda d: d.detach().to(torch.promote_types(d.dtype, torch.float32)).abs(), diagonal)
    mean = torch.stack([tree.wide(size.sum()) for size in tree.leaves(sizes)]).sum() / tree.numel(sizes)
    added = added.to(mean)
    least = _LEAST * mean + added
    if known(least > 0) is False:
        raise InvalidInput(f"{call}: the diagonal is zero and there is no damping: nothing can be divided by it")
    inverse = tree.map(lambda size: (size + added.to(size.dtype)).clamp(min=least.to(size.dtype)).reciprocal(), sizes)

    def precondition(v: T) -> T:
        factors = tree.matched(inverse, v, "the diagonal", "the vector")
        return tree.map(lambda x, factor: (x * factor).to(x.dtype), v, factors)

    return precondition


def spectral_preconditioner(eigenpairs: EigenPairs[T], damping: float | Tensor = 0.0) -> MatVec[T]:
    """A preconditioner from eigenpairs, for :func:`hessfn.solve`: it takes the outliers out of the spectrum.

    ``v -> Q (|Theta| + |damping|)^-1 Q'v + (v - QQ'v) / (min |theta| + |damping|)`` is the inverse of
    ``|A| + |damping|`` on the span of the eigenvectors, and a multiple of the identity on its complement. The known
    eigenvalues of the preconditioned system are +-1, the others lie between. With the k largest in magnitude, the
    condition number falls from ``|theta_1| / damping`` to ``|theta_k| / damping``.

    Args:
        eigenpairs: of :func:`hessfn.eigsh` with ``which="LM"``. They need not be accurate, but must be orthonormal.
        damping: that of the system.

    Returns:
        A function on trees like one of the eigenvectors, for ``solve(..., precondition=...)``.

    Cost: no product; k vectors kept.

    Raises:
        ValueError: these are no eigenpairs, they are not finite, or one is zero without damping.

    Source: Nicolaides (1987), deflation; Vecharynski and Knyazev (2013), the magnitude ``|A|``.

    >>> from hessfn import EigenPairs
    >>> pairs = EigenPairs(torch.tensor([3.0]), torch.eye(2)[:1], torch.zeros(1), torch.tensor(1), torch.tensor([True]))
    >>> spectral_preconditioner(pairs, damping=1.0)(torch.tensor([4.0, 8.0]))
    tensor([1., 2.])
    """
    call = "spectral_preconditioner(eigenpairs)"
    require_eigenpairs(eigenpairs, call)
    added = one_number(damping, "damping", call).abs()
    tree.require_finite(eigenpairs.values, "the eigenvalues")
    vectors = tree.map(lambda x: whole(x).detach(), eigenpairs.vectors)
    one = tree.map(lambda x: x[0], vectors)
    rows = vmap(lambda v: tree.ravel(v)[0], vectors)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    sizes = eigenpairs.values.detach().abs() + added.to(eigenpairs.values)
    rest = sizes.min()
    if known(rest > 0) is False:
        raise InvalidInput(f"{call}: an eigenvalue is zero and there is no damping: nothing can be divided by it")
    # Eigenvalues are not always where their vectors are.
    shares, inverse = (1 / sizes - 1 / rest).to(rows), (1 / rest).to(rows)

    def precondition(v: T) -> T:
        flat, unravel = tree.ravel(tree.matched(v, one, "the vector", "the eigenvectors"))
        flat = flat.to(rows.dtype)
        image = inverse * flat + (shares * (rows @ flat)) @ rows
        return tree.matched(unravel(image), v, "the preconditioned vector", "the vector")

    return precondition
