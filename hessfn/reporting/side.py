"""One side of a comparison: ``report.json`` of a folder, read and checked."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from hessfn.core.errors import InvalidInput


class Measured(NamedTuple):
    """A number and its error; NaN where there is none."""

    mean: float
    stderr: float


Layers = dict[str, tuple[int, Measured]]  # numel, trace


class Side(NamedTuple):
    """What the ``report.json`` of one folder says, as far as two can be compared."""

    folder: str
    loss: float
    eigenvalues: list[Measured]  #: with their residuals, which are bounds
    trace: Measured
    negative: Measured
    layers: Layers
    activations: Layers  #: empty where there are none
    density: dict[str, Any]  #: grid, values, and a band where there is one
    which: str  #: the end of the spectrum that the eigenvalues are from
    num_probes: int  #: samples of the trace and of the layers
    num_runs: int  #: samples of the negative curvature
    num_activation_probes: int  #: samples of the activations
    settings: dict[str, Any]
    versions: dict[str, Any]


def read(folder: str | Path) -> Side:
    """``report.json`` of a folder, checked.

    Raises:
        InvalidInput: there is none, or it is not what this version of hessfn writes.
    """
    file = Path(folder) / "report.json"
    try:
        found = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise InvalidInput(
            f"there is no report in {str(folder)!r} ({error.strerror}: {file.name}); hessfn report PROBLEM --out "
            f"{str(folder)!r} makes one"
        ) from error
    except ValueError as error:
        raise InvalidInput(f"{str(file)!r} is not JSON: {error}") from error
    try:
        return _side(str(folder), found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise InvalidInput(
            f"{str(file)!r} is not a report of this version of hessfn ({reason}); hessfn report PROBLEM --out "
            f"{str(folder)!r} makes one"
        ) from error


def _side(folder: str, found: Any) -> Side:
    settings, density = found["settings"], found["density"]
    curves = {"grid": density["grid"], "values": density["values"]}
    band = {name: density[name] for name in ("lower", "upper") if density[name] is not None}
    return Side(
        folder=folder,
        loss=_number(found["loss"]),
        eigenvalues=list(map(Measured, _numbers(found["eigenvalues"]), _numbers(found["residuals"]))),
        trace=_measured(found["trace"], "mean"),
        negative=_measured(found["negative_curvature"], "mean"),
        layers=_layers(found["layers"]),
        activations=_layers(found["activations"] or {}),
        density={name: _numbers(values) for name, values in {**curves, **band}.items()},
        which=str(settings["which"]),
        num_probes=int(settings["num_probes"]),
        num_runs=int(settings["num_runs"]),
        num_activation_probes=int(settings["num_activation_probes"]),
        settings=dict(settings),
        versions=dict(found["versions"]),
    )


def _layers(found: Any) -> Layers:
    return {name: (int(layer["numel"]), _measured(layer, "trace")) for name, layer in dict(found).items()}


def _measured(x: Any, key: str) -> Measured:
    return Measured(_number(x.get(key)), _number(x.get("stderr")))


def _number(x: Any) -> float:
    return math.nan if x is None else float(x)


def _numbers(x: Any) -> list[float]:
    return [_number(value) for value in x]
