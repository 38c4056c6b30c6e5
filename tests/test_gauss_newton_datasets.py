"""Gauss-Newton and Fisher matrices of whatever a model returns, over data sets, and of targets that are drawn.

Truth is ``J' H J`` of dense Jacobians and Hessians by ``torch.autograd.functional``.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_distributed import pytestmark as needs_processes
from test_distributed import run
from torch import Tensor, nn

import hessfn as hf
from hessfn.core import tree


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(number: int, seed: int = 0) -> Tensor:
    return torch.randint(3, (number,), generator=torch.Generator().manual_seed(seed))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


X, Y = normal(7, 3, seed=1), labels(7, seed=2)
CUT = 4
HALVES = [(X[:CUT], Y[:CUT]), (X[CUT:], Y[CUT:])]
CLASS_WEIGHTS = torch.tensor([1.0, 4.0, 0.3], dtype=torch.float64)
FORWARD, PARAMS = hf.stateless(net())
V = hf.gaussian(PARAMS, 1, seed=3)[0]
_SIZES = [p.numel() for p in PARAMS.values()]


def flat(x: Any) -> Tensor:
    return torch.cat([leaf.detach().reshape(-1) for leaf in x.values()])


def by_hand(vector: Tensor, x: Tensor) -> Tensor:
    """The net without its module."""
    w1, b1, w2, b2 = (p.reshape(q.shape) for p, q in zip(vector.split(_SIZES), PARAMS.values(), strict=True))
    return F.linear(torch.tanh(F.linear(x, w1, b1)), w2, b2)


def gauss_newton(criterion: Callable[[Tensor], Tensor], outputs: Callable[[Tensor], Tensor]) -> Tensor:
    at = flat(PARAMS)
    jacobian = torch.autograd.functional.jacobian(outputs, at)
    out = outputs(at)
    curvature = torch.autograd.functional.hessian(criterion, out)
    jacobian = jacobian.reshape(out.numel(), -1)
    return jacobian.T @ curvature.reshape(out.numel(), -1) @ jacobian


def fisher(losses: Callable[[Tensor], Tensor]) -> Tensor:
    """Of the losses of samples, ``(B,)``."""
    gradients = torch.autograd.functional.jacobian(losses, flat(PARAMS))
    return gradients.T @ gradients / len(gradients)


def off(found: Any, expected: Tensor) -> float:
    return float((flat(found) - expected).norm() / expected.norm())


# What a model may return


@dataclasses.dataclass
class Output:
    logits: Tensor
    best: Any = None
    cache: Any = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    logits: Tensor
    loss: Any = None


class Named(NamedTuple):
    logits: Tensor
    best: Tensor


class Cache:
    """An object in an output object, as the keys and values of a decoder."""

    def __init__(self, keys: Tensor) -> None:
        self.layers, self.seen, self.kind = [types.SimpleNamespace(keys=keys)], keys.shape[0], Cache


OUTPUTS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], Tensor]]] = {
    "tensor": (lambda o, h: o, lambda out: out),
    "tuple": (lambda o, h: (o, h), lambda out: out[0]),
    "dict": (lambda o, h: {"logits": o, "hidden": None, "best": o.argmax(1)}, lambda out: out["logits"]),
    "user dict": (lambda o, h: collections.UserDict(logits=o), lambda out: out["logits"]),
    "named tuple": (lambda o, h: Named(o, o.argmax(1)), lambda out: out.logits),
    "dataclass": (lambda o, h: Output(o, o.argmax(1), {"h": h}), lambda out: out.logits),
    "frozen dataclass": (lambda o, h: Frozen(o, o.mean()), lambda out: out.logits),
    "namespace": (lambda o, h: types.SimpleNamespace(logits=o, name="a"), lambda out: out.logits),
    "cache": (lambda o, h: Output(o, cache=Cache(h)), lambda out: out.logits),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_of_every_kind(kind: str) -> None:
    pack, read = OUTPUTS[kind]

    def forward(params: Any, x: Tensor) -> Any:
        out = FORWARD(params, x)
        return pack(out, torch.tanh(out))

    def criterion(out: Any, y: Tensor) -> Tensor:
        return F.cross_entropy(read(out), y)

    ggn = gauss_newton(lambda o: F.cross_entropy(o, Y), lambda p: by_hand(p, X))
    assert off(hf.ggnvp(forward, criterion, PARAMS, (X, Y))(V), ggn @ flat(V)) < 1e-12
    empirical = fisher(lambda p: F.cross_entropy(by_hand(p, X), Y, reduction="none"))
    assert off(hf.fvp(forward, criterion, PARAMS, (X, Y))(V), empirical @ flat(V)) < 1e-12
    as_arrays = ({"input": X.numpy()}, Y.numpy())
    assert off(hf.ggnvp(FORWARD, nn.CrossEntropyLoss(), PARAMS, as_arrays)(V), ggn @ flat(V)) < 1e-12


def test_a_criterion_of_two_outputs_and_a_whole_number() -> None:
    def forward(params: Any, x: Tensor) -> Any:
        out = FORWARD(params, x)
        return Output(out, best=out.argmax(1), cache=out.square().mean())

    def criterion(out: Any, y: Tensor) -> Tensor:
        return F.cross_entropy(out.logits, out.best) + out.cache**2

    def outputs(p: Tensor) -> Tensor:
        out = by_hand(p, X)
        return torch.cat([out.reshape(-1), out.square().mean()[None]])

    best = by_hand(flat(PARAMS), X).argmax(1)
    ggn = gauss_newton(lambda o: F.cross_entropy(o[:-1].reshape(7, 3), best) + o[-1] ** 2, outputs)
    assert off(hf.ggnvp(forward, criterion, PARAMS, (X, Y))(V), ggn @ flat(V)) < 1e-12


def test_complex_outputs_are_two_numbers() -> None:
    def forward(params: Any, x: Tensor) -> Any:
        return {"spectrum": torch.fft.rfft(FORWARD(params, x))}

    def criterion(out: Any, y: Any) -> Tensor:
        return out["spectrum"].abs().pow(4).sum()

    ggn = gauss_newton(
        lambda o: torch.view_as_complex(o).abs().pow(4).sum(),
        lambda p: torch.view_as_real(torch.fft.rfft(by_hand(p, X))),
    )
    assert off(hf.ggnvp(forward, criterion, PARAMS, (X, Y))(V), ggn @ flat(V)) < 1e-12


def test_none_among_the_parameters() -> None:
    def forward(params: Any, x: Tensor) -> Tensor:
        assert params["bias"] is None
        return torch.tanh(x @ params["w"])

    w = normal(3, 3)
    found = hf.ggnvp(forward, nn.MSELoss(), {"w": w, "bias": None}, (X, X))({"w": w, "bias": None})
    outputs = lambda flat: torch.tanh(X @ flat.reshape(3, 3))  # noqa: E731
    jacobian = torch.autograd.functional.jacobian(outputs, w.reshape(-1)).reshape(21, 9)
    assert torch.allclose(found["w"].reshape(-1), 2 / 21 * jacobian.T @ (jacobian @ w.reshape(-1)))
    assert found["bias"] is None


@pytest.mark.parametrize("make", [dict, collections.UserDict, lambda d: types.SimpleNamespace(**d)])
def test_a_batch_that_is_one_goes_to_both_sides(make: Any) -> None:
    batch = make({"input": X, "labels": Y, "loss_scale": 2.0})

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, batch: Any) -> Any:
            return Output(self.net(batch["input"] if hasattr(batch, "keys") else batch.input))

    def criterion(out: Any, batch: Any) -> Tensor:
        return F.cross_entropy(out.logits, batch["labels"] if hasattr(batch, "keys") else batch.labels)

    forward, params = hf.stateless(Model())
    v = {f"net.{name}": x for name, x in V.items()}
    ggn = gauss_newton(lambda o: F.cross_entropy(o, Y), lambda p: by_hand(p, X))
    assert off(hf.ggnvp(forward, criterion, params, batch)(v), ggn @ flat(V)) < 1e-12
    empirical = fisher(lambda p: F.cross_entropy(by_hand(p, X), Y, reduction="none"))
    assert off(hf.fvp(forward, criterion, params, batch)(v), empirical @ flat(V)) < 1e-12


@pytest.mark.parametrize("criterion", [lambda out, y: out.loss, lambda out, y: 0.5 * out.loss + 1])
@pytest.mark.parametrize("make", [hf.ggnvp, hf.fvp])
def test_the_loss_that_the_model_has_computed_is_no_criterion_of_outputs(make: Any, criterion: Any) -> None:
    def forward(params: Any, x: Tensor) -> Any:
        out = FORWARD(params, x)
        return Frozen(out, F.cross_entropy(out, Y))

    with pytest.raises(hf.HessfnError, match="what the criterion takes of the outputs is a single number"):
        make(forward, criterion, PARAMS, (X, Y))(V)
    # A number that is all there is, and a kink, are what they are.
    hf.ggnvp(lambda p, x: FORWARD(p, x).square().mean(), lambda out, y: out, PARAMS, (X, Y))(V)
    hf.ggnvp(FORWARD, nn.L1Loss(), PARAMS, (X, normal(7, 3)))(V)


def test_a_decoder_with_its_cache() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "n_positions": 6, "n_embd": 4, "n_layer": 1, "n_head": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(**sizes, **ends, attn_implementation="eager")
    model = transformers.GPT2LMHeadModel(config).double().eval()
    ids = torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(0))
    forward, params = hf.stateless(model)
    out = forward(params, {"input_ids": ids})
    assert out.past_key_values is not None and len(tree.leaves(out)) > 1

    def criterion(out: Any, batch: Any) -> Tensor:
        return F.cross_entropy(out.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

    batch = {"input_ids": ids, "labels": ids}
    v = hf.gaussian(params, 1)[0]

    def logits(*values: Tensor) -> Tensor:
        named = dict(zip(params, values, strict=True))
        return torch.func.functional_call(model, named, (), {"input_ids": ids, "use_cache": False}).logits

    at, along = tuple(params.values()), tuple(v.values())
    value, tangent = torch.autograd.functional.jvp(logits, at, along)
    _, image = torch.autograd.functional.vhp(lambda o: criterion(Output(o), batch), value, tangent)
    _, expected = torch.autograd.functional.vjp(logits, at, image)
    assert off(hf.ggnvp(forward, criterion, params, batch)(v), flat(dict(enumerate(expected)))) < 1e-12
    parts = [{name: x[i : i + 1] for name, x in batch.items()} for i in range(2)]
    mean = hf.batch_mean(lambda b: hf.ggnvp(forward, criterion, params, b), parts)
    assert off(mean(v), flat(dict(enumerate(expected)))) < 1e-12
    empirical = hf.fvp(forward, criterion, params, batch)(v)
    gradients = []
    for part in parts:
        leaves = [p.clone().requires_grad_() for p in at]
        value = torch.func.functional_call(
            model, dict(zip(params, leaves, strict=True)), (), {"input_ids": part["input_ids"]}
        )
        gradients.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(criterion(value, part), leaves)]))
    assert off(empirical, sum(g * (g @ flat(v)) for g in gradients) / 2) < 1e-12


# Over data sets

WEIGHED = nn.CrossEntropyLoss(weight=CLASS_WEIGHTS)
LOSS, _ = hf.functionalize(net(), WEIGHED)


def hessian_by_hand() -> Tensor:
    return torch.autograd.functional.hessian(
        lambda p: F.cross_entropy(by_hand(p, X), Y, weight=CLASS_WEIGHTS), flat(PARAMS)
    )


def ggn_by_hand() -> Tensor:
    return gauss_newton(lambda o: F.cross_entropy(o, Y, weight=CLASS_WEIGHTS), lambda p: by_hand(p, X))


MAKES: dict[str, tuple[Callable[[Any], Any], Callable[[], Tensor]]] = {
    "hvp": (lambda b: hf.hvp(LOSS, PARAMS, b), hessian_by_hand),
    "linearized_hvp": (lambda b: hf.linearized_hvp(LOSS, PARAMS, b), hessian_by_hand),
    "ggnvp": (lambda b: hf.ggnvp(FORWARD, WEIGHED, PARAMS, b), ggn_by_hand),
}


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("microbatch", [None, 2])
@pytest.mark.parametrize("name", MAKES)
def test_any_matvec_of_a_batch_becomes_that_of_a_data_set(name: str, microbatch: int | None, keep: bool) -> None:
    make, exact = MAKES[name]
    calls: list[int] = []

    def counted(batch: Any) -> Any:
        calls.append(len(batch[0]))
        return make(batch)

    matvec = hf.batch_mean(counted, HALVES, microbatch=microbatch, keep=keep)
    expected = exact() @ flat(V)
    for _ in range(3):
        assert off(matvec(V), expected) < 1e-12
    passes = 1 if keep else 3
    if microbatch is None:
        assert calls == [CUT, 7 - CUT] * passes
    else:
        assert len(calls) <= 4 * passes + 1 and max(calls) <= 2


def test_the_mean_of_fisher_matrices() -> None:
    found = hf.batch_mean(lambda b: hf.fvp(FORWARD, nn.CrossEntropyLoss(), PARAMS, b), HALVES)(V)
    expected = fisher(lambda p: F.cross_entropy(by_hand(p, X), Y, reduction="none")) @ flat(V)
    assert off(found, expected) < 1e-12


def fisher_by_hand() -> Tensor:
    return fisher(lambda p: F.cross_entropy(by_hand(p, X), Y, reduction="none"))


MEANS = {**MAKES, "fvp": (lambda b: hf.fvp(FORWARD, nn.CrossEntropyLoss(), PARAMS, b), fisher_by_hand)}


@pytest.mark.parametrize("name", MEANS)
def test_whatever_takes_a_matvec_takes_the_mean(name: str, tmp_path: Path) -> None:
    """Blocks, eigenvalues, traces and moments, of dense matrices that are made without batches."""
    make, exact = MEANS[name]
    matvec, A = hf.batch_mean(make, HALVES, keep=True), exact()
    assert off(matvec(V), A @ flat(V)) < 1e-12
    assert float((hf.dense(matvec, PARAMS, batch_size=31) - A).norm() / A.norm()) < 1e-12
    first = _SIZES[0]
    block = hf.dense(hf.restrict(matvec, PARAMS, "0.weight"), {"0.weight": PARAMS["0.weight"]}, batch_size=12)
    assert float((block - A[:first, :first]).norm() / A.norm()) < 1e-12
    spectrum = torch.linalg.eigvalsh(A)
    largest = spectrum[spectrum.abs().argsort(descending=True)][:3]
    kept = hf.journal(hf.progress(matvec, total=200), tmp_path / "j", key={"made": name})
    eig = hf.eigsh(kept, V, k=3)
    assert bool(((eig.values - largest).abs() <= eig.residuals + 1e-10 * largest[0].abs()).all())
    again = hf.eigsh(hf.journal(lambda v: 1 / 0, tmp_path / "j", key={"made": name}), V, k=3)
    assert torch.equal(again.values, eig.values)
    trace = hf.hutchinson(matvec, hf.rademacher(PARAMS, 30), batch_size=30)
    assert abs(trace.mean - A.trace()) <= 4 * trace.stderr and trace.stderr <= A.norm()
    z = hf.gaussian(PARAMS, 2, seed=5)
    rule = hf.slq(matvec, z, 5)
    for row, probe in enumerate(map(flat, z)):
        unit = probe / probe.norm()
        for power in (1, 4, 9):  # to degree 2m - 1
            moment = unit @ torch.linalg.matrix_power(A, power) @ unit
            found = (rule.weights[row] * rule.nodes[row] ** power).sum()
            assert abs(found - moment) <= 1e-9 * spectrum.abs().max() ** power


@pytest.mark.parametrize("name", [*MEANS, "drawn"])
def test_a_mean_runs_under_transforms(name: str) -> None:
    """Each vector of a stack by the same matrix as alone, drawn targets and all; and the derivative by the vector."""
    drawn = lambda b: hf.fvp(FORWARD, nn.CrossEntropyLoss(), PARAMS, b, num_samples=3)  # noqa: E731
    make = drawn if name == "drawn" else MEANS[name][0]
    for matvec in (hf.batch_mean(make, HALVES, keep=True), hf.batch_mean(make, HALVES, microbatch=2)):
        several = hf.gaussian(PARAMS, 3)
        alone = torch.stack([flat(matvec(v)) for v in several])
        stack = tree.map(lambda *x: torch.stack(x), *several)
        mapped = torch.cat([x.reshape(3, -1) for x in torch.func.vmap(matvec)(stack).values()], 1)
        assert float((mapped - alone).norm() / alone.norm()) < 1e-12
        slope = torch.func.grad(lambda v, matvec=matvec: tree.dot(v, matvec(v)))(several[0])
        assert off(slope, 2 * alone[0]) < 1e-12


def test_what_is_linearized_within_a_transform_says_so() -> None:
    loss, _ = hf.functionalize(net(), nn.CrossEntropyLoss())
    matvec = hf.batch_mean(lambda b: hf.linearized_hvp(loss, PARAMS, b), HALVES, weights=[4, 3], keep=True)
    with pytest.raises(hf.Untraceable, match="under a transform of torch.func"):
        torch.func.grad(lambda v: tree.dot(v, matvec(v)))(V)
    expected = matvec(V)  # made outside, it is kept
    assert off(torch.func.grad(lambda v: tree.dot(v, matvec(v)))(V), 2 * flat(expected)) < 1e-12


def test_gradients_that_batches_weigh_unlike_have_no_mean() -> None:
    """A sample's gradient is B times its share, by the weights of its batch: squares of these do not add up."""
    make = lambda b: hf.fvp(FORWARD, WEIGHED, PARAMS, b)  # noqa: E731
    with pytest.raises(hf.HessfnError, match=r"counts 0\.825 a sample in one batch, .* in another.*num_samples"):
        hf.batch_mean(make, HALVES)(V)
    hf.batch_mean(make, HALVES, weights=[4, 3])(V)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    alike = [(X[:3], y[:3]), (X[3:6], y[3:])]

    def each(p: Tensor) -> Tensor:
        return CLASS_WEIGHTS[y] / CLASS_WEIGHTS.mean() * F.cross_entropy(by_hand(p, X[:6]), y, reduction="none")

    assert off(hf.batch_mean(make, alike)(V), fisher(each) @ flat(V)) < 1e-12


