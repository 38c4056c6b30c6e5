"""A graph as text."""

from __future__ import annotations

from typing import Any

from torch import fx


def listing(module: fx.GraphModule) -> str:
    """A graph as it is read: a line for each operation.

    >>> def double(x): return x + x
    >>> print(listing(fx.symbolic_trace(double)))
    x = input
    add = add(x, x)
    return add
    """
    lines = []
    for node in module.graph.nodes:
        if node.op == "placeholder":
            lines.append(f"{node.name} = input")
        elif node.op == "get_attr":
            lines.append(f"{node.name} = constant {node.target}")
        elif node.op == "output":
            lines.append(f"return {_shown(node.args[0])}")
        else:
            given = [_shown(x) for x in node.args] + [f"{name}={_shown(x)}" for name, x in node.kwargs.items()]
            lines.append(f"{node.name} = {_shown(node.target)}({', '.join(given)})")
    return "\n".join(lines)


def _shown(x: Any) -> str:
    if isinstance(x, (list, tuple)):
        return f"[{', '.join(map(_shown, x))}]"
    return str(x) if isinstance(x, fx.Node) or not callable(x) else getattr(x, "__name__", str(x))
