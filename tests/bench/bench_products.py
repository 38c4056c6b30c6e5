"""What one Hessian-vector product costs, beside those of the peers that are installed: time, error, memory, growth.

``python tests/bench/bench_products.py [resnet20] [gpt] [mlp] [--json FILE]``: two tables a model, of products and of
first products of a loss. Times are medians of rounds in which every way has its turn, so that they share the drift of
the machine; memory is the peak of a process of its own.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import record
import torch
from models import MODELS, Problem, mlp, resnet20
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import hessfn as hf
from hessfn.core import tree

Vector = dict[str, Tensor]
Make = Callable[[nn.Module, nn.Module, tuple[Tensor, Tensor]], Callable[[Vector], Vector]]


def with_hessfn(make: Callable[..., hf.MatVec], **options: Any) -> Make:
    def build(model: nn.Module, criterion: nn.Module, batch: tuple[Tensor, Tensor]) -> Callable[[Vector], Vector]:
        loss, params = hf.functionalize(model, criterion)
        return make(loss, params, batch, **options)

    return build


def gradient(model: nn.Module, criterion: nn.Module, batch: tuple[Tensor, Tensor]) -> Callable[[Vector], Vector]:
    names, params = zip(*model.named_parameters(), strict=True)
    return lambda v: dict(zip(names, torch.autograd.grad(criterion(model(batch[0]), batch[1]), params), strict=True))


def pyhessian_kept(model: nn.Module, criterion: nn.Module, batch: tuple[Tensor, Tensor]) -> Callable[[Vector], Vector]:
    from pyhessian import hessian
    from pyhessian.utils import hessian_vector_product

    kept = hessian(model, criterion, data=batch, cuda=batch[0].is_cuda)
    names = [name for name, _ in model.named_parameters()]
    return lambda v: dict(zip(names, hessian_vector_product(kept.gradsH, kept.params, list(v.values())), strict=True))


def pyhessian_loader(
    model: nn.Module, criterion: nn.Module, batch: tuple[Tensor, Tensor]
) -> Callable[[Vector], Vector]:
    from pyhessian import hessian

    over = hessian(model, criterion, dataloader=[batch], cuda=batch[0].is_cuda)
    names = [name for name, _ in model.named_parameters()]
    return lambda v: dict(zip(names, over.dataloader_hv_product(list(v.values()))[1], strict=True))


def curvlinops(model: nn.Module, criterion: nn.Module, batch: tuple[Tensor, Tensor]) -> Callable[[Vector], Vector]:
    from curvlinops import HessianLinearOperator

    names, params = zip(*model.named_parameters(), strict=True)
    operator = HessianLinearOperator(model, criterion, list(params), [batch], check_deterministic=False)
    return lambda v: dict(zip(names, operator @ list(v.values()), strict=True))


def eigenthings(model: nn.Module, criterion: nn.Module, batch: tuple[Tensor, Tensor]) -> Callable[[Vector], Vector]:
    from hessian_eigenthings import HessianOperator
    from hessian_eigenthings.loss_fns import supervised_loss

    operator = HessianOperator(model, [batch], supervised_loss(criterion))
    _, unravel = tree.ravel(dict(model.named_parameters()))
    return lambda v: unravel(operator.matvec(tree.ravel(v)[0]))


WAYS: dict[str, Make] = {
    "gradient": gradient,
    "PyHessian, one batch (graph kept)": pyhessian_kept,
    "PyHessian, loader": pyhessian_loader,
    "curvlinops": curvlinops,
    "hessian-eigenthings": eigenthings,
    "hessfn double backward": with_hessfn(hf.hvp, mode="double_backward"),
    "hessfn hvp": with_hessfn(hf.hvp, trace_after=0),
    "hessfn linearized_hvp": with_hessfn(hf.linearized_hvp),
    "hessfn linearized_hvp, compiled": with_hessfn(hf.linearized_hvp, compile=True),
}
KEPT = "PyHessian, one batch (graph kept)"
FRESH = ("PyHessian, loader", "curvlinops", "hessian-eigenthings")


def built(name: str, problem: Problem) -> Callable[[], Vector] | None:
    """One product as a function of nothing; None where the peer is not installed."""
    model, criterion, batch = problem
    v = hf.gaussian({key: p.detach() for key, p in model.named_parameters()}, 1)[0]

    def kernel() -> Any:  # only hessfn finds by itself the attention kernel that can be differentiated twice
        return nullcontext() if name.startswith("hessfn") else sdpa_kernel(SDPBackend.MATH)

    try:
        with kernel():
            product = WAYS[name](copy.deepcopy(model), criterion, batch)  # some leave their gradients on it
    except ImportError:
        return None

    def run() -> Vector:
        with kernel():
            return {key: p.detach() for key, p in product(v).items()}

    return run


def in_turns(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each. A turn is of as many as take a quarter of a second, one after the other as in use."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    times = dict.fromkeys(runs, 1)
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(times[name]):
                run()
            seconds[name].append((time.perf_counter() - start) / times[name])
            times[name] = max(1, round(0.25 / seconds[name][0]))
    return {name: statistics.median(taken[1:]) for name, taken in seconds.items()}


Rows = list[dict[str, Any]]


def table(model: str, rounds: int, rows: Rows) -> Iterator[str]:
    problem = MODELS[model]()
    runs = {name: run for name in WAYS if (run := built(name, problem)) is not None}
    exact = truth(*problem)
    seconds = in_turns(runs, rounds)
    fresh = min((seconds[name] for name in FRESH if name in seconds), default=float("nan"))
    kept = seconds.get(KEPT, float("nan"))
    yield f"\n{model}: a product in ms, and over PyHessian's kept graph and the fastest peer that keeps none"
    yield f"{'':34} {'ms':>7} {'/ kept':>7} {'/ fresh':>8} {'error':>8} {'MB':>6}"
    for name, run in runs.items():
        row = {"model": model, "by": name, "ms": 1e3 * seconds[name], "mb": peak_memory(model, name) / 1024}
        if name != "gradient":
            row["error"] = relative_error(run(), exact)
        rows.append(row)
        error, t = f"{row['error']:.0e}" if "error" in row else "", seconds[name]
        yield f"{name:34} {1e3 * t:7.0f} {t / kept:7.2f} {t / fresh:8.2f} {error:>8} {row['mb']:6.0f}"


# What a training loop makes at each step.
FIRST: dict[str, Callable[..., hf.MatVec]] = {
    "jvp of grad": lambda loss, params, batch: partial(plain_product, loss, params, batch),
    "hvp": hf.hvp,
    "hvp, unchecked": partial(hf.hvp, check=False),
    "hvp, traced at once": partial(hf.hvp, trace_after=0),
    "hvp, traced at once, unchecked": partial(hf.hvp, trace_after=0, check=False),
    "linearized_hvp": hf.linearized_hvp,
    "linearized_hvp, unchecked": partial(hf.linearized_hvp, check=False),
}


def plain_product(loss: Any, params: Vector, batch: Any, v: Vector) -> Vector:
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(lambda p: torch.func.grad(loss)(p, batch), (params,), (v,))[1]


def first_products(model: str, rows: Rows) -> Iterator[str]:
    """The first products of a loss, each with a closure of its own, in three rounds."""
    module, criterion, batch = MODELS[model]()
    run = built("gradient", (module, criterion, batch))
    gradient = in_turns({"": run}, 5)[""]
    yield f"\n{model}: the 1st to 6th product of a loss, each with a closure of its own, in gradients"
    for name, make in FIRST.items():
        rounds = [seconds_of_products(make, module, criterion, batch) for _ in range(3)]
        taken = [statistics.median(t) / gradient for t in zip(*rounds, strict=True)]
        rows += [{"model": model, "by": name, "product": i, "gradients": x} for i, x in enumerate(taken, 1)]
        yield f"{name:34} " + " ".join(f"{x:7.1f}" for x in taken)


def seconds_of_products(make: Any, module: Any, criterion: Any, batch: Any) -> list[float]:
    loss, params = hf.functionalize(module, criterion)
    v, seconds = hf.gaussian(params, 1)[0], []
    for _ in range(6):
        start = time.perf_counter()
        make(loss, params, batch)(v)
        seconds.append(time.perf_counter() - start)
    return seconds


def truth(model: nn.Module, criterion: nn.Module, batch: tuple[Tensor, Tensor]) -> Vector:
    """The product by double backward, in float64."""
    loss, params = hf.functionalize(model, criterion)
    v = hf.gaussian(params, 1)[0]
    model = model.double()
    wide, batch = tree.map(lambda x: x.double() if x.is_floating_point() else x, (params, batch))
    loss, _ = hf.functionalize(model, criterion)
    exact = hf.hvp(loss, wide, batch, mode="double_backward")(tree.map(Tensor.double, v))
    model.float()
    return exact


def relative_error(found: Vector, exact: Vector) -> float:
    difference = {name: found[name].double() - exact[name] for name in exact}
    return float(tree.norm(difference) / tree.norm(exact))


def peak_memory(model: str, way: str) -> int:
    """In kilobytes, of a process that makes three products and nothing else."""
    command = [sys.executable, __file__, model, "--memory-of", way]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def growth(rows: Rows) -> Iterator[str]:
    yield "\nhow a linearized product grows: ms, and ms per sample or per 1000 parameters"
    for batch in (16, 32, 64, 128, 256):
        t = in_turns({"": built("hessfn linearized_hvp", resnet20(batch))}, 5)[""]
        rows.append({"model": "resnet20", "batch": batch, "ms": 1e3 * t})
        yield f"resnet20, batch {batch:4}: {1e3 * t:7.0f} {1e3 * t / batch:9.3f}"
    for width in (256, 512, 1024, 2048):
        problem = mlp(width=width)
        n = sum(p.numel() for p in problem[0].parameters())
        t = in_turns({"": built("hessfn linearized_hvp", problem)}, 5)[""]
        rows.append({"model": "mlp", "parameters": n, "ms": 1e3 * t})
        yield f"mlp, {n:8} parameters: {1e3 * t:7.1f} {1e6 * t / n:9.5f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=[*MODELS, "growth"], metavar="|".join([*MODELS, "growth"]))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    record.add_option(parser)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # the peers' deprecations
    if arguments.memory_of:
        run = built(arguments.memory_of, MODELS[arguments.models[0]]())
        for _ in range(3):
            run()
        # Not ru_maxrss, which a process has from its parent.
        print(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))
        return
    rows: Rows = []
    for model in arguments.models:
        of_model = [table(model, arguments.rounds, rows), first_products(model, rows)]
        for line in itertools.chain(*([growth(rows)] if model == "growth" else of_model)):
            print(line, flush=True)
    record.write(arguments.json, rows)


if __name__ == "__main__":
    main()
