"""What rounding does to eigenpairs and traces: one product is held against the same in a wider dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hessfn.core import tree
from hessfn.core.arguments import kind, require_eigenpairs, require_matvec, require_vector
from hessfn.core.errors import InvalidInput
from hessfn.core.probes import rademacher
from hessfn.core.results import EigenPairs, ProductRounding
from hessfn.core.tree import MatVec, T
from hessfn.core.watched import Watched


def rounding_of_pairs(matvec: MatVec[T], exact: MatVec[T], eigenpairs: EigenPairs[T]) -> Tensor:
    """A bound for the error that rounding adds to every eigenpair's residual, from one comparison of two products.

    A residual is computed with rounded products, so it does not contain their rounding. With ``E`` the difference of
    the exact matrix and the one that the products belong to, ``||A q - theta q|| <= residual + ||E q||``.
    ``||E v||`` of one vector, ``v = sum_i s_i q_i / sqrt(k)`` with random signs, has all pairs in it:
    ``k ||E v||^2`` is ``sum_i ||E q_i||^2`` on average over the signs. Six tenths of it are
    divided among the pairs in proportion to ``|theta_i|``, as for rounding in the factors of ``A = J'HJ``, and four
    tenths equally, as for rounding of a plain matrix. Twice the root of a share is the bound; the factor 2 allows for
    the randomness of one vector.

    Args:
        matvec: the products that the pairs were computed with: float32, TF32, bfloat16.
        exact: products with the same matrix in float64 (float32 on a device that has none); it is called once, with
            the vector in that dtype.
        eigenpairs: what ``eigsh`` returns; ``values`` and ``vectors`` are used.

    Returns:
        ``(k,)``, at least 0, in the unit of the eigenvalues: an eigenvalue of the exact matrix is no further than
        ``residuals + rounding`` from each value, in at least 95 % of cases. For a bound of one pair, give that pair
        alone, ``k = 1``: the bound is then 2 ``||E q||``.

    Cost: one product of each; three vectors kept, in float64.

    Raises:
        ValueError: an argument is of another kind, or a product is not finite.

    Source: the bound of residuals is Parlett's (1998); Higham (2002) for what rounding does to products.

    >>> from hessfn import eigsh
    >>> d = torch.tensor([3.0, 1.0, 0.1], dtype=torch.float64)
    >>> coarse = lambda v: ((d * v).bfloat16()).double()
    >>> pairs = eigsh(coarse, torch.ones(3, dtype=torch.float64), k=2)
    >>> rounding_of_pairs(coarse, lambda v: d * v, pairs) < 0.1
    tensor([True, True])
    """
    call = "rounding_of_pairs(matvec, exact, eigenpairs)"
    _require_kinds(matvec, exact, call)
    require_eigenpairs(eigenpairs, call)
    values, vectors = eigenpairs.values.detach(), tree.map(Tensor.detach, eigenpairs.vectors)
    k = len(values)
    signs = rademacher(values, 1, seed=_SIGNS)[0] / math.sqrt(k)
    mean = tree.map(lambda q: torch.tensordot(signs.to(q), q, 1), vectors)
    error = tree.norm(_difference(matvec, exact, mean)[0]).to(values)
    size = values.abs()
    shares = _EVEN / k + (1 - _EVEN) * size / size.sum().clamp(min=torch.finfo(size.dtype).tiny)
    # The vectors themselves were rounded to their dtype after the residual was known.
    own = tree.eps(vectors) / 4 * (size + size.max())
    return _SAFETY * error * (k * shares).sqrt() + own


_EVEN = 0.4  # the part of the error that all pairs share alike
_SAFETY = 2.0
_SIGNS = 0xE44  # a stream of its own


def rounding_of_products(matvec: MatVec[T], exact: MatVec[T], probe: T) -> ProductRounding[T]:
    """The relative rounding error of products, and bounds for the error of traces, from one random vector.

    With ``E`` the difference of the exact matrix A and of A', the one that the products belong to, and ``e = E z``: a
    mean of ``z'A'z`` instead of ``z'Az`` is off by ``tr E``, block by block. ``z_l'e_l`` has this mean, and at most
    ``sqrt(2) ||e_l||`` for a standard error. So ``|z_l'e_l| + 2 sqrt(2) ||e_l||`` covers it.

    Args:
        matvec, exact: as for :func:`rounding_of_pairs`.
        probe: ``rademacher(params, 1)[0]``, or another with ``E zz' = I``.

    Returns:
        ``relative``, for :func:`kind_of_rounding`, and bounds for the trace of the whole and of every leaf's block:
        float64 scalars.

    Cost: one product of each; three vectors kept, in float64.

    Raises:
        ValueError: an argument is of another kind, or a product is not finite.

    Source: Higham (2002), for what rounding does to products.

    >>> d = torch.tensor([3.0, 1.0], dtype=torch.float64)
    >>> found = rounding_of_products(lambda v: (d * v).bfloat16().double(), lambda v: d * v, torch.ones(2).double())
    >>> found.relative, found.total
    (tensor(0., dtype=torch.float64), tensor(0., dtype=torch.float64))
    """
    return _rounding(matvec, exact, probe, "rounding_of_products(matvec, exact, probe)")


def _rounding(matvec: MatVec[T], exact: MatVec[T], probe: T, call: str) -> ProductRounding[T]:
    _require_kinds(matvec, exact, call)
    require_vector(probe, "probe", call)
    error, image = _difference(matvec, exact, probe)
    biases = [tree.dot(z, e) for z, e in zip(tree.leaves(probe), tree.leaves(error), strict=True)]
    noises = [tree.norm(e) for e in tree.leaves(error)]
    bounds = [bias.abs() + _NOISES * noise for bias, noise in zip(biases, noises, strict=True)]
    whole = torch.stack([x.cpu() for x in biases]).sum().abs() + _NOISES * tree.norm(error).cpu()
    size = tree.norm(image)
    return ProductRounding(
        tree.norm(error) / size.clamp(min=torch.finfo(size.dtype).tiny), whole, tree.unflatten(bounds, error)
    )


def rounding_of_trace(matvec: MatVec[T], exact: MatVec[T], probe: T) -> T:
    """How far rounding may move the trace of every leaf's block: ``leaves`` of :func:`rounding_of_products` alone.

    Args:
        matvec, exact, probe: as for :func:`rounding_of_products`.

    Returns:
        A tree like ``probe`` of float64 scalars, at least 0, in the unit of the eigenvalues. The bound for the whole
        trace, ``total`` there, is smaller than their sum.

    Cost: one product of each; three vectors kept, in float64.

    Raises:
        ValueError: as for :func:`rounding_of_products`.

    Source: as for :func:`rounding_of_products`.

    >>> d = torch.tensor([3.0, 1.0], dtype=torch.float64)
    >>> rounding_of_trace(lambda v: d * v, lambda v: d * v, torch.ones(2, dtype=torch.float64))
    tensor(0., dtype=torch.float64)
    """
    return _rounding(matvec, exact, probe, "rounding_of_trace(matvec, exact, probe)").leaves


_NOISES = 2 * math.sqrt(2)


def kind_of_rounding(relative: Tensor | float, dtype: torch.dtype) -> str:
    """Names the arithmetic that products with this relative error were computed in, if it is not that of their dtype.

    Products of a deep net lose some digits by themselves: in float32 they are good to about 1e-5. A far larger error
    means another arithmetic, such as TF32, which multiplies with 10 bits after the point and replaces float32 on some
    GPUs. A library cannot rely on the settings, so the products tell.

    Args:
        relative: the field ``relative`` of :func:`rounding_of_products`.
        dtype: of the vectors.

    Returns:
        A sentence with the remedy, or an empty string where the error is what ``dtype`` leads one to expect.

    Cost: no product.

    Raises:
        ValueError: ``dtype`` is no dtype of torch.

    >>> kind_of_rounding(4e-6, torch.float32)
    ''
    >>> kind_of_rounding(1.8e-2, torch.float32).partition(":")[0]
    'products in float32 are good to 2e-02, as with TF32'
    """
    if not isinstance(dtype, torch.dtype):
        raise InvalidInput(f"kind_of_rounding(relative, dtype): dtype is {kind(dtype)}, not a dtype of torch's")
    error = float(relative)
    if dtype == torch.float32 and error > _TF32:
        return (
            f"products in float32 are good to {error:.0e}, as with TF32: it multiplies with 10 bits after the point, "
            "float32 with 23. For more set torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32 "
            "to False, or torch.set_float32_matmul_precision('highest')"
        )
    if dtype == torch.float64 and error > math.sqrt(torch.finfo(dtype).eps):
        return f"products in float64 are good to {error:.0e} only, as if they were computed in float32 or less"
    if dtype in (torch.float16, torch.bfloat16):
        return f"products in {str(dtype).removeprefix('torch.')} are good to {error:.0e}: float32 has more digits"
    return ""


# Rounding to 10 bits is off by 2e-4 on average, a single product by about as much; float32 by 3e-8, times the 30 to 300
# that a deep net makes of it.
_TF32 = 1e-4


def _require_kinds(matvec: MatVec[T], exact: MatVec[T], call: str) -> None:
    require_matvec(matvec, call)
    require_matvec(exact, call)


def _difference(matvec: MatVec[T], exact: MatVec[T], v: T) -> tuple[T, T]:
    """``exact(v) - matvec(v)`` and ``exact(v)``, wide; of the same ``v``, in the dtype that ``matvec`` takes."""
    # Detached, not under no_grad: a matvec of the caller's own may differentiate.
    coarse, fine = _detached(matvec, v), _detached(exact, tree.map(tree.wide, v))
    pairs = zip(tree.leaves(fine), tree.leaves(coarse), strict=True)
    if any(_digits(a) < _digits(b) for a, b in pairs):
        raise InvalidInput("the products of exact are coarser than those of matvec: give them in this order")
    error = tree.map(lambda a, b: tree.wide(a) - tree.wide(b), fine, tree.matched(coarse, fine, "matvec", "exact"))
    return error, fine


def _detached(matvec: MatVec[T], v: T) -> T:
    product = Watched(matvec)
    return product.finished(tree.map(Tensor.detach, product(v)))


def _digits(x: Tensor) -> float:
    return -math.log10(torch.finfo(x.dtype).eps)
