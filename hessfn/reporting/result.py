"""What ``report.json`` holds: the numbers of an analysis by name, and what it takes to compute them again."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from typing import Any

from torch import Tensor

from hessfn.core import tree
from hessfn.core.results import Estimate, Sensitivities
from hessfn.core.tree import Tree
from hessfn.reporting.analysis import Analysis, Landscape, Spectrum
from hessfn.reporting.options import Options
from hessfn.reporting.problem import FirstPass, Prepared


def result_of(analysis: Analysis, problem: Prepared, first: FirstPass, options: Options) -> dict[str, Any]:
    """All of it as JSON has it: see :func:`hessfn.report`."""
    spectrum, activations = analysis.spectrum, analysis.activations
    result = {
        "loss": analysis.loss,
        **_spectrum(spectrum, problem.params),
        "activations": None if activations is None else _activations(activations),
        "landscape": _landscape(analysis.landscape),
        "settings": _settings(analysis, problem, first, options),
        "versions": {
            **versions("hessfn", "torch", "numpy", "scipy", "matplotlib"),
            "python": platform.python_version(),
        },
    }
    return plain(result)


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


def _spectrum(spectrum: Spectrum, params: Tree) -> dict[str, Any]:
    density, band, layers = spectrum.density, spectrum.band, spectrum.layers
    return {
        "eigenvalues": spectrum.eigen.values,
        "residuals": spectrum.eigen.residuals,
        "converged": spectrum.eigen.converged,
        "trace": _estimate(spectrum.trace),
        "negative_curvature": _estimate(spectrum.negative),
        "density": {
            "grid": density.grid,
            "values": density.values,
            "lower": None if band is None else band.lower,
            "upper": None if band is None else band.upper,
        },
        "layers": {
            name: {"numel": params[name].numel(), "trace": trace, "stderr": layers.stderr[name]}
            for name, trace in layers.mean.items()
        },
    }


def _estimate(found: Estimate) -> dict[str, Tensor]:
    return {"mean": found.mean, "stderr": found.stderr}


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
        "num_samples": first.num_samples,
        **options.settings(),
        "dtype": str(leaf.dtype).removeprefix("torch."),
        "device": str(leaf.device),
        "radius": analysis.landscape.steps[-1],
        "command": options.command,
    }
