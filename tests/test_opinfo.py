"""Every operation on torch's own list: its curvature is right, warned of, or refused; never wrong without a word."""

from __future__ import annotations

import functools
import sys
import types
import unittest
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from nets import normal
from torch import Tensor
from torch.utils import _pytree as pytree

import hessfn as hf

NUM_SAMPLES = 8  # of an entry, evenly from its list
NUM_ENTRIES = 20_000  # of the inputs of a sample

# What the test does not ask of an entry, and why. The page has the same table.
_CAST = "rounds to fewer digits than a difference of gradients can do without"
EXCEPTIONS = {
    "as_strided.partial_views": "reads memory beside its argument, which a copy of that does not have",
    **dict.fromkeys(["float", "half", "bfloat16", "cfloat", "chalf"], _CAST),
    **dict.fromkeys(["sparse.sampled_addmm", "sparse.mm.reduce"], "takes sparse arguments only"),
}


@functools.cache
def operations() -> dict[str, Any]:
    """The entries that have a gradient on the CPU in float64, by name."""
    # torch's list imports expecttest, of which it needs the name of a class.
    stand_in = types.ModuleType("expecttest")
    vars(stand_in).update(TestCase=unittest.TestCase, assert_expected_inline=None)
    sys.modules.setdefault("expecttest", stand_in)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    return {
        op.full_name.removeprefix("torch."): op
        for op in op_db
        if op.supports_autograd and torch.float64 in op.supported_backward_dtypes("cpu")
    }


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        # The list takes seconds to import: not where these tests are left out.
        names = [] if metafunc.config.option.markexpr == "not slow" else list(operations())
        metafunc.parametrize("name", [_marked(name) for name in names])


def _marked(name: str) -> Any:
    """Strict: an exception that is none any more fails, and leaves the table."""
    reason = EXCEPTIONS.get(name)
    return pytest.param(name, marks=pytest.mark.xfail(strict=True, reason=reason)) if reason else name


def noise(like: Tensor, seed: int) -> Tensor:
    return normal(like.numel(), seed=seed).reshape(like.shape)


class Problem(NamedTuple):
    loss: Callable[[list[Tensor]], Tensor]
    params: list[Tensor]


def problems(op: Any) -> list[Problem]:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        samples = [x for x in op.sample_inputs("cpu", torch.float64, requires_grad=True) if is_suitable(x)]
        found = [problem(op, sample) for sample in samples[:: -(-len(samples) // NUM_SAMPLES) or 1]]
    return [given for given in found if given]


def is_variable(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad and x.dtype == torch.float64


def is_suitable(sample: Any) -> bool:
    """Whether there is something to differentiate by: dense tensors, neither empty nor large."""
    found = [x for x in pytree.tree_leaves((sample.input, sample.args, sample.kwargs)) if is_variable(x)]
    return 0 < sum(x.numel() for x in found) <= NUM_ENTRIES and all(x.layout is torch.strided for x in found)


def problem(op: Any, sample: Any) -> Problem | None:
    """A loss of the inputs that ask for a gradient: a weighted sum of the outputs and of half their squares.

    With the squares the product of a linear operation is not zero. None where no output has a gradient.
    """
    leaves, spec = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
    slots = [i for i, x in enumerate(leaves) if is_variable(x)]
    fixed = [x.detach() if isinstance(x, Tensor) else x for x in leaves]

    def outputs(params: list[Tensor]) -> list[Tensor]:
        given = list(fixed)
        for i, p in zip(slots, params, strict=True):
            given[i] = p
        first, args, kwargs = pytree.tree_unflatten(given, spec)
        out = sample.output_process_fn_grad(op.gradcheck_wrapper(op.get_op(), first, *args, **kwargs))
        found = [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]
        found = [torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in found]
        return [x for x in found if x.is_floating_point()]

    params = [fixed[i].clone() for i in slots]
    with torch.enable_grad():
        out = outputs([p.clone().requires_grad_() for p in params])
    if not any(x.requires_grad for x in out):
        return None
    weights = [noise(x, 7 + i).cos() + 0.5 for i, x in enumerate(out)]

    def loss(params: list[Tensor]) -> Tensor:
        terms = [w * (x + x.square() / 2) for w, x in zip(weights, outputs(params), strict=True)]
        return torch.stack([term.sum() for term in terms]).sum()

    return Problem(loss, params)


def difference(given: Problem, v: list[Tensor], step: float) -> tuple[Tensor, float]:
    """Central differences of plain gradients, with a step and half of it, extrapolated; and the error by rounding."""

    def gradient(c: float) -> Tensor:
        at = [(p + c * d).requires_grad_() for p, d in zip(given.params, v, strict=True)]
        grads = torch.autograd.grad(given.loss(at), at, allow_unused=True, materialize_grads=True)
        return torch.cat([g.reshape(-1) for g in grads])

    coarse, fine = ((gradient(h) - gradient(-h)) / (2 * h) for h in (step, step / 2))
    return (4 * fine - coarse) / 3, 1e-14 * float(gradient(step).norm()) / step


def is_right(given: Problem, v: list[Tensor], found: list[Tensor]) -> bool:
    """Whether the product agrees with the differences of one of three steps: a kink may lie within the others."""
    flat = torch.cat([x.reshape(-1) for x in found])
    for step in (1e-4, 1e-6, 1e-3):
        expected, rounding = difference(given, v, step)
        if (flat - expected).norm() <= 1e-5 * max(flat.norm(), expected.norm()) + rounding + 1e-8:
            return True
    return False


def verdict(given: Problem) -> str:
    directions = [[noise(p, seed + i) for i, p in enumerate(given.params)] for seed in (3, 30)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        matvec = hf.hvp(given.loss, given.params)
        try:
            products = [matvec(v) for v in directions]  # the check sees the first one
        except hf.HessfnError as error:
            return f"refused: {error}"
        right = all(is_right(given, v, found) for v, found in zip(directions, products, strict=True))
    said = " ".join(str(w.message) for w in caught)
    if right:
        return f"right: {said}" if "curvature of the loss" in said else "right"
    told = "a kink" in said or "is not exact" in said or ("not the curvature" in said and "which agrees" not in said)
    return f"warned: {said}" if told else f"silently wrong: {said}"


@pytest.mark.slow
def test_an_operation_of_the_list_is_right_or_it_is_said(name: str) -> None:
    found = [verdict(given) for given in problems(operations()[name])]
    assert found, "nothing was compared"
    assert [said for said in found if said.startswith("silently wrong")] == []


def test_the_page_has_the_exceptions() -> None:
    page = (Path(__file__).parents[1] / "docs" / "operations.md").read_text("utf-8")
    rows = page.partition("operation | why\n--- | ---\n")[2].partition("\n\n")[0].splitlines()
    assert rows == [f"`{name}` | {reason}" for name, reason in EXCEPTIONS.items()]
