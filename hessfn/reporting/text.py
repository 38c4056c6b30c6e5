"""Text for people: numbers with their errors, names, and the summary that the command line prints."""

from __future__ import annotations

import math
from typing import Any

# What may be wrong with a number, in the order of the columns that show it.
ERRORS = {"residual": "search", "stderr": "probes", "rounding": "rounding", "data_stderr": "data"}

_REMEDIES = {
    "residual": ("how near the search came", "a smaller tolerance, or more steps,"),
    "stderr": ("that of the random probes", "more probes"),
    "rounding": ("rounding", "products in float64"),
    "data_stderr": ("the choice of the data", "more samples"),
}


def summary(result: dict[str, Any]) -> str:
    """The numbers of a report in at most 80 columns, each with its errors."""
    settings, model, data, cost = (result[name] for name in ("settings", "model", "data", "cost"))
    seconds = "" if cost["seconds"] is None else f" in {cost['seconds']:.3g} s"
    threads = "" if cost["threads"] is None else f", {cost['threads']} thread{'s' * (cost['threads'] != 1)}"
    lines = [
        cut(settings["problem"] or "a loss", 80),
        cut(
            f"{model['name']} in {model['mode']} mode, {settings['num_parameters']:,} parameters, {settings['dtype']}",
            80,
        ),
        f"{data['num_samples']:,} samples in {data['num_batches']:,} batch{'es' * (data['num_batches'] != 1)}, "
        f"{cost['products']} products{seconds}{threads}",
        "",
        f"loss {with_error(result['loss'], result['loss_data_stderr'])}, gradient norm "
        f"{number(result['gradient_norm'])}{_accuracy(result)}",
        "",
        f"{'':<20}{'value':>12}" + "".join(f"{title:>11}" for title in ERRORS.values()),
    ]
    for name, one in headline(result).items():
        lines.append(
            f"{name:<20}{number(one['value']):>12}{_errors(one)}{' *' if one.get('converged') is False else ''}"
        )
    lines += _eigenvalues(result)
    lines += ["", *_words(result), "", *_layers(result["layers"])]
    return "\n".join(lines)


def _eigenvalues(result: dict[str, Any]) -> list[str]:
    lines = []
    for i, (x, converged) in enumerate(zip(result["eigenvalues"], result["converged"], strict=True)):
        names = {"residual": "residuals", "rounding": "rounding", "data_stderr": "data_stderr"}
        found = {name: None if result[key] is None else result[key][i] for name, key in names.items()}
        lines.append(f"{f'  eigenvalue {i + 1}':<20}{number(x):>12}{_errors(found)}{'' if converged else ' *'}")
    smallest = result["negative_curvature"]["smallest"]
    reached = all(result["converged"]) and (smallest is None or smallest["converged"] is not False)
    return lines + ([] if reached else ["  * not converged to the tolerance"])


