"""A compiled kernel: one source in C as machine code."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from hessfn.core.config import announce_kernel
from hessfn.core.locks import Lock
from hessfn.engine.native.build import Built, build, can_be_had, compilers


def is_off() -> bool:
    """Whether the user has switched compiled code off."""
    return os.environ.get("HESSFN_NATIVE") == "0"


class Kernel:
    """It is compiled when it is first wanted, and :func:`hessfn.show_config` says what has become of it."""

    def __init__(self, name: str, source: Path):
        self._source = source
        self.built: list[Built | None] = []  # once in a process, also if it failed
        self._building = Lock()
        announce_kernel(name, self.describe)

    def is_expected(self) -> bool:
        """Whether it will be there when it is wanted, as far as can be told without compiling it.

        It may be asked under ``torch_state_lock``, for which others wait.
        """
        return not is_off() and (self.built[0] is not None if self.built else can_be_had(self._source))

    def library(self) -> ctypes.CDLL | None:
        """The machine code, if it can be had and is not switched off.

        It may wait for a compiler, the first time on a machine: not to be asked under ``torch_state_lock``.
        """
        built = None if is_off() else self._once()
        return None if built is None else built.library

    def identity(self) -> str:
        """Which machine code it is: a hash of the library's bytes, or "" where there is none."""
        built = None if is_off() else self._once()
        return "" if built is None else built.digest

    def describe(self) -> dict[str, str]:
        """For :func:`hessfn.show_config`: which kernel is in use and what compiled it, or why none is."""
        if is_off():
            return {"kernel": "off (HESSFN_NATIVE=0)"}
        made = self.library()
        if made is None:
            return {"kernel": "none: no compiler that works" if compilers() else "none: no compiler"}
        compiler = ctypes.c_char_p.in_dll(made, "compiled_by").value or b""
        return {"kernel": self.identity(), "compiler": compiler.decode()}

    def _once(self) -> Built | None:
        if not self.built:
            with self._building:
                if not self.built:
                    self.built.append(build(self._source))
        return self.built[0]
