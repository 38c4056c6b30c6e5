"""The truth that bench_report.py holds reports against, as far as long runs can tell it.

    python tests/bench/truth.py resnet20 --minutes 30
    python tests/bench/truth.py gpt --minutes 10

Writes truth_resnet20.json or truth_gpt.json beside this file. None of hessfn's estimators is in it: Lanczos with full
orthogonalisation, five Rayleigh quotients in float64 by double backward, and for the traces the Ritz pairs as a control
variate; of ResNet20, which is linear in each of its layers, the exact traces, by a plain gradient of every output of
every sample in float64. What it has done is kept in --state, so that it can be run again for smaller errors.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from models import FILES, trained_gpt
from torch import Tensor, nn

import hessfn as hf
from hessfn import problems
from hessfn.core import tree

EXACT = ("resnet20",)  # nets of ReLUs with a few outputs
STEPS = {"resnet20": 70, "gpt": 200}  # products for the Krylov space
Problem = tuple[nn.Module, nn.Module, list[tuple[Tensor, Tensor]]]
PROBLEMS: dict[str, Callable[[], Problem]] = {
    "resnet20": lambda: problems.cifar10_resnet20(**FILES, num_images=200, batch_size=200),
    "gpt": trained_gpt,
}


def truth_of(name: str) -> Path:
    return Path(__file__).parent / f"truth_{name}.json"


def lanczos(
    product: Callable[[Tensor], Tensor], state: dict[str, Any], n: int, num_steps: int, deadline: float
) -> bool:
    """Adds steps until there are enough, which it returns, or until the deadline."""
    if not state:
        start = torch.randn(n, generator=torch.Generator().manual_seed(1))
        state |= {"basis": [start / start.norm()], "alpha": [], "beta": []}
    basis = torch.zeros(num_steps + 1, n)
    for i, q in enumerate(state["basis"]):
        basis[i] = q
    while (step := len(state["alpha"])) < num_steps and time.monotonic() < deadline:
        w = product(basis[step])
        state["alpha"].append(float(w.double() @ basis[step].double()))
        for _ in range(2):
            w = w - basis[: step + 1].T @ (basis[: step + 1] @ w)
        state["beta"].append(float(w.norm()))
        basis[step + 1] = w / w.norm()
        state["basis"].append(basis[step + 1].clone())
    return len(state["alpha"]) == num_steps


def ritz(state: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Values, vectors, and the weights of the starting vector: the quadrature of its density."""
    num_steps = len(state["alpha"])
    off = torch.tensor(state["beta"][: num_steps - 1]).double()
    values, s = torch.linalg.eigh(torch.diag(torch.tensor(state["alpha"]).double()) + off.diag(1) + off.diag(-1))
    return values, s.T.float() @ torch.stack(state["basis"][:num_steps]), s[0].square()


def probed(
    product: Callable[[Tensor], Tensor], pairs: tuple[Tensor, Tensor], sizes: list[int], num: int, deadline: float
) -> Tensor:
    """Samples of the trace of every leaf, a row for each probe from number ``num`` on."""
    theta, q = pairs[0].float(), pairs[1]
    own = torch.stack([part.square().sum(1) for part in q.split(sizes, 1)])  # (leaves, pairs)
    rows = []
    while not rows or time.monotonic() < deadline:
        draw = torch.Generator().manual_seed(1000 + num + len(rows))
        z = torch.randint(2, (q.shape[1],), generator=draw).float() * 2 - 1
        plain = torch.stack([part.double().sum() for part in (z * product(z)).split(sizes)])
        within = torch.stack([part @ w for part, w in zip(q.split(sizes, 1), z.split(sizes), strict=True)])
        rows.append(plain - ((within * (q @ z) - own) * theta).double().sum(1))
    return torch.stack(rows)


def exact_traces(problem: Problem) -> dict[str, float]:
    """Of every leaf's block, of cross-entropy: the mean over samples of ``sum_c p_c |g_c|^2 - |sum_c p_c g_c|^2``."""
    model, _, batches = problem
    params, data = dict(model.double().named_parameters()), [(x.double(), y) for x, y in batches]
    found, number = dict.fromkeys(params, 0.0), sum(len(y) for _, y in data)
    for x, _ in data:
        for one in x:
            outputs = model(one[None])[0]
            p = outputs.softmax(0).detach()
            slopes = [torch.autograd.grad(c, list(params.values()), retain_graph=True) for c in outputs]
            for name, *of_leaf in zip(params, *slopes, strict=True):
                g = torch.stack(of_leaf).flatten(1)
                found[name] += float(p @ g.square().sum(1) - (p @ g).square().sum()) / number
    return found


