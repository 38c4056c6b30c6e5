"""The types a user's own mypy sees: strict programs pass, mistakes are caught, and the aliases exist at runtime."""

import importlib.util
import re
import subprocess
import sys
import textwrap
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from torch import Tensor

import hessfn as hf

ROOT = Path(__file__).parents[1]

HEAD = """
from collections.abc import Callable, Sequence
from typing import Any
import torch
from torch import Tensor, nn
from typing_extensions import assert_type
import hessfn as hf

Params = dict[str, Tensor]
"""

# What the README's tour makes, each name with its type.
TOUR = {
    "loss": "Callable[[Params, Any], Tensor]",
    "params": "Params",
    "hvp": "hf.MatVec[Params]",
    "eig": "hf.EigenPairs[Params]",
    "eig.values": "Tensor",
    "eig.vectors": "Params",
    "trace": "hf.Estimate[Tensor]",
    "trace.mean": "Tensor",
    "esd": "hf.Density",
    "esd.values": "Tensor",
}

# Everything else, from the arguments of one function.
ARGUMENTS = {
    "loss": "Callable[[Params, Any], Tensor]",
    "forward": "Callable[[Params, Any], Any]",
    "model": "nn.Module",
    "params": "Params",
    "matvec": "hf.MatVec[Params]",
    "flat": "hf.MatVec[Tensor]",
    "w": "Tensor",
    "batch": "tuple[Tensor, Tensor]",
    "quadrature": "hf.Quadrature",
}
TYPES = {
    "hf.functionalize(model, nn.MSELoss())": "tuple[Callable[[Params, Any], Tensor], Params]",
    "hf.stateless(model)": "tuple[Callable[[Params, Any], Any], Params]",
    "hf.activation_loss(model, nn.MSELoss(), batch, '*', at='output', reduction='sum')[1]": "Params",
    "hf.hvp(lambda w: (w**3).sum(), w)": "hf.MatVec[Tensor]",
    "hf.hvp(loss, params, batch, mode='forward')(params)": "Params",
    "hf.hvp(lambda p: p[0].sum(), [w, w])": "hf.MatVec[list[Tensor]]",
    "hf.linearized_hvp(loss, params, batch)": "hf.MatVec[Params]",
    "hf.mean_hvp(loss, params, [batch])": "hf.MatVec[Params]",
    "hf.ggnvp(forward, nn.MSELoss(), params, batch)": "hf.MatVec[Params]",
    "hf.fvp(forward, nn.MSELoss(), params, batch)": "hf.MatVec[Params]",
    "hf.gaussian(params, 3)": "Sequence[Params]",
    "hf.rademacher(w, 3)[0]": "Tensor",
    "hf.rademacher(w, 3)[:2]": "Sequence[Tensor]",
    "hf.restrict(flat, w, '*')": "hf.MatVec[Params]",
    "hf.block(matvec, params, '0.*', '1.*')": "hf.MatVec[Params]",
    "hf.deflate(matvec, params)": "hf.MatVec[Params]",
    "hf.scaled(matvec, params)": "hf.MatVec[Params]",
    "hf.scaled(flat, w)(w)": "Tensor",
    "hf.adam_scale(torch.optim.AdamW(model.parameters()), params)": "Params",
    "hf.critical_sharpness(loss, params, params, batch)": "hf.CriticalSharpness",
    "hf.progress(matvec, total=3)": "hf.MatVec[Params]",
    "hf.progress(loss, unit='point')(params, batch)": "Tensor",
    "hf.all_reduce(matvec, 3.0)(params)": "Params",
    "hf.dense(matvec, params)": "Tensor",
    "hf.eigsh(lambda v: 2 * v, w, which='BE').vectors": "Tensor",
    "hf.eigsh(matvec, params, warm_start=params)": "hf.EigenPairs[Params]",
    "hf.follow(matvec, like=params)[0]": "hf.EigenPairs[Params]",
    "hf.follow(matvec, hf.follow(matvec, like=params)[1])[1].vectors": "Params",
    "hf.power_iter(matvec, params).vector": "Params",
    "hf.lanczos(matvec, params, 3)": "hf.Tridiagonal[Params]",
    "hf.hutchinson(lambda v: 2 * v, hf.rademacher(w, 3))": "hf.Estimate[Tensor]",
    "hf.hutchinson(matvec, [params, params])": "hf.Estimate[Tensor]",
    "hf.rounding_of_pairs(matvec, matvec, hf.eigsh(matvec, params))": "Tensor",
    "hf.rounding_of_products(matvec, matvec, params).leaves": "Params",
    "hf.batch_forms(lambda b: matvec, [batch], params)": "hf.Forms[Tensor]",
    "hf.batch_traces(lambda b: matvec, [batch], [params]).values": "Params",
    "hf.data_interval(w)": "tuple[Tensor, Tensor]",
    "hf.block_tops(matvec, params).values": "dict[str, Tensor]",
    "hf.squared_frobenius_per_leaf(matvec, [params]).mean": "Params",
    "hf.stable_ranks(hf.squared_frobenius_per_leaf(matvec, [params]), hf.block_tops(matvec, params)).mean": "Params",
    "hf.hutchinson_per_leaf(matvec, hf.rademacher(params, 3)).stderr": "Params",
    "hf.hutchinson_diag(flat, hf.rademacher(w, 3))": "hf.Estimate[Tensor]",
    "hf.hutchinson_per_sample(matvec, hf.rademacher(params, 3))": "hf.Estimate[Params]",
    "hf.mean_traces(hf.hutchinson_per_leaf(matvec, hf.rademacher(params, 3)), params)": "hf.Estimate[Params]",
    "hf.squared_row_norms(matvec, hf.rademacher(params, 3))": "hf.Estimate[Params]",
    "hf.squared_frobenius(matvec, hf.rademacher(params, 3))": "hf.Estimate[Tensor]",
    "hf.deflated_trace(matvec, hf.rademacher(params, 3), hf.eigsh(matvec, params))": "hf.Estimate[Tensor]",
    "hf.hutchpp(matvec, hf.rademacher(params, 3))": "hf.Estimate[Tensor]",
    "hf.xtrace(matvec, hf.rademacher(params, 3))": "hf.Estimate[Tensor]",
    "hf.xdiag(matvec, hf.rademacher(params, 3)).mean": "Params",
    "hf.slq(matvec, hf.gaussian(params, 3), 5).nodes": "Tensor",
    "hf.solve(matvec, params).x": "Params",
    "hf.solve(flat, w, precondition=hf.diagonal_preconditioner(w)).residual": "Tensor",
    "hf.spectral_preconditioner(hf.eigsh(matvec, params), 0.1)": "hf.MatVec[Params]",
    "hf.trace_of(quadrature, torch.exp, 3)": "hf.Estimate[Tensor]",
    "hf.wasserstein(quadrature, w)": "Tensor",
    "hf.line(loss, params, params, [0.0, 1.0], batch)": "Tensor",
    "hf.plane(loss, params, (params, params), range(3), w, batch)": "Tensor",
    "hf.random_direction(params)": "Params",
    "hf.gradient_direction(loss, params, batch)": "Params",
    "hf.direction_to(params, params)": "Params",
    "hf.filter_normalized(params, params)": "Params",
    "hf.slice_curvature(loss, params, params, batch)": "hf.Curvature",
    "hf.principal_directions([params])": "hf.Trajectory[Params]",
    "hf.principal_directions([params]).directions[0]": "Params",
    "hf.activation_traces(model, nn.MSELoss(), [batch], '*', 3, at='output')": "hf.Estimate[Params]",
    "hf.sensitivities(model, nn.MSELoss(), [batch]).weights.mean": "Params",
    "hf.allocate_bits(hf.sensitivities(model, nn.MSELoss(), [batch]), mean_bits=4)": "dict[str, int]",
    "hf.expected_rise(hf.sensitivities(model, nn.MSELoss(), [batch]), params, 4)": "hf.Estimate[Params]",
    "hf.quantized(params, {'0': 4})": "Params",
    "hf.tree.add(params, params)": "Params",
    "hf.tree.ravel(params)[1](w)": "Params",
}

