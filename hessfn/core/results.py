"""What public functions return: named tuples, which torch takes for trees, so that ``vmap`` and ``torch.save`` do.

Tensors are float64 where the device has it, unless said otherwise. ``T`` is the type of the trees that a matvec works
on; ``k`` is the number of eigenpairs, ``m`` of Lanczos steps, ``p`` of probes, ``n`` of entries of a vector, ``g`` of
points. The unit of the eigenvalues is that of the matrix: for a Hessian, of the loss over that of the parameters
squared. Under ``vmap`` all tensors carry the batch's axis in front.

Every tensor is contiguous and has memory of its own, so that a file has no more than is seen. ``torch.load`` reads the
results with its default ``weights_only=True``: when this module is loaded, which ``import hessfn`` does, it adds these
classes, which hold data and run nothing, to the list of what may be read.
"""

from __future__ import annotations

from typing import Generic

import torch
from torch import Tensor
from torch.serialization import add_safe_globals
from typing_extensions import NamedTuple, TypeVar  # typing's own cannot be generic before Python 3.11

from hessfn.core import tree
from hessfn.core.students_t import ends_of_squares, half_widths
from hessfn.core.tree import T

S = TypeVar("S", default=Tensor)


class EigenPair(NamedTuple, Generic[T]):
    """One eigenvalue of a matvec, from :func:`hessfn.power_iter`."""

    value: Tensor  #: (), the Rayleigh quotient ``v'Av``, in the unit of the eigenvalues
    vector: T  #: like ``v0``, of unit norm
    residual: Tensor  #: (), ``||A vector - value vector||``: an eigenvalue of A is no further than this from ``value``
    num_matvecs: Tensor  #: (), int64, the products that were made
    converged: Tensor  #: (), bool, whether ``residual <= rtol |value|``


class EigenPairs(NamedTuple, Generic[T]):
    """Several eigenvalues of a matvec, from :func:`hessfn.eigsh`."""

    values: Tensor  #: (k,), in the unit of the eigenvalues and the order that ``which`` asks for
    vectors: T  #: like ``v0`` with a leading axis of k: orthonormal
    residuals: Tensor  #: (k,), ``||A v - value v||`` of each: an eigenvalue of A is no further than this from its value
    num_matvecs: Tensor  #: (), int64, the products that were made
    converged: Tensor  #: (k,), bool, whether ``residual <= rtol |value|``, or is what rounding leaves of a value near 0
    rounding: Tensor | None = None  #: (k,), a bound for the error of each value by rounding; None: unknown
    data_stderr: Tensor | None = None  #: (k,), the standard error by the data, for samples of this size; None: unknown
    outside: Tensor | None = None  #: (2,), all other eigenvalues lie between, with probability 0.999; None: not known


class Tridiagonal(NamedTuple, Generic[T]):
    """The Lanczos recurrence ``A Q = Q T + residual e_m'``, from :func:`hessfn.lanczos`."""

    alpha: Tensor  #: (m,), the diagonal of T, in the unit of the eigenvalues
    beta: Tensor  #: (m - 1,), its off-diagonal, at least 0, in the same unit
    basis: T  #: like ``v0`` with a leading axis of m: the orthonormal columns of Q
    residual: T  #: like ``v0``: what the last product leaves outside of the basis


