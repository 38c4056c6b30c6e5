"""Runs the Python of a page as printed, with the hessfn that is installed: `python -I tools/tour.py README.md`.

The page's reader has a model and one batch of data; here they are a small net and random numbers.
"""

import re
import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch

import hessfn as hf

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def given() -> dict[str, Any]:
    """What the page takes for granted."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 16), torch.nn.Tanh(), torch.nn.Linear(16, 5)).double()
    inputs, targets = torch.randn(64, 20, dtype=torch.float64), torch.randint(5, (64,))
    return {"torch": torch, "model": model, "inputs": inputs, "targets": targets}


def main(page: Path) -> None:
    blocks = BLOCK.findall(page.read_text("utf-8"))
    if not blocks:
        raise SystemExit(f"{page} has no block of Python")
    matplotlib.use("agg")
    names = given()
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    eig, trace, esd = names["eig"], names["trace"], names["esd"]
    exact = torch.linalg.eigvalsh(hf.dense(names["hvp"], names["params"]))
    largest = exact[exact.abs().argsort(descending=True)][: len(eig.values)]
    if not (eig.values - largest).abs().le(eig.residuals + 1e-9).all():
        raise SystemExit(f"the eigenvalues are {eig.values}, not {largest}")
    if not abs(trace.mean - exact.sum()) <= 5 * trace.stderr:
        raise SystemExit(f"the trace is {trace.mean} +- {trace.stderr}, not {exact.sum()}")
    if not abs(torch.trapezoid(esd.values, esd.grid) - 1) <= 0.01:
        raise SystemExit("the density does not integrate to 1")
    print(f"{page.name} ran: hessfn {hf.__version__} in {Path(hf.__file__).parent}, torch {torch.__version__}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