def test_a_kept_mean_takes_what_can_be_run_through_once() -> None:
    matvec = hf.batch_mean(MAKES["linearized_hvp"][0], iter(HALVES), keep=True)
    assert off(matvec(V), hessian_by_hand() @ flat(V)) < 1e-12
    assert off(matvec(V), hessian_by_hand() @ flat(V)) < 1e-12
    with pytest.raises(hf.HessfnError, match="run through only once"):
        hf.batch_mean(MAKES["hvp"][0], iter(HALVES))


def test_a_pass_that_fails_leaves_nothing_kept() -> None:
    fails = [True]

    def make(batch: Any) -> Any:
        if fails[0] and len(batch[0]) == 7 - CUT:
            raise ValueError("not yet")
        return MAKES["ggnvp"][0](batch)

    matvec = hf.batch_mean(make, HALVES, keep=True)
    with pytest.raises(ValueError, match="batch 1: not yet"):
        matvec(V)
    fails[0] = False
    assert off(matvec(V), ggn_by_hand() @ flat(V)) < 1e-12


def test_weights_of_ones_own() -> None:
    each = [gauss_newton(lambda o, y=y: F.cross_entropy(o, y), lambda p, x=x: by_hand(p, x)) for x, y in HALVES]
    make = lambda b: hf.ggnvp(FORWARD, nn.CrossEntropyLoss(), PARAMS, b)  # noqa: E731
    expected = (2 * each[0] + 5 * each[1]) / 7 @ flat(V)
    for keep in (False, True):
        assert off(hf.batch_mean(make, HALVES, weights=[2, 5], keep=keep)(V), expected) < 1e-12
    assert off(hf.batch_mean(make, HALVES, weights=lambda b: 2.0 if len(b[0]) == CUT else 5.0)(V), expected) < 1e-12


