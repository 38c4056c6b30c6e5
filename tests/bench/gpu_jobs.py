"""The main job of each library on a GPU: top five, trace and density; seconds, the error it states, the true one.

``resnet18``: CIFAR's form, shortly trained, on 10,000 images. ``gpt``: 124 million parameters, 4 x 1024 tokens.

Each number is a cell. A library first makes one product, and is asked for as many as fit into the seconds of a cell,
for trace and density at most ``--products``; the row has both numbers. What was found is in the rows, so that errors
can be told later, too. The truth is made by more than one library: eigenvalues are Rayleigh quotients by double
backward, without TF32; trace and density are means of hessfn's own and hessian-eigenthings' (gpu_truth.py).
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from bench_report import distance, largest
from cells import Cells, Row
from gpu_problems import Job, job
from gpu_truth import TRUTHS, together
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import hessfn as hf

JOBS = ("resnet18", "gpt")
NUM_PAIRS = 5
PEER_STEPS, PEER_PROBES, DENSITY_STEPS = 20, 60, 100  # of hessian-eigenthings, which leaves them to its user


class Library(NamedTuple):
    """What makes one product; and each number, from at most so many products to a row and how many it took."""

    product: Callable[[], Any]
    top: Callable[[int], Row]
    trace: Callable[[int], Row]
    density: Callable[[int], Row]


def of_hessfn(model: Any, criterion: Any, batches: Any) -> Library:
    loss, params = hf.functionalize(model, criterion)
    matvec = hf.linearized_hvp(loss, params, batches[0]) if len(batches) == 1 else hf.mean_hvp(loss, params, batches)
    v, pairs = hf.gaussian(params, 3), []

    def top(cap: int) -> Row:
        found = hf.eigsh(matvec, v[0], NUM_PAIRS, rtol=1e-2, max_matvecs=cap, keep_all=True)
        pairs[:] = [found]
        values, residuals = found.values[:NUM_PAIRS], found.residuals[:NUM_PAIRS]
        says = float((residuals / values.abs()).max())
        return {"values": values.tolist(), "says": says, "products": found.num_matvecs}

    def trace(cap: int) -> Row:
        known = pairs[0] if pairs else None
        found = hf.hutchinson(matvec, hf.rademacher(params, cap), rtol=0.02 if cap > 10 else None, eigenpairs=known)
        return trace_row(float(found.mean), float(found.stderr), found.num_matvecs)

    def density(cap: int) -> Row:
        steps = max(2, cap // 2)
        found = hf.slq(matvec, v[1:], steps)
        weights = found.weights / len(found.weights)
        return {"nodes": found.nodes.flatten().tolist(), "weights": weights.flatten().tolist(), "products": 2 * steps}

    return Library(lambda: matvec(v[0]), top, trace, density)


def trace_row(mean: float, stderr: float, products: int) -> Row:
    return {"mean": mean, "stderr": stderr, "says": stderr / abs(mean), "products": products}


def of_eigenthings(model: Any, criterion: Any, batches: Any) -> Library:
    module = importlib.import_module("hessian_eigenthings")
    operator = module.HessianOperator(model, batches, module.supervised_loss(criterion))
    v = hf.gaussian(torch.zeros(operator.size, device=operator.device), 1)[0]

    def top(cap: int) -> Row:
        steps = min(cap, PEER_STEPS)
        found = module.lanczos(operator, k=NUM_PAIRS, max_iter=steps, tol=1e-3, seed=0)
        values = sorted((float(x) for x in found.eigenvalues), key=lambda x: -abs(x))
        return {"values": values, "products": steps}

    def trace(cap: int) -> Row:
        count = min(cap, PEER_PROBES)
        found = module.trace(operator, num_matvecs=count, seed=0)
        return trace_row(float(found.estimate), float(found.stderr), count)

    def density(cap: int) -> Row:
        steps = min(cap, DENSITY_STEPS)
        found = module.spectral_density(operator, num_runs=1, lanczos_steps=steps, seed=0)
        nodes, weights = found.raw_eigenvalues.flatten(), found.raw_weights.flatten()
        return {"nodes": nodes.tolist(), "weights": weights.tolist(), "products": steps}

    return Library(lambda: operator.matvec(v), top, trace, density)


def of_pyhessian(model: Any, criterion: Any, batches: Any) -> Library:
    # Its package hides the module behind the class of the same name.
    hessian_of = importlib.import_module("pyhessian.hessian").hessian
    data = {"data": batches[0]} if len(batches) == 1 else {"dataloader": batches}
    hessian = hessian_of(model, criterion, cuda=batches[0][0].is_cuda, **data)
    v = [torch.ones_like(p) for p in hessian.params]
    made = [0]

    def counted(product: Callable[..., Any]) -> Callable[..., Any]:
        def count(*arguments: Any) -> Any:
            made[0] += 1
            return product(*arguments)

        return count

    utils = importlib.import_module("pyhessian.hessian")
    hessian.dataloader_hv_product = counted(hessian.dataloader_hv_product)
    kept = utils.hessian_vector_product

    def product() -> Any:
        return hessian.dataloader_hv_product(v) if hessian.full_dataset else kept(hessian.gradsH, hessian.params, v)

    @contextmanager
    def patched() -> Iterator[None]:
        """Products are counted, and ``torch.eig`` is there as it was when PyHessian was written."""
        before, made[0] = getattr(torch, "eig", None), 0
        torch.eig, utils.hessian_vector_product = eig, counted(kept)
        try:
            yield
        finally:
            torch.eig, utils.hessian_vector_product = before, kept

    def top(cap: int) -> Row:
        with patched():
            values, _ = hessian.eigenvalues(maxIter=max(2, min(100, cap // NUM_PAIRS)), top_n=NUM_PAIRS)
        return {"values": values, "products": made[0]}

    def trace(cap: int) -> Row:
        with patched():
            samples = torch.tensor(hessian.trace(maxIter=min(100, cap)))
        return trace_row(float(samples.mean()), float(samples.std() / len(samples) ** 0.5), made[0])

    def density(cap: int) -> Row:
        with patched():
            (nodes,), (weights,) = hessian.density(iter=min(DENSITY_STEPS, cap))
        return {"nodes": list(map(float, nodes)), "weights": list(map(float, weights)), "products": made[0]}

    return Library(product, top, trace, density)


def eig(matrix: Tensor, eigenvectors: bool) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    return torch.stack([values, torch.zeros_like(values)], 1), vectors


LIBRARIES: dict[str, Callable[..., Library]] = {
    "hessfn": of_hessfn,
    "hessian-eigenthings": of_eigenthings,
    "PyHessian": of_pyhessian,
}


def synchronized() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def compare(cells: Cells, name: str, given: argparse.Namespace) -> None:
    found: list[Job] = []

    def build() -> Row:
        found[:] = [job(name, given.scale, torch.device(given.device), given.images)]
        model, _, batches = found[0]
        return {"parameters": sum(p.numel() for p in model.parameters()), "batches": len(batches)}

    if cells.run({"model": name, "by": "problem"}, build) is None:
        return
    results: dict[str, dict[str, Row]] = {}
    parts: list[dict[str, Row]] = []
    for library in LIBRARIES:
        results[library] = numbers(cells, name, library, found[0], given.products)
        if library in TRUTHS and given.products:  # after its own numbers: what is late may find no time
            parts.append(TRUTHS[library](cells, {"model": name}, *found[0], given.products))
    truth = together(cells, {"model": name}, parts)
    for library, of_library in results.items():
        for number, row in of_library.items():
            if number in truth:
                verdict = {"off": off(number, row, truth), **beside_ours(number, row, results["hessfn"])}
                cells.add({**cells.same, "model": name, "by": library, "number": number, **row, **verdict})


def beside_ours(number: str, row: Row, ours: dict[str, Row]) -> Row:
    """Seconds in ours: of a trace those to our error, which falls as the root of the probes; of others as they are."""
    if number not in ours:
        return {}
    more = (row["says"] / ours["trace"]["says"]) ** 2 if number == "trace" else 1.0
    return {"times_ours": row["seconds"] * more / ours[number]["seconds"]}


def numbers(cells: Cells, name: str, library: str, problem: Job, most: int) -> dict[str, Row]:
    """The three numbers of a library, as far as there is time for them, each of so many products at most."""
    model, criterion, batches = problem
    made: list[Library] = []
    key = {"model": name, "by": library}
    kernel = nullcontext if library == "hessfn" else lambda: sdpa_kernel(SDPBackend.MATH)

    def product() -> Row:
        start = synchronized()
        made[:] = [LIBRARIES[library](model, criterion, batches)]
        for _ in range(4):  # hvp traces its loss after the third
            made[0].product()
        warm, count = synchronized(), 3
        for _ in range(count):
            made[0].product()
        return {"first_seconds": warm - start, "product_seconds": (synchronized() - warm) / count}

    found: dict[str, Row] = {}
    with kernel():
        once = cells.run({**key, "number": "product"}, product)
        for number in ("top", "trace", "density") if once is not None and most else ():
            cap = min(100 if number == "top" else most, int(0.8 * cells.left / once["product_seconds"]))

            def measure(number: str = number, cap: int = cap) -> Row:
                start = synchronized()
                row = getattr(made[0], number)(cap)
                return {"seconds": synchronized() - start, "at_most": cap, **row}

            row = cells.run({**key, "number": number}, measure, needs=12 * once["product_seconds"])
            if row is not None:
                found[number] = row
    model.zero_grad(set_to_none=True)
    return found


def off(number: str, row: Row, truth: dict[str, Row]) -> float:
    """The relative error of a number: of the top five the largest one, of a density over the range of the spectrum."""
    if number == "top":
        return largest(row["values"], truth["top"]["values"])
    if number == "trace":
        return largest([row["mean"]], [truth["trace"]["mean"]])
    return distance(row["nodes"], row["weights"], {"density": truth["density"]})
