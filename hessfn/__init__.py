"""hessfn: functional Hessian analysis for PyTorch.

Make a matvec from a loss, transform it, consume it:

>>> import torch, hessfn as hf
>>> loss, params = hf.functionalize(torch.nn.Linear(3, 1), torch.nn.MSELoss())
>>> matvec = hf.hvp(loss, params, (torch.ones(4, 3), torch.zeros(4, 1)))
>>> estimate = hf.hutchinson(matvec, hf.rademacher(params, 10))
"""

import importlib
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # What everybody uses: trees, random trees, results, errors.
    from hessfn.core import tree
    from hessfn.core.config import show_config
    from hessfn.core.errors import HessfnError, JournalError, Untraceable
    from hessfn.core.probes import gaussian, rademacher
    from hessfn.core.results import (
        Band,
        BlockTops,
        CriticalSharpness,
        CrossFitted,
        Cumulative,
        Curvature,
        Density,
        EigenPair,
        EigenPairs,
        Estimate,
        FollowState,
        Forms,
        Mode,
        NegativeShare,
        ProductRounding,
        Quadrature,
        Sensitivities,
        Solution,
        Trajectory,
        Tridiagonal,
    )
    from hessfn.core.tree import MatVec, Tree

    # Losses: a model and its data as a function.
    from hessfn.losses import batches
    from hessfn.losses.activation import activation_loss, activation_shapes
    from hessfn.losses.functional import functionalize, stateless

    # Make a matvec from a loss.
    from hessfn.products.batch_forms import batch_forms, batch_traces
    from hessfn.products.batch_mean import batch_mean
    from hessfn.products.exact_gauss_newton import ggn_diagonal, ggn_traces
    from hessfn.products.fisher import fvp
    from hessfn.products.gauss_newton import ggnvp
    from hessfn.products.hessian import hvp, linearized_hvp, mean_hvp
    from hessfn.products.ladder import find_mode

    # Transform one.
    from hessfn.parallel.all_reduce import ShardedBatches, all_reduce
    from hessfn.storage.product_journal import journal
    from hessfn.transforms.blocks import block, restrict
    from hessfn.transforms.conversion import as_linear_operator, dense
    from hessfn.transforms.deflation import deflate
    from hessfn.transforms.matvec_check import check_matvec
    from hessfn.transforms.progress_bar import progress
    from hessfn.transforms.scaling import scaled

    # Consume one.
    from hessfn.estimators.block_spectra import eigsh_per_block, slq_per_block
    from hessfn.estimators.data_error import cross_fitted, data_interval, data_stderr, trace_data_stderr
    from hessfn.estimators.distances import jensen_shannon, jensen_shannon_per_pair
    from hessfn.estimators.eigen import eigsh, lanczos, power_iter
    from hessfn.estimators.hutchinson import (
        deflated_trace,
        hutchinson,
        hutchinson_diag,
        hutchinson_per_leaf,
        hutchinson_per_sample,
        mean_traces,
    )
    from hessfn.estimators.layer_blocks import block_tops, squared_frobenius_per_leaf, stable_ranks
    from hessfn.estimators.leave_one_out import hutchpp, xdiag, xtrace
    from hessfn.estimators.negative import negative_share_of_squares
    from hessfn.estimators.preconditioners import diagonal_preconditioner, spectral_preconditioner
    from hessfn.estimators.solve import solve
    from hessfn.estimators.spectral_sums import trace_of
    from hessfn.estimators.rounding import (
        kind_of_rounding,
        rounding_of_pairs,
        rounding_of_products,
        rounding_of_trace,
    )
    from hessfn.estimators.spectrum import (
        cumulative,
        density,
        density_band,
        quadrature_of,
        slq,
        wasserstein,
    )
    from hessfn.estimators.squared_norms import squared_frobenius, squared_row_norms
    from hessfn.quantization.bits import allocate_bits, expected_rise
    from hessfn.quantization.quantizer import quantized
    from hessfn.quantization.sensitivity import activation_traces, sensitivities

    # Along a training.
    from hessfn.training.adam import adam_scale
    from hessfn.training.critical import critical_sharpness
    from hessfn.training.follow import follow

    # Landscapes and pictures.
    from hessfn.landscape.directions import direction_to, filter_normalized, gradient_direction, random_direction
    from hessfn.landscape.slice_check import check_slice, slice_curvature
    from hessfn.landscape.slices import line, plane
    from hessfn.landscape.trajectory import principal_directions
    from hessfn.plotting import plot

    # The main job.
    from hessfn.reporting.compare import compare
    from hessfn.reporting.run import report

    Way, choose_way = Mode, find_mode
    __version__: str

