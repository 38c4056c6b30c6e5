"""The pictures of a report, drawn from what ``report.json`` holds: PNG for light and for dark pages."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch import Tensor

from hessfn.core.results import Band, Density, EigenPairs, Estimate
from hessfn.plotting import plot

Draw = Callable[[Figure], Any]

# As in page.css.
DARK = {
    **dict.fromkeys(["figure.facecolor", "axes.facecolor", "savefig.facecolor"], "#12161c"),
    **dict.fromkeys(["text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"], "#e6edf3"),
}
_COLORS = 64  # of a picture: a curve with its soft edges has less, and a fifth of the bytes are left


class Picture(NamedTuple):
    """PNG for light and for dark pages, in base64."""

    light: str
    dark: str


def picture(draw: Draw, height: float = 3.8, *, width: float = 6.4) -> Picture:
    """What ``draw(figure)`` draws, in inches."""
    from PIL import Image  # Matplotlib needs it, and brings it

    # No pyplot: no display, no global state. To find where everything goes takes half of the time, and is done once.
    light, dark = Figure(figsize=(width, height), layout="constrained"), Figure(figsize=(width, height))

    def png(figure: Figure, colors: dict[Any, Any]) -> str:
        with mpl.rc_context(colors):
            figure.set_facecolor(mpl.rcParams["figure.facecolor"])
            draw(figure)
            for axes, placed in zip(figure.axes, light.axes if figure is dark else (), strict=False):
                axes.set_position(placed.get_position(original=True))
            drawn, file = io.BytesIO(), io.BytesIO()
            figure.savefig(drawn, dpi=144)
        Image.open(drawn).convert("RGB").quantize(_COLORS).save(file, "PNG", optimize=True)
        return base64.b64encode(file.getvalue()).decode()

    return Picture(png(light, {}), png(dark, DARK))


def pictures(result: dict[str, Any]) -> dict[str, Picture]:
    """Of a report, by name."""
    landscape, layers, activations = result["landscape"], result["layers"], result["activations"]
    density, spectrum, lines = density_of(result), eigenpairs_of(result), tensors(landscape["losses"])
    made = {
        "density": picture(
            lambda figure: plot.density_plot(density, figure.subplots(), band=band_of(result), floor=floor_of([result]))
        ),
        "eigenvalues": picture(
            lambda figure: _eigenvalues(spectrum, len(result["eigenvalues"]), figure),
            1.0 + 0.24 * min(len(spectrum.values), 40),
            width=5.0,
        ),
        "layers": layer_picture({"": layers}),
        "landscape": picture(lambda figure: plot.line_plot(landscape["steps"], lines, figure.subplots())),
    }
    if landscape["plane"] is not None:
        made["plane"] = picture(lambda figure: _plane(landscape["plane"], figure), 3.8, width=5.0)
    if activations:
        made["activations"] = layer_picture({"": activations})
    return made


def layer_picture(layers: dict[str, dict[str, Any]]) -> Picture:
    """The traces of the layers of one report, or of several by their labels, which have the same layers."""
    drawn = {
        label: Estimate(
            {name: tensors(x["trace"]) for name, x in found.items()},
            {name: tensors(x["stderr"]) for name, x in found.items()},
            torch.tensor(0, device="cpu"),
            data_stderr={name: tensors(x.get("data_stderr")) for name, x in found.items()},
        )
        for label, found in layers.items()
    }
    height = plot.layer_plot_height(max(map(len, layers.values())))
    return picture(lambda figure: plot.layer_plot(drawn, figure.subplots()), height)


def density_of(result: dict[str, Any]) -> Density:
    return Density(tensors(result["density"]["grid"]), tensors(result["density"]["values"]))


def band_of(result: dict[str, Any]) -> Band | None:
    density = result["density"]
    if density["lower"] is None or density["upper"] is None:
        return None
    return Band(*(tensors(density[name]) for name in ("grid", "lower", "upper")))


def floor_of(results: list[dict[str, Any]]) -> float:
    """Where the axis of densities ends: a hundredth of what one eigenvalue makes, as narrow as the bulk."""
    peaks = [x for result in results for x in result["density"]["values"] if x is not None and math.isfinite(x)]
    num = max(int(result["model"]["parameters"]) for result in results)
    return max(max(peaks, default=0.0), 1e-300) / (100 * max(num, 1))


def eigenpairs_of(result: dict[str, Any]) -> EigenPairs[Any]:
    """Those that were found, and the smallest one, if it is not among them. There are no vectors in it."""
    names = {"value": "eigenvalues", "residual": "residuals", "rounding": "rounding", "data_stderr": "data_stderr"}
    rows = {name: list(result[key] or [None] * len(result["eigenvalues"])) for name, key in names.items()}
    smallest = result["negative_curvature"]["smallest"]
    if smallest is not None and smallest["value"] not in rows["value"]:
        for name, row in rows.items():
            row.append(smallest[name])
    found = {name: tensors(row) for name, row in rows.items()}
    return EigenPairs(
        values=found["value"],
        vectors=torch.empty(0, device="cpu"),
        residuals=found["residual"],
        num_matvecs=torch.tensor(0, device="cpu"),
        converged=torch.ones(len(found["value"]), device="cpu") > 0,
        rounding=found["rounding"],
        data_stderr=found["data_stderr"],
    )


def tensors(x: Any) -> Any:
    """Numbers of JSON in float64, with NaN for null."""
    if isinstance(x, dict):
        return {name: tensors(one) for name, one in x.items()}
    return torch.tensor(_numbers(x), dtype=torch.float64, device="cpu")


def _numbers(x: Any) -> Any:
    return list(map(_numbers, x)) if isinstance(x, list) else math.nan if x is None else x


def _eigenvalues(pairs: EigenPairs[Any], num_found: int, figure: Figure) -> None:
    """The last row is the smallest eigenvalue, if it is not one of those that were asked for."""
    axes = plot.eigen_plot(pairs, figure.subplots())
    if (num := len(pairs.values)) > num_found:
        rows = [row for row in axes.get_yticks() if row < num]
        axes.set_yticks([*rows, num], [*(f"{row:.0f}" for row in rows), "smallest"])


def _plane(plane: dict[str, Any], figure: Figure) -> None:
    """Contours, with a dot wherever the loss was computed, if that is not everywhere."""
    losses: Tensor = tensors(plane["losses"])
    axes = plot.plane_plot(plane["steps"], plane["steps"], losses, figure.subplots())
    measured = torch.tensor(plane.get("measured") or [[True]], device="cpu")
    if not bool(measured.all()):
        at = torch.tensor(plane["steps"], device="cpu")[measured.nonzero()]
        axes.plot(at[:, 0], at[:, 1], ".", color="white", markersize=2.5, alpha=0.8)
