"""The form of ``report.json``: what a file that may be anybody's must hold before its numbers are used.

A *parser* takes what JSON has given and where it stands in the file; it returns the value, or raises an error that
names the place. Keys that no parser asks for are dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from hessfn.core.errors import InvalidInput
from hessfn.reporting.text import printable

SCHEMA = 2
_LARGEST = 1e150  # of numbers: the squares of larger ones are not finite
_LONGEST = 300  # characters of a name

Parser = Callable[[Any, str], Any]


def parsed(found: Any) -> dict[str, Any]:
    """A report as :func:`hessfn.report` returns it; NaN stands for numbers that are null, and names can be printed.

    Raises:
        InvalidInput: it is something else; the message names the place.
    """
    if not isinstance(found, dict):
        raise InvalidInput(f"it is {_kind(found)} and no object")
    if (schema := found.get("schema", 1)) != SCHEMA or isinstance(schema, bool):
        raise InvalidInput(f"its schema is {_shown(schema)}, this version reads {SCHEMA}")
    result: dict[str, Any] = _REPORT(found, "")
    for at, names in _AS_LONG.items():
        _same_lengths({name: _at(result, name) for name in names if _at(result, name) is not None}, at)
    for name in ("rounding", "data_stderr"):  # not measured at all
        result[name] = result[name] or [math.nan] * len(result["eigenvalues"])
    samples, layers = result["samples"], result["layers"]
    if samples is not None and layers is not None:
        num_probes, num_batches = len(samples["trace"]), len(samples["batch_weights"])
        _lengths(samples["layers"], num_probes, "samples.layers")
        if (plain := samples["plain"]) is not None:
            _lengths({**plain["layers"], "trace": plain["trace"]}, num_probes, "samples.plain")
        if (batches := samples["batches"]) is not None:
            _lengths(batches["layers"], num_batches, "samples.batches.layers")
            _lengths(dict(enumerate(batches["eigenvalues"])), num_batches, "samples.batches.eigenvalues")
            found = {name: batches[name] for name in ("trace", "losses") if batches[name] is not None}
            _lengths(found, num_batches, "samples.batches")
    return result


def number(x: Any, where: str) -> float:
    if x is None:
        return math.nan
    if isinstance(x, bool) or not isinstance(x, int | float):
        raise InvalidInput(f"{where} is {_shown(x)} and no number")
    if not abs(x) <= _LARGEST:
        raise InvalidInput(f"{where} is {_shown(x)}, beyond {_LARGEST:g}")
    return float(x)


def real(x: Any, where: str) -> float:
    """A number that is there."""
    if math.isnan(value := number(x, where)):
        raise InvalidInput(f"{where} is null")
    return value


def size(x: Any, where: str) -> float:
    """An error, which is not negative."""
    if (value := number(x, where)) < 0:
        raise InvalidInput(f"{where} is {_shown(x)}, below 0")
    return value


def count(x: Any, where: str) -> int:
    if isinstance(x, bool) or not isinstance(x, int) or not 0 <= x <= 2**63:
        raise InvalidInput(f"{where} is {_shown(x)} and no count")
    return x


def flag(x: Any, where: str) -> bool:
    if not isinstance(x, bool):
        raise InvalidInput(f"{where} is {_shown(x)} and neither true nor false")
    return x


def text(x: Any, where: str) -> str:
    if not isinstance(x, str):
        raise InvalidInput(f"{where} is {_shown(x)} and no text")
    return _name(x)


def scalar(x: Any, where: str) -> Any:
    """The value of a setting."""
    if x is None or isinstance(x, bool):
        return x
    if isinstance(x, list):
        return [text(one, f"{where}[{i}]") for i, one in enumerate(x)]
    if isinstance(x, str):
        return text(x, where)
    value = number(x, where)
    return x if isinstance(x, int) else value


def optional(parser: Parser) -> Parser:
    return lambda x, where: None if x is None else parser(x, where)


def listed(parser: Parser, least: int = 0) -> Parser:
    def of(x: Any, where: str) -> list[Any]:
        if not isinstance(x, list):
            raise InvalidInput(f"{where} is {_kind(x)} and no list")
        if len(x) < least:
            raise InvalidInput(f"{where} has {len(x)} entries and not {least}")
        return [parser(one, f"{where}[{i}]") for i, one in enumerate(x)]

    return of


def mapped(parser: Parser) -> Parser:
    """From names, such as those of layers."""

    def of(x: Any, where: str) -> dict[str, Any]:
        return {_name(name): parser(one, f"{where}.{_name(name)}") for name, one in _object(x, where).items()}

    return of


def record(**parsers: Parser) -> Parser:
    """An object with these keys; what is missing is null, where that may be."""

    def of(x: Any, where: str) -> dict[str, Any]:
        found = _object(x, where)
        values = {}
        for name, parser in parsers.items():
            place = f"{where}.{name}" if where else name
            try:
                values[name] = parser(found.get(name), place)
            except InvalidInput as error:
                raise error if name in found else InvalidInput(f"it has no {place}") from None
        return values

    return of


def _object(x: Any, where: str) -> dict[str, Any]:
    if not isinstance(x, dict):
        raise InvalidInput(f"{where} is {_kind(x)} and no object")
    return x


def _name(x: str) -> str:
    shown = printable(x[: _LONGEST + 1])
    return shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST - 3]}..."


def _shown(x: Any) -> str:
    return _kind(x) if isinstance(x, dict | list) else printable(repr(x)[:40])


def _kind(x: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", type(None): "null", bool: "true or false"}
    return kinds.get(type(x), "a number")


def _at(result: dict[str, Any], path: str) -> Any:
    for name in path.split("."):
        result = result[name] if result is not None else None  # type: ignore[assignment]
    return result


def _same_lengths(lists: dict[str, list[Any]], at: str) -> None:
    first = next(iter(lists.values()), [])
    for name, one in lists.items():
        if len(one) != len(first):
            raise InvalidInput(f"{name} has {len(one)} entries and {at} {len(first)}")


def _lengths(lists: dict[Any, list[Any]], num: int, where: str) -> None:
    for name, one in lists.items():
        if len(one) != num:
            raise InvalidInput(f"{where}.{name} has {len(one)} entries and not {num}")


_NUMBERS, _SIZES = listed(number), listed(size)
_ESTIMATE = {"mean": number, "stderr": size}
_ERRORS = {"rounding": size, "data_stderr": size}
_SHARPNESS = record(value=number, residual=size, **_ERRORS, lower=number, upper=number)
_SMALLEST = record(value=number, residual=size, **_ERRORS, converged=optional(flag))
_LAYER = record(
    numel=count, trace=number, stderr=size, **_ERRORS, top=number, top_residual=size, stable_rank=number,
    stable_rank_stderr=size, pairs_share=number,
)  # fmt: skip
_ACTIVATION = record(
    numel=count, trace=number, stderr=size, weight_numel=count, weight_trace=number, weight_stderr=size
)
_TRACES = {"trace": _NUMBERS, "layers": mapped(_NUMBERS)}
_BATCHES = record(**_TRACES, eigenvalues=listed(_NUMBERS), losses=optional(_NUMBERS))
_SAMPLES = record(
    probe_seed=optional(count), **_TRACES, plain=optional(record(**_TRACES)), batch_weights=_SIZES,
    batches=optional(_BATCHES), data=optional(text),
)  # fmt: skip
_CURVES = {"grid": listed(real, 2), "values": listed(number, 2)}
_REPORT = record(
    date=optional(text),
    loss=number,
    loss_data_stderr=size,
    accuracy=optional(record(value=number, stderr=size)),
    gradient_norm=number,
    eigenvalues=_NUMBERS,
    residuals=_SIZES,
    rounding=optional(_SIZES),
    data_stderr=optional(_SIZES),
    converged=listed(flag),
    outside=optional(_NUMBERS),
    sharpness=optional(_SHARPNESS),
    trace=record(**_ESTIMATE, **_ERRORS, lower=number, upper=number),
    negative_curvature=record(
        smallest=optional(_SMALLEST), share_of_squares=optional(record(**_ESTIMATE, steps_error=size))
    ),
    density=record(**_CURVES, lower=optional(_NUMBERS), upper=optional(_NUMBERS)),
    layers=mapped(_LAYER),
    activations=optional(mapped(_ACTIVATION)),
    model=record(name=text, layers=count, parameters=count, mode=text, criterion=text),
    data=record(num_batches=count, num_samples=count, parts=optional(count)),
    cost=record(products=optional(count), seconds=number, threads=optional(count), kernel=optional(flag)),
    samples=optional(_SAMPLES),
    settings=mapped(scalar),
    versions=mapped(text),
)
_AS_LONG = {
    "eigenvalues": ["eigenvalues", "residuals", "rounding", "data_stderr", "converged"],
    "density.grid": ["density.grid", "density.values", "density.lower", "density.upper"],
}
