"""hessfn: functional Hessian analysis for PyTorch.

Make a matvec from a loss, transform it, consume it:

>>> import torch, hessfn as hf
>>> loss, params = hf.functionalize(torch.nn.Linear(3, 1), torch.nn.MSELoss())
>>> matvec = hf.hvp(loss, params, (torch.ones(4, 3), torch.zeros(4, 1)))
>>> estimate = hf.hutchinson(matvec, hf.rademacher(params, 10))
"""

import importlib
from typing import TYPE_CHECKING, Any

# What everybody uses: trees, random trees, results, errors.
from hessfn.core import tree
from hessfn.core.config import show_config
from hessfn.core.errors import HessfnError, JournalError, Untraceable
from hessfn.core.probes import gaussian, rademacher
from hessfn.core.results import (
    Band,
    Cumulative,
    Curvature,
    Density,
    EigenPair,
    EigenPairs,
    Estimate,
    Mode,
    Quadrature,
    Sensitivities,
    Trajectory,
    Tridiagonal,
)
from hessfn.core.tree import MatVec, Tree

# Losses: a model and its data as a function.
from hessfn.losses import batches
from hessfn.losses.activation import activation_loss, activation_shapes
from hessfn.losses.functional import functionalize, stateless

# Make a matvec from a loss.
from hessfn.products.gauss_newton import fvp, ggnvp
from hessfn.products.hessian import hvp, linearized_hvp, mean_hvp
from hessfn.products.modes import find_mode

# Transform one.
from hessfn.parallel.all_reduce import ShardedBatches, all_reduce
from hessfn.storage.product_journal import journal
from hessfn.transforms.blocks import block, restrict
from hessfn.transforms.conversion import as_linear_operator, dense
from hessfn.transforms.deflation import deflate
from hessfn.transforms.matvec_check import check_matvec
from hessfn.transforms.progress_bar import progress

# Consume one.
from hessfn.estimators.eigen import eigsh, lanczos, power_iter
from hessfn.estimators.hutchinson import (
    deflated_trace,
    hutchinson,
    hutchinson_diag,
    hutchinson_per_leaf,
    hutchinson_per_sample,
    mean_traces,
    squared_frobenius,
    squared_row_norms,
)
from hessfn.estimators.leave_one_out import hutchpp, xdiag, xtrace
from hessfn.estimators.spectrum import cumulative, density, density_band, slq, trace_of, wasserstein
from hessfn.quantization.sensitivity import activation_traces, sensitivities

# Landscapes and pictures.
from hessfn.landscape.directions import direction_to, filter_normalized, gradient_direction, random_direction
from hessfn.landscape.slice_check import check_slice, slice_curvature
from hessfn.landscape.slices import line, plane
from hessfn.landscape.trajectory import principal_directions
from hessfn.plotting import plot

if TYPE_CHECKING:
    from hessfn.reporting.compare import compare
    from hessfn.reporting.run import report

# The main job is loaded when it is first asked for: it imports figures and templates.
_LOADED_WHEN_USED = {
    "compare": ("hessfn.reporting.compare", "compare"),
    "report": ("hessfn.reporting.run", "report"),
    "Way": ("hessfn.core.results", "Mode"),  # the names of before
    "choose_way": ("hessfn.products.modes", "find_mode"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("hessfn")
    if name in _LOADED_WHEN_USED:
        module, attribute = _LOADED_WHEN_USED[name]
        return getattr(importlib.import_module(module), attribute)
    raise AttributeError(f"module 'hessfn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


__all__ = [
    "Band",
    "Cumulative",
    "Curvature",
    "Density",
    "EigenPair",
    "EigenPairs",
    "Estimate",
    "HessfnError",
    "JournalError",
    "MatVec",
    "Mode",
    "Quadrature",
    "Sensitivities",
    "ShardedBatches",
    "Trajectory",
    "Tree",
    "Tridiagonal",
    "Untraceable",
    "activation_loss",
    "activation_shapes",
    "activation_traces",
    "all_reduce",
    "as_linear_operator",
    "batches",
    "block",
    "check_matvec",
    "check_slice",
    "compare",
    "cumulative",
    "deflate",
    "deflated_trace",
    "dense",
    "density",
    "density_band",
    "direction_to",
    "eigsh",
    "filter_normalized",
    "find_mode",
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
    "report",
    "restrict",
    "sensitivities",
    "show_config",
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
