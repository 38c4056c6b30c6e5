"""The README of the engine shows every stage as it is; ``python tests/test_engine_readme.py`` writes it anew."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import torch

from hessfn.engine import pipeline
from hessfn.engine.listing import listing

README = Path(__file__).parents[1] / "hessfn" / "engine" / "README.md"
HEAD = """\
# The engine

From a loss to a fast, clean graph of its Hessian-vector product. The engine knows no model and no estimator. It is a
small compiler, with the usual parts under their usual names:

| file | what is in it |
|---|---|
| `pipeline.py` | the one list of passes, in order; `hvp` and `linearized_hvp` both run it |
| `trace.py` | tracing: a loss as a graph of aten operations, or the reason why a graph would not be this loss |
| `recorder.py` | the recorder, which writes operations down without computing them |
| `views.py` | alias analysis of a trace: operations in place become plain ones |
| `decisions.py` | what was decided by the values of integers and masks, and the guard of a graph |
| `kinds.py` | what kinds of operation there are: in place, a view, composite, read by value |
| `reference.py` | `make_fx`, which the recorder is held against, and which takes its place where it fails |
| `explain.py` | what an error of torch means for whoever wrote the loss |
| `graph_module.py` | a graph as a module, compiled when it is first called, in no cache of the process |
| `listing.py` | a graph as text |
| `same_operations.py` | what a graph consists of, whatever the number of samples |
| `meta_shapes.py` | shapes, strides and dtypes of results, without torch's compiler |
| `zero_propagation.py` | what derivative rules do with zeros, left out |
| `op_definitions.py` | operations by their definitions, where torch's derivatives are wrong or cost more |
| `geometry_definitions.py` | distances and samples of a grid, among these |
| `recurrent_cells.py` | cells of recurrent layers, which GPUs have fused |
| `rewrites.py` | passes that rewrite a graph in place: folding of BatchNorm, layouts, reassociation |
| `linearize.py` | forward-over-reverse, constant folding |
| `linear_leaves.py` | degree analysis: whether a network is linear in each leaf of its parameters alone |
| `linear_product.py` | what a linearized product is lowered to, kept for other parameters and data |
| `memory_plan.py` | alias analysis, out-variant rewrite, liveness: where results go |
| `liveness.py` | how many bytes results take at each operation |
| `rematerialize.py` | what is cheap is computed again behind the peak of memory |
| `heap.py` | what was freed goes back to the system on the way to a peak of memory |
| `fused/` | attention by tiles and cross-entropy in chunks: one node each, with both derivatives |
| `conv3x3/` | a guest: compiled convolutions by 3 x 3; hessfn works when this folder is deleted |
| `flash_attention/` | another guest: attention by tiles as compiled code |
| `native/` | how the guests' C is compiled, once on a machine |

A new operation without a forward rule goes into `op_definitions.py` (a definition of it) or into the list at the end of
`trace.py` (torch can decompose it). A new pass goes into the list in `pipeline.py`.

## The stages

"""
LOSS = """def loss(w, x):
    hidden = x @ w
    hidden *= 2
    return (hidden.sin() * x[:, :2]).sum()
"""


def loss(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    hidden = x @ w
    hidden *= 2
    return (hidden.sin() * x[:, :2]).sum()


def written() -> str:
    """The text of the README: each stage in a sentence, and the graph where the stage changes it."""
    w, x = torch.linspace(-1, 1, 6).reshape(3, 2), torch.linspace(-1, 2, 12).reshape(4, 3)
    shown: dict[str, str] = {}
    last = ""

    def after(name: str, module: torch.fx.GraphModule) -> None:
        nonlocal last
        graph = listing(module)
        changed, last = graph != last, graph
        shown[f"{len(shown)} {name}"] = graph if changed else ""

    job = pipeline.Job(loss, w, (x,), linearized=True)
    pipeline.run(pipeline.STAGES, None, job, after=after)
    graphs = {key.split(" ")[1] + key.split(" ")[0]: graph for key, graph in shown.items()}
    wanted = [stage for stage in pipeline.STAGES if stage.run is not None and stage.when(job)]
    parts = [
        f"A small loss, with `w` (3, 2) and `x` (4, 3), after every stage that changes it, on its way to a linearized\n"
        f'product. Printed with torch {torch.__version__.partition("+")[0]}, on the CPU; `meta["val"]` of every node '
        f"has its shape.\n\n```python\n{LOSS}```\n"
    ]
    for number, (stage, graph) in enumerate(zip(wanted, graphs.values(), strict=True), 1):
        text = textwrap.fill(f"**{number}. {stage.name}** {stage.does}", 120)
        parts.append(text + "\n" + (f"\n```text\n{graph}\n```\n" if graph else ""))
    return HEAD + "\n".join(parts)


def test_the_readme_shows_the_stages_as_they_are() -> None:
    text = README.read_text("utf-8")
    if f"torch {torch.__version__.partition('+')[0]}," not in text:
        pytest.skip(f"it was printed with another torch than {torch.__version__}, whose derivative rules may differ")
    assert text == written()


if __name__ == "__main__":
    README.write_text(written(), "utf-8")
