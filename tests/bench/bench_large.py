"""A GPT of 110 million parameters through everything, on 64 tokens: products, seconds, and peak memory.

``python tests/bench/bench_large.py [--tokens 64]``: every row is a process of its own. Memory is in units of the
parameters' size, 0.44 GB in float32, on top of what importing torch and hessfn takes.
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
from models import GPT
from torch import nn

import hessfn as hf
from hessfn.core import tree

VOCABULARY, WIDTH, LAYERS = 16384, 768, 12
Task = Callable[[hf.MatVec, hf.Tree], tuple[int, str]]


def product(matvec: hf.MatVec, params: hf.Tree) -> tuple[int, str]:
    size = tree.norm(matvec(hf.gaussian(params, 1)[0]))
    return 1, f"norm {float(size):.4g}"


def top_two(matvec: hf.MatVec, params: hf.Tree) -> tuple[int, str]:
    found = hf.eigsh(matvec, hf.gaussian(params, 1)[0], 2, which="LA", rtol=1e-2, basis_size=16, max_matvecs=64)
    pairs = zip(found.values.tolist(), found.residuals.tolist(), strict=True)
    return int(found.num_matvecs), ", ".join(f"{value:.4g} (residual {r:.1g})" for value, r in pairs)


def trace(matvec: hf.MatVec, params: hf.Tree) -> tuple[int, str]:
    found = hf.hutchinson(matvec, hf.rademacher(params, 6))
    return 6, f"{float(found.mean):.4g} +- {float(found.stderr):.2g}"


def density(matvec: hf.MatVec, params: hf.Tree) -> tuple[int, str]:
    rule = hf.slq(matvec, hf.gaussian(params, 1), 10)
    hf.density(rule)
    return 10, f"from {float(rule.nodes.min()):.3g} to {float(rule.nodes.max()):.3g}"


TASKS: dict[str, Task | None] = {
    "nothing but the imports": None,
    "one product": product,
    "top 2, 16 vectors kept": top_two,
    "trace": trace,
    "density, no basis": density,
}


def run(name: str, tokens: int) -> dict[str, Any]:
    result: dict[str, Any] = {"products": 0, "found": "", "seconds": 0.0, "parameters": 0}
    task = TASKS[name]
    if task is not None:
        torch.manual_seed(0)
        ids = torch.randint(VOCABULARY, (1, tokens + 1))
        model = GPT(VOCABULARY, WIDTH, LAYERS, tokens).eval()
        loss, params = hf.functionalize(model, nn.CrossEntropyLoss())
        matvec = hf.hvp(loss, params, (ids[:, :-1], ids[:, 1:].flatten()))
        start = time.perf_counter()
        result["products"], result["found"] = task(matvec, params)
        result["seconds"], result["parameters"] = time.perf_counter() - start, tree.numel(params)
    # Not ru_maxrss, which a process has from its parent.
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return {**result, "peak": int(peak.group(1)) * 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", default=list(TASKS), help=f"of {list(TASKS)}")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    record.add_option(parser)
    arguments = parser.parse_args()
    if arguments.alone:
        print(json.dumps(run(arguments.tasks[0], arguments.tokens)))
        return
    print(f"{'':26} {'products':>8} {'seconds':>8} {'peak GB':>8} {'/ parameters':>12}  result")
    floor, rows = None, []
    for name in arguments.tasks:
        command = [sys.executable, "-W", "ignore", __file__, name, "--alone", "--tokens", str(arguments.tokens)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        floor = row["peak"] if floor is None else floor
        units = (row["peak"] - floor) / (4 * row["parameters"]) if row["parameters"] else 0.0
        cost = f"{row['products']:8} {row['seconds']:8.0f} {row['peak'] / 1e9:8.2f} {units:12.1f}"
        print(f"{name:26} {cost}  {row['found']}", flush=True)
        rows.append({"task": name, **row, "peak in parameters": units})
    record.write(arguments.json, rows)


if __name__ == "__main__":
    main()
