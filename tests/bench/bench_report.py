"""The whole report against PyHessian and hessian-eigenthings: seconds, and the stated and true error of each number.

One run, one table for each problem, on the same data: ``python tests/bench/bench_report.py [resnet20] [gpt]``. All by
their defaults, but for the number of eigenvalues (five), and of products where a peer has no default. The truth is in
truth_*.json, made by truth.py. Peers that are not installed are said to be absent: pip install -e ".[bench]".

An error is relative: of the top five the largest one, of layers the largest among the ten largest traces, of a density
its Wasserstein-1 distance over the range of the spectrum. "says" is what the library itself says of its error: one
standard error of a trace, residual and rounding of an eigenvalue; a dash where it says nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import record
import torch
from models import DATA, FILES
from scipy import stats
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from truth import PROBLEMS, Problem, truth_of

import hessfn as hf

NUM_PAIRS, NUM_PROBES, NUM_STEPS = 5, 60, 100  # of hessian-eigenthings, which leaves them to its user


class Row(NamedTuple):
    number: str
    seconds: float | None  # None where it comes with the others
    says: float | None  # relative
    off: float | None  # relative, from the truth


def largest(values: Sequence[float], truth: Sequence[float]) -> float:
    return max(abs(x / t - 1) for x, t in zip(values, truth, strict=True))


def distance(points: Sequence[float], weights: Sequence[float], truth: Any) -> float:
    """Wasserstein-1 between two spectra, over the range of the true one."""
    nodes = truth["density"]["nodes"]
    return stats.wasserstein_distance(points, nodes, weights, truth["density"]["weights"]) / (max(nodes) - min(nodes))


def ours(problem: Problem, truth: Any) -> list[Row]:
    with tempfile.TemporaryDirectory() as out:
        begun = time.perf_counter()
        found = hf.report(problem, out, k=NUM_PAIRS)
        seconds = time.perf_counter() - begun
    values, trace = found["eigenvalues"], found["trace"]
    errors = [r + (e or 0) for r, e in zip(found["residuals"], found.get("rounding") or [0] * NUM_PAIRS, strict=True)]
    big = sorted(truth["layers"], key=lambda name: -abs(truth["layers"][name]["trace"]))[:10]
    layers = [found["layers"][name] for name in big]
    grid, heights = found["density"]["grid"], found["density"]["values"]
    widths = torch.gradient(torch.tensor(grid))[0].abs()
    return [
        Row("the whole report", seconds, None, None),
        Row(
            "top 5",
            None,
            max(e / abs(x) for e, x in zip(errors, values, strict=True)),
            largest(values, truth["eigenvalues"]),
        ),
        Row(
            "trace",
            None,
            trace["stderr"] / abs(trace["mean"]),
            largest([trace["mean"]], [truth["trace"]["mean"]]),
        ),
        Row(
            "ten layers",
            None,
            max(x["stderr"] / abs(x["trace"]) for x in layers),
            largest([x["trace"] for x in layers], [truth["layers"][name]["trace"] for name in big]),
        ),
        Row("density", None, None, distance(grid, (torch.tensor(heights) * widths).clamp(min=0).tolist(), truth)),
    ]


Task = Callable[[], tuple[float | None, float]]  # says, off


def timed(tasks: dict[str, Task]) -> list[Row]:
    rows = []
    for number, task in tasks.items():
        begun = time.perf_counter()
        says, off = task()
        rows.append(Row(number, time.perf_counter() - begun, says, off))
    return [Row("the three", sum(row.seconds or 0 for row in rows), None, None), *rows]


def pyhessian(problem: Problem, truth: Any) -> list[Row]:
    model, criterion, batches = problem
    module = importlib.import_module("pyhessian.hessian")  # the package hides it behind the class of that name
    removed = getattr(torch, "eig", None)
    torch.manual_seed(0)

    def eig(matrix: Tensor, eigenvectors: bool) -> tuple[Tensor, Tensor]:
        """What torch had under this name when PyHessian was written."""
        values, vectors = torch.linalg.eigh(matrix)
        return torch.stack([values, torch.zeros_like(values)], 1), vectors

    data = {"data": batches[0]} if len(batches) == 1 else {"dataloader": batches}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.eig = eig
        try:
            hessian = module.hessian(model, criterion, cuda=False, **data)

            def top() -> tuple[None, float]:
                values, _ = hessian.eigenvalues(top_n=NUM_PAIRS)
                return None, largest(values, truth["eigenvalues"])

            def trace() -> tuple[float, float]:
                samples = torch.tensor(hessian.trace())
                mean = float(samples.mean())
                stderr = float(samples.std() / len(samples) ** 0.5)  # of its samples: it returns no error
                return stderr / abs(mean), largest([mean], [truth["trace"]["mean"]])

            def density() -> tuple[None, float]:
                (nodes,), (weights,) = hessian.density()
                return None, distance(nodes, weights, truth)

            return timed({"top 5": top, "trace": trace, "density": density})
        finally:
            torch.eig = removed
            model.zero_grad(set_to_none=True)


def eigenthings(problem: Problem, truth: Any) -> list[Row]:
    model, criterion, batches = problem
    module = importlib.import_module("hessian_eigenthings")
    operator = module.HessianOperator(model, batches, module.supervised_loss(criterion))

    def top() -> tuple[float | None, float]:
        # It does not stop by itself: so many steps as it takes on the trained nets here.
        found = module.lanczos(operator, k=NUM_PAIRS, max_iter=4 * NUM_PAIRS, tol=1e-3, seed=0)
        values = sorted((float(x) for x in found.eigenvalues), key=lambda x: -abs(x))
        return None, largest(values, truth["eigenvalues"])

    def trace() -> tuple[float, float]:
        found = module.trace(operator, num_matvecs=NUM_PROBES, seed=0)
        return found.stderr / abs(found.estimate), largest([found.estimate], [truth["trace"]["mean"]])

    def density() -> tuple[None, float]:
        found = module.spectral_density(operator, num_runs=1, lanczos_steps=NUM_STEPS, seed=0)
        nodes, weights = found.raw_eigenvalues.flatten(), found.raw_weights.flatten()
        return None, distance(nodes.tolist(), weights.tolist(), truth)

    return timed({"top 5": top, "trace": trace, "density": density})


LIBRARIES: dict[str, Callable[[Problem, Any], list[Row]]] = {
    "hessfn": ours,
    "pyhessian": pyhessian,
    "hessian_eigenthings": eigenthings,
}


def kernels(library: str) -> contextlib.AbstractContextManager[None]:
    """Attention has no second derivative in its fused kernel: peers need to be told to take another one."""
    return contextlib.nullcontext() if library == "hessfn" else sdpa_kernel(SDPBackend.MATH)


def percent(x: float | None) -> str:
    return "-" if x is None or not math.isfinite(x) else f"{100 * x:.2g} %"


def compare(name: str, libraries: Sequence[str], measured: list[dict[str, Any]]) -> None:
    truth = json.loads(truth_of(name).read_text())
    model, _, batches = PROBLEMS[name]()
    num, threads = sum(p.numel() for p in model.parameters()), torch.get_num_threads()
    known = percent(truth["trace"]["stderr"] / abs(truth["trace"]["mean"]))
    print(
        f"\n{name}: {num:,} parameters, {len(batches)} batches, {threads} threads; the true trace is known to {known}\n"
    )
    print("| by | number | seconds | says | off |\n|---|---|---|---|---|")
    for library in libraries:
        if library != "hessfn" and importlib.util.find_spec(library) is None:
            print(f'| {library} | not installed | | | |   <!-- pip install "hessfn[bench]" -->')
            continue
        try:
            with kernels(library):
                rows = LIBRARIES[library](PROBLEMS[name](), truth)
        except Exception as failure:  # a peer may not run on this version of torch: that is a result, too
            if library == "hessfn":
                raise
            measured.append({"problem": name, "by": library, "failed": type(failure).__name__})
            print(f"| {library} | {type(failure).__name__}: {str(failure).splitlines()[0][:60]} | | | |")
            continue
        for row in rows:
            measured.append({"problem": name, "by": library, **row._asdict()})
            seconds = "" if row.seconds is None else f"{row.seconds:.1f}"
            print(f"| {library} | {row.number} | {seconds} | {percent(row.says)} | {percent(row.off)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", nargs="*", help=f"of {', '.join(PROBLEMS)} (default: all)")
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    record.add_option(parser)
    options = parser.parse_args()
    measured: list[dict[str, Any]] = []
    for name in options.problems or PROBLEMS:
        if name == "resnet20" and not all(path.is_file() for path in FILES.values()):
            print(f"resnet20 left out: no weights and images in {DATA}; HESSFN_DATA names the folder")
        elif not truth_of(name).is_file():
            print(f"{name} left out: its truth is not known yet; python tests/bench/truth.py {name}")
        else:
            compare(name, options.libraries, measured)
    record.write(options.json, measured)


if __name__ == "__main__":
    main()
