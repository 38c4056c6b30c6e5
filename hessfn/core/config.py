"""What computes here: versions, threads, and the compiled kernels that have announced themselves."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable

import torch

_KERNELS: dict[str, Callable[[], dict[str, str]]] = {}


def announce_kernel(name: str, describe: Callable[[], dict[str, str]]) -> None:
    """Called once, at import, by an optional compiled kernel; ``describe`` says whether it is in use, and which."""
    _KERNELS[name] = describe


def config() -> dict[str, str]:
    """What a result depends on besides the program: where two machines agree in all of it, so do the last bits."""
    found = {
        "hessfn": importlib.metadata.version("hessfn"),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "processor": platform.machine(),
    }
    for name, describe in _KERNELS.items():
        found |= {f"{name} {key}": value for key, value in describe().items()}
    return found


def show_config() -> None:
    """Prints what computes here: versions, threads, compiled kernels with their hash and compiler.

    It may compile a kernel, once on a machine. Part of every report of a bug.

    >>> show_config()
    hessfn ...
    """
    found = config()
    width = max(map(len, found)) + 2
    for name, value in found.items():
        print(f"{name:<{width}}{value}")
