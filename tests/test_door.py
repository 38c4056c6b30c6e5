"""A routine names what it was given wrongly, with the remedy, before it computes; what can be meant goes through."""

import inspect

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch
from torch import nn

import hessfn as hf
from hessfn.core.errors import InvalidInput

MODEL = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
CRITERION = nn.MSELoss()
BATCH = torch.arange(8.0).double().reshape(4, 2), torch.ones(4, 1).double()
LOSS, PARAMS = hf.functionalize(MODEL, CRITERION)
FORWARD, _ = hf.stateless(MODEL)
V0 = hf.gaussian(PARAMS, 1)[0]
STEPS = [0.0, 1.0]
A = torch.diag(torch.arange(1.0, 4.0).double())
FLAT = torch.ones(3).double()


def never(*_):
    raise AssertionError("nothing is computed before the arguments are looked at")


def mv(v):
    return never(v)


def vec(v):
    return A @ v


NO_MATVEC = r"not a function from a vector to its product"
MATRIX, ARRAY = r"lambda v: A @ v", r"lambda v: torch.from_numpy\(A @ v.numpy\(\)\)"
DRAW, ONE = r"give rademacher\(params, 100\)", r"take gaussian\(params, 1\)\[0\]"
NO_VECTOR = r"not a tensor or a tree of tensors, such as gaussian\(params, 1\)\[0\]"
TO_LOSS = r"loss, params = functionalize\(model, criterion\)"
TO_FORWARD = r"forward, params = stateless\(model\)"
VECTORS = r"take the .vectors of eigsh"

# Routines by the second argument, with the further ones they need.

WITH_VECTOR = {
    "power_iter": lambda m, v: hf.power_iter(m, v),
    "lanczos": lambda m, v: hf.lanczos(m, v, 2),
    "eigsh": lambda m, v: hf.eigsh(m, v),
    "solve": lambda m, v: hf.solve(m, v),
}
WITH_LIKE = {
    "dense": lambda m, x: hf.dense(m, x),
    "as_linear_operator": lambda m, x: hf.as_linear_operator(m, x),
    "check_matvec": lambda m, x: hf.check_matvec(m, x),
    "restrict": lambda m, x: hf.restrict(m, x, "*"),
    "block": lambda m, x: hf.block(m, x, "*", "*"),
}
PAIRS = hf.EigenPairs(torch.ones(1), FLAT[None], torch.zeros(1), torch.tensor(1), torch.tensor([True]))
WITH_PROBES = {
    "hutchinson": lambda m, z: hf.hutchinson(m, z),
    "hutchinson_per_leaf": lambda m, z: hf.hutchinson_per_leaf(m, z),
    "hutchinson_per_sample": lambda m, z: hf.hutchinson_per_sample(m, z),
    "hutchinson_diag": lambda m, z: hf.hutchinson_diag(m, z),
    "squared_row_norms": lambda m, z: hf.squared_row_norms(m, z),
    "squared_frobenius": lambda m, z: hf.squared_frobenius(m, z),
    "deflated_trace": lambda m, z: hf.deflated_trace(m, z, PAIRS),
    "hutchpp": lambda m, z: hf.hutchpp(m, z),
    "xtrace": lambda m, z: hf.xtrace(m, z),
    "xdiag": lambda m, z: hf.xdiag(m, z),
    "slq": lambda m, z: hf.slq(m, z, 2),
}
WITH_LOSS = {
    "hvp": lambda f, p: hf.hvp(f, p, BATCH),
    "linearized_hvp": lambda f, p: hf.linearized_hvp(f, p, BATCH),
    "mean_hvp": lambda f, p: hf.mean_hvp(f, p, [BATCH]),
    "line": lambda f, p: hf.line(f, p, p, STEPS, BATCH),
    "plane": lambda f, p: hf.plane(f, p, (p, p), STEPS, STEPS, BATCH),
    "gradient_direction": lambda f, p: hf.gradient_direction(f, p, BATCH),
    "slice_curvature": lambda f, p: hf.slice_curvature(f, p, p, BATCH),
    "check_slice": lambda f, p: hf.check_slice(mv, f, p, p, BATCH),
}
WITH_FORWARD = {"ggnvp": hf.ggnvp, "fvp": hf.fvp}
WITH_QUADRATURE = {
    "density": hf.density,
    "density_band": hf.density_band,
    "cumulative": hf.cumulative,
    "trace_of": lambda q: hf.trace_of(q, torch.exp, 3),
    "wasserstein": lambda q: hf.wasserstein(q, FLAT),
}


