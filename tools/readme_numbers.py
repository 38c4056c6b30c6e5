"""Writes the tables of measured numbers into README.md and docs/benchmarks.md, from the records in benchmarks/results.

    python tools/readme_numbers.py            # writes them anew
    python tools/readme_numbers.py --check    # says whether they are up to date, and writes nothing

A table stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->``. Benchmarks write records by ``--json``.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->\n)", re.DOTALL)
PEERS = ("PyHessian", "curvlinops", "hessian-eigenthings")
HVP, LINEARIZED = "hessfn hvp", "hessfn linearized_hvp"

Record = dict[str, Any]
Lines = list[str]


def read(name: str) -> Record:
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Lines:
    lines = [f"| {' | '.join(cells)} |".replace("|  ", "| ") for cells in (head, *rows)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:]]


def short(value: Any) -> str:
    """A number in three digits, a text as it is, nothing as nothing."""
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.0f}" if abs(value) >= 100 or isinstance(value, int) else f"{value:#.3g}"


def cell(record: Record, key: str, form: str = "", **which: Any) -> str:
    """One number of the row that has these values; nothing where none was measured."""
    for row in record["rows"]:
        if all(row.get(name) == value for name, value in which.items()):
            value = row.get(key)
            return format(value, form).removesuffix(".") if form and value is not None else short(value)
    return ""


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2g} %"


def without_repeats(rows: Iterable[Sequence[str]]) -> Iterable[Sequence[str]]:
    """The first cell stands where it changes."""
    last = None
    for first, *rest in rows:
        yield ["" if first == last else first, *rest]
        last = first


def with_versions(names: Sequence[str], record: Record) -> list[str]:
    return [f"{name} {record['libraries'].get(name, '')}".strip() for name in names]


def place(record: Record) -> str:
    """Where a record is from, and when."""
    torch = f"torch {record['torch'].partition('+')[0]}"
    return ", ".join(part for part in (record["device"] or record["processor"], torch, record["date"]) if part)


def dated(record: Record, *lines: str) -> Lines:
    """A table of docs/benchmarks.md, below where it is from."""
    origin = f"{place(record)}, commit {record['commit']}:"
    return [origin[0].upper() + origin[1:], "", *lines]


MODELS = {
    "products_gpu": {
        "resnet18": "ResNet18, 512 images of 32 x 32",
        "resnet50": "ResNet50, 64 images of 224 x 224",
        "gpt": "GPT, 12 layers of 768, vocabulary 50257, 4 x 1024 tokens",
        "nanogpt": "GPT-2 with 124 million parameters, 4 x 1024 tokens",
        "vit": "ViT-B/16, 32 images of 224 x 224",
    },
    "products_cpu": {
        "resnet20": "ResNet20, CIFAR-10, batch 128",
        "gpt": "GPT, 4 layers of 128, 8 x 128 tokens",
        "mlp": "MLP 784-512-512-10, batch 512",
    },
}


def models_of(name: str, record: Record) -> dict[str, str]:
    """Those of a table that the record has."""
    there = {row.get("model") for row in record["rows"] if "ms" in row}
    return {model: words for model, words in MODELS[name].items() if model in there}


def peers() -> Lines:
    """Of the README: what each library can do, then milliseconds of a product, on a GPU first."""
    features, gpu, cpu = read("features"), read("products_gpu"), read("products_cpu")
    rows = []
    for feature in dict.fromkeys(row["feature"] for row in features["rows"]):
        answers = {row["by"]: row["has"] for row in features["rows"] if row["feature"] == feature}
        rows.append([feature, *("yes" if answers[name] else "no" for name in ("hessfn", *PEERS))])
    for where, record, models in (("GPU", gpu, "products_gpu"), ("CPU", cpu, "products_cpu")):
        for model, words in models_of(models, record).items():
            of = {
                by: cell(record, "ms", ".0f", model=model, by=by) or "not measured" for by in (HVP, LINEARIZED, *PEERS)
            }
            kept = cell(record, "ms", ".0f", model=model, by="PyHessian, one batch (graph kept)")
            of["PyHessian"] = (
                f"{cell(record, 'ms', '.0f', model=model, by='PyHessian, loader')} ({kept})" if kept else "not measured"
            )
            rows.append([f"ms on a {where}: {words}", f"{of[HVP]}, {of[LINEARIZED]}", *(of[peer] for peer in PEERS)])
    torch = features["torch"].partition("+")[0]
    words = (
        f"*Yes* means that a call gave the right result on {features['date']}, with torch {torch} "
        "(`tests/bench/bench_features.py`). Times are for one product. The two of hessfn are `hvp` and "
        "`linearized_hvp`; the two of PyHessian are over a loader and, in parentheses, of one batch with its graph "
        "kept. "
        f"GPU: {place(gpu)}. CPU: {place(cpu)}. [More](docs/benchmarks.md)."
    )
    return [*table(["", "hessfn", *with_versions(PEERS, features)], rows), "", *textwrap.wrap(words, 120)]


WAYS_GPU = {
    "PyHessian, one batch (graph kept)": "PyHessian, graph kept",
    "PyHessian, loader": "PyHessian, loader",
    "curvlinops": "curvlinops",
    "hessian-eigenthings": "hessian-eigenthings",
    HVP: "`hvp`",
    LINEARIZED: "`linearized_hvp`",
    f"{LINEARIZED}, CUDA graph": "as a CUDA graph",
}


def products_gpu() -> Lines:
    record = read("products_gpu")
    measured = {row["by"] for row in record["rows"] if "ms" in row}
    ways = [by for by in WAYS_GPU if by in measured]

    def both(model: str, by: str) -> str:
        ms = cell(record, "ms", ".1f", model=model, by=by)
        return ms and f"{ms} ({cell(record, 'gradients', model=model, by=by)})"

    rows = [
        [words, cell(record, "ms", ".1f", model=model, by="gradient"), *(both(model, by) for by in ways)]
        for model, words in models_of("products_gpu", record).items()
    ]
    names = [f"{WAYS_GPU[by]} {record['libraries'].get(by, '')}".strip() for by in ways]
    return dated(record, *table(["", "gradient", *names], rows))


def by_model(key: str, ways: dict[str, str]) -> Lines:
    """Numbers of one kind of products on the CPU: a row for each way, a column for each model."""
    record = read("products_cpu")
    models = MODELS["products_cpu"]
    rows = [[words, *(cell(record, key, ".0f", model=model, by=by) for model in models)] for by, words in ways.items()]
    return dated(record, *table(["", *models.values()], rows))


def products_cpu() -> Lines:
    curvlinops, eigenthings = with_versions(PEERS[1:], read("products_cpu"))
    ways = {
        "gradient": "a gradient, for scale",
        "PyHessian, one batch (graph kept)": "PyHessian, one batch (keeps its graph)",
        "PyHessian, loader": "PyHessian, loader",
        "curvlinops": curvlinops,
        "hessian-eigenthings": eigenthings,
        HVP: "`hvp`",
        LINEARIZED: "`linearized_hvp`",
        f"{LINEARIZED}, compiled": "`linearized_hvp(compile=True)`",
    }
    return by_model("ms", ways)


def memory_cpu() -> Lines:
    ways = {
        "PyHessian, one batch (graph kept)": "PyHessian, one batch (keeps its graph)",
        "PyHessian, loader": "PyHessian, loader",
        HVP: "`hvp`",
        LINEARIZED: "`linearized_hvp`",
    }
    return by_model("mb", ways)


def language() -> Lines:
    record, numbers = read("language"), ("memory in gradients", "time in gradients")
    ways = ("hvp", "linearized_hvp")
    rows = [
        [
            size.replace("x", " x "),
            *(cell(record, number, ".2f", row=size, by=way) for number in numbers for way in ways),
        ]
        for size in dict.fromkeys(row["row"] for row in record["rows"])
    ]
    head = [f"`{way}` {number.split()[0]}" for number in numbers for way in ways]
    return dated(record, *table(["vocabulary x batch x tokens", *head], rows))


def large() -> Lines:
    record = read("large")
    rows = [
        [row["task"], f"{row['products']}", f"{row['seconds']:.0f}", f"{row['peak'] / 1e9:.1f} GB", row["found"]]
        for row in record["rows"]
        if row["products"]
    ]
    return dated(record, *table(["", "products", "seconds", "peak of the process", "found"], rows))


def first_products() -> Lines:
    record, count = read("first_products"), 5
    ways = {
        "jvp of grad": "`jvp` of `grad`",
        "hvp": "`hvp`",
        "hvp, unchecked": "`hvp(check=False)`",
        "hvp, traced at once, unchecked": "`hvp(trace_after=0, check=False)`",
        "linearized_hvp, unchecked": "`linearized_hvp(check=False)` and a product",
    }
    rows = []
    for model, by in dict.fromkeys((row["model"], row["by"]) for row in record["rows"]):
        if by in ways:
            numbers = [cell(record, "gradients", "#.2g", model=model, by=by, product=i) for i in range(1, count + 1)]
            rows.append([{"resnet20": "ResNet20", "mlp": "MLP", "gpt": "GPT"}[model], ways[by], *numbers])
    head = ["", "", "1st", "2nd", "3rd", *(f"{i}th" for i in range(4, count + 1))]
    return dated(record, *table(head, without_repeats(rows)))


def estimators() -> Lines:
    record, keys = read("estimators"), ("products", "seconds", "error")
    rows = [[row["task"], row["by"], *(short(row.get(key)) for key in keys)] for row in record["rows"]]
    return dated(record, *table(["", "by", *keys], without_repeats(rows)))


def report_resnet20() -> Lines:
    return report_of("report_resnet20")


def report_gpt() -> Lines:
    return report_of("report_gpt")


def report_of(name: str) -> Lines:
    record = read(name)
    rows = [
        [row["by"], row["number"], short(row.get("seconds")), percent(row.get("says")), percent(row.get("off"))]
        for row in record["rows"]
    ]
    return dated(record, *table(["by", "number", "seconds", "says", "off"], without_repeats(rows)))


TABLES: dict[str, Callable[[], Lines]] = {
    function.__name__: function
    for function in (
        *(peers, products_gpu, products_cpu, memory_cpu),
        *(language, large, first_products, estimators, report_resnet20, report_gpt),
    )
}


def filled(text: str) -> str:
    """The page with every table made anew."""

    def made(match: re.Match[str]) -> str:
        return match[1] + "".join(f"{line}\n" for line in TABLES[match[2]]()) + match[3]

    return TABLE.sub(made, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a table is not up to date")
    check = parser.parse_args().check
    stale = False
    for page in PAGES:
        old = page.read_text("utf-8")
        new = filled(old)
        if check and new != old:
            stale = True
            sys.stdout.writelines(difflib.unified_diff(old.splitlines(True), new.splitlines(True), page.name, "made"))
        elif not check:
            page.write_text(new, "utf-8")
    if stale:
        sys.exit("python tools/readme_numbers.py writes these tables anew")


if __name__ == "__main__":
    main()
