"""Products of a GPT at a real vocabulary and at real lengths: time and memory, in gradients of the same batch.

``python tests/bench/bench_language.py [vocabulary x batch x length [x width x layers] ...]``: of 4 layers of 256, if no
more is said; GPT-2 is 50257x1x1024x768x12. Every number is of a process of its own.
Memory is the peak of the process beyond what it has with the model loaded and torch's rules imported; it includes the
making of the product. Time is the median of products after the first.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
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

Make = Callable[..., hf.MatVec]


def gradient(loss: Any, params: Any, batch: Any) -> hf.MatVec:
    def of(v: Any) -> Any:
        leaves = [x.detach().requires_grad_() for x in params.values()]
        return torch.autograd.grad(loss(dict(zip(params, leaves, strict=True)), batch), leaves)

    return of


WAYS: dict[str, Make] = {
    "gradient": gradient,
    "hvp": lambda *given: hf.hvp(*given, trace_after=0, check=False),
    "linearized_hvp": lambda *given: hf.linearized_hvp(*given, check=False),
}
ROWS = ("50257x4x256", "512x1x1024", "512x1x4096")


def bytes_of(what: str) -> int:
    found = re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())
    return 1024 * int(found.group(1)) if found else 0


def run(way: str, row: str, rounds: int) -> dict[str, float]:
    vocabulary, batch, length, width, layers = map(int, (*row.split("x"), 256, 4)[:5])
    torch.manual_seed(0)
    for warm in WAYS.values():  # what is imported at the first derivative is no memory of the product's
        small = {"w": torch.ones(3)}
        warm(lambda p, x: (p["w"].sin() * x).sum(), small, torch.ones(3))(small)
    ids = torch.randint(vocabulary, (batch, length + 1))
    loss, params = hf.functionalize(GPT(vocabulary, width, layers, length).eval(), nn.CrossEntropyLoss())
    v = hf.gaussian(params, 1)[0]
    before = bytes_of("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    start = time.perf_counter()
    matvec = WAYS[way](loss, params, (ids[:, :-1], ids[:, 1:].flatten()))
    matvec(v)
    first, seconds = time.perf_counter() - start, []
    for _ in range(rounds):
        start = time.perf_counter()
        matvec(v)
        seconds.append(time.perf_counter() - start)
    return {
        "bytes": bytes_of("VmHWM") - before,
        "peak": bytes_of("VmHWM"),
        "first": first,
        "seconds": statistics.median(seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", default=list(ROWS), help="vocabulary x batch x length [x width x layers]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--alone", choices=WAYS, help=argparse.SUPPRESS)
    record.add_option(parser)
    given = parser.parse_args()
    if given.alone:
        print(json.dumps(run(given.alone, given.rows[0], given.rounds)))
        return
    print(
        f"{'GPT':26} {'':16} {'MB':>7} {'in gradients':>12} {'s':>7} {'in gradients':>12} {'first':>7} {'GB in all':>9}"
    )
    rows: list[dict[str, Any]] = []
    for row in given.rows:
        unit: dict[str, float] = {}
        for way in WAYS:
            command = [sys.executable, "-W", "ignore", __file__, row, "--alone", way, "--rounds", str(given.rounds)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            unit = unit or found
            memory, seconds = (found[x] / unit[x] for x in ("bytes", "seconds"))
            rows.append({"row": row, "by": way, **found, "memory in gradients": memory, "time in gradients": seconds})
            cost = f"{found['bytes'] / 1e6:7.0f} {memory:12.2f} {found['seconds']:7.2f} {seconds:12.2f}"
            print(f"{row:26} {way:16} {cost} {found['first']:7.2f} {found['peak'] / 1e9:8.2f}", flush=True)
    record.write(given.json, rows)


if __name__ == "__main__":
    main()
