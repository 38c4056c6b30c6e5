"""Two reports side by side: where the curvature of two nets differs by more than the errors of its estimates."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from scipy import stats

from hessfn.core.results import Density
from hessfn.plotting import plot
from hessfn.reporting import html, text
from hessfn.reporting.html import short
from hessfn.reporting.result import plain
from hessfn.reporting.side import Layers, Measured, Side, read
from hessfn.reporting.text import estimate, number
from hessfn.reporting.workspace import staging

_SURE = 0.05  # the chance that a comparison, or a table of layers as a whole, marks what is equal


class Difference(NamedTuple):
    """How far B is from A."""

    mean: float  #: B's less A's
    stderr: float  #: the standard error of that
    units: float  #: the mean over the standard error; NaN where unknown
    differs: bool  #: whether that is beyond chance


def compare(a: str | Path, b: str | Path, out: str | Path = "compare.html") -> dict[str, Any]:
    """Sets the reports of two folders side by side on one page, such as those of two checkpoints or two optimisers.

    Traces are compared in units of the combined standard error, ``(B - A) / sqrt(stderr_A^2 + stderr_B^2)``, against
    Student's t at 95 %; for the layers, at 95 % for all of them together (Bonferroni). Reports of the same seed share
    their probes, which makes the true error of the difference smaller as a rule: these are then on the safe side.
    Eigenvalues differ for sure where they are further apart than the sum of their residuals.

    Args:
        a: a folder that ``hessfn report`` has written, with ``report.json`` in it; ``b`` another one.
        out: the page to write; its folder is made if it is not there.

    Returns:
        ``loss`` (one each), ``eigenvalues`` (pairs, and whether they differ), ``trace`` and ``negative_curvature`` (a
        :class:`Difference`), ``layers`` and ``activations`` (name: the same, of those that both have), ``only``
        (layers that one has), ``critical`` (how many errors apart a layer must be, and an activation).

    Raises:
        ModuleNotFoundError: jinja2 or plotly, which make the page, is not installed.
        ValueError: a folder holds no ``report.json``, or another kind of one, or ``out`` cannot be written.
    """
    template = html.template("compare.html.j2")
    sides = read(a), read(b)
    result = difference(*sides)
    labelled = list(zip("AB", sides, strict=True))
    drawn = {name: Density(side.density["grid"], side.density["values"]) for name, side in labelled}
    images = {"density": html.picture(lambda ax: plot.density_plot(drawn, ax), 3.8)}
    spectrum = [{"name": name, **side.density, **_columns(side.eigenvalues)} for name, side in labelled]
    data = short(plain({"spectrum": spectrum}))
    page = template.render(sides=sides, result=result, settings=_settings(*sides), images=images, data=data)
    with staging(Path(out).parent) as folder:
        (folder / Path(out).name).write_text(page, "utf-8")
    return result


def difference(a: Side, b: Side) -> dict[str, Any]:
    """What :func:`compare` returns."""
    probes, runs = min(a.num_probes, b.num_probes), min(a.num_runs, b.num_runs)
    activation_probes = min(a.num_activation_probes, b.num_activation_probes)
    layers = _differences(a.layers, b.layers, probes)
    activations = _differences(a.activations, b.activations, activation_probes)
    same_end = a.which == b.which
    return {
        "loss": (a.loss, b.loss),
        "eigenvalues": [
            (x, y, same_end and abs(x.mean - y.mean) > x.stderr + y.stderr)
            for x, y in zip(a.eigenvalues, b.eigenvalues, strict=False)
        ],
        "trace": _difference(a.trace, b.trace, _critical(probes)),
        "negative_curvature": _difference(a.negative, b.negative, _critical(runs)),
        "layers": layers,
        "activations": activations,
        "only": {"A": [x for x in a.layers if x not in layers], "B": [x for x in b.layers if x not in layers]},
        "critical": {
            "layers": _critical(probes, len(layers)),
            "activations": _critical(activation_probes, len(activations)),
        },
    }


def summary(a: Side, b: Side, result: dict[str, Any]) -> str:
    """The differences of two reports in at most 80 columns."""

    def row(name: str, x: str, y: str, last: str) -> str:
        return f"{name:<12}{x:<20}{y:<20}{last}".rstrip()

    def compared(name: str, x: Measured, y: Measured, by: Difference, show: Any = estimate) -> str:
        return row(name, show(*x), show(*y), units(by))

    lines = [f"A  {text.cut(a.folder, 77)}", f"B  {text.cut(b.folder, 77)}", "", row("", "A", "B", "B - A")]
    lines.append(row("loss", number(a.loss), number(b.loss), number(b.loss - a.loss)))
    lines.append(compared("trace", a.trace, b.trace, result["trace"]))
    lines.append(compared("negative", a.negative, b.negative, result["negative_curvature"], text.share))
    for index, (x, y, differs) in enumerate(result["eigenvalues"], 1):
        lines.append(row(f"value {index}", number(x.mean), number(y.mean), "differ" if differs else "may be equal"))
    for kind, of in (("layers", "trace"), ("activations", "the trace of what enters")):
        marked = [(name, by) for name, by in result[kind].items() if by.differs]
        if result[kind] or kind == "layers":
            lines += ["", f"{len(marked)} of {len(result[kind])} layers that both have differ in {of}"]
        for name, by in sorted(marked, key=lambda item: -abs(item[1].units))[:8]:
            lines.append(f"  {text.cut(name, 42):<44}{estimate(by.mean, by.stderr)}")
    for side, names in result["only"].items():
        lines += [f"{len(names)} layers only {side} has"] if names else []
    return "\n".join(lines)


def units(by: Difference) -> str:
    """How far apart two numbers are, in words."""
    if math.isnan(by.units):
        return "unknown"
    return f"{by.units:+.1f} errors: {'differ' if by.differs else 'may be equal'}"


def _columns(eigenvalues: list[Measured]) -> dict[str, list[float]]:
    return {"eigenvalues": [x.mean for x in eigenvalues], "residuals": [x.stderr for x in eigenvalues]}


def _settings(a: Side, b: Side) -> list[tuple[str, ...]]:
    """Name and both values of every setting and version that one of them has."""
    pairs = (a.settings, b.settings), (a.versions, b.versions)
    return [
        (name, *(text.setting(side[name]) if name in side else "" for side in (x, y)))
        for x, y in pairs
        for name in dict.fromkeys([*x, *y])
    ]


def _critical(samples: int, comparisons: int = 1) -> float:
    """How many standard errors chance does not reach, with the degrees of freedom of the smaller sample."""
    return float(stats.t.ppf(1 - _SURE / (2 * max(comparisons, 1)), samples - 1)) if samples > 1 else math.inf


def _differences(a: Layers, b: Layers, samples: int) -> dict[str, Difference]:
    """Of the layers that both have."""
    both = [name for name in a if name in b]
    return {name: _difference(a[name][1], b[name][1], _critical(samples, len(both))) for name in both}


def _difference(a: Measured, b: Measured, critical: float) -> Difference:
    mean, stderr = b.mean - a.mean, math.hypot(a.stderr, b.stderr)
    if stderr > 0 and math.isfinite(stderr):
        return Difference(mean, stderr, mean / stderr, abs(mean) > critical * stderr)
    if stderr == 0 and math.isfinite(mean):
        return Difference(mean, stderr, math.copysign(math.inf, mean) if mean else 0.0, mean != 0)
    return Difference(mean, stderr, math.nan, False)
