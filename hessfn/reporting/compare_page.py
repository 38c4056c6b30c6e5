"""The page of a comparison."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from hessfn.plotting import plot
from hessfn.reporting import text
from hessfn.reporting.differences import Difference, verdict
from hessfn.reporting.figures import Picture, density_of, floor_of, picture
from hessfn.reporting.html import short

if TYPE_CHECKING:
    import jinja2

_MOST_CURVES = 6  # of a picture: more cannot be told apart
_ERRORS = {
    "sharpness": "data_stderr",
    "trace": "stderr",
    "smallest eigenvalue": "data_stderr",
    "loss": "loss_data_stderr",
}


def rendered(template: jinja2.Template, result: dict[str, Any]) -> str:
    """The page that shows what :func:`hessfn.compare` returns."""
    reports = result["reports"]
    labels = text.labels(len(reports))
    curves = {labels[i]: reports[i] for i in _spread(len(reports))}
    panels = _panels(reports)
    images = {"density": _densities(curves)}
    if len(reports) > 2:
        images["training"] = picture(lambda figure: _draw(panels, labels, figure), 1.6 * len(panels) + 0.6)
    return template.render(
        result=result,
        reports=reports,
        labels=labels,
        first=labels[0],
        last=labels[-1],
        settings=_settings(reports),
        images=images,
        charts=short({"spectrum": _spectrum(curves), "training": {"names": labels, "panels": panels}}),
        numbers=_numbers(result, labels),
        verdict=verdict,
        value_of=text.value,
    )


def _spread(num: int) -> list[int]:
    """The first, the last, and some in between."""
    most = min(num, _MOST_CURVES)
    return [round(i * (num - 1) / (most - 1)) for i in range(most)]


def _densities(curves: dict[str, dict[str, Any]]) -> Picture:
    drawn, floor = {label: density_of(x) for label, x in curves.items()}, floor_of(list(curves.values()))
    return picture(lambda figure: plot.density_plot(drawn, figure.subplots(), floor=floor))


def _spectrum(curves: dict[str, dict[str, Any]]) -> dict[str, Any]:
    names = ("eigenvalues", "residuals")
    drawn = [
        {"name": label, **{key: x["density"][key] for key in ("grid", "values")}, **{key: x[key] for key in names}}
        for label, x in curves.items()
    ]
    return {"curves": drawn, "floor": floor_of(list(curves.values()))}


def _panels(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The numbers of all reports in their order, with an error each."""
    panels = []
    for title, error in _ERRORS.items():
        found = [x | {"value": x["loss"]} if title == "loss" else text.headline(x).get(title) for x in reports]
        values = [x["value"] if x is not None else math.nan for x in found]
        errors = [x[error] if x is not None else math.nan for x in found]
        if any(map(math.isfinite, values)):
            panels.append({"title": title, "values": values, "errors": errors})
    return panels


def _draw(panels: list[dict[str, Any]], labels: list[str], figure: Figure) -> None:
    for axes, panel in zip(figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0], panels, strict=True):
        errors = [x if math.isfinite(x) else 0.0 for x in panel["errors"]]
        axes.errorbar(range(len(labels)), panel["values"], errors, fmt=".-", color="#0072B2", ecolor="gray", capsize=3)
        axes.set(ylabel=panel["title"])
        axes.grid(color="gray", alpha=0.25, linewidth=0.6)
    axes.set_xticks(range(len(labels)), labels)
    axes.set(xlabel="report")


def _settings(reports: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Name and all values of every setting and version that one of them has."""
    rows = []
    for part in ("settings", "versions"):
        for name in dict.fromkeys(key for x in reports for key in x[part]):
            values = (text.setting(x[part][name]) if name in x[part] else "" for x in reports)
            rows.append((name, list(values)))
    return rows


def _numbers(result: dict[str, Any], labels: list[str]) -> dict[str, Any]:
    """What can be downloaded: every difference, and the numbers of every report."""
    kept = (
        "loss",
        "sharpness",
        "trace",
        "smallest",
        "share_of_squares",
        "eigenvalues",
        "layers",
        "activations",
        "only",
        "steps",
    )
    headlines = {}
    for label, x in zip(labels, result["reports"], strict=True):
        row: dict[str, Any] = {name: x[name] for name in ("folder", "loss", "loss_data_stderr")}
        for title, one in text.headline(x).items():
            names = ("value", *text.ERRORS)
            row |= {title if key == "value" else f"{title} {key}": one[key] for key in names if key in one}
        headlines[label] = row
    numbers: dict[str, Any] = _plain({**{name: result[name] for name in kept}, "reports": headlines})
    return numbers


def _plain(x: Any) -> Any:
    """Differences as objects with their names; null for what is not finite."""
    if isinstance(x, Difference):
        x = x._asdict()
    if isinstance(x, dict):
        return {name: _plain(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x