class Estimate(NamedTuple, Generic[S]):
    """A mean over random probes with its error; ``S`` is a tensor, or a tree of them."""

    mean: S  #: the estimate, in the unit of the quantity: scalars, or, of diagonals and rows, tensors like the probes
    stderr: S  #: like ``mean``: the standard error by the probes; inf for a single probe without other information
    num_matvecs: Tensor  #: (), int64, the products that were made
    df: Tensor | S | None = None  #: (), or like ``mean``: degrees of freedom of ``stderr``, no derivative; None: many
    rounding: S | None = None  #: like ``mean``: a bound for the error by rounding of the products; None: not measured
    data_stderr: S | None = None  #: like ``mean``: the standard error by the data; None: not measured
    least: S | None = None  #: like ``mean``: a lower bound of a sum of squares; None: for other quantities

    def interval(self, level: float = 0.95) -> tuple[S, S]:
        """Lower and upper end of the confidence interval by the probes: ``mean -+ t stderr``, Student's t of ``df``.

        It holds the exact value with the probability ``level``, or a higher one. Where ``least`` is known, the interval
        leans to the right, as sums of squares do, and stays above it. Errors of rounding and of the data are not in it.

        Source: the degrees of freedom as of Satterthwaite (1946).

        >>> import torch
        >>> found = Estimate(torch.tensor(5.0), torch.tensor(1.0), torch.tensor(11), torch.tensor(10.0))
        >>> [round(float(end), 3) for end in found.interval()]
        [2.772, 7.228]
        """
        if self.least is None or not isinstance(self.df, Tensor):
            half = half_widths(self.stderr, self.df, level)
            return tree.map(torch.sub, self.mean, half), tree.map(torch.add, self.mean, half)
        df, like = self.df, self.mean
        leaves = zip(*(tree.leaves(x) for x in (self.mean, self.stderr, self.least)), strict=True)
        ends = [ends_of_squares(mean, stderr, df, least, level) for mean, stderr, least in leaves]
        return tree.unflatten([lower for lower, _ in ends], like), tree.unflatten([upper for _, upper in ends], like)


class Quadrature(NamedTuple):
    """A Gauss rule for the spectrum as each probe sees it, from :func:`hessfn.slq`."""

    nodes: Tensor  #: (p, m), in the unit of the eigenvalues, ascending in each row
    weights: Tensor  #: (p, m), at least 0, without unit; each row sums to 1


class NegativeShare(NamedTuple):
    """The share of negative eigenvalues in the sum of squares, from :func:`hessfn.negative_share_of_squares`."""

    share: Estimate[Tensor]  #: (), from 0 to 1, without unit, with its error by the probes
    steps_error: Tensor  #: (), the error of the quadrature itself, which the probes do not see


class Density(NamedTuple):
    """A smoothed spectral density, from :func:`hessfn.density`."""

    grid: Tensor  #: (g,), in the unit of the eigenvalues
    values: Tensor  #: (g,), fraction of the eigenvalues per unit of eigenvalue: integrates to 1


class Band(NamedTuple):
    """A pointwise confidence band of a density, from :func:`hessfn.density_band`."""

    grid: Tensor  #: (g,), in the unit of the eigenvalues
    lower: Tensor  #: (g,), fraction of the eigenvalues per unit of eigenvalue, at least 0
    upper: Tensor  #: (g,), the same, at least ``lower``


class Cumulative(NamedTuple):
    """The fraction of the eigenvalues up to a point, from :func:`hessfn.cumulative`."""

    grid: Tensor  #: (g,), in the unit of the eigenvalues
    values: Tensor  #: (g,), from 0 to 1, without unit


class Curvature(NamedTuple):
    """The second derivative of a loss along a direction, from its values alone: :func:`hessfn.slice_curvature`."""

    value: Tensor  #: (), in the unit of the loss over that of the step squared: ``v'Hv`` for the direction ``v``
    error: Tensor  #: (), in the same unit, how far it may be off: truncation and rounding together


class CriticalSharpness(NamedTuple):
    """The curvature along an update, from a few losses: :func:`hessfn.critical_sharpness`."""

    value: Tensor  #: (), one over the unit of the step: ``2 / eta`` for the step eta at which the loss is back
    error: Tensor  #: (), in the same unit, how far it may be off: the ends and rounding together; inf: at least value
    steps: Tensor  #: (2,), the ends: one at which the loss is not above that at 0 (or 0), one at which it is (or inf)
    num_losses: Tensor  #: (), int64, the values of the loss that were taken
    converged: Tensor  #: (), bool, whether the ends are within ``rtol`` of each other


