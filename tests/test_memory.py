"""Results have memory of their own: what is saved of one is what it shows, and what is saved is read by default."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import NETS, classes, normal, problem, seeded
from spectra import SPECTRA, on, symmetric
from torch import Tensor, nn

import hessfn as hf
from hessfn.core import results, tree
from hessfn.core.memory import own

LIKE = {"a": torch.zeros(2, 3).double(), "b": torch.zeros(6).double()}
MATVEC = on(symmetric(SPECTRA["indefinite"][::5]), LIKE)
V0 = hf.gaussian(LIKE, 1)[0]
SIGNS = hf.rademacher(LIKE, 4)
RULE = hf.slq(MATVEC, hf.gaussian(LIKE, 2), 5)
GRID = torch.linspace(-1, 1, 14).double()[::2]
LOSS, PARAMS, BATCH, MODEL = problem("mlp")
HVP = hf.hvp(LOSS, PARAMS, BATCH)
V = hf.gaussian(PARAMS, 1)[0]
CRITERION = nn.CrossEntropyLoss()


def gradient() -> Any:
    return torch.func.grad(LOSS)(PARAMS, BATCH)


def forms(v: Any) -> Any:
    return hf.Forms(torch.ones(2, 1).double(), torch.ones(2).double())


# What every public function returns that returns tensors, but for trees that share the model's memory on purpose.
RESULTS: dict[str, Any] = {
    "power_iter": lambda: hf.power_iter(MATVEC, V0),
    "lanczos": lambda: hf.lanczos(MATVEC, V0, 5),
    "eigsh": lambda: hf.eigsh(MATVEC, V0, 2),
    "eigsh, fixed": lambda: hf.eigsh(MATVEC, V0, 2, rtol=None, max_matvecs=6),
    "eigsh, second start": lambda: hf.eigsh(MATVEC, V0, 2, second_start=hf.gaussian(LIKE, 2)[1], keep_all=True),
    "solve": lambda: hf.solve(MATVEC, V0, damping=0.1),
    "solve, fixed": lambda: hf.solve(MATVEC, V0, rtol=None, max_matvecs=6),
    "solve, from there": lambda: hf.solve(lambda v: v, SIGNS[0]["b"], x0=SIGNS[0]["b"]),
    "diagonal_preconditioner": lambda: hf.diagonal_preconditioner(SIGNS[0])(V0),
    "spectral_preconditioner": lambda: hf.spectral_preconditioner(hf.eigsh(MATVEC, V0, 2), 0.1)(V0),
    "follow": lambda: hf.follow(MATVEC, like=LIKE)[0],
    "follow, state": lambda: hf.follow(MATVEC, like=LIKE)[1],
    "critical_sharpness": lambda: hf.critical_sharpness(LOSS, PARAMS, tree.scale(-1, gradient()), BATCH),
    "quadrature_of": lambda: hf.quadrature_of(hf.eigsh(MATVEC, V0, 2, keep_all=True), V0),
    "hutchinson": lambda: hf.hutchinson(MATVEC, SIGNS),
    "hutchinson, eigenpairs": lambda: hf.hutchinson(MATVEC, SIGNS, eigenpairs=hf.eigsh(MATVEC, V0, 2)),
    "hutchinson_per_leaf, eigenpairs": lambda: hf.hutchinson_per_leaf(
        MATVEC, SIGNS, eigenpairs=hf.eigsh(MATVEC, V0, 2)
    ),
    "hutchinson_diag, eigenpairs": lambda: hf.hutchinson_diag(MATVEC, SIGNS, eigenpairs=hf.eigsh(MATVEC, V0, 2)),
    "slq, eigenpairs": lambda: hf.slq(MATVEC, hf.gaussian(LIKE, 4), 5, eigenpairs=hf.eigsh(MATVEC, V0, 2)),
    "rounding_of_pairs": lambda: hf.rounding_of_pairs(MATVEC, MATVEC, hf.eigsh(MATVEC, V0, 2)),
    "rounding_of_products": lambda: hf.rounding_of_products(MATVEC, MATVEC, V0),
    "batch_forms": lambda: hf.batch_forms(
        lambda batch: hf.hvp(LOSS, PARAMS, batch), [BATCH] * 3, tree.map(lambda x: x[None], V)
    ),
    "data_stderr": lambda: hf.data_stderr(torch.ones(3, 2)),
    "cross_fitted": lambda: hf.cross_fitted(MATVEC, MATVEC, V0, forms_a=forms, forms_b=forms),
    "block_tops": lambda: hf.block_tops(MATVEC, LIKE),
    "hutchinson, rtol": lambda: hf.hutchinson(MATVEC, hf.rademacher(LIKE, 40), rtol=0.5),
    "hutchinson, groups": lambda: hf.hutchinson(MATVEC, SIGNS, batch_size=2),
    "hutchinson_per_leaf": lambda: hf.hutchinson_per_leaf(MATVEC, SIGNS),
    "hutchinson_per_leaf, groups": lambda: hf.hutchinson_per_leaf(MATVEC, SIGNS, batch_size=4),
    "hutchinson_per_sample": lambda: hf.hutchinson_per_sample(lambda v: 2 * v, hf.rademacher(torch.zeros(3, 4), 4)),
    "hutchinson_diag": lambda: hf.hutchinson_diag(MATVEC, SIGNS),
    "hutchinson_diag, one": lambda: hf.hutchinson_diag(MATVEC, SIGNS[:1]),
    "hutchinson_diag, groups": lambda: hf.hutchinson_diag(MATVEC, SIGNS, batch_size=4),
    "squared_row_norms": lambda: hf.squared_row_norms(MATVEC, SIGNS),
    "squared_frobenius": lambda: hf.squared_frobenius(MATVEC, SIGNS),
    "hutchpp": lambda: hf.hutchpp(MATVEC, SIGNS),
    "xtrace": lambda: hf.xtrace(MATVEC, SIGNS),
    "xdiag": lambda: hf.xdiag(MATVEC, SIGNS),
    "deflated_trace": lambda: hf.deflated_trace(MATVEC, SIGNS, hf.eigsh(MATVEC, V0)),
    "mean_traces": lambda: hf.mean_traces(hf.hutchinson_per_leaf(MATVEC, SIGNS), LIKE),
    "slq": lambda: RULE,
    "slq, groups": lambda: hf.slq(MATVEC, hf.gaussian(LIKE, 4), 5, batch_size=2),
    "density": lambda: hf.density(RULE),
    "density, grid": lambda: hf.density(RULE, GRID, sigma=0.1, linthresh=0.1),
    "density_band": lambda: hf.density_band(RULE, GRID),
    "cumulative": lambda: hf.cumulative(RULE),
    "cumulative, grid": lambda: hf.cumulative(RULE, GRID),
    "negative_share_of_squares": lambda: hf.negative_share_of_squares(RULE),
    "trace_of": lambda: hf.trace_of(RULE, torch.abs, 12),
    "wasserstein": lambda: hf.wasserstein(RULE, RULE),
    "rademacher": lambda: SIGNS[1],
    "gaussian": lambda: V0,
    "restrict": lambda: hf.restrict(MATVEC, LIKE, "a")({"a": V0["a"]}),
    "block": lambda: hf.block(MATVEC, LIKE, "a", "b")({"b": V0["b"]}),
    "deflate": lambda: hf.deflate(MATVEC, hf.eigsh(MATVEC, V0).vectors)(V0),
    "dense": lambda: hf.dense(MATVEC, LIKE),
    "ravel": lambda: tree.ravel(V0)[0],
    "unravel": lambda: tree.ravel(V0)[1](torch.zeros(12).double()),
    "unravel, several": lambda: tree.ravel(V0)[1](torch.zeros(3, 12).double()),
    "line": lambda: hf.line(LOSS, PARAMS, V, [0.0, 1.0], BATCH),
    "plane": lambda: hf.plane(LOSS, PARAMS, (V, V), [0.0, 1.0], [0.0, 1.0, 2.0], BATCH, batch_size=2),
    "slice_curvature": lambda: hf.slice_curvature(LOSS, PARAMS, V, BATCH),
    "principal_directions": lambda: hf.principal_directions([PARAMS, V, tree.scale(2.0, PARAMS)]),
    "principal_directions, tensors": lambda: hf.principal_directions(list(torch.eye(5).double())),
    "activation_traces": lambda: hf.activation_traces(MODEL, CRITERION, [BATCH], ["0", "2"], 3),
    "activation_loss": lambda: hf.activation_loss(MODEL, CRITERION, BATCH, ["0"])[1],
    "sensitivities": lambda: hf.sensitivities(MODEL, CRITERION, [BATCH], num_probes=3),
    "find_mode": lambda: hf.find_mode(LOSS, PARAMS, BATCH),
}


def tensors(result: Any) -> list[Tensor]:
    return [x for x in tree.leaves(result) if isinstance(x, Tensor)]


def assert_owned(result: Any) -> None:
    """As safetensors asks: contiguous, and no memory that another tensor has as well."""
    places = set()
    for x in tensors(result):
        assert x.is_contiguous()
        assert x.untyped_storage().nbytes() == x.numel() * x.element_size()
        places.add(x.untyped_storage().data_ptr())
    assert len(places) == len(tensors(result))


@pytest.mark.parametrize("name", RESULTS)
def test_what_is_saved_is_what_is_there_and_is_read_by_default(name: str) -> None:
    result = RESULTS[name]()
    assert_owned(result)
    file = io.BytesIO()
    torch.save({"of the run": [result]}, file)
    assert len(file.getvalue()) <= 4000 + sum(800 + x.nbytes for x in tensors(result))
    file.seek(0)
    (loaded,) = torch.load(file)["of the run"]
    assert type(loaded) is type(result)
    assert tree.structure(loaded) == tree.structure(result)
    assert all(torch.equal(a, b) for a, b in zip(tensors(loaded), tensors(result), strict=True))


def test_every_class_of_results_is_among_them() -> None:
    classes = {name for name in dir(results) if hasattr(getattr(results, name), "_fields")}
    kept = {type(make()).__name__ for make in RESULTS.values()}
    assert classes <= kept | {"Mode"} and len(classes) >= 12


def test_fifteen_numbers_of_an_eigenvector_take_fifteen_numbers() -> None:
    like = {"big": torch.zeros(250_000), "small": torch.zeros(3, 5)}
    pairs = hf.eigsh(lambda v: tree.map(lambda x: x * torch.linspace(0, 1, x.numel()).reshape(x.shape), v),
                     hf.gaussian(like, 1)[0], rtol=None, max_matvecs=2)  # fmt: skip
    file = io.BytesIO()
    torch.save(pairs.vectors["small"], file)
    assert len(file.getvalue()) < 2000


@pytest.mark.parametrize("first", ["hessfn", "torch"])
def test_results_load_whatever_is_imported_first(first: str, tmp_path: Path) -> None:
    torch.save(hf.eigsh(MATVEC, V0), tmp_path / "pairs.pt")
    second = {"hessfn": "torch", "torch": "hessfn"}[first]
    code = f"import {first}; import {second}; print(type(torch.load('pairs.pt')).__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "EigenPairs\n"


def test_a_pickle_is_of_the_same_class() -> None:
    pairs = hf.eigsh(MATVEC, V0)
    assert type(pickle.loads(pickle.dumps(pairs))) is hf.EigenPairs


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["plain", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_own_their_memory_in_every_mode(dtype: torch.dtype, layout: torch.memory_format) -> None:
    build, shape = NETS["conv"]
    model = seeded(build).to(dtype).to(memory_format=layout)
    loss, params = hf.functionalize(model, CRITERION)
    forward, _ = hf.stateless(model)
    batch = normal(*shape).to(dtype).to(memory_format=layout), classes(shape[0], 3)
    v = tree.map(lambda x: x.clone(), params)
    modes = ("traced", "forward", "reverse", "double_backward", "difference")
    for matvec in (
        *(hf.hvp(loss, params, batch, mode=mode, check=False) for mode in modes),
        hf.linearized_hvp(loss, params, batch, check=False),
        hf.mean_hvp(loss, params, [batch, batch], check=False),
        hf.ggnvp(forward, CRITERION, params, batch),
        hf.fvp(forward, CRITERION, params, batch),
    ):
        assert_owned(matvec(v))
    for direction in (
        hf.random_direction(params),
        hf.gradient_direction(loss, params, batch),
        hf.direction_to(params, v),
        hf.filter_normalized(v, params, keep_vectors=True),
    ):
        assert_owned(direction)


@pytest.mark.parametrize(
    "part",
    [
        lambda x: x[:2],
        lambda x: x.T,
        lambda x: x[:, 1],
        lambda x: x[0, 0],
        lambda x: x[:0],
        lambda x: x.expand(2, 4, 6)[0],
        lambda x: x.as_strided((4, 6), (0, 1)),
        lambda x: x.to_sparse().to_dense()[::2],
    ],
)
def test_a_part_is_copied_and_a_whole_is_not(part: Any) -> None:
    x = torch.arange(24.0).reshape(4, 6)
    assert own(x) is x
    assert torch.equal(own(part(x)), part(x))
    if part(x).numel() != x.numel() or not part(x).is_contiguous():
        assert_owned(own(part(x)))


def test_ownership_is_no_matter_of_derivatives() -> None:
    x = torch.ones(4, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: own(x[1:].T), x)
    assert torch.equal(torch.func.vmap(lambda row: own(row[:2]))(x), x[:, :2])
