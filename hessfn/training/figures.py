"""A density as a figure, and the way of a figure into whatever a trainer logs to."""

from __future__ import annotations

import importlib
import re
from typing import Any

from matplotlib.figure import Figure

from hessfn.core.results import Density


def density_figure(found: Density, step: int) -> Figure:
    """On a logarithmic axis, since the few eigenvalues that matter are a small fraction of all."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.add_subplot()
    grid, values = found.grid.cpu().numpy(), found.values.cpu().numpy()
    ax.semilogy(grid, values)
    ax.set_ylim(bottom=1e-6 * values.max())
    ax.set_xlabel("eigenvalue")
    ax.set_ylabel("density")
    ax.set_title(f"Hessian spectrum at step {step}")
    return figure


def log_figure(logger: Any, name: str, figure: Figure, step: int) -> bool:
    """Gives a figure to a logger of Lightning, or to a callback of transformers that reports; False if it takes none.

    They are told by what they have: TensorBoard's ``add_figure``, Weights & Biases' images, ``log_figure`` of MLflow
    and Comet.
    """
    experiment: Any = getattr(logger, "experiment", None)
    writer: Any = getattr(logger, "tb_writer", None) or experiment
    if hasattr(writer, "add_figure"):
        writer.add_figure(name, figure, step)
        return True
    if hasattr(logger, "log_image"):  # Weights & Biases in Lightning
        importlib.import_module("matplotlib.pyplot")  # which it takes to be imported
        logger.log_image(key=name, images=[figure], step=step)
        return True
    weights_and_biases = getattr(logger, "_wandb", None)
    if weights_and_biases is not None:
        importlib.import_module("matplotlib.pyplot")
        weights_and_biases.log({name: weights_and_biases.Image(figure), "train/global_step": step})
        return True
    file = re.sub(r"\W+", "_", name) + f"_{step}.png"
    mlflow = getattr(logger, "_ml_flow", None)
    if mlflow is not None:
        mlflow.log_figure(figure, file)
        return True
    if hasattr(experiment, "log_figure"):
        run = getattr(logger, "run_id", None)
        if run is None:
            experiment.log_figure(name, figure, step=step)
        else:
            experiment.log_figure(run, figure, file)
        return True
    return False
