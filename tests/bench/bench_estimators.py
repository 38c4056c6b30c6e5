"""Eigenpairs, trace and density on the trained ResNet20: products, seconds and true errors beside those of the peers.

One run, one table: ``python tests/bench/bench_estimators.py``. Peers that are not installed are left out. ``--digits``
takes the small net of the demo instead, to try the script itself.

Every result is checked with the same products, double backward by torch.autograd: a pair by its relative residual, the
worst of k; a trace by its distance to a reference, a density by its Wasserstein-1 distance to one, over the range.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import time
import warnings
from collections.abc import Callable
from typing import Any

import record
import scipy.sparse.linalg
import torch
from models import DATA, FILES
from torch import Tensor

import hessfn as hf
from hessfn import problems
from hessfn.core import tree
from hessfn.core.results import Quadrature
from hessfn.estimators.hutchinson import deflated_trace, hutchinson
from hessfn.estimators.spectrum import slq, wasserstein

Peer = dict[str, Callable[[], tuple[int, Any]]]  # task -> (products, result)
STEPS = 90
TASKS = ["top 5", "top 20", "trace", "plain Hutchinson", "density"]


def ours(matvec: hf.MatVec, params: hf.Tree) -> Peer:
    start, signs = hf.gaussian(params, 1)[0], hf.rademacher(params, 1000)
    kept: dict[int, Any] = {}

    def top(k: int) -> tuple[int, Any]:
        kept[k] = eig = hf.eigsh(matvec, start, k)
        return int(eig.num_matvecs), (eig.values, torch.func.vmap(lambda v: tree.ravel(v)[0])(eig.vectors))

    def trace() -> tuple[int, Any]:
        eig = hf.eigsh(matvec, start, 5)  # paid for here once more, as if nobody had asked for eigenpairs
        estimate = deflated_trace(matvec, signs[:46], eig)
        return int(eig.num_matvecs + estimate.num_matvecs), (float(estimate.mean), float(estimate.stderr))

    def plain() -> tuple[int, Any]:
        estimate = hutchinson(matvec, signs[:60])
        return 60, (float(estimate.mean), float(estimate.stderr))

    def spectrum() -> tuple[int, Any]:
        return STEPS, slq(matvec, hf.gaussian(params, 1), STEPS)

    return {
        "top 5": lambda: top(5),
        "top 20": lambda: top(20),
        "trace": trace,
        "plain Hutchinson": plain,
        "density": spectrum,
    }


def arpack(matvec: hf.MatVec, params: hf.Tree) -> Peer:
    operator = hf.as_linear_operator(matvec, params)
    start = tree.ravel(hf.gaussian(params, 1)[0])[0].numpy()

    def top(k: int) -> tuple[int, Any]:
        count = 0

        def product(v: Any) -> Any:
            nonlocal count
            count += 1
            return operator.matvec(v)

        counted = scipy.sparse.linalg.LinearOperator(operator.shape, matvec=product, dtype=operator.dtype)
        values, vectors = scipy.sparse.linalg.eigsh(counted, k, v0=start, ncv=2 * k + 20, tol=1e-3)
        return count, (torch.from_numpy(values), torch.from_numpy(vectors.T.copy()))

    return {"top 5": lambda: top(5), "top 20": lambda: top(20)}


def pyhessian(model: torch.nn.Module, criterion: Any, batch: Any) -> Peer:
    module = importlib.import_module("pyhessian.hessian")  # the package hides it behind the class of that name

    product, count = module.hessian_vector_product, 0

    def counted(*args: Any) -> Any:
        nonlocal count
        count += 1
        return product(*args)

    module.hessian_vector_product = counted

    def run(task: Callable[[Any], Any]) -> tuple[int, Any]:
        nonlocal count
        count = 0
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = task(module.hessian(model, criterion, data=batch, cuda=False))
        model.zero_grad(set_to_none=True)
        return count, result

    def top(hessian: Any, k: int) -> Any:
        values, vectors = hessian.eigenvalues(top_n=k)
        return torch.tensor(values), torch.stack([torch.cat([p.reshape(-1) for p in v]).detach() for v in vectors])

    def trace(hessian: Any) -> Any:
        samples = torch.tensor(hessian.trace())
        return float(samples.mean()), float(samples.std() / len(samples) ** 0.5)

    def spectrum(hessian: Any) -> Any:
        return Quadrature(*(torch.tensor(x).double() for x in hessian.density(iter=STEPS, n_v=1)))

    return {
        "top 5": lambda: run(lambda h: top(h, 5)),
        "top 20": lambda: run(lambda h: top(h, 20)),
        "trace": lambda: run(trace),
        "density": lambda: run(spectrum),
    }


def eigenthings(model: torch.nn.Module, criterion: Any, batch: Any) -> Peer:
    import hessian_eigenthings as module

    def run(task: Callable[[Any], Any]) -> tuple[int, Any]:
        operator = module.HessianOperator(model, [batch], module.supervised_loss(criterion))
        product, count = operator.matvec, 0

        def counted(v: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return product(v)

        operator.matvec = counted
        result = task(operator)
        return count, result

    def top(operator: Any, k: int) -> Any:
        # It does not stop by itself: the steps our own solver takes, and half as many more.
        result = module.lanczos(operator, k=k, max_iter=4 * k, tol=1e-3, seed=0)
        return result.eigenvalues, result.eigenvectors

    def trace(operator: Any) -> Any:
        result = module.trace(operator, num_matvecs=60, seed=0)
        return result.estimate, result.stderr

    def spectrum(operator: Any) -> Any:
        result = module.spectral_density(operator, num_runs=1, lanczos_steps=STEPS, seed=0)
        return Quadrature(result.raw_eigenvalues.double(), result.raw_weights.double())

    return {
        "top 5": lambda: run(lambda o: top(o, 5)),
        "top 20": lambda: run(lambda o: top(o, 20)),
        "trace": lambda: run(trace),
        "density": lambda: run(spectrum),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument(
        "--tasks", nargs="+", default=TASKS, choices=TASKS, help="all of them take the better part of an hour"
    )
    parser.add_argument("--digits", action="store_true", help="the small net of the demo")
    record.add_option(parser)
    options = parser.parse_args()
    if options.digits:
        model, criterion, batches = problems.digits(num_images=options.images, batch_size=options.images)
    elif all(path.is_file() for path in FILES.values()):
        model, criterion, batches = problems.cifar10_resnet20(
            **FILES, num_images=options.images, batch_size=options.images
        )
    else:
        print(f"left out: no weights and images in {DATA}; HESSFN_DATA names the folder, --digits takes another net")
        return
    batch = batches[0]
    loss, params = hf.functionalize(model, criterion)
    begun = time.perf_counter()
    matvec = hf.linearized_hvp(loss, params, batch)
    built = time.perf_counter() - begun
    exact = hf.hvp(loss, params, batch, mode="double_backward")
    unravel = tree.ravel(params)[1]

    peers: dict[str, Peer] = {"hessfn": ours(matvec, params), "ARPACK, hessfn's products": arpack(matvec, params)}
    for name, make in (("pyhessian", pyhessian), ("hessian_eigenthings", eigenthings)):
        if importlib.util.find_spec(name):
            peers[name] = make(model, criterion, batch)

    pairs = hf.eigsh(matvec, hf.gaussian(params, 1, seed=7)[0], 20)
    reference_trace = deflated_trace(matvec, hf.rademacher(params, 100, seed=7), pairs)
    print(f"{tree.numel(params)} parameters, {options.images} images, {torch.get_num_threads()} threads")
    print(f"hessfn's product, built once for all tasks: {built:.1f} seconds, in none of the times below")
    print(f"reference trace {float(reference_trace.mean):.2f} +- {float(reference_trace.stderr):.2f}\n")

    @functools.cache
    def reference_density() -> Quadrature:
        return slq(matvec, hf.gaussian(params, 2, seed=7), STEPS)

    def error(task: str, result: Any) -> str:
        if task.startswith("top"):
            values, vectors = result
            worst = 0.0
            for value, v in zip(values, vectors, strict=True):
                v = v / v.norm()
                product = tree.ravel(exact(unravel(v)))[0]
                worst = max(worst, float((product - value.to(v.dtype) * v).norm() / value.abs()))
            return f"residual {worst:.0e}"
        if task == "density":
            reference_rule = reference_density()
            span = float(reference_rule.nodes.max() - reference_rule.nodes.min())
            return f"W1 {float(wasserstein(result, reference_rule)) / span:.1e} of the range"
        mean, stderr = result
        relative, off = stderr / abs(mean), abs(mean / float(reference_trace.mean) - 1)
        return f"off by {off:.1%}, says +- {relative:.1%}"

    rows: list[dict[str, Any]] = []
    print(f"{'task':<18}{'by':<28}{'products':>9}{'seconds':>9}  error")
    for task in options.tasks:
        for name, tasks in peers.items():
            if task not in tasks:
                continue
            start = time.perf_counter()
            try:
                count, result = tasks[task]()
            except Exception as failure:  # a peer may not run on this version of torch: that is a result too
                rows.append({"task": task, "by": name, "failed": type(failure).__name__})
                print(
                    f"{task:<18}{name:<28}{'':>9}{'':>9}  {type(failure).__name__}: {str(failure).splitlines()[0][:60]}"
                )
                continue
            seconds = time.perf_counter() - start
            off = error(task, result)
            rows.append({"task": task, "by": name, "products": count, "seconds": seconds, "error": off})
            print(f"{task:<18}{name:<28}{count:>9}{seconds:>9.1f}  {off}", flush=True)
            if task == "plain Hutchinson":
                needed = int(60 * (result[1] / abs(result[0]) / 0.02) ** 2)
                print(f"{'':<18}{'  ... to 2 %, by its variance':<28}{needed:>9}{seconds * needed / 60:>9.1f}")
    record.write(options.json, rows)


if __name__ == "__main__":
    main()
