from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from nets import classes, normal, seeded
from torch import nn

import hessfn as hf

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "hessfn").glob("*.py"))


def imports(source: Path, *, everywhere: bool) -> set[str]:
    """What a file imports: everywhere in it, or only when it is itself imported."""
    parsed = ast.parse(source.read_text("utf-8"))
    found: set[str] = set()
    for node in ast.walk(parsed) if everywhere else parsed.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            own = node.module == "hessfn"
            found |= {f"hessfn.{alias.name}" for alias in node.names} if own else {node.module or ""}
    return found


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_the_core_dependencies_are_enough_to_import(source: Path) -> None:
    core = {"hessfn", "torch", "numpy", "scipy", "matplotlib", "tqdm"} | set(sys.stdlib_module_names)
    assert {name.split(".")[0] for name in imports(source, everywhere=False)} <= core


@pytest.mark.parametrize("name", ["tree", "probes", "eigen", "trace", "spectrum", "matvec", "landscape", "plot"])
def test_imports_point_one_way(name: str) -> None:
    above = {f"hessfn.{module}" for module in ("model", "curvature", "problems", "report", "page", "cli")}
    assert not imports(ROOT / "hessfn" / f"{name}.py", everywhere=True) & above


def test_the_tour_in_the_readme_runs_as_printed() -> None:
    tour = re.search(r"```python\n(import hessfn as hf\n.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert tour is not None
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)))
    given = {"torch": torch, "model": model, "inputs": normal(20, 6), "targets": classes(20, 3)}
    names: dict[str, Any] = dict(given)
    exec(tour[1], names)
    exact = torch.linalg.eigvalsh(hf.dense(names["hvp"], names["params"]))
    largest = exact[exact.abs().argsort(descending=True)][:5]
    assert ((names["eig"].values - largest).abs() <= names["eig"].residuals + 1e-9).all()
    assert (names["trace"].mean - exact.sum()).abs() <= 4 * names["trace"].stderr
    plt.close("all")


def test_the_version_is_that_of_the_package_and_of_the_changelog() -> None:
    version = importlib.metadata.version("hessfn")
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text("utf-8")


def test_types_and_template_come_with_the_package() -> None:
    assert (ROOT / "hessfn" / "py.typed").is_file()
    assert (ROOT / "hessfn" / "templates" / "report.html.j2").is_file()
