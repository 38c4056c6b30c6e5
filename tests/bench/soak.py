"""A thousand products: resident memory after the first hundred and after the last, for every way to make them.

``python tests/bench/soak.py [--products 1000]`` fails where memory has grown by more than 2 %. Every row is a process
of its own.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record
import torch
from models import gpt, mlp
from torch.utils.data import DataLoader, TensorDataset

import hessfn as hf


def batches(batch: tuple[torch.Tensor, torch.Tensor]) -> DataLoader[Any]:
    x, y = batch
    if len(x) != len(y):  # a GPT's targets are flat
        return DataLoader([(x[i : i + 1], y.reshape(len(x), -1)[i]) for i in range(len(x))], batch_size=None)
    return DataLoader(TensorDataset(x, y), batch_size=24)


NETS = {"mlp": lambda: mlp(64, 32), "gpt": lambda: gpt(2)}  # 26,506 and 875,264 parameters
WAYS: dict[str, Callable[..., hf.MatVec]] = {
    "hvp": hf.hvp,
    "linearized_hvp": hf.linearized_hvp,
    "mean_hvp": lambda loss, params, batch: hf.mean_hvp(loss, params, batches(batch)),
}


def resident() -> int:
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))


def soak(net: str, way: str, products: int) -> None:
    model, criterion, batch = NETS[net]()
    loss, params = hf.functionalize(model, criterion)
    matvec = WAYS[way](loss, params, batch)
    for count, v in enumerate(hf.gaussian(params, products), 1):
        matvec(v)
        if count in (products // 10, products):
            print(resident())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("nets", nargs="*", default=list(NETS), help=f"of {list(NETS)}")
    parser.add_argument("--products", type=int, default=1000)
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    record.add_option(parser)
    arguments = parser.parse_args()
    if arguments.alone:
        warnings.simplefilter("ignore")
        soak(*arguments.alone, arguments.products)
        return
    worst, rows = 0.0, []
    print(f"{'resident MB after':20} {arguments.products // 10:7} {arguments.products:7}  growth")
    for net in arguments.nets:
        for way in WAYS:
            command = [sys.executable, __file__, "--products", str(arguments.products), "--alone", net, way]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            early, late = map(int, done.stdout.split()[-2:])
            worst = max(worst, late / early - 1)
            rows.append({"net": net, "by": way, "early_mb": early / 1024, "late_mb": late / 1024})
            print(f"{net:4} {way:15} {early / 1024:7.0f} {late / 1024:7.0f} {late / early - 1:7.2%}", flush=True)
    record.write(arguments.json, rows)
    if worst > 0.02:
        sys.exit(f"memory grows: {worst:.1%} > 2 %")


if __name__ == "__main__":
    main()