def refused(call, words):
    with pytest.raises(InvalidInput, match=words) as caught:
        call()
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, hf.HessfnError)
    return str(caught.value)


# A matvec

MATVECS = {
    "a tree": (PARAMS, rf"matvec is a dict of 4, {NO_MATVEC}; hvp\(loss, params, batch\) makes one"),
    "a matrix": (A, rf"matvec is a tensor of shape \(3, 3\), {NO_MATVEC}; for a matrix A write {MATRIX}"),
    "an array": (A.numpy(), rf"matvec is of type ndarray and of shape \(3, 3\), {NO_MATVEC}.*{ARRAY}"),
    "a sparse matrix": (scipy.sparse.csr_matrix(A.numpy()), ARRAY),
    "a SciPy operator": (scipy.sparse.linalg.aslinearoperator(A.numpy()), ARRAY),
    "probes": (hf.rademacher(PARAMS, 5), rf"matvec is a sequence of 5, {NO_MATVEC}"),
    "a pair": ((LOSS, PARAMS), rf"matvec is a tuple of 2, {NO_MATVEC}"),
    "nothing": (None, rf"matvec is None, {NO_MATVEC}"),
}


@pytest.mark.parametrize("given", MATVECS)
@pytest.mark.parametrize("name", [*WITH_VECTOR, *WITH_LIKE, *WITH_PROBES])
def test_what_is_no_matvec_is_named_with_the_remedy(name, given):
    matvec, words = MATVECS[given]
    second = hf.rademacher(FLAT, 4) if name in WITH_PROBES else FLAT
    said = refused(lambda: {**WITH_VECTOR, **WITH_LIKE, **WITH_PROBES}[name](matvec, second), words)
    assert said.startswith(f"{name}(matvec, "), "the order of the arguments is in the message"


def test_exchanged_arguments_are_seen():
    for name, call in (WITH_VECTOR | WITH_LIKE).items():
        refused(lambda call=call: call(PARAMS, mv), rf"{name}\(matvec, \w+.*\): matvec is a dict of 4")
    for name, call in WITH_PROBES.items():
        refused(lambda call=call: call(hf.gaussian(PARAMS, 3), mv), rf"{name}\(matvec, .*\): matvec is a sequence of 3")
    for name, call in WITH_LOSS.items():
        refused(lambda call=call: call(PARAMS, LOSS), rf"{name}\(.*\): loss is a dict of 4")


# A vector

VECTORS_THAT_ARE_NONE = {
    "probes": (hf.gaussian(PARAMS, 1), rf"is a sequence of 1 vectors, not one of them: {ONE}"),
    "a number": (5, rf"is 5, {NO_VECTOR}"),
    "a function": (mv, rf"is the function mv, {NO_VECTOR}"),
    "a model": (MODEL, rf"is the model Sequential, not a tree of its parameters; {TO_LOSS}"),
    "a generator": (MODEL.parameters(), rf"is of type generator, {NO_VECTOR}"),
    "an array": (np.ones(3), rf"is of type ndarray and of shape \(3,\), {NO_VECTOR}"),
    "a tree of arrays": ({"w": np.ones(3)}, "leaf 'w' of .* is of type ndarray and of shape .3,., not a tensor"),
}


@pytest.mark.parametrize("given", VECTORS_THAT_ARE_NONE)
@pytest.mark.parametrize("name", [*WITH_VECTOR, *WITH_LIKE])
def test_what_is_no_vector_is_named_with_the_remedy(name, given):
    vector, words = VECTORS_THAT_ARE_NONE[given]
    said = refused(lambda: (WITH_VECTOR | WITH_LIKE)[name](mv, vector), words)
    assert said.startswith(f"{name}(matvec, ")


@pytest.mark.parametrize("name", [*WITH_VECTOR, "check_matvec"])
def test_entries_must_be_floating_point(name):
    batch_norm = {"weight": FLAT, "num_batches_tracked": torch.tensor(0)}
    words = "leaf 'num_batches_tracked' of .* is torch.int64, not floating-point: convert it, or leave it out"
    refused(lambda: (WITH_VECTOR | WITH_LIKE)[name](mv, batch_norm), words)
    refused(lambda: (WITH_VECTOR | WITH_LIKE)[name](mv, torch.arange(3)), r"(v0|like|b) is torch.int64, not floating")


# Probes