def weighed(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out, y, weight=CLASS_WEIGHTS)


def total(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out, y, reduction="sum")


@pytest.mark.parametrize("criterion", [weighed, total])
def test_what_is_no_mean_over_samples_is_refused(criterion: Any) -> None:
    loss, _ = hf.functionalize(net(), criterion)
    makes = [
        lambda b: hf.ggnvp(FORWARD, criterion, PARAMS, b),
        lambda b: hf.linearized_hvp(loss, PARAMS, b),
        lambda b: lambda v: hf.ggnvp(FORWARD, criterion, PARAMS, b)(v),  # which tells nothing of its criterion
    ]
    for make in makes:
        with pytest.raises(hf.HessfnError, match=r"no mean over samples by these weights.*weights="):
            hf.batch_mean(make, HALVES)(V)
    with pytest.raises(hf.HessfnError, match=r'CrossEntropyLoss\(reduction="sum"\) is a sum'):
        hf.batch_mean(lambda b: hf.ggnvp(FORWARD, nn.CrossEntropyLoss(reduction="sum"), PARAMS, b), HALVES)(V)


def test_batch_norm_in_training_mode_has_no_parts() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    loss, params = hf.functionalize(model, nn.CrossEntropyLoss())
    v = hf.gaussian(params, 1)[0]
    with pytest.raises(hf.HessfnError, match="samples meet"):
        hf.batch_mean(lambda b: hf.hvp(loss, params, b), HALVES, microbatch=2)(v)
    hf.batch_mean(lambda b: hf.hvp(loss, params, b), HALVES)(v)


