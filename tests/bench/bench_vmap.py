"""What `vmap` costs against a loop: over models, over mini-batches, over columns of a matrix, in one thread."""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import record
import torch
from torch import Tensor, nn

import hessfn as hf

NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp 20-32-10": (lambda: nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 10)), (20,)),
    "mlp 784-256-10": (lambda: nn.Sequential(nn.Linear(784, 256), nn.Tanh(), nn.Linear(256, 10)), (784,)),
    "conv 16-32": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.Tanh(),
            nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, 10),
        ),
        (3, 16, 16),
    ),
}  # fmt: skip
COUNT, BATCH = 8, 32


def best(function: Callable[[], Any], repeats: int = 3) -> float:
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def cases(name: str) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """For each case the loop and the `vmap`."""
    build, shape = NETS[name]
    torch.manual_seed(0)
    models = [build() for _ in range(COUNT)]
    loss, params = hf.functionalize(models[0], nn.CrossEntropyLoss())
    stacked, _ = torch.func.stack_module_state(models)
    stacked = {key: x.detach() for key, x in stacked.items()}
    x, y = torch.randn(COUNT, BATCH, *shape), torch.randint(10, (COUNT, BATCH))
    start = hf.gaussian(params, 1)[0]

    def sharpness(p: Any, *batch: Tensor) -> Tensor:
        return hf.eigsh(hf.hvp(loss, p, batch), start, which="LA", rtol=None, max_matvecs=10).values[0]

    def loop_of_models() -> Tensor:
        return torch.stack([sharpness({k: v[i] for k, v in stacked.items()}, x[0], y[0]) for i in range(COUNT)])

    def loop_of_batches() -> Tensor:
        return torch.stack([sharpness(params, x[i], y[i]) for i in range(COUNT)])

    found = {
        f"{COUNT} models": (loop_of_models, lambda: torch.func.vmap(lambda p: sharpness(p, x[0], y[0]))(stacked)),
        f"{COUNT} mini-batches": (loop_of_batches, lambda: torch.func.vmap(lambda *b: sharpness(params, *b))(x, y)),
    }
    if sum(p.numel() for p in params.values()) < 2000:
        matvec = hf.hvp(loss, params, (x[0], y[0]))
        found["dense, 64 columns"] = (
            lambda: hf.dense(matvec, params),
            lambda: hf.dense(matvec, params, batch_size=64),
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)
    record.add_option(parser)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.alone:
        net, case, way = given.alone
        run = cases(net)[case][int(way)]
        w = torch.ones(2)  # what the first product of a process loads is not of the case
        torch.func.vmap(hf.hvp(lambda w: w.exp().sum(), w, check=False))(torch.ones(2, 2))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seconds = best(run)
        print(seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
        return
    rows = []
    print("| net | over | loop | vmap | memory of the loop | of vmap |\n|---|---|---|---|---|---|")
    for net in NETS:
        for case in cases(net):
            numbers = []
            for way in "01":
                words = [sys.executable, __file__, "--alone", net, case, way]
                numbers += subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[-2:]
            loop, loop_memory, together, memory = map(float, numbers)
            seconds, mb = {"loop": loop, "vmap": together}, {"loop_mb": loop_memory, "vmap_mb": memory}
            rows.append({"net": net, "over": case, **seconds, **mb})
            print(f"| {net} | {case} | {loop:.3g} s | {together:.3g} s | {loop_memory:.0f} MB | {memory:.0f} MB |")
    record.write(given.json, rows)


if __name__ == "__main__":
    main()
