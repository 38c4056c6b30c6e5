"""Products on a CUDA device beside those of the peers that are installed, in one run: time, peak memory, error.

    python tests/bench/bench_gpu.py [resnet18 nanogpt ...] [--json FILE]
    python tests/bench/bench_gpu.py --blocks 1,2,4,8 [mlp ...]      # several products at a time, by vmap
    python tests/bench/bench_gpu.py --job resnet18                  # top five, trace and density (gpu_jobs.py)
    python tests/bench/bench_gpu.py --scale tiny --device cpu       # tries the script itself
    tests/bench/gpu_plan.sh FOLDER                                  # all of it in ten minutes

Milliseconds are medians of products one after the other, between CUDA events; memory is what torch has allocated at
most beyond what was there before; the error is that of one product in norm, against double backward in float64.
``gradient, again`` is the gradient once more at the end: how far the machine has drifted. ``CUDA graph`` records a
product's launches once, and replays them.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import gpu_jobs
import torch
from bench_products import WAYS, relative_error, truth, with_hessfn
from cells import Cells, Row, add_options
from gpu_problems import MODELS, SIZES, Problem, problem
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import hessfn as hf
from hessfn.core import tree
from hessfn.core.probes import each


def graphed(matvec: hf.MatVec, v: Any) -> hf.MatVec:
    """A CUDA graph of the product. It writes its results into the same memory each time: they are copied."""
    if not tree.leaves(v)[0].is_cuda:
        return matvec
    replay = torch.cuda.make_graphed_callables(matvec, (tree.map(torch.clone, v),))
    return lambda v: tree.map(torch.clone, replay(v))


def linearized_as_cuda_graph(model: Any, criterion: Any, batch: Any) -> hf.MatVec:
    loss, params = hf.functionalize(model, criterion)
    return graphed(hf.linearized_hvp(loss, params, batch), params)


def reduce_overhead(model: Any, criterion: Any, batch: Any) -> hf.MatVec:
    """The same by torch.compile, which compiles the product as well."""
    matvec = with_hessfn(hf.linearized_hvp)(model, criterion, batch)
    product = torch.compile(matvec, mode="reduce-overhead", fullgraph=True)
    return lambda v: tree.map(torch.clone, product(v))


# In order of their value: what is skipped for want of time is at the end.
LINEARIZED = "hessfn linearized_hvp"
WAYS = {
    "gradient": WAYS["gradient"],
    "hessfn hvp": WAYS["hessfn hvp"],
    LINEARIZED: WAYS[LINEARIZED],
    "hessfn linearized_hvp, CUDA graph": linearized_as_cuda_graph,
    **{name: make for name, make in WAYS.items() if not name.startswith(("gradient", "hessfn"))},
    "hessfn linearized_hvp, compiled": WAYS["hessfn linearized_hvp, compiled"],
    "hessfn linearized_hvp, reduce-overhead": reduce_overhead,
    "gradient, again": WAYS["gradient"],
}


def kernels(way: str) -> AbstractContextManager[None]:
    """Of torch's kernels for attention only one has a second derivative, which peers do not find by themselves."""
    return nullcontext() if way.startswith(("hessfn", "gradient")) else sdpa_kernel(SDPBackend.MATH)


def compiles(way: str) -> bool:
    return way.endswith(("compiled", "reduce-overhead"))


def milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def measured(run: Callable[[], Any], device: torch.device, rounds: int) -> Row:
    first = milliseconds(run, device)
    taken = [milliseconds(run, device) for _ in range(rounds)]
    row = {"ms": statistics.median(taken), "fastest": min(taken), "first_ms": first}
    if device.type == "cuda":
        row["peak"] = torch.cuda.max_memory_allocated()
    return row


