"""Text for people: numbers with their errors, names, and the summary that the command line prints."""

from __future__ import annotations

import math
from typing import Any


def summary(result: dict[str, Any]) -> str:
    """The numbers of a report in at most 80 columns."""
    settings, trace, negative = (result[name] for name in ("settings", "trace", "negative_curvature"))
    lines = [
        cut(settings["problem"], 80),
        f"{settings['num_parameters']:,} parameters, {settings['num_samples']:,} samples, {settings['dtype']}",
        "",
        f"{'loss':<12}{number(result['loss'])}",
        f"{'trace':<12}{estimate(**trace)}   (one standard error, {settings['num_probes']} probes)",
        f"{'negative':<12}{share(**negative)} of the sum of all |eigenvalues|",
        f"{'eigenvalues':<26}{'residual':>12}",
    ]
    for value, residual, converged in zip(result["eigenvalues"], result["residuals"], result["converged"], strict=True):
        lines.append(f"{'':<12}{number(value):<14}{residual:>12.1e}{'' if converged else '   not converged'}")
    ranked = sorted(result["layers"].items(), key=lambda item: -abs(item[1]["trace"] or 0))
    shown = ranked[:8]
    lines += ["", f"{'largest traces of layers':<46}{'numel':>10}   trace"]
    lines += [f"  {cut(name, 42):<44}{x['numel']:>10,}   {estimate(x['trace'], x['stderr'])}" for name, x in shown]
    if len(ranked) > len(shown):
        lines.append(f"  and {len(ranked) - len(shown)} more in report.json")
    return "\n".join(lines)


def number(x: float | None) -> str:
    """A number to five digits."""
    return "not finite" if x is None or not math.isfinite(x) else f"{x:.5g}"


def estimate(mean: float | None, stderr: float | None) -> str:
    """A number to the digits that its error leaves: ``142.2 +- 3.1``."""
    if mean is None or not stderr or not math.isfinite(mean) or not math.isfinite(stderr):
        return f"{number(mean)} +- {number(stderr)}"
    digits = 1 - math.floor(math.log10(stderr))  # two digits of the error
    if -1 <= digits <= 6 and abs(mean) < 1e6:
        return f"{mean:,.{max(digits, 0)}f} +- {stderr:.{max(digits, 0)}f}"
    return f"{mean:.4g} +- {stderr:.2g}"


def share(mean: float | None, stderr: float | None) -> str:
    """A fraction in percent."""
    return f"{estimate(*(None if x is None else 100 * x for x in (mean, stderr)))} %"


def cut(name: str, width: int) -> str:
    """The end of a name, in so many columns."""
    # Names are the user's, and terminals obey control characters.
    name = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    return name if len(name) <= width else f"...{name[3 - width :]}"


def setting(value: Any) -> str:
    """The value of a setting; None stands for all there are."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "all" if value is None else number(value) if isinstance(value, float) else str(value)
