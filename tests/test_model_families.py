"""Families of models, a row each: the product is right, and made in the mode that the documentation says.

``python tests/test_model_families.py`` writes the tables of the page anew; with names of families or of packages, only
their rows.
"""

from __future__ import annotations

import copy
import importlib.metadata
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from model_families import FAMILIES, Case, Family
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import hessfn as hf
from hessfn.core import tree

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
HEAD = "| family | mode | error | why |"
NARROW = (torch.float32, torch.bfloat16, torch.float16)
IN_DOUBLE, IN_SINGLE = 1e-6, 1e-4  # errors that are allowed; the second where a model computes in float32
STEP = 2e-5  # so small that no unit has its kink within it
IN_FLOAT32 = ", float32 inside"
OLDEST = {"transformers": "5.0"}  # which has a choice of how experts are computed
TAKEN = ("traced", "forward")  # modes that need no reason

INTRODUCTION = """\
# Families of models

The tables list small random models of common families, with batches as their libraries use them, on the CPU with
torch {torch}. Every row is a test. It compares the products of `hvp` and, if the mode is `traced`, of `linearized_hvp` with
differences of plain gradients of the model in float64, and checks their symmetry. `python tests/test_model_families.py` writes
the tables, with the packages of `pip install -e ".[families]"`.

- *mode* is the one that `hf.find_mode` names; [what can be differentiated](operations.md) explains each mode.
- *error* is the largest of all cases of a family, relative to the product. `float32 inside` marks a model that casts to float32
  whatever its dtype is, as RMSNorm, the softmax of eager attention and the losses of Hugging Face do. Its products have the
  digits of float32, and the reference is the same model without these casts.
- *why* gives the reason why no better mode is taken, if the mode is neither `traced` nor `forward`.

Transformers have one row for each family. Its cases are: `sdpa` and eager attention, if the family has both; no mask, and
padding on the left and on the right (eager attention: on the left); the loss that the model computes from `labels`. Neither
padding nor the token after it has a label. A model runs in float32 if its gradient in float64 is not finite: its mask has the
smallest number of float64, which becomes minus infinity in the float32 of its softmax. Embeddings with `padding_idx` are
varied in their other rows only, since gradients treat that row as a constant.
"""  # noqa: E501


class Found(NamedTuple):
    mode: str
    reason: str
    error: float
    note: str


# The truth: plain gradients of the model itself, in float64.


class Wide(TorchFunctionMode):
    """Has a model in float64 cast to nothing narrower: a difference of gradients needs all digits."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            return args[0].double()
        widen = lambda x: torch.float64 if x in NARROW and isinstance(x, torch.dtype) else x  # noqa: E731
        args, kwargs = [widen(x) for x in args], {key: widen(x) for key, x in (kwargs or {}).items()}
        return func(*args, **kwargs)


class Narrow(TorchDispatchMode):
    """Notes whether something in float64 is cast to fewer digits."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        casts = isinstance(out, Tensor) and out.dtype in NARROW and out.numel() > 1
        self.seen |= casts and any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in args)
        return out