def test_matrices_of_ones_own() -> None:
    batches = [normal(n, 3, seed=n) for n in (5, 2)]
    x, v = torch.cat(batches), normal(3)
    for keep in (False, True):
        found = hf.batch_mean(lambda x: lambda v: x.T @ (x @ v) / len(x), batches, keep=keep)
        assert torch.allclose(found(v), x.T @ (x @ v) / 7)
        assert torch.allclose(hf.eigsh(found, v).values[0], torch.linalg.eigvalsh(x.T @ x / 7)[-1], rtol=1e-5)
    assert torch.allclose(
        hf.batch_mean(lambda x: nn.Linear(3, 3, bias=False).double(), batches[:1])(v).norm() * 0, v[0] * 0
    )
    for wrong, words in ((lambda x: x.T @ x, "make.batch.: matvec is a tensor"), (lambda x: lambda v: v[:2], "shape")):
        with pytest.raises(hf.HessfnError, match=words):
            hf.batch_mean(wrong, batches, weights=[1, 1])(v)
    with pytest.raises(hf.HessfnError, match=r"batch 1: the product is not finite"):
        hf.batch_mean(lambda x: lambda v: v * (1 if len(x) == 5 else torch.nan), batches, weights=[1, 1])(v)
    for arguments in ((5, batches), (lambda x: x, {"a": 1}), (lambda x: x, 7)):
        with pytest.raises(hf.HessfnError, match=r"batch_mean\(make, batches\)"):
            hf.batch_mean(*arguments)


