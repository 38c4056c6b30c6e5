"""Sensitivities of ResNet20's layers, 200 images, 50 probes: time, beside one layer at a time; peak memory, beside a
gradient's.

``python tests/bench/bench_activations.py``. One layer at a time is timed with two and four probes for every sixth
layer, and scaled: all of it would take the better part of an hour.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record
import torch
from models import resnet20

import hessfn as hf

IMAGES, PROBES = 200, 50


def table(num_probes: int = PROBES, layers: Any = None, microbatch: int | None = None) -> hf.Sensitivities:
    model, criterion, batch = resnet20(IMAGES)
    return hf.sensitivities(model, criterion, [batch], layers, num_probes, microbatch=microbatch)


def gradient() -> None:
    model, criterion, (images, labels) = resnet20(IMAGES)
    criterion(model(images), labels).backward()


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def peak() -> float:
    """Of this process, in MB; not ru_maxrss, which a process has from its parent."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024  # type: ignore[index]


def in_its_own_process(task: str) -> float:
    command = [sys.executable, "-W", "ignore", __file__, "--alone", task]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    tasks: dict[str, Callable[[], Any]] = {
        "nothing": lambda: resnet20(IMAGES),
        "gradient": gradient,
        "table": lambda: table(3),
        "table-50": lambda: table(3, microbatch=50),
    }
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--alone", choices=tasks, help=argparse.SUPPRESS)
    record.add_option(parser)
    given = parser.parse_args()
    if given.alone:
        tasks[given.alone]()
        print(peak())
        return
    whole, found = seconds(table)
    layers = list(found.weights.mean)
    print(f"{len(layers)} layers, {IMAGES} images, {PROBES} probes, {torch.get_num_threads()} threads")
    for name in layers:
        w, a = ((x.mean[name], x.stderr[name]) for x in (found.weights, found.activations))
        print(f"  {name:45} weights {w[0]:9.3f} +- {w[1]:7.3f}   activations {a[0]:9.3f} +- {a[1]:7.3f}")
    print(f"all layers from the same products: {whole:.0f} s")
    alone = 0.0
    for name in layers[::6]:
        few, more = seconds(lambda: table(2, [name]))[0], seconds(lambda: table(4, [name]))[0]  # noqa: B023
        alone += (few + (PROBES - 2) * (more - few) / 2) * len(layers) / len(layers[::6])
    print(f"one layer at a time: {alone:.0f} s, so all at once take {whole / alone:.3f} of it")
    memory = {task: in_its_own_process(task) for task in tasks}
    print("peak memory, MB:", ", ".join(f"{task} {value:.0f}" for task, value in memory.items()))
    print(
        f"over a gradient: {memory['table'] / memory['gradient']:.2f}, in microbatches of 50: "
        f"{memory['table-50'] / memory['gradient']:.2f}"
    )
    rows = [{"what": "all layers at once", "seconds": whole}, {"what": "one layer at a time", "seconds": alone}]
    record.write(given.json, rows + [{"what": task, "mb": value} for task, value in memory.items()])


if __name__ == "__main__":
    main()
