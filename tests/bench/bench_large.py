"""GPT-2 of 124 million parameters through the main jobs: products, seconds, errors, and peak memory.

``python tests/bench/bench_large.py [--batch 4] [--tokens 1024] [--weights FILE]``: the model is transformers' own,
randomly initialised, or of a state dict in FILE. Every row is a process of its own. Sequences are taken one at a time
(``microbatch=1``). Memory is the peak of the process, and in units of the parameters' size (0.5 GB in float32) on top
of what the imports take.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record
import torch
from gpu_problems import text

import hessfn as hf
from hessfn.core import tree

Task = Callable[[hf.MatVec, hf.Tree], tuple[int, str]]


def product(matvec: hf.MatVec, params: hf.Tree) -> tuple[int, str]:
    size = tree.norm(matvec(hf.gaussian(params, 1)[0]))
    return 1, f"norm {float(size):.4g}"


def top_two(matvec: hf.MatVec, params: hf.Tree) -> tuple[int, str]:
    found = hf.eigsh(matvec, hf.gaussian(params, 1)[0], 2, which="LA", rtol=1e-2, basis_size=12, max_matvecs=24)
    pairs = zip(found.values.tolist(), found.residuals.tolist(), strict=True)
    return int(found.num_matvecs), ", ".join(f"{value:.4g} (residual {r:.1g})" for value, r in pairs)


def trace(matvec: hf.MatVec, params: hf.Tree) -> tuple[int, str]:
    found = hf.hutchinson(matvec, hf.rademacher(params, 6))
    lower, upper = found.interval()
    interval = f"95 %: {float(lower):.4g} to {float(upper):.4g}"
    return 6, f"{float(found.mean):.4g} +- {float(found.stderr):.2g} ({interval})"


def density(matvec: hf.MatVec, params: hf.Tree) -> tuple[int, str]:
    rule = hf.slq(matvec, hf.gaussian(params, 2), 6)
    found = hf.density(rule)
    alone = [hf.density(hf.Quadrature(*(x[i : i + 1] for x in rule)), found.grid) for i in range(2)]
    error = torch.trapezoid((alone[0].values - alone[1].values).abs(), found.grid) / 2  # of the mean of two
    ends = f"from {float(rule.nodes.min()):.3g} to {float(rule.nodes.max()):.3g}"
    return 12, f"{ends}, standard error {float(error):.2g} of its area"


TASKS: dict[str, Task | None] = {
    "nothing but the imports": None,
    "one product": product,
    "top two, 12 vectors kept": top_two,
    "trace": trace,
    "density, no basis": density,
}


def run(name: str, given: argparse.Namespace) -> dict[str, Any]:
    import transformers

    result: dict[str, Any] = {"products": 0, "found": "", "seconds": 0.0, "parameters": 0}
    task = TASKS[name]
    if task is not None:
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config())
        if given.weights:
            model.load_state_dict(torch.load(given.weights, weights_only=True), strict=False)  # the head is tied
        ids = text(given.batch * given.tokens, 50257).reshape(given.batch, given.tokens)
        loss, params = hf.functionalize(model.eval(), lambda outputs, batch: outputs.loss)
        batches = [{"input_ids": ids, "labels": ids}]
        matvec = hf.mean_hvp(loss, params, batches, microbatch=1)
        start = time.perf_counter()
        result["products"], result["found"] = task(matvec, params)
        result["seconds"], result["parameters"] = time.perf_counter() - start, tree.numel(params)
    # Not ru_maxrss, which a process has from its parent.
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return {**result, "peak": int(peak.group(1)) * 1024 if peak else 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", default=list(TASKS), help=f"of {list(TASKS)}")
    parser.add_argument("--batch", type=int, default=4, help="sequences")
    parser.add_argument("--tokens", type=int, default=1024, help="of each")
    parser.add_argument("--weights", help="a state dict of GPT2LMHeadModel, saved by torch.save")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    record.add_option(parser)
    given = parser.parse_args()
    if given.alone:
        print(json.dumps(run(given.tasks[0], given)))
        return
    print(f"{'':26} {'products':>8} {'seconds':>8} {'peak GB':>8} {'/ parameters':>12}  result")
    floor, rows = None, []
    options = ["--batch", str(given.batch), "--tokens", str(given.tokens)]
    options += ["--weights", given.weights] if given.weights else []
    for name in given.tasks:
        command = [sys.executable, "-W", "ignore", __file__, name, "--alone", *options]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        floor = row["peak"] if floor is None else floor
        units = (row["peak"] - floor) / (4 * row["parameters"]) if row["parameters"] else 0.0
        cost = f"{row['products']:8} {row['seconds']:8.0f} {row['peak'] / 1e9:8.2f} {units:12.1f}"
        print(f"{name:26} {cost}  {row['found']}", flush=True)
        rows.append({"task": name, **row, "peak in parameters": units})
    record.write(given.json, rows)


if __name__ == "__main__":
    main()