def test_mean_hvp_is_a_line_of_it() -> None:
    a, b = hf.mean_hvp(LOSS, PARAMS, HALVES)(V), hf.batch_mean(lambda b: hf.hvp(LOSS, PARAMS, b), HALVES)(V)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert off(a, hessian_by_hand() @ flat(V)) < 1e-12


@pytest.mark.parametrize("keep", [False, True])
def test_it_goes_through_a_group_and_a_journal(keep: bool, tmp_path: Any) -> None:
    expected = ggn_by_hand() @ flat(V)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        matvec = hf.batch_mean(MAKES["ggnvp"][0], hf.ShardedBatches(HALVES), keep=keep)
        assert off(matvec(V), expected) < 1e-12
        assert off(matvec(V), expected) < 1e-12
        reduced = hf.all_reduce(hf.batch_mean(MAKES["ggnvp"][0], HALVES, keep=keep), weight=7)
        assert off(reduced(V), expected) < 1e-12
    finally:
        dist.destroy_process_group()
    hf.journal(hf.batch_mean(MAKES["ggnvp"][0], HALVES, keep=keep), tmp_path / "j", key={"k": 1})(V)
    again = hf.journal(lambda v: 1 / 0, tmp_path / "j", key={"k": 1})
    assert off(again(V), expected) < 1e-12


