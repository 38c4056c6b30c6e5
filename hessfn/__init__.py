"""hessfn: functional Hessian analysis for PyTorch.

Make a matvec from a loss, transform it, consume it:

>>> import torch, hessfn as hf
>>> loss, params = hf.functionalize(torch.nn.Linear(3, 1), torch.nn.MSELoss())
>>> matvec = hf.hvp(loss, params, (torch.ones(4, 3), torch.zeros(4, 1)))
>>> estimate = hf.hutchinson(matvec, hf.rademacher(params, 10))
"""

from hessfn import batches, plot, tree
from hessfn.activation import activation_loss, activation_shapes
from hessfn.curvature import fvp, ggnvp, hvp, linearized_hvp, mean_hvp
from hessfn.distributed import all_reduce
from hessfn.eigen import EigenPair, EigenPairs, Tridiagonal, eigsh, lanczos, power_iter
from hessfn.graph import Untraceable
from hessfn.journal import journal
from hessfn.landscape import (
    Curvature,
    check_slice,
    direction_to,
    filter_normalized,
    gradient_direction,
    line,
    plane,
    random_direction,
    slice_curvature,
)
from hessfn.matvec import as_linear_operator, block, check_matvec, deflate, dense, progress, restrict
from hessfn.model import functionalize, stateless
from hessfn.probes import gaussian, rademacher
from hessfn.sensitivity import Sensitivities, activation_traces, sensitivities
from hessfn.sketch import hutchpp, xdiag, xtrace
from hessfn.spectrum import (
    Band,
    Cumulative,
    Density,
    Quadrature,
    cumulative,
    density,
    density_band,
    slq,
    trace_of,
    wasserstein,
)
from hessfn.trace import (
    Estimate,
    deflated_trace,
    hutchinson,
    hutchinson_diag,
    hutchinson_per_leaf,
    hutchinson_per_sample,
    mean_traces,
    squared_frobenius,
    squared_row_norms,
)
from hessfn.trajectory import Trajectory, principal_directions
from hessfn.tree import MatVec, Tree
from hessfn.ways import Way, choose_way

__all__ = [
    "Band",
    "Cumulative",
    "Curvature",
    "Density",
    "EigenPair",
    "EigenPairs",
    "Estimate",
    "MatVec",
    "Quadrature",
    "Sensitivities",
    "Trajectory",
    "Tree",
    "Tridiagonal",
    "Untraceable",
    "Way",
    "activation_loss",
    "activation_shapes",
    "activation_traces",
    "all_reduce",
    "as_linear_operator",
    "batches",
    "block",
    "check_matvec",
    "check_slice",
    "choose_way",
    "cumulative",
    "deflate",
    "deflated_trace",
    "dense",
    "density",
    "density_band",
    "direction_to",
    "eigsh",
    "filter_normalized",
    "functionalize",
    "fvp",
    "gaussian",
    "ggnvp",
    "gradient_direction",
    "hutchinson",
    "hutchinson_diag",
    "hutchinson_per_leaf",
    "hutchinson_per_sample",
    "hutchpp",
    "hvp",
    "journal",
    "lanczos",
    "line",
    "linearized_hvp",
    "mean_hvp",
    "mean_traces",
    "plane",
    "plot",
    "power_iter",
    "principal_directions",
    "progress",
    "rademacher",
    "random_direction",
    "restrict",
    "sensitivities",
    "slice_curvature",
    "slq",
    "squared_frobenius",
    "squared_row_norms",
    "stateless",
    "trace_of",
    "tree",
    "wasserstein",
    "xdiag",
    "xtrace",
]