class Trajectory(NamedTuple, Generic[T]):
    """Principal directions of a training, and coordinates along them, from :func:`hessfn.principal_directions`."""

    directions: tuple[T, ...]  #: k orthonormal trees like a checkpoint, in its dtypes
    coordinates: Tensor  #: (c, k), of the c checkpoints along them, in the unit of the parameters
    fractions: Tensor  #: (k,), of the squared distances from the origin that each direction holds, from 0 to 1


class Sensitivities(NamedTuple):
    """Traces of each layer's weights and activations, from :func:`hessfn.sensitivities`; dicts by layer."""

    weights: Estimate[dict[str, Tensor]]  #: (), loss over weight squared: the trace of the weight's block
    activations: Estimate[dict[str, Tensor]]  #: (), loss over activation squared: the samples' mean trace
    weight_numel: dict[str, int]  #: entries of the weight
    activation_numel: dict[str, int]  #: entries of one sample's activations: of all calls and tensors together


class Mode(NamedTuple):
    """How Hessian-vector products of a loss are made, from :func:`hessfn.find_mode`."""

    mode: str  #: one of the modes of :func:`hessfn.hvp`
    reason: str  #: why no earlier mode would do; empty where the first one did
    error: float  #: relative error of the product where it is a difference, 0.0 where it is exact


class ProductRounding(NamedTuple, Generic[T]):
    """The relative rounding error of products, and bounds for traces, from :func:`hessfn.rounding_of_products`."""

    relative: Tensor  #: (), without unit: the norm of the error over that of the product
    total: Tensor  #: (), at least 0, in the unit of the eigenvalues: how far rounding may move the trace
    leaves: T  #: the same for the trace of every leaf's diagonal block: a tree of scalars


class Forms(NamedTuple, Generic[S]):
    """Quadratic forms of the matrix of every batch, from :func:`hessfn.batch_forms` and :func:`hessfn.batch_traces`."""

    values: S  #: (b, k), in the unit of the eigenvalues: ``v'A_b v`` of each of k vectors; or trees
    weights: Tensor  #: (b,), what each batch counts in the mean


class CrossFitted(NamedTuple):
    """A confidence interval for the extreme eigenvalue of all data, from :func:`hessfn.cross_fitted`."""

    lower: Tensor  #: (), in the unit of the eigenvalues: the lower end, with the data's error taken off
    upper: Tensor  #: (), the upper end, with the data's error on top
    crossed: Tensor  #: (), the mean Rayleigh quotient of each half's vector on the other half: too small for a largest
    crossed_stderr: Tensor  #: (), its standard error by the data
    in_sample: Tensor  #: (), the eigenvalue of all batches together: too large for a largest
    in_sample_stderr: Tensor  #: (), its standard error by the data
    num_matvecs: Tensor  #: (), int64, products with the mean over all batches, to which those of parts add up


class BlockTops(NamedTuple):
    """The eigenvalue of largest magnitude of some leaves' diagonal blocks, from :func:`hessfn.block_tops`."""

    values: dict[str, Tensor]  #: (), in the unit of the eigenvalues
    residuals: dict[str, Tensor]  #: (), ``||A_ll v - value v||``: an eigenvalue of the block is no further than this
    converged: dict[str, Tensor]  #: (), bool, whether the residual is at most ``rtol |value|``
    num_matvecs: Tensor  #: (), int64, the products that were made, for all of them


class FollowState(NamedTuple, Generic[T]):
    """The state of :func:`hessfn.follow` between two calls: a tree of tensors, to be saved with a training."""

    vectors: T  #: like ``like`` with a leading axis of k: the eigenvectors of the last call
    seed: Tensor  #: (), int64, of the next call's random direction


class Solution(NamedTuple, Generic[T]):
    """The solution of a linear system with a matvec, from :func:`hessfn.solve`."""

    x: T  #: like ``b``, in the unit of b over that of the matrix
    residual: Tensor  #: (), ``||b - (A + damping I) x|| / ||b||``, without unit, by a product with x; no derivative
    num_matvecs: Tensor  #: (), int64, the products that were made
    converged: Tensor  #: (), bool, whether ``residual <= rtol``


add_safe_globals([kind for kind in list(globals().values()) if hasattr(kind, "_fields")])