# Where each name is. It is loaded when it is first asked for, so that what a program does not use costs it no time.
_HOMES = {
    "hessfn.core": "tree",
    "hessfn.core.config": "show_config",
    "hessfn.core.errors": "HessfnError JournalError Untraceable",
    "hessfn.core.probes": "gaussian rademacher",
    "hessfn.core.results": (
        "Band BlockTops CriticalSharpness CrossFitted Cumulative Curvature Density EigenPair EigenPairs "
        "Estimate FollowState Forms Mode NegativeShare ProductRounding Quadrature Sensitivities Solution Trajectory "
        "Tridiagonal"
    ),
    "hessfn.core.tree": "MatVec Tree",
    "hessfn.losses": "batches",
    "hessfn.losses.activation": "activation_loss activation_shapes",
    "hessfn.losses.functional": "functionalize stateless",
    "hessfn.products.batch_forms": "batch_forms batch_traces",
    "hessfn.products.batch_mean": "batch_mean",
    "hessfn.products.exact_gauss_newton": "ggn_diagonal ggn_traces",
    "hessfn.products.fisher": "fvp",
    "hessfn.products.gauss_newton": "ggnvp",
    "hessfn.products.hessian": "hvp linearized_hvp mean_hvp",
    "hessfn.products.ladder": "find_mode",
    "hessfn.parallel.all_reduce": "ShardedBatches all_reduce",
    "hessfn.storage.product_journal": "journal",
    "hessfn.transforms.blocks": "block restrict",
    "hessfn.transforms.conversion": "as_linear_operator dense",
    "hessfn.transforms.deflation": "deflate",
    "hessfn.transforms.matvec_check": "check_matvec",
    "hessfn.transforms.progress_bar": "progress",
    "hessfn.transforms.scaling": "scaled",
    "hessfn.estimators.block_spectra": "eigsh_per_block slq_per_block",
    "hessfn.estimators.data_error": "cross_fitted data_interval data_stderr trace_data_stderr",
    "hessfn.estimators.distances": "jensen_shannon jensen_shannon_per_pair",
    "hessfn.estimators.eigen": "eigsh lanczos power_iter",
    "hessfn.estimators.hutchinson": (
        "deflated_trace hutchinson hutchinson_diag hutchinson_per_leaf hutchinson_per_sample mean_traces"
    ),
    "hessfn.estimators.layer_blocks": "block_tops squared_frobenius_per_leaf stable_ranks",
    "hessfn.estimators.leave_one_out": "hutchpp xdiag xtrace",
    "hessfn.estimators.negative": "negative_share_of_squares",
    "hessfn.estimators.preconditioners": "diagonal_preconditioner spectral_preconditioner",
    "hessfn.estimators.solve": "solve",
    "hessfn.estimators.spectral_sums": "trace_of",
    "hessfn.estimators.rounding": "kind_of_rounding rounding_of_pairs rounding_of_products rounding_of_trace",
    "hessfn.estimators.spectrum": "cumulative density density_band quadrature_of slq wasserstein",
    "hessfn.estimators.squared_norms": "squared_frobenius squared_row_norms",
    "hessfn.quantization.bits": "allocate_bits expected_rise",
    "hessfn.quantization.quantizer": "quantized",
    "hessfn.quantization.sensitivity": "activation_traces sensitivities",
    "hessfn.training.adam": "adam_scale",
    "hessfn.training.critical": "critical_sharpness",
    "hessfn.training.follow": "follow",
    "hessfn.landscape.directions": "direction_to filter_normalized gradient_direction random_direction",
    "hessfn.landscape.slice_check": "check_slice slice_curvature",
    "hessfn.landscape.slices": "line plane",
    "hessfn.landscape.trajectory": "principal_directions",
    "hessfn.plotting": "plot",
    "hessfn.reporting.compare": "compare",
    "hessfn.reporting.run": "report",
}
_FOUND_IN = {name: module for module, names in _HOMES.items() for name in names.split()}
_NAMES_OF_BEFORE = {"Way": "Mode", "choose_way": "find_mode"}