def headline(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The numbers that a report is about: value and errors, by what they are called."""
    negative, found = result["negative_curvature"], {}
    if result["sharpness"] is not None:
        found["sharpness"] = result["sharpness"]
    found["trace"] = {**result["trace"], "value": result["trace"]["mean"]}
    if negative["smallest"] is not None:
        found["smallest eigenvalue"] = negative["smallest"]
    if (squares := negative["share_of_squares"]) is not None:
        found["negative share"] = {**squares, "value": squares["mean"], "residual": squares["steps_error"]}
    return found


def largest_error(one: dict[str, Any]) -> str | None:
    """Which of the errors of a number is the largest; None where none is known."""
    sizes = {key: abs(one[key]) for key in ERRORS if finite(one.get(key)) and one[key]}
    return max(sizes, key=sizes.__getitem__, default=None)


def largest_errors(numbers: dict[str, dict[str, Any]]) -> list[str]:
    """Sentences on what limits each of these numbers, and what helps."""
    sentences = []
    for key, (error, remedy) in _REMEDIES.items():
        names = [f"the {name}" for name, one in numbers.items() if largest_error(one) == key]
        if names:
            those = " and ".join([*([", ".join(names[:-1])] if names[1:] else []), names[-1]])
            sentences.append(f"The largest error of {those} is {error}: {remedy} would make it smaller.")
    return sentences


def _errors(one: dict[str, Any]) -> str:
    cells = (number(one[key], 2) if finite(one.get(key)) else "-" if key not in one else "unknown" for key in ERRORS)
    return "".join(f"{cell:>11}" for cell in cells)


def _words(result: dict[str, Any]) -> list[str]:
    """The intervals of 95 %, and what the columns mean."""
    trace, sharpness = result["trace"], result["sharpness"]
    lines = []
    if sharpness is not None and finite(sharpness["lower"]) and finite(sharpness["upper"]):
        lines.append(f"sharpness on all such data: {number(sharpness['lower'])} to {number(sharpness['upper'])} (95 %)")
    if trace["stderr"] == 0:
        lines.append("traces: without probes, since the net is linear in each of its layers")
    elif finite(trace["lower"]) and finite(trace["upper"]):
        lines.append(f"trace on these data: {number(trace['lower'])} to {number(trace['upper'])} (95 %)")
    lines.append("negative share: of the sum of all squared eigenvalues")
    return [*lines, "search, rounding: at most; probes, data: one standard error"]


def _layers(layers: dict[str, Any]) -> list[str]:
    ranked = sorted(layers.items(), key=lambda item: -abs(item[1]["trace"] or 0))
    shown = ranked[:8]
    lines = [f"{'largest traces of layers':<40}{'numel':>10}   {'trace and probes':<18}data"]
    for name, x in shown:
        data = number(x["data_stderr"], 2) if finite(x["data_stderr"]) else "unknown"
        lines.append(f"  {cut(name, 36):<38}{x['numel']:>10,}   {estimate(x['trace'], x['stderr']):<18}{data}"[:80])
    return lines + ([f"  and {len(ranked) - len(shown)} more in report.json"] if len(ranked) > len(shown) else [])


def _accuracy(result: dict[str, Any]) -> str:
    found = result["accuracy"]
    return "" if found is None else f", accuracy {share(found['value'], found['stderr'])}"


def finite(x: Any) -> bool:
    """Whether it is a number, and a finite one."""
    return x is not None and math.isfinite(x)


def number(x: float | None, digits: int = 5) -> str:
    """A number to five digits."""
    return f"{x:.{digits}g}" if x is not None and math.isfinite(x) else "not finite"


def value(found: dict[str, Any] | None) -> str:
    """That of an eigenvalue, which may not be known."""
    return number(found["value"]) if found is not None and finite(found["value"]) else "unknown"


def estimate(mean: float | None, stderr: float | None) -> str:
    """A number to the digits that its error leaves: ``142.2 +- 3.1``; alone where it is exact."""
    if stderr == 0:
        return number(mean)
    if mean is None or not stderr or not math.isfinite(mean) or not math.isfinite(stderr):
        return f"{number(mean)} +- {number(stderr)}"
    digits = 1 - math.floor(math.log10(stderr))  # two digits of the error
    if -1 <= digits <= 6 and abs(mean) < 1e6:
        return f"{mean:,.{max(digits, 0)}f} +- {stderr:.{max(digits, 0)}f}"
    return f"{mean:.4g} +- {stderr:.2g}"


def with_error(mean: float | None, stderr: float | None) -> str:
    """A number with its error, where one is known."""
    return estimate(mean, stderr) if stderr and math.isfinite(stderr) else number(mean)


def share(mean: float | None, stderr: float | None) -> str:
    """A fraction in percent."""
    return f"{estimate(*(None if x is None else 100 * x for x in (mean, stderr)))} %"


def labels(num: int) -> list[str]:
    """Short names for so many reports: letters, as long as there are enough."""
    return [chr(ord("A") + i) if num <= 26 else str(i + 1) for i in range(num)]


def cut(name: str, width: int) -> str:
    """The end of a name, in so many columns."""
    name = printable(name)
    return name if len(name) <= width else f"...{name[3 - width :]}"


def printable(name: str) -> str:
    """A name without control characters, which terminals obey: they are shown as they are written in Python."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def setting(value: Any) -> str:
    """The value of a setting; None stands for what follows from the others."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "default" if value is None else number(value) if isinstance(value, float) else str(value)
