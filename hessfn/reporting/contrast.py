"""From the reports of several folders to their differences, paired where probes or data are the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from hessfn.reporting.differences import Difference, Measured, Shared, critical, difference, of_eigenvalue, of_trace
from hessfn.reporting.side import Side

_ROUNDINGS = 8  # of a loss in its dtype: sums over samples and outputs are pairwise
_COARSE = torch.finfo(torch.float32).eps  # where nobody says in which dtype


def compared(sides: list[Side]) -> dict[str, Any]:
    """What :func:`hessfn.compare` returns."""
    reports = [{"folder": side.folder, **side.result} for side in sides]
    a, b = reports[0], reports[-1]
    shared = {"probes": _same_probes(a, b), "data": _same_data(a, b)}
    layers = _layers(a, b, "layers")
    activations = _layers(a, b, "activations")
    return {
        "reports": reports,
        "shared": shared,
        **_scalars(a, b),
        "eigenvalues": _eigenvalues(a, b),
        "layers": layers,
        "activations": activations,
        "only": {name: [x for x in side["layers"] if x not in layers] for name, side in (("A", a), ("B", b))},
        "critical": {
            "layers": critical(_num_probes(a, b, "layers") - 1, len(layers)),
            "activations": critical(_num_probes(a, b, "activations") - 1, len(activations)),
        },
        "steps": [_scalars(*two) for two in pairwise(reports)],
    }


def _scalars(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Difference | None]:
    trace = _difference(a, b, of_trace(a["trace"]), of_trace(b["trace"]), _shared(a, b, "trace"))
    shares = [x["negative_curvature"]["share_of_squares"] for x in (a, b)]
    return {
        "loss": _difference(a, b, _loss(a), _loss(b), _shared_losses(a, b)),
        "sharpness": _of_ends(a, b, *(x["sharpness"] for x in (a, b))),
        "trace": trace,
        "smallest": _of_ends(a, b, *(x["negative_curvature"]["smallest"] for x in (a, b))),
        "share_of_squares": _of_shares(a, b, *shares),
    }


def _loss(x: dict[str, Any]) -> Measured:
    """No probe has a part in it: on these data it is known to rounding."""
    dtype = getattr(torch, str(x["settings"].get("dtype")), None)
    eps = torch.finfo(dtype).eps if isinstance(dtype, torch.dtype) and dtype.is_floating_point else _COARSE
    return Measured(x["loss"], 0.0, _ROUNDINGS * eps * abs(x["loss"]), x["loss_data_stderr"])


def _of_ends(a: dict[str, Any], b: dict[str, Any], x: Any, y: Any) -> Difference | None:
    """Of two eigenvalues; by batches, where both are among those whose forms are kept."""
    one, other = of_eigenvalue(x), of_eigenvalue(y)
    if one is None or other is None:
        return None
    places = [_place(report, found.mean) for report, found in ((a, one), (b, other))]
    return _difference(a, b, one, other, _shared_forms(a, b, *places))


def _eigenvalues(a: dict[str, Any], b: dict[str, Any]) -> list[Difference]:
    """In their order; of different ends of the spectrum there is nothing to compare."""
    if a["settings"].get("which") != b["settings"].get("which"):
        return []
    found = [[of_eigenvalue(_eigenvalue(x, i)) for i in range(len(x["eigenvalues"]))] for x in (a, b)]
    return [
        _difference(a, b, x, y, _shared_forms(a, b, i, i))
        for i, (x, y) in enumerate(zip(*found, strict=False))
        if x is not None and y is not None
    ]


def _eigenvalue(report: dict[str, Any], i: int) -> dict[str, float]:
    names = {"value": "eigenvalues", "residual": "residuals", "rounding": "rounding", "data_stderr": "data_stderr"}
    return {name: report[key][i] for name, key in names.items()}


def _place(report: dict[str, Any], value: float) -> int | None:
    """The number of an eigenvalue among those that were found."""
    near = [i for i, x in enumerate(report["eigenvalues"]) if abs(x - value) <= 1e-9 * abs(value)]
    return near[0] if near else None


def _layers(a: dict[str, Any], b: dict[str, Any], kind: str) -> dict[str, Difference]:
    """Of the layers that both have."""
    mine, others = a[kind] or {}, b[kind] or {}
    both = [name for name in mine if name in others]
    return {
        name: _difference(
            a,
            b,
            of_trace(mine[name], "trace"),
            of_trace(others[name], "trace"),
            _shared(a, b, "layers", name) if kind == "layers" else Shared(),
            kind,
            len(both),
        )
        for name in both
    }


def _difference(
    a: dict[str, Any],
    b: dict[str, Any],
    x: Measured,
    y: Measured,
    shared: Shared,
    kind: str = "trace",
    comparisons: int = 1,
) -> Difference:
    num_batches = min(x["data"]["parts"] or x["data"]["num_batches"] for x in (a, b))
    counts = {"num_probes": _num_probes(a, b, kind), "num_batches": num_batches}
    return difference(x, y, shared, **counts, comparisons=comparisons)


def _num_probes(a: dict[str, Any], b: dict[str, Any], kind: str) -> int:
    option = {"activations": "num_activation_probes", "num_runs": "num_runs"}.get(kind, "num_probes")
    counts = [x["settings"].get(option) for x in (a, b)]
    if option == "num_probes":  # as many as there are, however many were asked for
        counts = [len(x["samples"]["trace"]) if x["samples"] else n for x, n in zip((a, b), counts, strict=True)]
    return min((n if isinstance(n, int) else 0) for n in counts)


def _of_shares(a: dict[str, Any], b: dict[str, Any], x: Any, y: Any) -> Difference | None:
    """Of the sum of all squared eigenvalues, that of negative ones."""
    return None if x is None or y is None else _difference(a, b, _share(x), _share(y), Shared(), "num_runs")


def _share(x: dict[str, float]) -> Measured:
    """Too few steps are an error that more runs leave."""
    return Measured(x["mean"], x["stderr"], 0.0 if math.isnan(x["steps_error"]) else x["steps_error"])


def _same_probes(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Probes are a function of their seed, and of the names and sizes of the parameters."""
    if a["samples"] is None or b["samples"] is None or a["samples"]["probe_seed"] is None:
        return False
    sizes = [{name: layer["numel"] for name, layer in x["layers"].items()} for x in (a, b)]
    return a["samples"]["probe_seed"] == b["samples"]["probe_seed"] and sizes[0] == sizes[1]