def begin(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def in_gradients(row: Row, unit: Row | None) -> Row:
    if unit is not None:
        row["gradients"] = row["ms"] / unit["ms"]
        if unit.get("peak"):
            row["peak_gradients"] = row["peak"] / unit["peak"]
    return row


def products(cells: Cells, name: str, ways: list[str], given: argparse.Namespace) -> None:
    """A row for each way: made, tried, timed, and forgotten, for what it keeps would count for the next one."""
    device, scale = torch.device(given.device), given.scale
    found: dict[str, Problem] = {}
    exact: dict[str, Any] = {}

    def build() -> Row:
        found[name] = problem(name, scale, device)
        return {"parameters": sum(p.numel() for p in found[name][0].parameters())}

    def in_float64() -> Row:
        exact.update(truth(copy.deepcopy(found[name][0]), *found[name][1:]))
        return {}

    if cells.run({"model": name, "by": "problem"}, build) is None:
        return
    if given.exactly:
        cells.run({"model": name, "by": "truth"}, in_float64)
    unit = None

    def one(way: str) -> Row:
        if scale == "tiny" and name != "mlp" and compiles(way):
            return {"skipped": "a compiler takes as long for a tiny net as for a large one; the mlp tries it"}
        model, criterion, batch = found[name]
        model = copy.deepcopy(model)  # some leave their gradients on it
        v = hf.gaussian({key: p.detach() for key, p in model.named_parameters()}, 1)[0]
        before = begin(device)
        with kernels(way):
            product = WAYS[way](model, criterion, batch)
            result = {key: x.detach() for key, x in product(v).items()}
            row = {"error": relative_error(result, exact)} if exact and not way.startswith("gradient") else {}
            del result
            row |= measured(lambda: product(v), device, given.rounds)
        if "peak" in row:
            row["peak"] -= before
        return in_gradients(row, unit)

    for way in ways:
        row = cells.run({"model": name, "by": way}, lambda: one(way))  # noqa: B023
        unit = row if way == "gradient" else unit


def blocks(cells: Cells, name: str, sizes: list[int], given: argparse.Namespace) -> None:
    """So many products at a time by vmap, as ``batch_size=`` has them: milliseconds are for one product."""
    device = torch.device(given.device)
    for way, make in {"hessfn hvp": hf.hvp, LINEARIZED: hf.linearized_hvp}.items():
        made: dict[str, Any] = {}

        def build(make: Any = make, made: dict[str, Any] = made) -> Row:
            model, criterion, batch = problem(name, given.scale, device)
            loss, params = hf.functionalize(model, criterion)
            matvec = make(loss, params, batch, **({"trace_after": 0} if make is hf.hvp else {}))
            made.update(matvec=matvec, vectors=list(hf.gaussian(params, max(sizes))))
            matvec(made["vectors"][0])
            return {}

        def one(size: int, made: dict[str, Any] = made) -> Row:
            before = begin(device)

            def run() -> list[Tensor]:
                return [tree.dot(v, v) for v in each(made["matvec"], made["vectors"][:size], size)]

            row = measured(run, device, given.rounds)
            if "peak" in row:
                row["peak"] -= before
            return {**row, **{key: row[key] / size for key in ("ms", "fastest", "first_ms")}}

        if cells.run({"model": name, "by": f"{way}, made"}, build) is not None:
            for size in sizes:
                cells.run({"model": name, "by": way, "block": size}, lambda: one(size))  # noqa: B023


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="*", help=f"of {', '.join(MODELS)}; or with --job of {', '.join(gpu_jobs.JOBS)}"
    )
    parser.add_argument("--job", action="store_true", help="top five, trace and density instead of single products")
    parser.add_argument("--blocks", help="sizes with commas between: products in blocks, by vmap")
    parser.add_argument("--images", type=int, default=10_000, help="of the job resnet18")
    parser.add_argument(
        "--products", type=int, default=100, help="at most so many for one number of a job; 0: one product"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-errors", dest="exactly", action="store_false", help="no product in float64")
    parser.add_argument("--ways", default=";".join(WAYS), help="names, with semicolons between: some have commas")
    parser.add_argument(
        "--no-compile", action="store_true", help="leaves out the ways that torch.compile takes part in"
    )
    parser.add_argument("--scale", choices=SIZES, default="full")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", choices=["highest", "high"], default="highest", help="high: TF32 for products")
    add_options(parser, seconds=600)
    return parser.parse_args()


def main() -> None:
    given = arguments()
    warnings.simplefilter("ignore")  # the peers' deprecations
    if given.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here")
        return
    torch.set_float32_matmul_precision(given.precision)
    what = "job" if given.job else "blocks" if given.blocks else "product"
    device = torch.cuda.get_device_name() if given.device == "cuda" else given.device
    cells = Cells(given, what=what, scale=given.scale, precision=given.precision, device=device)
    print(device, torch.__version__)
    for name in given.models or (gpu_jobs.JOBS if given.job else MODELS):
        if given.job:
            cells.same["images"] = given.images if name == "resnet18" else None
            gpu_jobs.compare(cells, name, given)
        elif given.blocks:
            blocks(cells, name, [int(size) for size in given.blocks.split(",")], given)
        else:
            products(
                cells, name, [way for way in given.ways.split(";") if not (given.no_compile and compiles(way))], given
            )


if __name__ == "__main__":
    main()