def shared_over_processes(rank: int, size: int, folder: Path) -> None:
    expected = ggn_by_hand() @ flat(V)
    thirds = [(X[:3], Y[:3]), (X[3:5], Y[3:5]), (X[5:], Y[5:])]
    for batches in (thirds, [(X, Y)]):
        for keep in (False, True):
            matvec = hf.batch_mean(MAKES["ggnvp"][0], hf.ShardedBatches(batches), keep=keep)
            for _ in range(2):
                assert off(matvec(V), expected) < 1e-12


@needs_processes
def test_processes_share_the_batches_of_any_matvec(tmp_path: Path) -> None:
    """Also where one of them has fewer than the others, or none."""
    run(shared_over_processes, 2, tmp_path)


# Targets that are drawn

POSITIONS = normal(4, 3, 5, seed=5), torch.randint(3, (4, 5), generator=torch.Generator().manual_seed(3))
IGNORED = torch.where(torch.arange(7) % 3 == 0, -100, Y)
SOFT, BITS = normal(7, 3, seed=4).softmax(1), (normal(7, 3, seed=6) > 0).double()
DRAWN: dict[str, tuple[Any, Tensor]] = {
    "classes": (nn.CrossEntropyLoss(), Y),
    "weights of classes": (WEIGHED, IGNORED),
    "smoothed": (nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, label_smoothing=0.2), IGNORED),
    "probabilities": (nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, label_smoothing=0.1), SOFT),
    "a sum": (nn.CrossEntropyLoss(reduction="sum"), Y),
    "a function": (functools.partial(F.cross_entropy, ignore_index=1), Y),
    "squares": (nn.MSELoss(), SOFT),
    "logits": (nn.BCEWithLogitsLoss(), BITS),
    "weights of logits": (nn.BCEWithLogitsLoss(weight=SOFT, pos_weight=CLASS_WEIGHTS), BITS),
}


