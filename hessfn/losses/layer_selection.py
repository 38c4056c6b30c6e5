"""Layers of a model by name, pattern, type or predicate; and clear words where one is not there or not reached."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from torch import nn

from hessfn.core.errors import InvalidInput

Edge = Literal["input", "output"]  # of a layer: what enters it, or what leaves it
Kind = type[nn.Module]
Layers = str | Kind | Iterable[str | Kind] | Callable[[str, nn.Module], bool]


def choose(modules: Mapping[str, nn.Module], layer_of: Mapping[str, str], layers: Layers) -> set[str]:
    """What ``layers`` asks for: names of layers (each the first that its module has) and names of single flows.

    Args:
        modules: all of them, by all their names.
        layer_of: flows, such as ``"attention:query"``, and the layers they belong to.
    """
    first = {id(modules[name]): name for name in reversed(list(modules))}
    chosen: set[str] = set()
    for entry in _entries(layers):
        if isinstance(entry, str):
            found = {first[id(m)] for name, m in modules.items() if fnmatch.fnmatchcase(name, entry)}
            found |= {name for name in layer_of if fnmatch.fnmatchcase(name, entry)}
        elif isinstance(entry, type):
            found = {first[id(m)] for m in modules.values() if isinstance(m, entry)}
        else:
            found = {first[id(m)] for name, m in modules.items() if entry(name, m)}
        if not found:
            raise InvalidInput(_not_there(entry, [*modules, *layer_of]))
        chosen |= found
    return chosen


def _entries(layers: Layers) -> list[Any]:
    single = isinstance(layers, (str, type)) or not isinstance(layers, Iterable)
    return [layers] if single else list(layers)  # type: ignore[arg-type]


def _not_there(entry: Any, known: list[str]) -> str:
    there = f"there are: {', '.join(known[:12])}{', ...' * (len(known) > 12)}"
    if not isinstance(entry, str):
        return f"no layer matches {entry!r}; {there if known else 'the model is a single layer'}"
    ending = [name for name in known if name.endswith(entry.rpartition(".")[2])]
    close = list(dict.fromkeys([*difflib.get_close_matches(entry, known, 3), *ending]))[:3]
    return f"layer {entry!r} is not in the model; " + (
        f"did you mean {' or '.join(map(repr, close))}?" if close else there
    )


def refuse_missing(
    modules: Mapping[str, nn.Module], layer_of: Mapping[str, str], chosen: set[str], calls: Mapping[str, int], at: Edge
) -> None:
    """Raises where a chosen layer is not called, or nothing that has derivatives flows there."""
    shown = {*layer_of, *layer_of.values()}
    # A ModuleList and its like have no forward of their own: they only hold layers.
    missing = [n for n in modules if n in chosen - shown and type(modules[n]).forward is not nn.Module.forward]
    unreached = ", ".join(repr(name) for name in missing if not calls[name])
    if unreached or not chosen & shown:
        raise InvalidInput(
            f"the model does not call {unreached or sorted(chosen)} on this batch: leave out what it skips"
        )
    if missing:
        does = "enters" if at == "input" else "leaves"
        names = ", ".join(map(repr, missing))
        raise InvalidInput(f"no floating-point tensor {does} {names}: leave out, or take the other at=")