# Mistakes, each with what mypy says of it.
MISUSES = {
    'hf.eigsh(matvec, params, which="largest")': "incompatible type \"Literal['largest']\"",
    'hf.hvp(loss, params, batch, mode="fwd")': "incompatible type \"Literal['fwd']\"",
    "hf.eigsh(matvec, params).value": '"EigenPairs[dict[str, Tensor]]" has no attribute "value"',
    "hf.hutchinson(matvec, 100)": 'Argument 2 to "hutchinson" has incompatible type "int"',
    "hf.hutchinson(matvec, params)": "incompatible type",
    "hf.hutchinson(matvec, hf.rademacher(w, 3))": "incompatible type",
    "hf.eigsh(params, matvec)": 'Argument 1 to "eigsh" has incompatible type "dict[str, Tensor]"',
    "hf.eigsh(matvec, hf.gaussian(params, 1))": "incompatible type",
    "hf.eigsh(w, w)": 'Argument 1 to "eigsh" has incompatible type "Tensor"',
    "hf.ggnvp(loss, params, batch)": 'Missing positional argument "batch"',
    "hf.scaled(matvec, w)": "incompatible type",
    "hf.fvp(forward, params, nn.MSELoss(), batch)": 'Argument 2 to "fvp" has incompatible type "dict[str, Tensor]"',
    "hf.density(hf.eigsh(matvec, params))": 'Argument 1 to "density" has incompatible type "EigenPairs[',
    "hf.deflate(matvec, hf.eigsh(matvec, params))": "incompatible type",
    "hf.activation_loss(model, nn.MSELoss(), batch, '*', at='out')": "incompatible type \"Literal['out']\"",
    "hf.activation_loss(model, nn.MSELoss(), batch, '*', reduction='none')": "incompatible type \"Literal['none']\"",
    "hf.hutchinson(matvec, hf.rademacher(params, 3)).mean['0.weight']": "Invalid index type",
    "hf.eigsh(matvec, params).vectors.shape": '"dict[str, Tensor]" has no attribute "shape"',
}