def standard_errors(found: Callable[[int], Tensor], expected: Tensor, runs: int = 24) -> Tensor:
    """How many of its standard errors a mean over seeds is off, entry by entry."""
    values = torch.stack([found(seed) for seed in range(runs)])
    stderr = values.std(0) / runs**0.5
    return (values.mean(0) - expected) / stderr


@pytest.mark.parametrize("name", DRAWN)
def test_the_fisher_matrix_of_drawn_targets_is_on_average_the_gauss_newton_matrix(name: str) -> None:
    criterion, y = DRAWN[name]
    expected = gauss_newton(lambda o: criterion(o, y), lambda p: by_hand(p, X)) @ flat(V)

    def found(seed: int) -> Tensor:
        return flat(hf.fvp(FORWARD, criterion, PARAMS, (X, y), num_samples=40, seed=seed)(V))

    z = standard_errors(found, expected)
    assert float(z.square().mean().sqrt()) < 2  # entries are correlated
    assert float(z.abs().max()) < 5
    once = found(0)
    assert float((once - expected).norm() / expected.norm()) < 0.6
    assert torch.equal(once, found(0)) and not torch.equal(once, found(1))


def test_draws_at_several_positions_are_independent() -> None:
    x, y = POSITIONS
    torch.manual_seed(0)
    forward, params = hf.stateless(nn.Conv1d(3, 3, 1).double())
    v = hf.gaussian(params, 1)[0]
    at = flat(params)

    def outputs(p: Tensor) -> Tensor:
        return F.conv1d(x, p[:9].reshape(3, 3, 1), p[9:])

    jacobian = torch.autograd.functional.jacobian(outputs, at).reshape(60, -1)
    curvature = torch.autograd.functional.hessian(lambda o: F.cross_entropy(o, y), outputs(at)).reshape(60, 60)
    expected = jacobian.T @ curvature @ jacobian @ flat(v)
    z = standard_errors(
        lambda seed: flat(hf.fvp(forward, nn.CrossEntropyLoss(), params, (x, y), num_samples=40, seed=seed)(v)),
        expected,
    )
    assert float(z.square().mean().sqrt()) < 2 and float(z.abs().max()) < 5


