"""The solution of a linear system with a curvature matrix, with the residual it really has."""

from __future__ import annotations

from typing import Generic

import torch
from torch import Tensor
from typing_extensions import NamedTuple  # typing's own cannot be generic before Python 3.11

from hessfn.core import tree
from hessfn.core.arguments import require_function, require_matvec, require_vector
from hessfn.core.errors import InvalidInput
from hessfn.core.results import Solution
from hessfn.core.torch_state import known
from hessfn.core.tree import MatVec, T
from hessfn.core.watched import refuse_derivative
from hessfn.estimators import krylov
from hessfn.estimators.implicit import with_derivative
from hessfn.estimators.krylov import FlatMatVec, Space
from hessfn.estimators.minimal_residual import NOT_DEFINITE, correction
from hessfn.estimators.preconditioners import one_number

_RTOL = 1e-6  # what `converged` means where no tolerance was asked for
_MOST = 1000  # products, where no number was asked for


def solve(
    matvec: MatVec[T],
    b: T,
    *,
    damping: float | Tensor = 0.0,
    precondition: MatVec[T] | None = None,
    x0: T | None = None,
    rtol: float | None = 1e-6,
    max_matvecs: int | None = None,
    basis_size: int = 100,
) -> Solution[T]:
    """Solves ``(A + damping I) x = b`` for a symmetric A, definite or indefinite, by minimal residuals (MINRES).

    The basis of the Krylov space is kept and stays orthogonal. A three-term recurrence would need only about six
    vectors, but up to twice the products for spectra with outliers, as those of networks.

    Args:
        b: the right-hand side; everything is computed on its device.
        damping: of any sign, so it may also be a shift; a number, or a tensor with one number, for ``vmap`` and
            derivatives.
        precondition: a function ``v -> M v``, M symmetric positive definite and near the inverse of
            ``|A + damping I|``, as :func:`hessfn.diagonal_preconditioner` and :func:`hessfn.spectral_preconditioner`
            make it. The better M is, the fewer products; it does not change the solution.
        x0: where to start, such as the solution of a similar system.
        rtol: stop once ``||b - (A + damping I) x|| <= rtol ||b||``. None for exactly ``max_matvecs`` products, under
            ``vmap`` (several right-hand sides at once) and derivatives too; ``converged`` is then judged by 1e-6.
        max_matvecs: the most products spent, at least 2; by default 1000, or ``5 n + 10`` where that is fewer.
        basis_size: the most basis vectors kept; then the next cycle begins, from the residual. Fewer cost more
            products for spectra with outliers and for ill-conditioned matrices.

    Returns:
        ``x`` like b; ``residual = ||b - (A + damping I) x|| / ||b||`` of the x that is returned, in its dtype, computed
        with a product of its own; ``num_matvecs``; ``converged``. If it has not converged, the last x is returned. For
        a singular matrix it is the shortest x with the smallest residual; ``converged`` is False if that residual is
        larger than asked. No residual gets below the resolution of the dtype times ``||A|| ||x|| / ||b||``: in float32
        1e-6 needs a condition number up to 10, 1e-4 up to 1000. Beyond that the search ends, with ``converged`` False.

        Without ``rtol`` ``x`` has first derivatives, by b, by damping and by what the matvec closes over, in reverse
        and in forward mode. They are those of the solution and not of the steps to it, ``dx = (A + damping I)^-1 (db -
        dA x - d damping x)``, found in the same way with as many products, when they are asked for. The preconditioner
        and ``x0`` have none, nor has the residual, and a second derivative is refused.

    Cost: ``num_matvecs`` products: one for the residual of every cycle, and with ``x0`` one for the first; at its peak
        ``basis_size`` + 8 vectors, with a preconditioner twice ``basis_size`` + 12 (where fewer products are made,
        fewer are kept). The preconditioner is applied once for each.

    Raises:
        ValueError: b or ``x0`` is no vector, complex or not finite, a number is out of range, a product is not finite,
            the preconditioner is not positive definite, or (with ``rtol``) a derivative is asked for, or ``vmap`` hides
            what to stop on: pass ``rtol=None``.
        NotImplementedError: a second derivative is asked for.

    Source: Paige and Saunders (1975), of the minimal residual; Choi, Paige and Saunders (2011), of singular systems;
    Christianson (1994), of the derivative.

    >>> A = torch.diag(torch.tensor([2.0, -4.0]))
    >>> solve(lambda v: A @ v, torch.tensor([2.0, 2.0])).x
    tensor([ 1.0000, -0.5000])
    """
    call = "solve(matvec, b)"
    require_matvec(matvec, call)
    require_vector(b, "b", call)
    if any(leaf.is_complex() for leaf in tree.leaves(b)):
        raise InvalidInput(f"{call}: b is complex; give it as its real view, torch.view_as_real(b)")
    added = one_number(damping, "damping", call)
    if rtol is not None and not rtol > 0:
        raise InvalidInput(f"{call}: rtol={rtol} must be above 0, or None for a fixed number of products")
    if precondition is not None:
        require_function(precondition, "precondition", call)
    if x0 is not None:
        require_vector(x0, "x0", call)
        x0 = tree.matched(x0, b, "x0", "b")
    if rtol is None and max_matvecs is None:
        raise InvalidInput("rtol=None asks for a fixed number of products: give it as max_matvecs")
    budget = min(_MOST, 5 * tree.numel(b) + 10) if max_matvecs is None else max_matvecs
    if basis_size < 2:
        raise InvalidInput(f"basis_size={basis_size} must be at least 2")
    least = 2 if x0 is None else 3
    if budget < least:
        raise InvalidInput(f"max_matvecs={budget} must be at least {least}, of which one is for the residual")
    tree.require_finite((b, x0), "b or x0")
    if rtol is not None:
        refuse_derivative(b, x0, damping)

    space = krylov.flatten(matvec, b, tolerance=rtol is not None)

    rhs = space.ravel(b)
    added = added.to(rhs)

    def shifted(v: Tensor) -> Tensor:
        return krylov.less(space.matvec(v), -added, v)

    preconditioned = None if precondition is None else _flat(precondition, b, space)
    system = _System(space, shifted, preconditioned, basis_size)
    # Relative to a right-hand side of zeros no residual is small but that of zeros.
    start = None if x0 is None else torch.where(tree.norm(rhs.detach()) > 0, space.ravel(x0).detach().to(rhs), 0.0)
    if rtol is None:
        return _fixed(system, rhs, start, budget)
    return _until(system, rhs, start, rtol, budget)