PROBES_THAT_ARE_NONE = {
    "a tree": (PARAMS, rf"probes is a dict of 4, not several vectors; {DRAW}"),
    "a vector": (FLAT, rf"probes is a tensor of shape \(3,\), not several vectors; {DRAW}"),
    "a scalar": (FLAT[0], rf"probes is a tensor of shape \(\), not several vectors; {DRAW}"),
    "a number": (100, rf"probes is 100, not several vectors; {DRAW}"),
    "a function": (hf.rademacher, rf"probes is the function rademacher, not several vectors; {DRAW}"),
    "a model": (MODEL, rf"probes is the model Sequential, not several vectors; {DRAW}"),
    "an array": (np.ones((2, 3)), rf"probes is of type ndarray and of shape \(2, 3\), not several vectors; {DRAW}"),
    "eigenpairs": (PAIRS, rf"probes is of type EigenPairs, not several vectors; {DRAW}"),
    "numbers": ([1, 2, 3], rf"probes\[0\] is 1, {NO_VECTOR}"),
    "a range": (range(10), rf"probes\[0\] is 0, {NO_VECTOR}"),
    "probes of probes": ([hf.rademacher(FLAT, 2)], r"probes\[0\] is a sequence of 2 vectors, not one of them"),
}


@pytest.mark.parametrize("given", PROBES_THAT_ARE_NONE)
@pytest.mark.parametrize("name", WITH_PROBES)
def test_what_are_no_probes_is_named_with_the_remedy(name, given):
    probes, words = PROBES_THAT_ARE_NONE[given]
    said = refused(lambda: WITH_PROBES[name](mv, probes), words)
    assert said.startswith(f"{name}(matvec, probes")


# A loss, and the outputs of a model

LOSSES = {
    "a tree": (PARAMS, PARAMS, rf"loss is a dict of 4, not a function of the parameters; {TO_LOSS}"),
    "a pair": ((LOSS, PARAMS), PARAMS, rf"loss is a tuple of 2, .*; unpack the pair, {TO_LOSS}"),
    "a model": (
        MODEL,
        PARAMS,
        rf"loss is the model Sequential, .*; {TO_LOSS}; or, by its inputs, lambda x: model\(x\)",
    ),
    "a model of its data": (MODEL, BATCH, rf"loss is the model Sequential, .*; {TO_LOSS}"),
}


@pytest.mark.parametrize("given", LOSSES)
@pytest.mark.parametrize("name", WITH_LOSS)
def test_what_is_no_loss_is_named_with_the_remedy(name, given):
    loss, params, words = LOSSES[given]
    assert refused(lambda: WITH_LOSS[name](loss, params), words).startswith(f"{name}(")


@pytest.mark.parametrize("name", WITH_LOSS)
def test_what_are_no_parameters_is_named(name):
    for bad, words in (
        (MODEL, rf"params is the model Sequential, not a tree of its parameters; {TO_LOSS}"),
        (MODEL.parameters(), "params is of type generator"),
        (hf.gaussian(PARAMS, 2), "params is a sequence of 2 vectors"),
    ):
        refused(lambda bad=bad: WITH_LOSS[name](never, bad), words)


@pytest.mark.parametrize("make", [hf.hvp, hf.linearized_hvp, hf.gradient_direction])
def test_parameters_that_have_no_derivative_are_named(make):
    refused(lambda: make(never, {"w": FLAT, "n": torch.tensor([1])}), "leaf 'n' of params is torch.int64")


@pytest.mark.parametrize("name", WITH_FORWARD)
def test_a_loss_in_place_of_the_outputs_is_seen(name):
    make, call = WITH_FORWARD[name], rf"{name}\(forward, criterion, params, batch\): "
    ours = rf"{call}forward is the loss of functionalize, criterion and all; {TO_FORWARD}"
    refused(lambda: make(LOSS, PARAMS, BATCH), ours)
    refused(lambda: make(LOSS, PARAMS, *BATCH), ours)
    refused(lambda: make(LOSS, CRITERION, PARAMS, BATCH), ours)
    refused(lambda: make(MODEL, CRITERION, PARAMS, BATCH), rf"{call}forward is the model Sequential.*{TO_FORWARD}")
    refused(lambda: make(PARAMS, CRITERION, FORWARD, BATCH), rf"{call}forward is a dict of 4.*{TO_FORWARD}")
    refused(lambda: make(FORWARD, PARAMS, CRITERION, BATCH), rf"{call}criterion is a dict of 4, not a function")
    refused(lambda: make(lambda p, b: never, PARAMS, BATCH), rf"{call}criterion is a dict of 4, not a function")
    refused(lambda: make(FORWARD, CRITERION, BATCH[0].numpy(), BATCH), rf"{call}params is of type ndarray")
    for bad, words in ((BATCH[0], r"a tensor of shape \(4, 2\)"), (None, "None"), ({"x": 1, "y": 2}, "a dict of 2")):
        refused(lambda bad=bad: make(FORWARD, CRITERION, PARAMS, bad), rf"batch \(inputs, targets\) is {words}, not a")