def top_five(problem: Problem, values: Tensor, q: Tensor) -> list[tuple[float, float]]:
    """Rayleigh quotients and residuals, in float64, by torch.autograd alone."""
    model, criterion, batches = problem
    loss, params = hf.functionalize(model.double(), criterion)
    unravel, found = tree.ravel(params)[1], []
    data = [(x.double() if x.is_floating_point() else x, y) for x, y in batches]
    for i in values.abs().argsort(descending=True)[:5].tolist():
        v = q[i].double() / q[i].double().norm()
        parts = [tree.ravel(hf.hvp(loss, params, b, mode="double_backward", check=False)(unravel(v)))[0] for b in data]
        product = torch.stack([p * len(y) for p, (_, y) in zip(parts, data, strict=True)]).sum(0)
        product = product / sum(len(y) for _, y in data)
        value = float(v @ product)
        found.append((value, float((product - value * v).norm())))
    return sorted(found, key=lambda pair: -abs(pair[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problem", choices=PROBLEMS)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--state", type=Path, help="a folder (default: one for temporary files)")
    options = parser.parse_args()
    folder = options.state or Path(tempfile.gettempdir())
    file = folder / f"hessfn_truth_{options.problem}.pt"
    kept: dict[str, Any] = torch.load(file, weights_only=True) if file.is_file() else {"lanczos": {}, "rows": None}

    num_steps, problem = STEPS[options.problem], PROBLEMS[options.problem]()
    model, criterion, batches = problem
    loss, params = hf.functionalize(model, criterion)
    whole = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))  # batches of equal size: one mean
    matvec, unravel = hf.linearized_hvp(loss, params, whole), tree.ravel(params)[1]

    def product(v: Tensor) -> Tensor:
        return tree.ravel(matvec(unravel(v)))[0]

    deadline = time.monotonic() + 60 * options.minutes
    try:
        if not lanczos(product, kept["lanczos"], tree.numel(params), num_steps, deadline):
            print(f"{len(kept['lanczos']['alpha'])} of {num_steps} steps: run it again")
            return
        values, q, weights = ritz(kept["lanczos"])
        if "top" not in kept:
            kept["top"] = top_five(PROBLEMS[options.problem](), values, q)
        if options.problem in EXACT:
            found = exact_traces(PROBLEMS[options.problem]())
            kept["rows"] = torch.tensor([list(found.values())], dtype=torch.float64)
        else:
            before = kept["rows"]
            sizes = [leaf.numel() for leaf in tree.leaves(params)]
            rows = probed(product, (values, q), sizes, 0 if before is None else len(before), deadline)
            kept["rows"] = rows if before is None else torch.cat([before, rows])
    finally:
        torch.save(kept, file)
    rows = kept["rows"]
    num_probes = 0 if options.problem in EXACT else len(rows)
    stderr = rows.std(0) / len(rows) ** 0.5 if num_probes else torch.zeros_like(rows[0])
    of_all = float(rows.sum(1).std() / len(rows) ** 0.5) if num_probes else 0.0
    truth = {
        "problem": options.problem,
        "num_parameters": tree.numel(params),
        "num_steps": num_steps,
        "num_probes": num_probes,
        "eigenvalues": [value for value, _ in kept["top"]],
        "residuals": [residual for _, residual in kept["top"]],
        "trace": {"mean": float(rows.sum(1).mean()), "stderr": of_all},
        "layers": {
            name: {"trace": round(float(x), 6), "stderr": round(float(e), 6)}
            for name, x, e in zip(params, rows.mean(0), stderr, strict=True)
        },
        "density": {
            "nodes": [float(f"{x:.6g}") for x in values.tolist()],
            "weights": [float(f"{x:.6g}") for x in weights.tolist()],
        },
    }
    truth_of(options.problem).write_text(json.dumps(truth, indent=1) + "\n")
    print(f"{truth_of(options.problem)}: {num_probes} probes, trace {truth['trace']}, top five {truth['eigenvalues']}")


if __name__ == "__main__":
    main()
