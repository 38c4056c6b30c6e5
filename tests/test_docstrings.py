"""Every public function's docstring has the parts that CONTRIBUTING.md asks for."""

from __future__ import annotations

import inspect
import re
from types import FunctionType

import pytest

import hessfn as hf
from hessfn import problems
from hessfn.plotting import plot

PLOTS = {f"plot.{name}": getattr(plot, name) for name in dir(plot) if name.endswith("_plot")}
PUBLIC = {
    **{name: getattr(hf, name) for name in hf.__all__ if isinstance(getattr(hf, name), FunctionType)},
    **PLOTS,
    "ShardedBatches": hf.ShardedBatches,
    "batches.mean": hf.batches.mean,
    "problems.digits": problems.digits,
    "problems.cifar10_resnet20": problems.cifar10_resnet20,
}

# Parts that a function has no use for.
WITHOUT = {
    "show_config": {"Args:", "Raises:"},
    "ShardedBatches": {"Returns:"},  # a class
    "report": {">>>"},  # seconds, and files
    "compare": {">>>"},
    "problems.cifar10_resnet20": {">>>"},  # downloads
    **{name: {"Cost:", "Raises:"} for name in PLOTS},
}


def parts_of(function: FunctionType) -> set[str]:
    parts = {"Args:", "Cost:", "Raises:", ">>>"}
    return parts if inspect.signature(function).return_annotation in (None, "None") else {*parts, "Returns:"}


def section(text: str, head: str) -> str:
    found = re.search(rf"^{head}\n((?:    .*\n|\n)+)", text + "\n", re.MULTILINE)
    return found[1] if found else ""


@pytest.mark.parametrize("name", PUBLIC)
def test_a_docstring_has_its_parts(name: str) -> None:
    text = inspect.getdoc(PUBLIC[name]) or ""
    wanted = parts_of(PUBLIC[name]) - WITHOUT.get(name, set())
    assert {part for part in wanted if not re.search(f"^{re.escape(part)}", text, re.MULTILINE)} == set()


@pytest.mark.parametrize("name", PUBLIC)
def test_the_first_line_is_a_sentence(name: str) -> None:
    first = (inspect.getdoc(PUBLIC[name]) or "").splitlines()[0]
    assert first[0] in "`" + first[0].upper() and first[-1] in ".:?", first


@pytest.mark.parametrize("name", PUBLIC)
def test_arguments_that_are_described_are_there(name: str) -> None:
    described = re.findall(
        r"^    (\w+(?:, \w+)*): ", section(inspect.getdoc(PUBLIC[name]) or "", "Args:"), re.MULTILINE
    )
    told = {argument for line in described for argument in line.split(", ")}
    assert told <= set(inspect.signature(PUBLIC[name]).parameters)