def test_the_number_of_arguments_is_python_s_matter():
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'batch'"):
        hf.ggnvp(FORWARD, CRITERION, PARAMS)
    assert list(inspect.signature(hf.fvp).parameters)[:4] == ["forward", "criterion", "params", "batch"]


# Results of other routines


@pytest.mark.parametrize("name", WITH_QUADRATURE)
def test_what_is_no_quadrature_is_named_with_the_remedy(name):
    remedy = r"slq\(matvec, gaussian\(params, 10\), num_matvecs=90\) makes one"
    for bad, words in (
        (PAIRS, "of type EigenPairs"),
        (FLAT, r"a tensor of shape \(3,\)"),
        (hf.Density(FLAT, FLAT), "of type Density"),
        (mv, "the function mv"),
    ):
        refused(lambda bad=bad: WITH_QUADRATURE[name](bad), rf"{name}\(.*\): quadrature is {words}, .*; {remedy}")
    rule = hf.slq(vec, hf.gaussian(FLAT, 2), 2)
    refused(lambda: hf.trace_of(rule, 3, 4), r"fn is 3, not a function")
    refused(lambda: hf.wasserstein(rule, PAIRS), "quadrature is of type EigenPairs")


def test_eigenvectors_are_asked_for_by_name():
    pair = hf.power_iter(vec, FLAT)
    for given in (PAIRS, pair):
        refused(lambda given=given: hf.deflate(mv, given), rf"vectors is of type EigenPairs?; {VECTORS}")
        refused(
            lambda given=given: hf.eigsh(mv, FLAT, warm_start=given), rf"warm_start is of type EigenPairs?; {VECTORS}"
        )
    refused(lambda: hf.deflate(mv, {"a": FLAT, "b": FLAT[0]}), r"no leading axis of k vectors.*v.unsqueeze\(0\)")
    for given in (pair, FLAT, {"values": FLAT, "vectors": FLAT}):
        refused(
            lambda given=given: hf.deflated_trace(mv, hf.rademacher(FLAT, 3), given),
            r"eigenpairs is .*; give what eigsh\(matvec, v0, k\) returns",
        )
    refused(lambda: hf.mean_traces(FLAT, FLAT), r"traces is a tensor.*; give what hutchinson_per_leaf")


def test_landscapes_say_what_a_plane_and_a_path_are_made_of():
    for bad, words in ((V0, "a dict of 4"), ((V0,), "a tuple of 1"), (FLAT[0], "a tensor"), ([V0] * 3, "a list of 3")):
        refused(lambda bad=bad: hf.plane(never, PARAMS, bad, STEPS, STEPS), rf"directions is {words}.*, not a pair")
    for bad in (PARAMS, MODEL, 3, iter([V0])):
        refused(lambda bad=bad: hf.principal_directions(bad), "checkpoints is .*, not a sequence of trees; give a list")
    refused(lambda: hf.slice_curvature(never, PARAMS, 3), "direction is 3")
    refused(lambda: hf.random_direction(MODEL), rf"params is the model Sequential, .*; {TO_LOSS}")


def test_data_sets_and_models_are_asked_for_by_name():
    for bad, words in ((5, "5"), ({"input_ids": FLAT}, "a dict of 1")):
        remedy = rf"batches is {words}; give a DataLoader or a list, \[batch\] for a single one"
        refused(lambda bad=bad: hf.mean_hvp(never, PARAMS, bad), remedy)
        refused(lambda bad=bad: hf.sensitivities(MODEL, CRITERION, bad), remedy)
    refused(lambda: hf.activation_traces(LOSS, CRITERION, [BATCH], "*", 3), "model is the function loss, not an nn.Mod")


def test_probes_are_drawn_like_a_tree_and_so_many():
    for draw in (hf.rademacher, hf.gaussian):
        name = draw.__name__
        refused(lambda draw=draw: draw(100, PARAMS), rf"{name}\(like, num\): like is 100, not a tensor or a tree")
        refused(lambda draw=draw: draw(MODEL, 10), rf"like is the model Sequential, .*; {TO_LOSS}")
        refused(lambda draw=draw: draw(PARAMS, PARAMS), r"num is a dict of 4, not a whole number")
        refused(lambda draw=draw: draw(torch.ones(2).cfloat(), 1), r"like has complex entries")


# Every public routine has a door.

