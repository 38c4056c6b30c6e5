"""A graph as a module, whose code lives as long as the module."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx


class GraphModule(fx.GraphModule):
    """A graph that is compiled when it is first called.

    ``fx.GraphModule`` compiles whenever its graph is given or changed, and enters its source in caches of the process,
    where it stays for ever: a graph that passes through twenty stages would do so twenty times.
    """

    _run: Callable[..., Any] | None

    def recompile(self) -> Any:
        """Says that the graph has changed."""
        self._run = None

    @property
    def code(self) -> str:
        return self.graph.python_code(root_module="self").src

    def compiled(self) -> Callable[..., Any]:
        """What the graph does, as a function of the module and the graph's inputs."""
        if self._run is None:
            code = self.graph.python_code(root_module="self")
            found = dict(code.globals)
            exec(compile(code.src, "<graph of hessfn>", "exec"), found)
            self._run = found["forward"]
        return self._run

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        """The graph's results."""
        return self.compiled()(self, *inputs)


@contextmanager
def without_collections() -> Iterator[None]:
    """A graph is many small objects that all stay: to look for garbage among them takes a third of a trace."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
