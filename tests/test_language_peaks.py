"""Peaks of memory of products of a GPT at a real vocabulary and at a long text, in gradients of the same batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hessfn.engine.heap import trim_heap

BENCH = Path(__file__).parent / "bench" / "bench_language.py"
MOST = {"50257x4x256": (1.3, 1.6), "512x1x1024": (2.6, 3.6), "512x1x4096": (2.8, 3.3)}  # of hvp and linearized_hvp

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc"),
]


def peak(row: str, way: str) -> float:
    command = [sys.executable, "-W", "ignore", str(BENCH), row, "--alone", way, "--rounds", "1"]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # two threads beside other work wait for each other
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=alone)
    return float(json.loads(done.stdout.splitlines()[-1])["bytes"])


@pytest.mark.parametrize("row", MOST)
def test_a_product_takes_about_the_memory_of_two_gradients(row: str) -> None:
    unit = peak(row, "gradient")
    of_hvp, of_linearized = (peak(row, way) / unit for way in ("hvp", "linearized_hvp"))
    assert of_hvp < MOST[row][0]
    assert of_linearized < MOST[row][1]


def test_a_heap_that_is_trimmed_keeps_what_is_in_use() -> None:
    kept = [torch.full((1 << 16,), float(i)) for i in range(64)]
    del kept[::2]
    trim_heap()
    assert [float(x.mean()) for x in kept] == [float(i) for i in range(1, 64, 2)]