OTHERS = {  # those that take a folder, a rank's share, a model: their own files say what they ask for
    "ShardedBatches", "activation_loss", "activation_shapes", "all_reduce", "compare", "find_mode", "functionalize",
    "journal", "report", "show_config", "stateless",
}  # fmt: skip


ROUTINES = [name for name in hf.__all__ if inspect.isfunction(getattr(hf, name)) and name not in OTHERS]


@pytest.mark.parametrize("name", ROUTINES)
def test_no_routine_takes_a_number_for_its_first_argument(name):
    routine = getattr(hf, name)
    needed = [p for p in inspect.signature(routine).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    count = len([p for p in needed if p.default is p.empty])
    assert "is 7" in refused(lambda: routine(*[7] * count), rf"{name}\(")


# What can be meant

LEGITIMATE = {
    "a stack of probes on plain tensors": lambda: hf.hutchinson(vec, torch.eye(3).double()),
    "a list of tensors": lambda: hf.hutchinson(vec, [FLAT, -FLAT]),
    "probes that are lists of tensors": lambda: hf.hutchinson(lambda v: [A @ v[0]], [[FLAT], [-FLAT]]),
    "a generator": lambda: hf.hutchinson_diag(vec, (z for z in hf.rademacher(FLAT, 3))),
    "an iterator": lambda: hf.xtrace(vec, iter(hf.rademacher(FLAT, 3))),
    "a slice of probes": lambda: hf.slq(vec, hf.gaussian(FLAT, 5)[1:3], 2),
    "probes of whole numbers": lambda: hf.hutchinson(lambda v: A @ v.double(), [torch.tensor([1, -1, 1])] * 2),
    "a start that is a list of tensors": lambda: hf.eigsh(lambda v: [A @ v[0]], [FLAT]),
    "a start that is a parameter": lambda: hf.eigsh(vec, nn.Parameter(FLAT)),
    "a start in half precision": lambda: hf.eigsh(lambda v: v, FLAT.half()),
    "a linear layer as a matvec": lambda: hf.hutchinson(nn.Linear(3, 3, bias=False).double(), hf.rademacher(FLAT, 2)),
    "a bound method as a matvec": lambda: hf.eigsh(A.matmul, FLAT),
    "a dense matrix of whole numbers": lambda: hf.dense(lambda v: 2 * v, torch.tensor([1, 2])),
    "a criterion as a loss of outputs": lambda: hf.hvp(CRITERION, BATCH[1], BATCH[1])(BATCH[1]),
    "a model as a loss of its input": lambda: hf.hvp(nn.Linear(3, 1).double(), FLAT)(FLAT),
    "complex parameters": lambda: hf.hvp(lambda w: (w.abs() ** 4).sum(), FLAT.cfloat())(FLAT.cfloat()),
    "a slice through counters": lambda: hf.line(
        lambda p: p["w"].sum(), {"w": FLAT, "n": torch.tensor(1)}, {"w": FLAT, "n": torch.tensor(0)}, STEPS
    ),
    "directions as a tensor": lambda: hf.plane(lambda w: w.sum(), FLAT, torch.ones(2, 3).double(), STEPS, STEPS),
    "directions of a trajectory": lambda: hf.plane(
        lambda w: w.sum(), FLAT, hf.principal_directions(list(A)).directions, STEPS, STEPS
    ),
    "nodes and weights": lambda: hf.density((A, A.softmax(1))),
    "batches of plain tensors": lambda: hf.mean_hvp(lambda w, x: (w * x).square().sum(), FLAT, (FLAT, FLAT))(FLAT),
    "a pair of a generator": lambda: hf.ggnvp(FORWARD, CRITERION, PARAMS, (x for x in BATCH))(V0),
    "pairs of one's own": lambda: hf.deflated_trace(
        vec, hf.rademacher(FLAT, 2), type("Pairs", (), {"values": FLAT[:1], "vectors": FLAT[None]})
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEGITIMATE)
def test_what_can_be_meant_goes_through(name):
    LEGITIMATE[name]()


def test_values_are_not_looked_at():
    def under(v):
        hf.eigsh(vec, v, rtol=None, max_matvecs=2)
        hf.hutchinson(vec, [v])
        hf.hvp(lambda w: (w**3).sum(), v, mode="forward")(v)
        return v

    torch.func.vmap(under)(torch.ones(2, 3).double())
    meta = FLAT.to("meta")
    assert hf.hutchinson(lambda v: 2 * v, hf.rademacher(meta, 2)).mean.is_meta
    compiled = torch.compile(lambda v: hf.hutchinson(vec, [v, v]).mean, fullgraph=True, backend="eager")
    assert compiled(FLAT) == A.trace()
