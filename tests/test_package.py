from __future__ import annotations

import ast
import importlib.metadata
import sys
from pathlib import Path

import pytest

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


def test_the_version_is_that_of_the_package_and_of_the_changelog() -> None:
    version = importlib.metadata.version("hessfn")
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text("utf-8")


def test_types_and_template_come_with_the_package() -> None:
    assert (ROOT / "hessfn" / "py.typed").is_file()
    assert (ROOT / "hessfn" / "templates" / "report.html.j2").is_file()
