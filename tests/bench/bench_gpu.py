"""Products on a CUDA device beside those of the peers that are installed, in one run: time, peak memory, error.

``python tests/bench/bench_gpu.py [resnet18 gpt ...] [--json FILE]``: milliseconds are medians of products one after
the other, between CUDA events; memory is what torch has allocated at most beyond what was there before; the
error is that of one product in norm, against double backward in float64.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import record
import torch
from bench_products import WAYS, built, relative_error, truth
from models import GPT
from torch import Tensor, nn

Problem = tuple[nn.Module, nn.Module, tuple[Tensor, Tensor]]


def resnet18(batch: int = 512) -> Problem:
    from torchvision.models import resnet18 as build

    model = build(num_classes=10)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()  # as usual on CIFAR
    return model.eval(), nn.CrossEntropyLoss(), (torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,)))


def resnet50(batch: int = 64) -> Problem:
    from torchvision.models import resnet50 as build

    return build().eval(), nn.CrossEntropyLoss(), (torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,)))


def vit(batch: int = 32) -> Problem:
    from torchvision.models import vit_b_16 as build

    return build().eval(), nn.CrossEntropyLoss(), (torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,)))


def gpt(batch: int = 4, length: int = 1024) -> Problem:
    ids = torch.randint(50257, (batch, length + 1))
    model = GPT(50257, 768, 12, length)
    return model.eval(), nn.CrossEntropyLoss(), (ids[:, :-1], ids[:, 1:].flatten())


MODELS: dict[str, Callable[[], Problem]] = {"resnet18": resnet18, "gpt": gpt, "resnet50": resnet50, "vit": vit}


def milliseconds(run: Callable[[], Any]) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


def measured(name: str, rounds: int, exactly: bool, ways: list[str]) -> dict[str, Any]:
    torch.manual_seed(0)
    model, criterion, batch = MODELS[name]()
    problem = model.cuda(), criterion, tuple(x.cuda() for x in batch)
    exact = truth(*problem) if exactly else None
    found: dict[str, Any] = {}
    runs: dict[str, Callable[[], Any]] = {}
    for way in ways:
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        try:
            run = built(way, problem)
            if run is None:
                continue
            product = run()
            milliseconds(run)
            row = {"peak": torch.cuda.max_memory_allocated() - before}
            if exact is not None and way != "gradient":
                row["error"] = relative_error(product, exact)
            del product
            row["ms"] = statistics.median(milliseconds(run) for _ in range(rounds))
            found[way], runs[way] = row, run
        except Exception as error:
            found[way] = {"failed": f"{type(error).__name__}: {str(error)[:120]}"}
        runs.clear()  # what is kept counts for the next one's memory
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--exactly", action="store_true", help="errors too, against float64")
    parser.add_argument("--ways", default=";".join(WAYS), help="names, with semicolons between: some have commas")
    record.add_option(parser)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    if not torch.cuda.is_available():
        print("no CUDA device here")
        return
    print(torch.cuda.get_device_name(), torch.__version__)
    rows: list[dict[str, Any]] = []
    for name in given.models:
        found = measured(name, given.rounds, given.exactly, given.ways.split(";"))
        unit = found["gradient"]
        for way, row in found.items():
            rows.append({"model": name, "by": way, **row})
            if "failed" in row:
                print(f"{name:10} {way:34} {row['failed']}", flush=True)
                continue
            rows[-1]["gradients"] = row["ms"] / unit["ms"]
            cost = f"{row['ms']:9.2f} ms {rows[-1]['gradients']:6.2f} gradients"
            memory = f"{row['peak'] / 1e6:8.0f} MB {row['peak'] / unit['peak']:6.2f}"
            print(f"{name:10} {way:34} {cost} {memory}  {row.get('error', float('nan')):.1e}", flush=True)
    record.write(given.json, rows)


if __name__ == "__main__":
    main()