def copied(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of TorchScript, by which e3nn copies
        return copy.deepcopy(model)


def plain_loss(model: nn.Module, case: Case) -> Tensor:
    if isinstance(case.batch, Mapping):
        return case.criterion(model(**case.batch), case.batch)
    inputs, targets = case.batch
    return case.criterion(model(*inputs) if isinstance(inputs, tuple) else model(inputs), targets)


def differences(model: nn.Module, case: Case, v: dict[str, Tensor]) -> Tensor:
    """The product with a vector by central differences of plain gradients, extrapolated to a step of zero."""
    moved, starts = copied(model), dict(model.named_parameters())
    leaves = {name: p for name, p in moved.named_parameters() if name in v}
    size = float(tree.norm(v))

    def gradient(c: float) -> Tensor:
        with torch.no_grad():
            for name, p in leaves.items():
                p.copy_(starts[name] + c / size * v[name])
        with Wide():
            value = plain_loss(moved, case)
        parts = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return torch.cat([part.flatten() for part in parts])

    def central(h: float) -> Tensor:
        return (gradient(h) - gradient(-h)) / (2 * h)

    return (4 * central(STEP / 2) - central(STEP)) / 3 * size


# What is found of hessfn.


def drawn(build: Any, seed: int = 0) -> nn.Module:
    """A model in float64 whose every parameter has something random: zeros and ones would hide errors."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages: their models are made as they make them
        torch.manual_seed(seed)
        model: nn.Module = build().double().eval()
        for p in model.parameters():
            width = p[0].numel() if p.dim() > 1 else 10
            p.data.add_(torch.randn_like(p) / width**0.5, alpha=0.3)
    return model


def in_single(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x


def has_a_gradient(model: nn.Module, case: Case) -> bool:
    value = plain_loss(model, case)
    leaves = [p for p in model.parameters() if p.requires_grad]
    return all(g is None or bool(g.isfinite().all()) for g in torch.autograd.grad(value, leaves, allow_unused=True))


def without_padding(model: nn.Module, v: dict[str, Tensor]) -> dict[str, Tensor]:
    """A vector with nothing in the rows of padding: a plain gradient takes these for constants."""
    kept = {name: x.clone() for name, x in v.items()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None and f"{name}.weight" in kept:
            kept[f"{name}.weight"][module.padding_idx] = 0
    return kept


def checked(case: Case) -> Found:
    """The mode of a case and its error, after everything is held that does not depend on the table."""
    model = drawn(case.build)
    exact, given = model, case.batch
    if case.twin:
        exact = drawn(case.twin)
        exact.load_state_dict(model.state_dict())
    with Narrow() as narrow:
        runs_in_double = has_a_gradient(exact, case) and not case.twin
    if not runs_in_double:
        model, given = copied(model).float(), tree.map(in_single, case.batch)
    loss, params = hf.functionalize(model, case.criterion, params=case.params)
    vectors = (without_padding(model, v) for v in hf.gaussian(params, 2, seed=5))
    (v, w), is_exact = vectors, runs_in_double and not narrow.seen
    truth = differences(exact, case, tree.map(torch.Tensor.double, v))

    def error(product: Any) -> float:
        return float((tree.ravel(product)[0].double() - truth).norm() / truth.norm())

    mode = hf.find_mode(loss, params, given)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        matvec = hf.hvp(loss, params, given, trace_after=0)
        along_v, along_w = matvec(v), matvec(w)
    assert any("mode" in str(warning.message) for warning in said) == (mode.mode not in TAKEN)
    asymmetry = abs(float(tree.dot(w, along_v) - tree.dot(v, along_w)))
    tolerance = (1e-10 if is_exact and mode.mode != "difference" else 1e-5) if runs_in_double else 1e-3
    tolerance = max(tolerance, 3 * mode.error)  # which a difference in float32 tells of itself
    assert asymmetry <= tolerance * float(tree.norm(along_v) * tree.norm(w))
    errors = [error(along_v)]
    if mode.mode == "traced":
        errors.append(error(hf.linearized_hvp(loss, params, given)(v)))
    else:
        with pytest.raises(hf.Untraceable):
            hf.linearized_hvp(loss, params, given)
    assert max(errors) <= max(IN_DOUBLE if is_exact else IN_SINGLE, 3 * mode.error)
    return Found(mode.mode, "" if mode.mode in TAKEN else mode.reason, max(errors), "" if is_exact else IN_FLOAT32)


def row_of(family: Family) -> list[str]:
    """The cells of a family, over all its cases."""
    found = {case.variant: checked(case) for case in family.cases()}
    by_mode: dict[str, list[str]] = {}
    for variant, one in found.items():
        by_mode.setdefault(one.mode, []).append(variant)
    modes = ", ".join(by_mode) if len(by_mode) == 1 else "; ".join(f"{m} ({', '.join(v)})" for m, v in by_mode.items())
    note = max(one.note for one in found.values())
    error = re.sub(r"e-0", "e-", f"{max(one.error for one in found.values()):.0e}")
    reasons = dict.fromkeys(one.reason for one in found.values() if one.reason)
    return [family.name, modes, f"{error}{note}", "; ".join(reasons).replace("|", "/")]


# The page.


def version(package: str) -> str:
    return importlib.metadata.version(package.replace("_", "-")).partition("+")[0]


def written(chosen: set[str]) -> str:
    """The page; with names of families or packages, only their rows are made anew."""
    kept = rows_of_the_page() if chosen else {}

    def cells(family: Family) -> list[str]:
        is_kept = chosen and not chosen & {family.name, family.package}
        return kept[family.package, family.name][1] if is_kept else row_of(family)

    parts = [INTRODUCTION.format(torch=version("torch"))]
    for package in dict.fromkeys(family.package for family in FAMILIES):
        rows = [f"| {' | '.join(cells(family))} |" for family in FAMILIES if family.package == package]
        parts.append("\n".join([f"## {package} {version(package)}", "", HEAD, "|---|---|---|---|", *rows, ""]))
    return "\n".join(parts)


def rows_of_the_page() -> dict[tuple[str, str], tuple[str, list[str]]]:
    """By package and family: the version of the package and the cells."""
    found, package, number = {}, "", ""
    for line in PAGE.read_text("utf-8").splitlines():
        if line.startswith("## "):
            package, number = line.split()[1:]
        elif package and line.startswith("| ") and line != HEAD:
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            found[package, cells[0]] = number, cells
    return found


def test_the_page_has_these_families() -> None:
    page = PAGE.read_text("utf-8")
    number = re.findall(r"torch (\S+)\. ", page)[0]
    assert page.startswith(INTRODUCTION.format(torch=number))
    assert list(rows_of_the_page()) == [(family.package, family.name) for family in FAMILIES]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: f"{family.package}: {family.name}")
def test_a_family(family: Family) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages: they call what torch has deprecated when they are imported
        pytest.importorskip(family.package, minversion=OLDEST.get(family.package))
    number, (name, modes, error, why) = rows_of_the_page()[family.package, family.name]
    found = row_of(family)
    assert found[:2] == [name, modes]
    size, _, note = error.partition(",")
    measured, _, also = found[2].partition(",")
    assert note == also
    assert float(measured) <= 30 * float(size)  # other processors round otherwise
    if number == version(family.package) and f"torch {version('torch')}. " in PAGE.read_text("utf-8"):
        assert found[3] == why


if __name__ == "__main__":
    torch.set_num_threads(1)
    PAGE.write_text(written(set(sys.argv[1:])), "utf-8")
