"""The negative curvature of ResNet20 from one very long Lanczos run, and whether the errors of a report cover it.

    python tests/bench/truth_negative.py --state /tmp/long --minutes 6      # run again until it has all steps
    python tests/bench/truth_negative.py --state /tmp/long --report report.json

Full orthogonalisation in float64, products in float32. The Ritz pairs that have converged are eigenvalues, and count
once each; of all others the run sees only what its start sees of them, ``n`` times the weights of their nodes, as a
sample with a standard error. Writes truth_negative.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from truth import PROBLEMS

import hessfn as hf
from hessfn.core import tree

STEPS = 480
FILE = Path(__file__).parent / "truth_negative.json"
CONVERGED = 1e-2  # residual of a pair, as a part of its value
SHOWN = (16, 30, 60, 120, 240, 480)  # numbers of steps, whose rules are compared


def extended(state: Path, num_steps: int, deadline: float) -> dict[str, Any]:
    """The Lanczos recurrence, as far as the deadline lets it; it goes on from what is in ``state``."""
    model, criterion, batches = PROBLEMS["resnet20"]()
    loss, params = hf.functionalize(model, criterion)
    matvec, unravel = hf.linearized_hvp(loss, params, batches[0]), tree.ravel(params)[1]
    n, file = tree.numel(params), state / "negative.pt"
    basis = torch.zeros(num_steps + 1, n, dtype=torch.float64)
    alpha, beta = [], []
    if file.is_file():
        kept = torch.load(file, weights_only=True)
        alpha, beta = kept["alpha"], kept["beta"]
        basis[: len(alpha) + 1] = kept["basis"]
    else:
        start = torch.randn(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        basis[0] = start / start.norm()
    while (step := len(alpha)) < num_steps and time.monotonic() < deadline:
        w = tree.ravel(matvec(unravel(basis[step].float())))[0].double()
        alpha.append(float(w @ basis[step]))
        for _ in range(2):
            w = w - basis[: step + 1].T @ (basis[: step + 1] @ w)
        beta.append(float(w.norm()))
        basis[step + 1] = w / w.norm()
    found = {"alpha": alpha, "beta": beta, "basis": basis[: len(alpha) + 1].clone()}
    torch.save(found, file)
    return {**found, "n": n}


def rule(alpha: list[float], beta: list[float], num_steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes, weights, and the residuals of the Ritz pairs, of the first steps."""
    off = torch.tensor(beta[: num_steps - 1], dtype=torch.float64)
    middle = torch.tensor(alpha[:num_steps], dtype=torch.float64)
    nodes, s = torch.linalg.eigh(torch.diag(middle) + off.diag(1) + off.diag(-1))
    return nodes, s[0].square(), beta[num_steps - 1] * s[-1].abs()


def share(alpha: list[float], beta: list[float], num_steps: int, n: int) -> dict[str, Any]:
    """The negative share of the sum of squares, its standard error by the start, and the most negative eigenvalue."""
    nodes, weights, residuals = rule(alpha, beta, num_steps)
    known = residuals <= CONVERGED * nodes.abs()
    below, all_of = nodes.clamp(max=0).square(), nodes.square()
    sums = [float(f[known].sum() + n * (weights * f)[~known].sum()) for f in (below, all_of)]
    ratio = sums[0] / sums[1]
    # Linearized, the share is the sum of (f - ratio g) over that of g; a start of unit norm has this variance.
    unknown = torch.where(known, 0.0, below - ratio * all_of)
    first, second = ((weights * unknown**power).sum() for power in (1, 2))
    stderr = math.sqrt(max(0.0, float(2 * n * (second - first**2)))) / sums[1]
    return {
        "num_steps": num_steps,
        "num_converged": int(known.sum()),
        "share": ratio,
        "stderr": stderr,
        "plain_share": float((weights * below).sum() / (weights * all_of).sum()),
        "sum_of_squares": sums[1],
        "smallest": float(nodes[0]),
        "residual": float(residuals[0]),
    }


def held(report: dict[str, Any], truth: dict[str, Any]) -> str:
    """What the report says, what is true, and how many of its own errors lie between."""
    smallest, part = report["negative_curvature"]["smallest"], report["negative_curvature"]["share_of_squares"]
    says = smallest["residual"] + (smallest.get("rounding") or 0)
    off = smallest["value"] - truth["smallest"]
    lines = [
        f"smallest {smallest['value']:.5g} +- {says:.2g} (residual and rounding), truth {truth['smallest']:.5g}: "
        f"off by {off:.2g}"
    ]
    error = math.hypot(part["stderr"], truth["stderr"])
    off = part["mean"] - truth["share"]
    lines.append(
        f"share {part['mean']:.5g} +- {part['stderr']:.2g} (probes) +- {part['steps_error']:.2g} (steps), "
        f"truth {truth['share']:.5g} +- {truth['stderr']:.2g}: off by {off:.2g}, beyond the steps' "
        f"{max(0.0, abs(off) - part['steps_error']) / error if error else math.nan:.2g} standard errors"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--state", type=Path, required=True, help="the folder that keeps the Krylov space (1 GB)")
    parser.add_argument("--report", type=Path, help="a report.json of the same problem")
    options = parser.parse_args()
    if options.report is None:
        options.state.mkdir(parents=True, exist_ok=True)
        found = extended(options.state, STEPS, time.monotonic() + 60 * options.minutes)
        done = len(found["alpha"])
        rows = [share(found["alpha"], found["beta"], m, found["n"]) for m in sorted({*SHOWN, done}) if m <= done]
        FILE.write_text(json.dumps({"num_parameters": found["n"], "rows": rows}, indent=1) + "\n")
        print(f"{done} of {STEPS} steps")
        for row in rows:
            print(row)
        return
    truth = json.loads(FILE.read_text())["rows"][-1]
    print(held(json.loads(options.report.read_text()), truth))


if __name__ == "__main__":
    main()
