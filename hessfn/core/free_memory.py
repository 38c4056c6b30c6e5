"""How much memory is free: of the machine, of the control group that a container is held to, or of a device."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

_ROOT = Path("/")


def free_bytes(device: torch.device | str = "cpu", *, root: Path = _ROOT) -> float:
    """How many bytes may be asked for on a device now; inf where nobody tells.

    On the CPU, the least of what the machine has available and of what is left under the limits of this process: those
    of its control groups (version 2 or 1), as containers and batch systems set them, and of its address space. What the
    system keeps of files counts as free, since it gives that back. On a GPU, what is free there and what torch has in
    reserve. It is of this moment: other programs ask too.

    Args:
        root: where the system's files are, for tests.

    >>> free_bytes() > 0
    True
    """
    device = torch.device(device)
    if device.type == "cpu":
        return max(0, min([_available(root), *_under_control_groups(root), _of_address_space(root)]))
    if device.type == "mps":
        return max(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory(), 0)
    module: Any = getattr(torch, device.type, None)  # torch.cuda, torch.xpu, or what a package of another device adds
    if not hasattr(module, "mem_get_info"):
        return math.inf
    free, _ = module.mem_get_info(device)
    return free + module.memory_reserved(device) - module.memory_allocated(device)


def _available(root: Path) -> float:
    found = _table(root / "proc/meminfo")
    if "MemAvailable:" in found:
        return found["MemAvailable:"] * 1024
    with contextlib.suppress(ImportError, AttributeError, ValueError, OSError):  # Windows has none of these names
        import os

        pages = os.sysconf("SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES")
        return pages * os.sysconf("SC_PAGE_SIZE")
    return math.inf


def _under_control_groups(root: Path) -> Iterator[float]:
    """What is left under the limit of each group that this process is in, from its own to the topmost."""
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            mounts, limit, usage, file = ("", "unified"), "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            mounts = ("memory", controllers)
            limit, usage, file = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        own = Path(path.lstrip("/"))
        for mount in mounts:
            # Within a container the path may be the host's, of which there is only the root here.
            for group in (own, *own.parents):
                folder = root / "sys/fs/cgroup" / mount / group
                most, used = _integer(folder / limit), _integer(folder / usage)
                if most is not None and used is not None:
                    yield most - used + _table(folder / "memory.stat").get(file, 0)


def _of_address_space(root: Path) -> float:
    """As ``ulimit -v`` sets it."""
    try:
        import resource
    except ImportError:  # Windows
        return math.inf
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    used = _table(root / "proc/self/status").get("VmSize:", 0) * 1024
    return math.inf if most == resource.RLIM_INFINITY else most - used


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8", "replace").splitlines()
    except OSError:
        return []


def _table(path: Path) -> dict[str, int]:
    """The lines of a file that are a name and a number."""
    rows = [line.split() for line in _lines(path)]
    return {row[0]: int(row[1]) for row in rows if len(row) >= 2 and row[1].isdecimal()}


def _integer(path: Path) -> int | None:
    """None where there is no such file, or it says ``max``."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdecimal() else None
