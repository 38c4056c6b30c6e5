"""What a report looks like: the summary in a terminal, the figures, the page, and how they get to their folder."""

from __future__ import annotations

import base64
import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from matplotlib.figure import Figure
from torch import Tensor

from hessfn import plot
from hessfn.eigen import EigenPairs
from hessfn.spectrum import Band, Density
from hessfn.trace import Estimate

if TYPE_CHECKING:
    import jinja2
    from matplotlib.axes import Axes


class Plane(NamedTuple):
    steps: Tensor
    losses: Tensor
    directions: list[str]


class Analysis(NamedTuple):
    """All that a report shows."""

    loss: Tensor
    eigen: EigenPairs
    trace: Estimate
    negative: Estimate
    layers: Estimate
    density: Density
    band: Band | None
    steps: Tensor
    losses: dict[str, Tensor]
    plane: Plane | None


def template() -> jinja2.Template:
    """The page's template; asked for before anything is computed, as jinja2 may be missing."""
    try:
        import jinja2
    except ImportError as error:
        raise ModuleNotFoundError('the report\'s page is made with jinja2: pip install "hessfn[demo]"') from error
    # Names of layers and problems are the user's: everything is escaped.
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = number
    environment.globals["estimate"] = estimate
    return environment.from_string(resources.files("hessfn").joinpath("templates/report.html.j2").read_text("utf-8"))


def write(folder: Path, template: jinja2.Template, analysis: Analysis, result: dict[str, Any]) -> None:
    """``report.json``, the figures and ``report.html``, which needs none of the others."""
    for name, draw in _figures(analysis).items():
        height = plot.layer_plot_height(len(result["layers"])) if name == "layers" else 3.8
        _save(folder / f"{name}.png", draw, height)
    sizes = analysis.eigen.values.abs()
    top = int(sizes.argmax())
    images = {file.stem: base64.b64encode(file.read_bytes()).decode() for file in folder.glob("*.png")}
    (folder / "report.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", "utf-8")
    (folder / "report.html").write_text(template.render(**result, images=images, top_index=top), "utf-8")


def plain(x: Any) -> Any:
    """What JSON can say: tensors as numbers or lists, what is not finite as null."""
    if isinstance(x, Tensor):
        return plain(x.tolist())
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [plain(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


@contextlib.contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A scratch folder inside ``out``. Its files move to ``out`` when all of them are there, or never."""
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".report-", dir=out))
    except OSError as error:
        raise ValueError(f"the report cannot be written to {str(out)!r}: {error.strerror}") from error
    try:
        yield scratch
        for file in sorted(scratch.iterdir()):
            os.replace(file, out / file.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        with contextlib.suppress(OSError):  # those with a report in them are not empty
            for folder in made:
                folder.rmdir()


def summary(result: dict[str, Any]) -> str:
    """The numbers in at most 80 columns."""
    settings, trace = result["settings"], result["trace"]
    lines = [
        _cut(settings["problem"], 80),
        f"{settings['parameters']:,} parameters, {settings['samples']:,} samples, {settings['dtype']}",
        "",
        f"{'loss':<12}{number(result['loss'])}",
        f"{'trace':<12}{estimate(trace['mean'], trace['stderr'])}   (one standard error, {settings['probes']} probes)",
        f"{'eigenvalues':<26}{'residual':>12}",
    ]
    for value, residual, converged in zip(result["eigenvalues"], result["residuals"], result["converged"], strict=True):
        lines.append(f"{'':<12}{number(value):<14}{residual:>12.1e}{'' if converged else '   not converged'}")
    ranked = sorted(result["layers"].items(), key=lambda item: -abs(item[1]["trace"] or 0))
    shown = ranked[:8]
    lines += ["", f"{'largest traces of layers':<46}{'numel':>10}   trace"]
    lines += [f"  {_cut(name, 42):<44}{x['numel']:>10,}   {estimate(x['trace'], x['stderr'])}" for name, x in shown]
    if len(ranked) > len(shown):
        lines.append(f"  and {len(ranked) - len(shown)} more in report.json")
    return "\n".join(lines)


def number(x: float | None) -> str:
    return "not finite" if x is None else f"{x:.5g}"


def estimate(mean: float | None, stderr: float | None) -> str:
    """A number to the digits that its error leaves: ``142.2 +- 3.1``."""
    if mean is None or not stderr:
        return f"{number(mean)} +- {number(stderr)}"
    digits = 1 - math.floor(math.log10(stderr))  # two digits of the error
    if -1 <= digits <= 6 and abs(mean) < 1e6:
        return f"{mean:,.{max(digits, 0)}f} +- {stderr:.{max(digits, 0)}f}"
    return f"{mean:.4g} +- {stderr:.2g}"


def _cut(name: str, width: int) -> str:
    return name if len(name) <= width else f"...{name[3 - width :]}"


def _figures(analysis: Analysis) -> dict[str, Callable[[Axes], Any]]:
    return {
        "density": lambda ax: plot.density_plot(analysis.density, ax),
        "eigenvalues": lambda ax: plot.eigen_plot(analysis.eigen, ax),
        "layers": lambda ax: plot.layer_plot(analysis.layers, ax),
        "landscape": lambda ax: plot.line_plot(analysis.steps, analysis.losses, ax),
    }


def _save(file: Path, draw: Callable[[Axes], Any], height: float) -> None:
    figure = Figure(figsize=(6.4, height), layout="constrained")  # no pyplot: no display, no global state
    draw(figure.subplots())
    figure.savefig(file, dpi=144)