def test_logarithms_of_probabilities_have_the_fisher_matrix_of_their_logits() -> None:
    """Of ``NLLLoss`` the Gauss-Newton matrix is zero, since it is linear; the Fisher matrix is that of the softmax."""
    forward = lambda p, x: FORWARD(p, x).log_softmax(1)  # noqa: E731
    criterion = nn.NLLLoss(weight=CLASS_WEIGHTS)
    expected = ggn_by_hand() @ flat(V)
    z = standard_errors(
        lambda seed: flat(hf.fvp(forward, criterion, PARAMS, (X, Y), num_samples=40, seed=seed)(V)), expected
    )
    assert float(z.square().mean().sqrt()) < 2 and float(z.abs().max()) < 5


def test_one_draw_is_one_gradient_a_sample() -> None:
    """With one sample and one draw the matrix is ``g g'`` of one of the classes, and all of them come up."""
    x, y = X[:1], Y[:1]
    each = torch.autograd.functional.jacobian(lambda p: -by_hand(p, x)[0].log_softmax(0), flat(PARAMS))
    classes = set()
    for seed in range(30):
        found = flat(hf.fvp(FORWARD, nn.CrossEntropyLoss(), PARAMS, (x, y), num_samples=1, seed=seed)(V))
        near = [c for c in range(3) if torch.allclose(found, each[c] * (each[c] @ flat(V)), rtol=1e-8, atol=1e-12)]
        assert len(near) == 1
        classes.update(near)
    assert classes == {0, 1, 2}


def test_drawn_targets_over_a_data_set() -> None:
    expected = ggn_by_hand() @ flat(V)

    def found(seed: int) -> Tensor:
        make = lambda b: hf.fvp(FORWARD, WEIGHED, PARAMS, b, num_samples=40, seed=seed)  # noqa: E731
        return flat(hf.batch_mean(make, HALVES)(V))

    z = standard_errors(found, expected)
    assert float(z.square().mean().sqrt()) < 2 and float(z.abs().max()) < 5


def test_batches_of_one_seed_have_draws_of_their_own() -> None:
    """Of two batches that differ in a digit alone, targets are not drawn by the same numbers."""
    a, b = (flat(hf.fvp(FORWARD, nn.MSELoss(), PARAMS, (x, SOFT), num_samples=1)(V)) for x in (X, X + 1e-9))
    assert float((a - b).norm() / a.norm()) > 0.1


def test_drawn_targets_are_a_symmetric_matrix_under_vmap_and_dense() -> None:
    matvec = hf.fvp(FORWARD, nn.CrossEntropyLoss(), PARAMS, (X, Y), num_samples=2)
    hf.check_matvec(matvec, PARAMS)
    matrix = hf.dense(matvec, PARAMS)
    assert torch.allclose(matrix, matrix.T)
    assert int((torch.linalg.eigvalsh(matrix) > 1e-10).sum()) <= 2 * 7
    assert torch.allclose(flat(matvec(V)), matrix @ flat(V))


@pytest.mark.parametrize("criterion", [nn.KLDivLoss(reduction="batchmean"), nn.L1Loss(), weighed, nn.BCELoss()])
def test_criteria_without_a_likelihood_are_refused(criterion: Any) -> None:
    with pytest.raises(hf.HessfnError, match="targets cannot be drawn by .*: take CrossEntropyLoss.*num_samples out"):
        hf.fvp(FORWARD, criterion, PARAMS, (X, SOFT), num_samples=3)


def test_counts_and_outputs_that_cannot_be() -> None:
    make = functools.partial(hf.fvp, criterion=nn.MSELoss(), params=PARAMS, batch=(X, SOFT))
    for arguments, words in (({"num_samples": 0}, "num_samples=0"), ({"num_samples": 2, "seed": -1}, "seed=-1")):
        with pytest.raises(hf.HessfnError, match=words):
            make(FORWARD, **arguments)
    with pytest.raises(hf.HessfnError, match="drawn by a tensor of outputs, not a dict of 1"):
        make(lambda p, x: {"logits": FORWARD(p, x)}, num_samples=2)(V)
    with pytest.raises(hf.HessfnError, match="outputs of 7 samples, but targets of 4"):
        hf.fvp(FORWARD, nn.MSELoss(), PARAMS, (X, SOFT[:4]))(V)
    assert np.isfinite(float(tree.norm(make(FORWARD, num_samples=1)(V))))