def _flat(precondition: MatVec[T], like: T, space: Space[T]) -> FlatMatVec:
    """On flat vectors, without a derivative: it changes the way to the solution alone."""

    def product(v: Tensor) -> Tensor:
        image = space.ravel(tree.aligned(precondition(space.unravel(v)), like, "what precondition returns"))
        if image.device.type == "cpu":  # elsewhere to ask is to wait, and what is not finite is found at the end
            tree.require_finite(image, "what precondition returns")
        return image.detach()

    return product


class _System(NamedTuple, Generic[T]):
    space: Space[T]
    matvec: FlatMatVec  # with the damping
    precondition: FlatMatVec | None
    basis_size: int


def _fixed(system: _System[T], b: Tensor, x0: Tensor | None, num_matvecs: int) -> Solution[T]:
    """Cycles of known lengths, each from the residual that the last has left, all without a derivative but the end."""
    space = system.space

    def constant(v: Tensor) -> Tensor:
        with torch.no_grad():  # so that no product keeps a graph that nothing asks for
            return system.matvec(v).detach()

    fixed = b.detach()
    x, rest = (torch.zeros_like(fixed), fixed) if x0 is None else (x0, fixed - constant(x0))
    left = num_matvecs - (x0 is not None)
    while left:
        steps = min(system.basis_size, left - 1)
        steps -= left - steps - 1 == 1  # one product alone makes no cycle
        left -= steps + 1
        x = x + correction(constant, system.precondition, rest, steps, space.eps).x
        if known(x.isnan().any()):
            space.finished(torch.zeros((), device="cpu"))  # where it was a product, its number
            raise InvalidInput(NOT_DEFINITE)
        x = _returned(space, x)
        rest = b - system.matvec(x) if left == 0 else fixed - constant(x)
    residual = space.finished(_relative(rest.detach(), fixed))

    def inverse(v: Tensor) -> Tensor:
        return space.ravel(_fixed(system, v, None, num_matvecs).x)

    x = with_derivative(x, rest, inverse)
    return Solution(space.unravel(x), residual, torch.tensor(num_matvecs, device="cpu"), residual <= _RTOL)


def _until(system: _System[T], b: Tensor, x0: Tensor | None, rtol: float, budget: int) -> Solution[T]:
    """Cycles from true residuals, as long as one halves it: what rounding took from one, the next gives back."""
    space, matvec = system.space, system.matvec
    x, rest, count = (torch.zeros_like(b), b, 0) if x0 is None else (x0, b - matvec(x0), 1)
    residual, size = _relative(rest, b), tree.norm(b)
    goal = rtol * krylov.number(size, space.unravel(b), 0)
    while krylov.number(residual, space.unravel(rest), count) > rtol and count + 2 <= budget:
        steps = min(system.basis_size, budget - count - 1)
        found, spent, norm = correction(matvec, system.precondition, rest, steps, space.eps, goal)
        trial = _returned(space, x + found)
        trial_rest = b - matvec(trial)
        count += spent + 1
        before, trial_residual = residual, _relative(trial_rest, b)
        if trial_residual < before:
            x, rest, residual = trial, trial_rest, trial_residual
        if trial_residual >= before or (spent < steps and trial_residual > before / 2):
            break
        if trial_residual < 10 * (resolved := space.eps * norm * tree.norm(x)) / size and resolved > goal:
            break  # what is asked cannot be had: the residual itself is rounding
    space.finished(residual)
    return Solution(space.unravel(x), residual, torch.tensor(count, device="cpu"), residual <= rtol)


def _returned(space: Space[T], x: Tensor) -> Tensor:
    """The vector in the dtypes that the result has: the residual is that of what is returned."""
    return space.ravel(space.unravel(x))


def _relative(rest: Tensor, b: Tensor) -> Tensor:
    """Relative to b, and 0 where both are 0."""
    residual, size = tree.norm(rest), tree.norm(b)
    return torch.where(residual == 0, residual, residual / size)