def _same_data(a: dict[str, Any], b: dict[str, Any]) -> bool:
    s, t = a["samples"], b["samples"]
    if s is None or t is None or not s["batches"] or not t["batches"] or not s["data"]:
        return False
    return bool(s["data"] == t["data"] and s["batch_weights"] == t["batch_weights"])


def _shared(a: dict[str, Any], b: dict[str, Any], *path: str) -> Shared:
    """What two estimates of the trace, or of that of a layer, have in common."""

    def at(found: Any) -> Any:
        for name in path:
            found = found.get(name)
        return found

    def pair(of: Callable[[dict[str, Any]], Any], *, shared: bool) -> Any:
        return _pair(tuple(at(of(x["samples"])) for x in (a, b))) if shared else None

    probes, data = _same_probes(a, b), _same_data(a, b)
    return Shared(
        samples=pair(lambda samples: samples, shared=probes),
        plain=pair(lambda samples: samples["plain"], shared=probes and all(x["samples"]["plain"] for x in (a, b))),
        batches=pair(lambda samples: samples["batches"], shared=data),
        weights=a["samples"] and a["samples"]["batch_weights"],
    )


def _shared_losses(a: dict[str, Any], b: dict[str, Any]) -> Shared:
    """The losses by the same batches."""
    if not _same_data(a, b):
        return Shared()
    batches = _pair(tuple(x["samples"]["batches"]["losses"] for x in (a, b)))
    return Shared(batches=batches, weights=a["samples"]["batch_weights"])


def _shared_forms(a: dict[str, Any], b: dict[str, Any], i: int | None, j: int | None) -> Shared:
    """What two eigenvalues have in common: the forms ``q' H_b q`` by the same batches."""
    if i is None or j is None or not _same_data(a, b):
        return Shared()
    forms = [x["samples"]["batches"]["eigenvalues"] for x in (a, b)]
    if i >= len(forms[0]) or j >= len(forms[1]):
        return Shared()
    return Shared(batches=(forms[0][i], forms[1][j]), weights=a["samples"]["batch_weights"])


def _pair(found: tuple[Any, ...]) -> Any:
    """Two lists of numbers, if that is what it is."""
    complete = all(x and all(map(math.isfinite, x)) for x in found)
    return found if complete else None
