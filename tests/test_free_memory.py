"""How much memory is free, from the files in which systems say so; and how much a function keeps."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import problem
from torch import nn

import hessfn as hf
from hessfn.core.free_memory import free_bytes
from hessfn.core.kept_memory import bytes_kept

MB = 2**20


def system(root: Path, cgroup: str = "", **files: str) -> Path:
    """A machine with 1000 MB available, and what else its files say; ``__`` stands for the slash."""
    written = {
        "proc__meminfo": "MemTotal: 4096000 kB\nMemAvailable: 1024000 kB\n",
        "proc__self__cgroup": cgroup,
        **files,
    }
    for name, text in written.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_without_limits_it_is_what_the_machine_has_available(tmp_path: Path) -> None:
    assert free_bytes(root=system(tmp_path)) == 1000 * MB
    unlimited = {"sys__fs__cgroup__memory.max": "max\n", "sys__fs__cgroup__memory.current": f"{900 * MB}\n"}
    assert free_bytes(root=system(tmp_path, "0::/\n", **unlimited)) == 1000 * MB


def test_a_container_of_version_2_is_held_to_its_limit_and_files_are_given_back(tmp_path: Path) -> None:
    files = {
        "sys__fs__cgroup__memory.max": f"{500 * MB}\n",
        "sys__fs__cgroup__memory.current": f"{300 * MB}\n",
        "sys__fs__cgroup__memory.stat": f"anon {200 * MB}\ninactive_file {50 * MB}\nactive_file {10 * MB}\n",
    }
    assert free_bytes(root=system(tmp_path, "0::/\n", **files)) == (500 - 300 + 50) * MB
    # The path may be that of the host, which is not to be seen from within.
    assert free_bytes(root=system(tmp_path, "0::/docker/abc\n", **files)) == (500 - 300 + 50) * MB


def test_the_tightest_of_the_groups_counts(tmp_path: Path) -> None:
    group = "sys__fs__cgroup__slice__job"
    files = {
        f"{group}__memory.max": f"{800 * MB}",
        f"{group}__memory.current": f"{100 * MB}",
        "sys__fs__cgroup__slice__memory.max": f"{700 * MB}",
        "sys__fs__cgroup__slice__memory.current": f"{600 * MB}",
    }
    assert free_bytes(root=system(tmp_path, "0::/slice/job\n", **files)) == 100 * MB


@pytest.mark.parametrize("mount", ["memory", "cpu,memory"])
def test_a_group_of_version_1_is_held_to_its_limit(mount: str, tmp_path: Path) -> None:
    group = f"sys__fs__cgroup__{mount}__job"
    files = {
        f"{group}__memory.limit_in_bytes": f"{400 * MB}\n",
        f"{group}__memory.usage_in_bytes": f"{350 * MB}\n",
        f"{group}__memory.stat": f"inactive_file {7 * MB}\ntotal_inactive_file {20 * MB}\n",
    }
    cgroup = f"5:devices:/job\n4:{mount}:/job\n1:name=systemd:/\n0::/\n"
    assert free_bytes(root=system(tmp_path, cgroup, **files)) == 70 * MB


def test_over_the_limit_nothing_is_free(tmp_path: Path) -> None:
    files = {"sys__fs__cgroup__memory.max": "1000", "sys__fs__cgroup__memory.current": "2000"}
    assert free_bytes(root=system(tmp_path, "0::/\n", **files)) == 0


def test_where_no_file_tells_there_is_still_an_answer(tmp_path: Path) -> None:
    assert 0 < free_bytes(root=tmp_path) <= math.inf
    assert free_bytes("meta") == math.inf


def test_what_is_asked_for_here_is_gone() -> None:
    before, held = free_bytes(), []

    def is_gone() -> bool:
        held.append(torch.ones(64 * MB))  # 256 MB, which are written to
        return before - free_bytes() > 0.5 * sum(x.nbytes for x in held) or before == math.inf

    assert any(is_gone() for _ in range(6))  # others on the machine may free as much meanwhile, but not every time


class Holder:
    def __init__(self, x: Any) -> None:
        self.x = {"inside": [x]}

    def method(self) -> None: ...


@pytest.mark.parametrize(
    "hold",
    [
        lambda x: lambda: x,
        lambda x: lambda: (x, x[3:]),
        lambda x: functools.partial(print, x),
        lambda x: functools.partial(print, end=x),
        lambda x: Holder(x).method,
        lambda x: [(x, {"a": x.view(5, 2)})],
        lambda x: (lambda inner: lambda: inner)(lambda default=x: default),
    ],
)
def test_what_a_function_reaches_counts_once(hold: Any) -> None:
    x = torch.zeros(10)
    assert bytes_kept(hold(x)) == 40
    assert bytes_kept(hold(x), x) == 0
    assert bytes_kept(hold(x), x[2:4]) == 0  # the same memory


def test_modules_count_by_parameters_and_buffers() -> None:
    net = nn.BatchNorm1d(3)
    assert bytes_kept(net) == 4 * 3 * 4 + 8
    assert bytes_kept(lambda: net, [*net.parameters()]) == 2 * 3 * 4 + 8


def test_a_linearized_product_says_what_each_further_batch_takes() -> None:
    loss, params, (inputs, targets), _ = problem("conv")
    large = inputs.repeat(50, 1, 1, 1), targets.repeat(50)
    sizes = [bytes_kept(hf.linearized_hvp(loss, params, batch), (loss, params)) for batch in ((inputs, targets), large)]
    # Its constants and its results grow with the batch, and are at least the batch itself, which it copies.
    assert sizes[0] >= inputs.nbytes + targets.nbytes
    assert 45 * inputs.nbytes < sizes[1] - sizes[0]
    product = hf.linearized_hvp(loss, params, large)
    before = bytes_kept(product, (loss, params, large))
    product(params)
    assert bytes_kept(product, (loss, params, large)) == before  # the results of a call lie in what is kept
