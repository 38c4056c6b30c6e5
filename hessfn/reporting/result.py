"""What ``report.json`` holds: the numbers of an analysis by name, and what it takes to compute them again."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from datetime import datetime, timezone
from typing import Any

from torch import Tensor

from hessfn.core import tree
from hessfn.core.config import numerics
from hessfn.core.fingerprints import fingerprint
from hessfn.core.results import EigenPairs, Estimate, Sensitivities
from hessfn.core.tree import Tree
from hessfn.estimators.data_error import data_stderr
from hessfn.reporting.analysis import Analysis, Landscape, Layers, Samples
from hessfn.reporting.options import Options
from hessfn.reporting.problem import FirstPass, Prepared

SCHEMA = 2  # of report.json


def result_of(
    analysis: Analysis, problem: Prepared, first: FirstPass, options: Options, seconds: float
) -> dict[str, Any]:
    """All of it as JSON has it: see :func:`hessfn.report`."""
    activations = analysis.activations
    result = {
        "schema": SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "loss": analysis.loss,
        "loss_data_stderr": _loss_stderr(analysis),
        "accuracy": _accuracy(first),
        "gradient_norm": tree.norm(first.gradient),
        **_spectrum(analysis, problem.params),
        "activations": None if activations is None else _activations(activations),
        "landscape": _landscape(analysis.landscape),
        "model": _model(problem),
        "data": {
            "num_batches": len(first.sizes),
            "batch_sizes": first.sizes,
            "num_samples": sum(first.sizes),
            "parts": len(analysis.samples.weights),
        },
        "cost": {
            "products": analysis.num_products,
            "seconds": seconds,
            "stages": analysis.stages,
            "threads": int(numerics()["threads"]),
            "kernel": any(not x.startswith(("none", "off")) for name, x in numerics().items() if name != "threads"),
            "products_mode": analysis.mode,
        },
        "settings": _settings(analysis, problem, first, options),
        "versions": {
            **versions("hessfn", "torch", "numpy", "scipy", "matplotlib"),
            "python": platform.python_version(),
        },
    }
    result["samples"] |= {"probe_seed": options.seed, "data": fingerprint(first.fingerprints["data"])}
    return plain(result)


def _accuracy(first: FirstPass) -> dict[str, Any] | None:
    """With the standard error of a share of so many samples."""
    if first.accuracy is None:
        return None
    share = first.accuracy
    return {"value": share, "stderr": (share * (1 - share) / sum(first.sizes)).sqrt()}


def _loss_stderr(analysis: Analysis) -> Tensor | None:
    """By the spread over groups of the data; None of a single one."""
    losses, weights = analysis.group_losses, analysis.samples.weights
    return data_stderr(losses, weights) if len(losses) > 1 else None


def _model(problem: Prepared) -> dict[str, Any]:
    modules = list(problem.model.modules())
    training = {module.training for module in modules}
    return {
        "name": type(problem.model).__name__,
        "layers": sum(any(True for _ in module.parameters(recurse=False)) for module in modules),
        "parameters": tree.numel(problem.params),
        "mode": "mixed" if len(training) > 1 else "training" if training == {True} else "eval",
        "criterion": getattr(problem.criterion, "__name__", type(problem.criterion).__name__),
    }


def plain(x: Any) -> Any:
    """What JSON can say: tensors as numbers or lists, what is not finite as null."""
    if isinstance(x, Tensor):
        return plain(x.tolist())
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [plain(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def versions(*packages: str) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in packages}


def _spectrum(found: Analysis, params: Tree) -> dict[str, Any]:
    density, band, layers, below = found.density, found.band, found.layers, found.negative
    return {
        "eigenvalues": found.eigen.values,
        "residuals": found.eigen.residuals,
        "rounding": found.eigen.rounding,
        "data_stderr": found.eigen.data_stderr,
        "converged": found.eigen.converged,
        "outside": found.eigen.outside,
        "sharpness": {
            **_pair(found.sharpness.pair),
            "lower": found.sharpness.lower,
            "upper": found.sharpness.upper,
        },
        "trace": _estimate(found.trace),
        "negative_curvature": {
            "smallest": _pair(below.smallest),
            "share_of_squares": {
                "mean": below.share.mean,
                "stderr": below.share.stderr,
                "steps_error": below.steps_error,
            },
        },
        "density": {
            "grid": density.grid,
            "values": density.values,
            "lower": None if band is None else band.lower,
            "upper": None if band is None else band.upper,
        },
        "layers": {name: _layer(name, layers, params[name].numel()) for name in layers.trace.mean},
        "samples": _samples(found.samples, found.group_losses),
    }


def _pair(pair: EigenPairs) -> dict[str, Any]:
    """Of one eigenpair."""
    return {
        "value": pair.values[0],
        "residual": pair.residuals[0],
        "rounding": None if pair.rounding is None else pair.rounding[0],
        "data_stderr": None if pair.data_stderr is None else pair.data_stderr[0],
        "converged": pair.converged[0],
    }


def _estimate(found: Estimate) -> dict[str, Any]:
    lower, upper = found.interval()
    return {
        "mean": found.mean,
        "stderr": found.stderr,
        "rounding": found.rounding,
        "data_stderr": found.data_stderr,
        "lower": lower,
        "upper": upper,
    }


def _layer(name: str, layers: Layers, numel: int) -> dict[str, Any]:
    trace, rank = layers.trace, layers.stable_rank
    return {
        "numel": numel,
        "trace": trace.mean[name],
        "stderr": trace.stderr[name],
        "rounding": None if trace.rounding is None else trace.rounding[name],
        "data_stderr": None if trace.data_stderr is None else trace.data_stderr[name],
        "top": layers.top.get(name),
        "top_residual": layers.top_residual.get(name),
        "stable_rank": rank.mean.get(name),
        "stable_rank_stderr": rank.stderr.get(name),
        "pairs_share": layers.pairs_share[name],
    }


def _samples(samples: Samples, losses: Tensor) -> dict[str, Any]:
    return {
        "trace": samples.trace,
        "layers": samples.layers,
        "plain": {"trace": samples.plain_trace, "layers": samples.plain_layers},
        "batch_weights": samples.weights,
        "batches": {
            "losses": losses,
            "trace": samples.group_trace,
            "eigenvalues": samples.group_eigenvalues,
            "layers": samples.group_layers,
        },
    }


def _activations(found: Sensitivities) -> dict[str, Any]:
    return {
        name: {
            "numel": found.activation_numel[name],
            "trace": trace,
            "stderr": found.activations.stderr[name],
            "weight_numel": found.weight_numel[name],
            "weight_trace": found.weights.mean[name],
            "weight_stderr": found.weights.stderr[name],
        }
        for name, trace in found.activations.mean.items()
    }


def _landscape(landscape: Landscape) -> dict[str, Any]:
    return {**landscape._asdict(), "plane": None if landscape.plane is None else landscape.plane._asdict()}


def _settings(analysis: Analysis, problem: Prepared, first: FirstPass, options: Options) -> dict[str, Any]:
    """The options, with what the model and the data have made of them."""
    leaf = tree.leaves(problem.params)[0]
    return {
        "problem": options.name,
        "num_parameters": tree.numel(problem.params),
        "num_samples": sum(first.sizes),
        **options.settings(),
        "dtype": str(leaf.dtype).removeprefix("torch."),
        "device": str(leaf.device),
        "radius": analysis.landscape.steps[-1],
        "command": options.command,
    }
