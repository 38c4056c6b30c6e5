"""Reports side by side: where the curvature of nets differs by more than the errors of its estimates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hessfn.core.errors import InvalidInput
from hessfn.reporting import html
from hessfn.reporting.compare_page import rendered
from hessfn.reporting.contrast import compared
from hessfn.reporting.differences import Difference, verdict
from hessfn.reporting.side import read
from hessfn.reporting.text import cut, estimate, labels, number, value, with_error
from hessfn.reporting.workspace import staging


def compare(*folders: str | Path, out: str | Path = "compare.html") -> dict[str, Any]:
    """Compares the reports in several folders on one page, such as those of checkpoints in the order of a training.

    The first and the last report are compared in detail. Reports of nets with the same parameters and with the same
    seed share their probes. Their traces are compared by the samples ``z_i'(B - A)z_i``, with the control variates of
    both as regressors, which detects changes far below the errors of the two. Other estimates have the combined error
    ``sqrt(stderr_A^2 + stderr_B^2)``. The test is Student's t at 95 %; for the layers at 95 % for all together
    (Bonferroni). Eigenvalues differ if they are further apart than their residuals and their rounding. ``differs`` is
    about these data; ``generalizes`` says whether the difference is also larger than what other data would change, by
    batches, which are paired if the data are the same.

    Args:
        folders: at least two, each with a ``report.json`` of ``hessfn report``. Files of other people are safe: they
            are checked, and nothing in them is run.
        out: the page to write; its folder is made if it does not exist. A last positional argument that ends in
            ``.html`` is used as ``out``.

    Returns:
        ``reports`` (what each of them holds, NaN for null, and ``folder``); of the first and the last: ``loss``,
        ``sharpness``, ``trace``, ``smallest`` (the smallest eigenvalue) and ``share_of_squares`` (of negative
        eigenvalues), each a ``Difference(mean, stderr, bound, units, differs, data_stderr, generalizes, paired)`` or
        None, ``eigenvalues`` (a list of these), ``layers`` and ``activations`` (a dict of these by the names that both
        have), ``only`` (layers that one has), ``critical`` (how many errors apart a layer must be, and an activation),
        ``shared`` (whether ``probes`` and ``data`` are the same); and ``steps``, these five numbers of every report
        less those of the one before.

    Cost: no product; the folders are read.

    Raises:
        ModuleNotFoundError: jinja2, which makes the page, is not installed.
        ValueError: a folder holds no ``report.json``, or another kind of one, there is only one, or ``out`` cannot be
            written.

    Source: Glasserman and Yao (1992) for common random numbers; Lavenberg and Welch (1981) for the regression on
    control variates.
    """
    if len(folders) > 2 and str(folders[-1]).endswith(".html") and not Path(folders[-1]).is_dir():
        *folders, out = folders  # type: ignore[assignment]
    if len(folders) < 2:
        raise InvalidInput(f"compare takes the folders of at least two reports, not {len(folders)}")
    template = html.template("compare.html.j2")
    result = compared([read(folder) for folder in folders])
    page = rendered(template, result)
    with staging(Path(out).parent) as folder:
        (folder / Path(out).name).write_text(page, "utf-8")
    return result


def summary(result: dict[str, Any]) -> str:
    """What :func:`compare` returns, in at most 80 columns."""
    names, reports = labels(len(result["reports"])), result["reports"]
    lines = [f"{name}  {cut(x['folder'], 77)}" for name, x in zip(names, reports, strict=True)]
    lines += ["", *_over_reports(result, names)] if len(reports) > 2 else []
    return "\n".join([*lines, "", *_of_two(result, names[0], names[-1])])


def _of_two(result: dict[str, Any], first: str, last: str) -> list[str]:
    """The first report and the last, and how far they are apart."""
    a, b = result["reports"][0], result["reports"][-1]

    def row(name: str, x: str, y: str, apart: str = "", words: str = "") -> str:
        return f"{name:<10}{x:<17}{y:<17} {apart:<21} {words}".rstrip()

    def compared_row(name: str, x: str, y: str, by: Difference | None, scale: float = 1.0) -> str:
        return row(name, x, y, "" if by is None else _apart(by, scale), verdict(by))

    def smallest(x: dict[str, Any]) -> str:
        return value(x["negative_curvature"]["smallest"])

    def share(x: dict[str, Any]) -> str:
        found = x["negative_curvature"]["share_of_squares"]
        return "unknown" if found is None else f"{100 * found['mean']:.3g} %"

    lines = [row("", first, last, f"{last} - {first}")]
    losses = [with_error(x["loss"], x["loss_data_stderr"]) for x in (a, b)]
    apart = with_error(result["loss"].mean, result["loss"].data_stderr)
    lines.append(row("loss", losses[0], losses[1], apart, verdict(result["loss"])))
    lines.append(compared_row("sharpness", value(a["sharpness"]), value(b["sharpness"]), result["sharpness"]))
    trace_a, trace_b = (estimate(x["trace"]["mean"], x["trace"]["stderr"]) for x in (a, b))
    lines.append(compared_row("trace", trace_a, trace_b, result["trace"]))
    lines.append(compared_row("smallest", smallest(a), smallest(b), result["smallest"]))
    lines.append(compared_row("negative", share(a), share(b), result["share_of_squares"], 100))
    for i, by in enumerate(result["eigenvalues"]):
        x, y = a["eigenvalues"][i], b["eigenvalues"][i]
        lines.append(compared_row(f"value {i + 1}", number(x), number(y), by))
    for kind, of in (("layers", "trace"), ("activations", "the trace of what enters")):
        marked = [(name, by) for name, by in result[kind].items() if by.differs]
        if result[kind] or kind == "layers":
            lines += ["", f"{len(marked)} of {len(result[kind])} layers that both have differ in {of}"]
        for name, by in sorted(marked, key=lambda item: -abs(item[1].mean))[:8]:
            lines.append(f"  {cut(name, 42):<44}{estimate(by.mean, by.stderr)}")
    for side, names in result["only"].items():
        lines += [f"{len(names)} layers only {first if side == 'A' else last} has"] if names else []
    return [*lines, "", *_notes(result)]


def _notes(result: dict[str, Any]) -> list[str]:
    shared = result["shared"]
    probes = (
        "the same probes, sample by sample" if shared["probes"] else "different probes, so the errors of both add up"
    )
    return [
        f"{'probes':<11}{probes}",
        f"{'data':<11}{'the same, batch by batch' if shared['data'] else 'not known to be the same'}",
        f"{'loss':<11}with one standard error by the choice of the data",
        f"{'negative':<11}the share of the sum of all squared eigenvalues",
        f"{'here':<11}on these data; other data may say otherwise",
    ]


def _apart(by: Difference, scale: float = 1.0) -> str:
    return estimate(scale * by.mean, scale * (by.stderr or by.bound))


def _over_reports(result: dict[str, Any], names: list[str]) -> list[str]:
    """A line for each report; a star stands where a number differs from the one above it."""
    lines = [f"{'':<6}{'loss':<14}{'sharpness':<20}{'trace':<24}smallest"]
    for name, x, step in zip(names, result["reports"], [{}, *result["steps"]], strict=True):
        cells = [
            (number(x["loss"]), "loss", 14),
            (value(x["sharpness"]), "sharpness", 20),
            (estimate(x["trace"]["mean"], x["trace"]["stderr"]), "trace", 24),
            (value(x["negative_curvature"]["smallest"]), "smallest", 16),
        ]
        marked = [f"{text + (' *' if step.get(key) and step[key].differs else ''):<{w}}" for text, key, w in cells]
        lines.append(f"{name:<6}{''.join(marked)}".rstrip())
    return [*lines, f"{'':<6}* differs from the line above"]
