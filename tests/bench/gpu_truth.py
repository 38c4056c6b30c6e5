"""The truth that gpu_jobs.py holds its numbers against: longer runs of more than one library.

The five eigenvalues are Rayleigh quotients by double backward of torch.autograd, without TF32, at vectors that hessfn
has found, with their residuals; ``apart`` is how far hessian-eigenthings' own longer run is from them. The trace is
the mean of hessfn's and hessian-eigenthings' own probes, weighed by their variances; ``apart`` is the difference in
standard errors. The density is the mean of the quadratures of both. ``libraries`` says how many have had their part.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from bench_report import largest
from cells import Cells, Row
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import hessfn as hf
from hessfn.core import tree

NUM_PAIRS = 5


@contextmanager
def without_tf32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def double_backward(model: Any, criterion: Any, batches: Any, v: Tensor) -> Tensor:
    """The product of the mean loss by torch.autograd alone, flat."""
    params = list(model.parameters())
    total, count = torch.zeros_like(v), 0
    parts = [x.reshape(p.shape) for x, p in zip(v.split([p.numel() for p in params]), params, strict=True)]
    with sdpa_kernel(SDPBackend.MATH), without_tf32():
        for inputs, targets in batches:
            gradient = torch.autograd.grad(criterion(model(inputs), targets), params, create_graph=True)
            product = torch.autograd.grad(gradient, params, parts)
            total += torch.cat([x.flatten() for x in product]) * len(targets)
            count += len(targets)
    return total / count


def by_hessfn(cells: Cells, key: Row, model: Any, criterion: Any, batches: Any, most: int) -> dict[str, Row]:
    loss, params = hf.functionalize(model, criterion)
    matvec = hf.linearized_hvp(loss, params, batches[0]) if len(batches) == 1 else hf.mean_hvp(loss, params, batches)
    found: dict[str, Any] = {}

    def top() -> Row:
        pairs = hf.eigsh(matvec, hf.gaussian(params, 1, seed=9)[0], NUM_PAIRS, rtol=1e-4, max_matvecs=2 * most)
        found["pairs"] = pairs
        rows = []
        for i in range(NUM_PAIRS):
            v = tree.ravel(tree.map(lambda x: x[i], pairs.vectors))[0]  # noqa: B023
            v = v / v.norm()
            product = double_backward(model, criterion, batches, v)
            value = v @ product
            rows.append((float(value), float((product - value * v).norm())))
        rows.sort(key=lambda row: -abs(row[0]))
        return {"values": [value for value, _ in rows], "residuals": [error for _, error in rows]}

    def trace() -> Row:
        estimate = hf.hutchinson(matvec, hf.rademacher(params, most, seed=9), eigenpairs=found.get("pairs"))
        return {"mean": float(estimate.mean), "stderr": float(estimate.stderr)}

    def density() -> Row:
        rule = hf.slq(matvec, hf.gaussian(params, 1, seed=10), most)
        weights = rule.weights / len(rule.weights)
        return {"nodes": rule.nodes.flatten().tolist(), "weights": weights.flatten().tolist()}

    return measured(cells, {**key, "by": "truth, hessfn"}, {"top": top, "trace": trace, "density": density})


def by_eigenthings(cells: Cells, key: Row, model: Any, criterion: Any, batches: Any, most: int) -> dict[str, Row]:
    try:
        module = importlib.import_module("hessian_eigenthings")
    except ImportError:
        return {}
    operator = module.HessianOperator(model, batches, module.supervised_loss(criterion))

    def top() -> Row:
        found = module.lanczos(operator, k=NUM_PAIRS, max_iter=min(30, most), tol=1e-6, seed=9)
        return {"values": sorted((float(x) for x in found.eigenvalues), key=lambda x: -abs(x))}

    def trace() -> Row:
        found = module.hutchinson(operator, num_samples=most, seed=9)
        return {"mean": float(found.estimate), "stderr": float(found.stderr)}

    def density() -> Row:
        found = module.spectral_density(operator, num_runs=1, lanczos_steps=most, seed=9)
        return {"nodes": found.raw_eigenvalues.flatten().tolist(), "weights": found.raw_weights.flatten().tolist()}

    with sdpa_kernel(SDPBackend.MATH):
        tasks = {"top": top, "trace": trace, "density": density}
        return measured(cells, {**key, "by": "truth, hessian-eigenthings"}, tasks)


def measured(cells: Cells, key: Row, tasks: dict[str, Any]) -> dict[str, Row]:
    rows = {number: cells.run({**key, "number": number}, task) for number, task in tasks.items()}
    return {number: row for number, row in rows.items() if row is not None}


TRUTHS = {"hessfn": by_hessfn, "hessian-eigenthings": by_eigenthings}


def together(cells: Cells, key: Row, parts: list[dict[str, Row]]) -> dict[str, Row]:
    """Of each number what all parts say together; of some there may be none."""
    truth = {}
    for number in ("top", "trace", "density"):
        said = [part[number] for part in parts if number in part]
        if said:
            truth[number] = {**combined(number, said), "libraries": len(said)}
            cells.add({**cells.same, **key, "by": "truth", "number": number, **truth[number]})
    return truth


def combined(number: str, both: list[Row]) -> Row:
    if number == "top":
        return {**both[0], "apart": largest(both[-1]["values"], both[0]["values"])}
    if number == "trace":
        weights = [max(row["stderr"], 1e-12 * abs(row["mean"])) ** -2 for row in both]
        mean = sum(w * row["mean"] for w, row in zip(weights, both, strict=True)) / sum(weights)
        apart = abs(both[0]["mean"] - both[-1]["mean"]) / sum(row["stderr"] ** 2 for row in both) ** 0.5
        return {"mean": mean, "stderr": sum(weights) ** -0.5, "apart": apart}
    return {
        "nodes": [x for row in both for x in row["nodes"]],
        "weights": [x / len(both) for row in both for x in row["weights"]],
    }