if not TYPE_CHECKING:  # else every name would be one to a type checker

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            return importlib.import_module("importlib.metadata").version("hessfn")
        if name in _NAMES_OF_BEFORE:
            return __getattr__(_NAMES_OF_BEFORE[name])
        if name not in _FOUND_IN:
            raise AttributeError(f"module 'hessfn' has no attribute {name!r}")
        home = importlib.import_module(_FOUND_IN[name])
        # A name is a function or a class of its home, or else a module in it.
        found = getattr(home, name) if hasattr(home, name) else importlib.import_module(f"{home.__name__}.{name}")
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


def _is_the_command() -> bool:
    """Whether this is ``hessfn`` or ``python -m hessfn``, which may be asked for no more than its version."""
    program = (getattr(sys, "argv", None) or [""])[0]
    words = {*sys.orig_argv, *map("".join, pairwise(sys.orig_argv))}
    return Path(program).stem == "hessfn" or (program == "-m" and "-mhessfn" in words)


if not _is_the_command():
    # With torch: torch.load then knows the classes of results, in whatever order a program imports.
    importlib.import_module("hessfn.core.results")

__all__ = [
    "Band", "BlockTops", "CriticalSharpness", "CrossFitted", "Cumulative", "Curvature", "Density", "EigenPair",
    "EigenPairs", "Estimate", "FollowState", "Forms", "HessfnError", "JournalError", "MatVec", "Mode", "NegativeShare",
    "ProductRounding", "Quadrature", "Sensitivities", "ShardedBatches", "Solution", "Trajectory", "Tree",
    "Tridiagonal", "Untraceable", "activation_loss", "activation_shapes", "activation_traces", "adam_scale",
    "all_reduce", "allocate_bits", "as_linear_operator", "batch_forms", "batch_mean", "batch_traces", "batches",
    "block", "block_tops", "check_matvec", "check_slice", "compare", "critical_sharpness", "cross_fitted",
    "cumulative", "data_interval", "data_stderr", "deflate", "deflated_trace", "dense", "density", "density_band",
    "diagonal_preconditioner", "direction_to", "eigsh", "eigsh_per_block", "expected_rise", "filter_normalized",
    "find_mode", "follow", "functionalize", "fvp", "gaussian", "ggn_diagonal", "ggn_traces", "ggnvp",
    "gradient_direction", "hutchinson", "hutchinson_diag", "hutchinson_per_leaf", "hutchinson_per_sample", "hutchpp",
    "hvp", "jensen_shannon", "jensen_shannon_per_pair", "journal", "kind_of_rounding", "lanczos", "line",
    "linearized_hvp", "mean_hvp", "mean_traces", "negative_share_of_squares", "plane", "plot", "power_iter",
    "principal_directions", "progress", "quadrature_of", "quantized", "rademacher", "random_direction", "report",
    "restrict", "rounding_of_pairs", "rounding_of_products", "rounding_of_trace", "scaled", "sensitivities",
    "show_config", "slice_curvature", "slq", "slq_per_block", "solve", "spectral_preconditioner", "squared_frobenius",
    "squared_frobenius_per_leaf", "squared_row_norms", "stable_ranks", "stateless", "trace_data_stderr", "trace_of",
    "tree", "wasserstein", "xdiag", "xtrace",
]  # fmt: skip