def tour() -> str:
    page = (ROOT / "README.md").read_text("utf-8")
    (block,) = re.findall(r"```python\nimport torch\nimport hessfn as hf\n\n(loss, params.*?)```", page, re.S)
    return block


def program() -> tuple[str, dict[int, str]]:
    """One source, and the lines on which mypy has something to say."""
    signature = ", ".join(f"{name}: {kind}" for name, kind in ARGUMENTS.items())
    lines = [
        *HEAD.splitlines(),
        "def tour(model: nn.Module, inputs: Tensor, targets: Tensor) -> None:",
        *textwrap.indent(tour(), "    ").splitlines(),
        *[f"    assert_type({name}, {kind})" for name, kind in TOUR.items()],
        f"def types({signature}) -> None:",
        *[f"    assert_type({call}, {kind})" for call, kind in TYPES.items()],
        f"def misuses({signature}) -> None:",
    ]
    expected = {len(lines) + i: words for i, words in enumerate(MISUSES.values(), 1)}
    return "\n".join([*lines, *[f"    {call}" for call in MISUSES], ""]), expected


@pytest.mark.slow
def test_strict_programs_pass_and_mistakes_are_caught(tmp_path: Path) -> None:
    """One run for all: reading the types of torch takes most of the time, once for every cache."""
    pytest.importorskip("mypy")
    source, expected = program()
    (tmp_path / "program.py").write_text(source, "utf-8")
    options = ["--strict", "--python-version=3.10", "--hide-error-context", "--no-pretty"]
    command = [sys.executable, "-m", "mypy", *options, f"--cache-dir={ROOT / '.mypy_cache' / 'user'}", "program.py"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    said: dict[int, str] = {}
    for number, words in re.findall(r"^program\.py:(\d+): (?:error|note): (.*)", ran.stdout, re.MULTILINE):
        said[int(number)] = said.get(int(number), "") + words + "\n"
    lines = source.splitlines()
    assert ran.returncode == 1 and not ran.stderr, ran.stdout + ran.stderr
    unexpected = {lines[number - 1]: words for number, words in said.items() if number not in expected}
    assert not unexpected
    missed = {lines[n - 1]: said.get(n, "nothing") for n, words in expected.items() if words not in said.get(n, "")}
    assert not missed


def test_aliases_and_results_take_parameters_at_runtime() -> None:
    params = dict[str, Tensor]
    assert hf.MatVec[params] == Callable[[params], params]
    for result in (hf.EigenPair, hf.EigenPairs, hf.Tridiagonal, hf.Trajectory, hf.Estimate):
        assert typing.get_origin(result[params]) is result and typing.get_args(result[params]) == (params,)


def test_annotations_can_be_read_at_runtime() -> None:
    for name in ("hvp", "mean_hvp", "ggnvp", "restrict", "deflate", "eigsh", "hutchinson", "slq", "line", "plane"):
        assert "return" in typing.get_type_hints(getattr(hf, name))
    assert typing.get_origin(typing.get_type_hints(hf.gaussian)["return"]) is Sequence


def test_the_types_come_with_the_package() -> None:
    spec = importlib.util.find_spec("hessfn")
    assert spec is not None and spec.origin is not None
    assert Path(spec.origin).with_name("py.typed").is_file()
