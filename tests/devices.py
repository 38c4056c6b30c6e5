"""The device that tests of a device are of: HESSFN_TEST_DEVICE, a GPU or ``second``, which every machine has.

``pytest --placed`` puts what tests make on it, and leaves what hessfn makes where hessfn puts it. The default device
is the CPU still, as for most users: a tensor of hessfn's without a device meets those of the test, and torch refuses.
On ``second`` some tests fail with it: what torch wants from a device of its own is not there (LSTM's cells, sparse and
complex tensors, compilers, process groups), and a matvec of a test that is called by autograd's thread is not placed.
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_map

HERE = Path(__file__).parent
DEVICE = os.environ.get("HESSFN_TEST_DEVICE", "cuda")  # that the tests of a device are of
TESTS, LIBRARY = str(HERE), str(HERE.parent / "hessfn")


class Placed(TorchFunctionMode):
    """What a test makes, or something else than hessfn makes for it, lies on this device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.numpy, torch.Tensor.__array__) and _of_a_test():
            return func(args[0].cpu(), *args[1:], **kwargs)
        if func in _device_constructors() and kwargs.get("device") is None and _of_a_test():
            if kwargs.get("generator") is not None:  # that of the CPU: the numbers are to be the same
                return func(*args, **kwargs).to(DEVICE)
            return func(*args, **{**kwargs, "device": DEVICE})
        try:
            return func(*args, **kwargs)
        except RuntimeError:
            if any(map(_is_of_hessfn, _frames())):
                raise
            # A test's own arithmetic, with what hessfn gives on the CPU.
            return func(*tree_map(_there, args), **tree_map(_there, kwargs))


def _there(x: Any) -> Any:
    return x.to(DEVICE) if isinstance(x, torch.Tensor) else x


def place_tests() -> None:
    """For all of the run: what a module of tests makes when it is read lies there as well."""
    Placed().__enter__()
    from_numpy, assert_close = torch.from_numpy, torch.testing.assert_close
    torch.from_numpy = lambda x: from_numpy(x).to(DEVICE) if _of_a_test() else from_numpy(x)
    torch.testing.assert_close = functools.partial(assert_close, check_device=False)


def _of_a_test() -> bool:
    """Whether a file of the tests is nearer in the stack than one of hessfn."""
    return next((not _is_of_hessfn(name) for name in _frames() if _is_of_hessfn(name) or name.startswith(TESTS)), False)


def _is_of_hessfn(name: str) -> bool:
    return name.startswith(LIBRARY)


def _frames() -> Iterator[str]:
    """The files in the stack, the nearest first, without this one."""
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename != __file__:
            yield frame.f_code.co_filename
        frame = frame.f_back


def register_second_device() -> None:
    """Compiles (a minute, once) and registers the device ``second``: before the first gradient, as torch wants it."""
    from torch.utils import cpp_extension  # it looks for CUDA, and says so if there is none

    source = HERE / "second_device" / "device.cpp"
    digest = hashlib.sha256(source.read_bytes() + torch.__version__.encode()).hexdigest()[:12]
    library = HERE.parent / "build" / f"second_device-{digest}.so"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}")
        where = [f"-I{folder}" for folder in cpp_extension.include_paths()]
        libraries = [f"-L{folder}" for folder in cpp_extension.library_paths()] + ["-ltorch", "-ltorch_cpu", "-lc10"]
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
        flags = ["-shared", "-fPIC", "-O1", "-std=c++20", abi]
        compiler = os.environ.get("CXX", "c++")
        subprocess.run([compiler, *flags, *where, source, "-o", partial, *libraries], check=True)
        partial.replace(library)
    torch.ops.load_library(library)
    torch.utils.rename_privateuse1_backend("second")
    module: Any = types.ModuleType("torch.second")
    module.is_available, module.device_count, module.current_device = lambda: True, lambda: 1, lambda: 0
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    module._is_in_bad_fork, module.manual_seed_all = lambda: False, lambda seed: None
    torch._register_device_module("second", module)
    torch.utils.generate_methods_for_privateuse1_backend(for_module=False, for_packed_sequence=False)


needs_device = pytest.mark.skipif(
    DEVICE != "second" and not torch.get_device_module(DEVICE).is_available(), reason=f"no device {DEVICE}"
)


def num_waits(run: Callable[[], object]) -> int:
    """How often it waits for the device: a number is read from it, or something is copied from it or to it."""
    if DEVICE == "second":
        before: int = torch.ops.second_device.num_transfers()
        run()
        return torch.ops.second_device.num_transfers() - before
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(w.message) for w in said)
