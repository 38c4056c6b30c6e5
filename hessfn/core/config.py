"""What computes here: versions, threads, and the compiled kernels that have announced themselves."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
from collections.abc import Callable
from pathlib import Path

import torch

KERNELS: dict[str, Callable[[], dict[str, str]]] = {}
_CPUINFO = Path("/proc/cpuinfo")
# What it says of a model and of its features, on x86 and on ARM; the rest is of the moment, such as the clock.
_OF_THE_MODEL = {"vendor_id", "cpu family", "model", "model name", "stepping", "flags"}
_OF_THE_MODEL |= {"CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision", "Features"}


def announce_kernel(name: str, describe: Callable[[], dict[str, str]]) -> None:
    """Called once, at import, by an optional compiled kernel.

    ``describe()`` says under ``"kernel"`` which one is in use, or why none is, and what else is worth knowing.
    """
    KERNELS[name] = describe


def config() -> dict[str, str]:
    """What a result depends on besides the program: where two machines agree in all of it, so do the last bits."""
    model = processor().get("model name") or platform.processor() or "unknown"
    found = {
        "hessfn": importlib.metadata.version("hessfn"),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "processor": f"{model} ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})",
    }
    for name, describe in KERNELS.items():
        found |= {f"{name} {key}": value for key, value in describe().items()}
    return found


def numerics() -> dict[str, str]:
    """What the last bits depend on in one installation on one machine: of :func:`config`, the threads and kernels."""
    return {name: value for name, value in config().items() if name == "threads" or name.endswith(" kernel")}


def show_config() -> None:
    """Prints versions, threads, processor, and compiled kernels with their hash and compiler, for bug reports.

    Cost: no product; the first call on a machine compiles the kernel, in about a second.

    >>> show_config()
    hessfn ...
    """
    found = config()
    width = max(map(len, found)) + 2
    for name, value in found.items():
        print(f"{name:<{width}}{value}")


@functools.cache
def processor() -> dict[str, str]:
    """Model and features of the processor, as far as the system tells: what code for one machine depends on."""
    try:
        first = _CPUINFO.read_text("utf-8", "replace").split("\n\n")[0]
    except OSError:  # not Linux
        return {"machine": platform.machine(), "processor": platform.processor()}
    lines = [line.partition(":") for line in first.splitlines()]
    told = {name.strip(): value.strip() for name, _, value in lines}
    return {"machine": platform.machine(), **{name: told[name] for name in told if name in _OF_THE_MODEL}}
