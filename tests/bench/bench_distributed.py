"""What a product costs on 1, 2, ... processes of one thread each, the same data dealt out to them.

``python tests/bench/bench_distributed.py``: ResNet20 on CIFAR-10, 4 batches of 32 images, over gloo. A product of one
process and of two have their turns in every round, so that they share the drift of the machine; the processes that are
not asked wait at a barrier.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import record
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from models import resnet20

import hessfn as hf
from hessfn.core import tree
from hessfn.parallel.all_reduce import ShardedBatches


def measure(rank: int, size: int, folder: str, rounds: int, num_batches: int, batch: int, file: Any) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    groups = [dist.new_group(list(range(n))) for n in range(1, size + 1)]
    model, criterion, (inputs, targets) = resnet20(num_batches * batch)
    batches = list(zip(inputs.split(batch), targets.split(batch), strict=True))
    loss, params = hf.functionalize(model, criterion)
    v = hf.gaussian(params, 1)[0]
    ways: list[tuple[str, Any, Callable[[], Any]]] = []
    for n, group in enumerate(groups, 1):
        if rank < n:
            matvec = hf.mean_hvp(loss, params, ShardedBatches(batches, group))
            ways.append((f"product, {n} processes", group, lambda matvec=matvec: matvec(v)))
            reduction = hf.all_reduce(lambda v: v, 1.0, group=group)
            ways.append((f"reduction alone, {n} processes", group, lambda reduction=reduction: reduction(v)))
    names = [f"{what}, {n} processes" for n in range(1, size + 1) for what in ("product", "reduction alone")]
    mine = {name: (group, run) for name, group, run in ways}
    times: dict[str, list[float]] = {name: [] for name in names}
    for count in range(rounds + 1):
        for name in names:
            dist.barrier()
            if name in mine:
                start = time.perf_counter()
                mine[name][1]()
                if count:  # the first product traces the loss
                    times[name].append(time.perf_counter() - start)
    if rank == 0:
        n, bytes_sent = tree.numel(params), 4 * (tree.numel(params) + 2)
        print(f"ResNet20, {n:,} parameters, {num_batches} batches of {batch}; {bytes_sent:,} bytes reduced a product")
        print(f"  {'':34}{'median':>10}{'least':>10} ms")
        for name in names:
            print(f"  {name:34}{1e3 * statistics.median(times[name]):10.1f}{1e3 * min(times[name]):10.1f}")
        record.write(file, [{"what": name, "ms": 1e3 * statistics.median(times[name])} for name in names])
        for what, of in (("median", statistics.median), ("least", min)):
            ratios = [
                of(times["product, 1 processes"]) / of(times[f"product, {n} processes"]) for n in range(1, size + 1)
            ]
            print(f"  speed-up by the {what}: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32)
    record.add_option(parser)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (given.processes, folder, given.rounds, given.batches, given.batch, given.json)
        mp.spawn(measure, arguments, nprocs=given.processes)
