"""Models of every kind: where they keep their tensors, what wraps them, what runs them again."""

from __future__ import annotations

import collections
import copy
import functools
import gc
import threading
import types
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import classes, dense_hessian, normal, seeded
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import hessfn as hf
from hessfn.core.errors import InvalidInput, Untraceable
from hessfn.reporting.options import Options
from hessfn.reporting.problem import converted

BATCH = normal(5, 3), normal(5, 2, seed=3)
UNTRACED = "ignore:Hessian-vector products in mode 'double_backward', which is exact"


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def differences(
    model: nn.Module, batch: Any = BATCH, criterion: Any = F.mse_loss, fixed: int | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A vector, and its product by extrapolated central differences of the gradient of the model itself, moved.

    A row ``fixed`` of the first parameter, as that of the padding, does not move.
    """
    params = dict(model.named_parameters())
    v = {name: normal(*real(p).shape, seed=5 + i) for i, (name, p) in enumerate(params.items())}
    if fixed is not None:
        next(iter(v.values()))[fixed] = 0.0

    def gradient(step: float) -> list[Tensor]:
        before = [p.detach().clone() for p in params.values()]
        with torch.no_grad():
            for name, p in params.items():
                real(p.data).add_(step * v[name])
        value = criterion(model(batch[0]), batch[1])
        found = torch.autograd.grad(value, list(params.values()), allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            for p, old in zip(params.values(), before, strict=True):
                p.copy_(old)
        return [real(g.to_dense() if g.is_sparse else g).clone() for g in found]

    def central(h: float) -> list[Tensor]:
        return [(a - b) / (2 * h) for a, b in zip(gradient(h), gradient(-h), strict=True)]

    pairs = zip(params, central(1e-4), central(2e-4), strict=True)
    return v, {name: (4 * fine - coarse) / 3 for name, fine, coarse in pairs}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-7) -> None:
    assert list(found) == list(expected)
    off = torch.cat([(found[name] - x).flatten() for name, x in expected.items()]).norm()
    assert off <= rtol * torch.cat([x.flatten() for x in expected.values()]).norm()


def assert_right(
    model: nn.Module,
    plain: nn.Module | None = None,
    batch: Any = BATCH,
    criterion: Any = F.mse_loss,
    linear: bool = True,
) -> None:
    """The products of a model against differences of gradients of a plain model of the same tensors."""
    plain = model if plain is None else plain
    before = {name: x.clone() for name, x in model.state_dict().items()}
    v, expected = differences(plain, batch, criterion)
    loss, params = hf.functionalize(model, criterion)
    assert torch.allclose(loss(params, batch), criterion(plain(batch[0]), batch[1]), rtol=1e-12)
    assert_same(hf.hvp(loss, params, batch)(v), expected)
    if linear:
        assert_same(hf.linearized_hvp(loss, params, batch)(v), expected)
    assert all(torch.allclose(x, before[name], rtol=1e-14) for name, x in model.state_dict().items())


# Tensors in a second place.


class Holder(nn.Module):
    """Two layers whose tensors are held a second time, and used from there as well."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor], hold: Callable[[Any], None]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        hold(self)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.use(self, x))) * self.a.weight.square().sum()


class Slots:
    __slots__ = ("weight",)


class Plain:
    def __init__(self, weight: Tensor) -> None:
        self.weight, self.lock = [weight], threading.Lock()


Pair = collections.namedtuple("Pair", "first second")


def held(name: str, make: Callable[[Any], Any]) -> Callable[[Any], None]:
    return lambda model: model.__dict__.__setitem__(name, make(model))


def slot(model: Any) -> Slots:
    thing = Slots()
    thing.weight = model.a.weight
    return thing


def default_dict(model: Any) -> Any:
    return collections.defaultdict(list, {0: [model.a.weight]})


def closure(model: Any) -> Callable[[Tensor], Tensor]:
    layer = model.a
    return lambda x: F.linear(x, layer.weight)


def recursive(model: Any) -> Callable[..., Tensor]:
    weight = model.a.weight

    def again(x: Tensor, times: int = 2) -> Tensor:
        return again(x, times - 1) + F.linear(x, weight) if times else F.linear(x, weight)

    return again


def by_weight(of: Callable[[Any], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    return lambda model, x: F.linear(x, of(model))


HOLDERS: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[[Any], None]]] = {
    "attribute": (by_weight(lambda m: m.w), held("w", lambda m: m.a.weight)),
    "list": (by_weight(lambda m: m.w[0]), held("w", lambda m: [m.a.weight, m.b.weight])),
    "dict": (by_weight(lambda m: m.w["a"]), held("w", lambda m: {"a": m.a.weight})),
    "ordered dict": (by_weight(lambda m: m.w[0]), held("w", lambda m: collections.OrderedDict({0: m.a.weight}))),
    "default dict": (by_weight(lambda m: m.w[0][0]), held("w", default_dict)),
    "nested tuple": (by_weight(lambda m: m.w[1][0]), held("w", lambda m: (1.0, (m.a.weight,)))),
    "named tuple": (by_weight(lambda m: m.w.second), held("w", lambda m: Pair(None, m.a.weight))),
    "deque": (by_weight(lambda m: m.w[0]), held("w", lambda m: collections.deque([m.a.weight], maxlen=3))),
    "key": (lambda m, x: m.a(x) * m.w[m.a.weight], held("w", lambda m: {m.a.weight: 2.0})),
    "object": (by_weight(lambda m: m.w.weight[0]), held("w", lambda m: Plain(m.a.weight))),
    "slots": (by_weight(lambda m: m.w.weight), held("w", slot)),
    "namespace": (by_weight(lambda m: m.w.x), held("w", lambda m: types.SimpleNamespace(x=m.a.weight))),
    "user dict": (by_weight(lambda m: m.w["x"]), held("w", lambda m: collections.UserDict(x=m.a.weight))),
    "partial": (lambda m, x: m.f(x), held("f", lambda m: functools.partial(F.linear, weight=m.a.weight))),
    "bound method": (lambda m, x: m.f(x), held("f", lambda m: m.a.forward)),
    "closure": (lambda m, x: m.f(x), held("f", closure)),
    "recursive closure": (lambda m, x: m.f(x), held("f", recursive)),
    "default argument": (lambda m, x: m.f(x), held("f", lambda m: lambda x, layer=m.a: layer(x))),
    "modules in a list": (lambda m, x: m.f[0](x), held("f", lambda m: [m.a])),
    "weak reference": (lambda m, x: m.f()(x), held("f", lambda m: weakref.ref(m.a))),
    "parent": (lambda m, x: m.a.parent.a(x), lambda m: held("parent", lambda _: m)(m.a)),
    "hook": (lambda m, x: m.a(x), lambda m: m.a.register_forward_hook(lambda _, __, y: y + m.b.weight.sum())),
    "pre-hook": (lambda m, x: m.a(x), lambda m: m.a.register_forward_pre_hook(lambda _, x: x[0] * m.b.bias.sum())),
    "patched forward": (lambda m, x: m.a(x), lambda m: held("forward", lambda _: closure(m))(m.a)),
}  # fmt: skip


@pytest.mark.parametrize("place", HOLDERS)
def test_a_tensor_is_the_same_in_every_place(place: str) -> None:
    assert_right(seeded(lambda: Holder(*HOLDERS[place])))


@pytest.mark.slow
@pytest.mark.parametrize("place", ["closure", "list"])
@pytest.mark.filterwarnings("ignore:Dynamo")  # of what it runs beside its graph
def test_a_compiled_loss_sees_the_same_tensors(place: str) -> None:
    loss, params = hf.functionalize(seeded(lambda: Holder(*HOLDERS[place])), F.mse_loss)
    doubled = {name: 2 * p for name, p in params.items()}
    expected = loss(doubled, BATCH)
    assert torch.allclose(torch.compile(lambda p: loss(p, BATCH), backend="eager")(doubled), expected, rtol=1e-12)
    whole = torch.compile(lambda p: loss(p, BATCH), backend="eager", fullgraph=True)
    if place == "list":  # what cannot be part of a graph runs beside it, where that is allowed
        with pytest.raises(Exception, match="the model keeps a parameter a second time, in 'w'"):
            whole(doubled)
    else:
        assert torch.allclose(whole(doubled), expected, rtol=1e-12)


def test_tied_weights_may_be_in_a_list_as_well() -> None:
    model = seeded(lambda: Holder(*HOLDERS["list"]))
    model.c = nn.Linear(3, 4).double()
    model.c.weight = model.a.weight
    model.use = lambda m, x: m.c(x) + F.linear(x, m.w[0])
    assert_right(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_threads_see_their_own_parameters(dtype: torch.dtype) -> None:
    model = seeded(lambda: Holder(*HOLDERS["list"])).to(dtype)
    forward, params = hf.stateless(model)
    many = [{name: (1 + 0.1 * i) * p for name, p in params.items()} for i in range(8)]
    x = BATCH[0].to(dtype)
    expected = [forward(p, x) for p in many]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda p: [forward(p, x) for _ in range(20)][-1], many))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("place", ["list", "parent", "bound method", "closure"])
def test_a_call_keeps_no_tensors(place: str) -> None:
    forward, params = hf.stateless(seeded(lambda: Holder(*HOLDERS[place])))
    gc.disable()
    try:
        for _ in range(2):
            moved = {name: 1.1 * p for name, p in params.items()}
            kept = [weakref.ref(p) for p in moved.values()]
            assert torch.isfinite(forward(moved, BATCH[0])).all()
            del moved
            assert not any(ref() is not None for ref in kept)
    finally:
        gc.enable()


def test_outputs_may_be_functions_of_the_model() -> None:
    class Returning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Any:
            return lambda scale: self.layer(scale * x)

    model = seeded(Returning)
    assert_right(model, criterion=lambda outputs, targets: F.mse_loss(outputs(2.0), targets))


def test_a_loss_can_be_sent_to_another_process() -> None:
    cloudpickle = pytest.importorskip("cloudpickle")
    model = seeded(lambda: Holder(*HOLDERS["list"]))
    v, expected = differences(model)
    sent = cloudpickle.dumps(hf.functionalize(model, F.mse_loss))
    del model
    loss, params = cloudpickle.loads(sent)
    assert_same(hf.hvp(loss, params, BATCH)(v), expected)


def test_a_call_leaves_nothing_for_the_next() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.calls, self.seen, self.cache = nn.Linear(3, 2), 0, [], {}

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.seen.append(x)
            self.cache.setdefault("first", self.layer.weight.sum())
            return self.layer(x) * self.cache["first"] * self.calls * len(self.seen)

    model = seeded(Counting)
    forward, params = hf.stateless(model)
    doubled = {name: 2 * p for name, p in params.items()}
    first = forward(params, BATCH[0])
    assert torch.allclose(forward(doubled, BATCH[0]), 4 * first, rtol=1e-13)
    assert torch.equal(forward(params, BATCH[0]), first)
    assert (model.calls, model.seen, model.cache) == (0, [], {})


class Lora(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = (
            nn.Parameter(torch.randn(2, base.in_features)),
            nn.Parameter(torch.randn(base.out_features, 2)),
        )
        self.__dict__["weights"] = [base.weight]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[0], self.base.bias) + x @ self.down.T @ self.up.T


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrices = nn.ParameterList([torch.randn(4, 3), torch.randn(2, 4)])
        self.scales = nn.ParameterDict({"hidden": torch.randn(4)})

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.matrices[0].T) * self.scales["hidden"] @ self.matrices[1].T


class Forwarding(nn.Module):
    """Attributes that it lacks are those of the model that it wraps."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class WithSlots(nn.Linear):
    __slots__ = ("again",)


def with_slots() -> nn.Module:
    layer = WithSlots(3, 2)
    WithSlots.again.__set__(layer, layer.weight)  # type: ignore[attr-defined]
    layer.register_forward_hook(lambda module, args, out: torch.tanh(out + F.linear(args[0], module.again)))
    return layer


def locked() -> nn.Module:
    model = mlp()
    model.lock, model.things = threading.RLock(), Plain(torch.ones(1))
    return model


MODULES: dict[str, Callable[[], nn.Module]] = {
    "lora": lambda: nn.Sequential(Lora(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)),
    "parameter lists": Lists,
    "getattr": lambda: Forwarding(mlp()),
    "slots": with_slots,
    "locks": locked,
    "weight norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)),
    "spectral norm": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)),
    "orthogonal": lambda: nn.Sequential(
        parametrizations.orthogonal(nn.Linear(3, 3), orthogonal_map="cayley"), nn.Tanh(), nn.Linear(3, 2)
    ),
}


@pytest.mark.parametrize("kind", MODULES)
def test_modules_of_every_kind(kind: str) -> None:
    assert_right(seeded(MODULES[kind]))


def test_what_cannot_be_copied_is_named() -> None:
    model = mlp()
    model[2].source = (i for i in range(3))
    with pytest.raises(InvalidInput, match=r"'2\.source' of the model, a generator, cannot be copied"):
        hf.functionalize(model, F.mse_loss)
    model[2].source = {"inner": [(i for i in range(3))]}
    with pytest.raises(InvalidInput, match=r"'2\.source' of the model, a generator"):
        hf.functionalize(model, F.mse_loss)


def test_a_lazy_module_is_to_be_called_once() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2)).double()
    with pytest.raises(InvalidInput, match=r"'0\.weight' has no shape yet: call the model once"):
        hf.functionalize(model, F.mse_loss)
    model(BATCH[0])
    assert_right(model)


# Compiled models.


def never(graph: Any, inputs: Any) -> Any:
    raise AssertionError("it was compiled")


compiled = functools.partial(torch.compile, backend=never)


@compiled
def compiled_tanh(x: Tensor) -> Tensor:
    return torch.tanh(x)


class Decorated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    @compiled
    def hidden(self, x: Tensor) -> Tensor:
        return compiled_tanh(self.a(x))

    @compiled
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.hidden(x))


def in_place() -> nn.Module:
    model = mlp()
    model.compile(backend=never)
    return model


COMPILED: dict[str, Callable[[], nn.Module]] = {
    "model": lambda: compiled(mlp()),
    "submodule": lambda: nn.Sequential(compiled(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)),
    "in place": in_place,
    "data-parallel": lambda: nn.DataParallel(compiled(mlp())),
    "averaged": lambda: AveragedModel(compiled(mlp())),
    "compiled average": lambda: compiled(AveragedModel(mlp())),
    "twice": lambda: compiled(nn.DataParallel(AveragedModel(compiled(mlp())))),
}


@pytest.mark.parametrize("kind", COMPILED)
def test_a_compiled_model_is_the_model(kind: str) -> None:
    model, plain = seeded(COMPILED[kind]), mlp().double()
    params = hf.functionalize(model, F.mse_loss)[1]
    assert list(params) == [name for name, _ in plain.named_parameters()]
    plain.load_state_dict(params)
    assert_right_of(model, plain)
    stored = {p.data_ptr() for p in model.parameters()}
    assert all(p.data_ptr() in stored for p in params.values()), "they follow an optimiser that steps in place"
    shapes = hf.activation_shapes(model, BATCH[0])
    assert list(shapes) == ["0", "1", "2"]


def assert_right_of(model: nn.Module, plain: nn.Module) -> None:
    v, expected = differences(plain)
    loss, params = hf.functionalize(model, F.mse_loss)
    for make in (hf.hvp, hf.linearized_hvp):
        assert_same(make(loss, params, BATCH)(v), expected)


def test_functions_that_are_compiled_run_as_they_were_written() -> None:
    model, plain = seeded(Decorated), mlp().double()
    loss, params = hf.functionalize(model, compiled(F.mse_loss))
    plain.load_state_dict({name.replace("a.", "0.").replace("b.", "2."): p for name, p in params.items()})
    v, expected = differences(plain)
    product = hf.hvp(loss, params, BATCH)(dict(zip(params, v.values(), strict=True)))
    assert_same(dict(zip(v, product.values(), strict=True)), expected)
    with torch.no_grad():
        assert hf.line(loss, params, params, [0.0], BATCH).isfinite().all()
    with pytest.raises(Exception, match="it was compiled"):
        model(BATCH[0])


def test_an_averaged_model_has_the_names_of_the_model() -> None:
    model = seeded(mlp)
    averaged = AveragedModel(model)
    with torch.no_grad():
        model[0].weight.mul_(2.0)
    averaged.update_parameters(model)
    loss, params = hf.functionalize(averaged, F.mse_loss)
    assert list(params) == list(dict(model.named_parameters()))
    v, expected = differences(averaged.module)
    assert_same(hf.hvp(loss, params, BATCH)(v), expected)


# Scripted and traced models.

SCRIPTED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "scripted": torch.jit.script,
    "traced": lambda model: torch.jit.trace(model, BATCH[:1]),
    "scripted part": lambda model: nn.Sequential(torch.jit.script(model[0]), *model[1:]),
}


@pytest.mark.parametrize("kind", SCRIPTED)
@pytest.mark.filterwarnings(UNTRACED, "ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")
def test_a_scripted_model_goes_by_plain_autograd(kind: str) -> None:
    plain = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.BatchNorm1d(4), nn.Linear(4, 2)))
    model = SCRIPTED[kind](copy.deepcopy(plain))
    assert_right(model, plain, linear=False)
    loss, params = hf.functionalize(model, F.mse_loss)
    v, expected = differences(plain)
    matvec = hf.hvp(loss, params, BATCH)
    for _ in range(3):  # TorchScript optimises what it has seen before
        assert_same(matvec(v), expected)
    assert hf.find_mode(loss, params, BATCH).mode == "double_backward"
    with pytest.raises(Untraceable, match="torch.jit"):
        hf.linearized_hvp(loss, params, BATCH)


# Models that run again in their backward pass.


class Branching(nn.Module):
    """Its inner model is run again by the backward pass; a branch on values keeps it from being traced."""

    def __init__(self, again: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.head, self.again = mlp(), nn.Linear(2, 2), again

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.again(self.inner, x)
        return self.head(hidden * 2 if hidden.sum() > 1e9 else hidden)


class Reversible(torch.autograd.Function):
    """Keeps its inputs alone, and computes again with a graph: a backward that can be differentiated."""

    @staticmethod
    def forward(ctx: Any, model: nn.Module, x: Tensor, *params: Tensor) -> Tensor:
        ctx.model = model
        ctx.save_for_backward(x, *params)
        return model(x)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        x, *params = ctx.saved_tensors
        with torch.enable_grad():
            entering = x if x.requires_grad else x.detach().requires_grad_()
            out = ctx.model(entering)
            create = torch.is_grad_enabled()
            return None, *torch.autograd.grad(out, (entering, *params), upstream, create_graph=create)


class Adjoint(Reversible):
    """The same where derivatives are off, as the adjoint method of a differential equation has it."""

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        with torch.no_grad():
            return None, *(g.detach() for g in Reversible.backward(ctx, upstream)[1:])


RERUN: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "checkpoint": lambda inner, x: checkpoint(inner, x, use_reentrant=False),
    "two checkpoints": lambda inner, x: checkpoint(
        lambda x: checkpoint(inner[1:], inner[0](x), use_reentrant=False), x, use_reentrant=False
    ),
    "kept checkpoint": lambda inner, x: inner.again(inner.__call__, x),
    "reversible": lambda inner, x: Reversible.apply(inner, x, *inner.parameters()),
}


@pytest.mark.parametrize("kind", RERUN)
@pytest.mark.filterwarnings(UNTRACED)
def test_a_model_that_runs_again_meets_the_same_tensors(kind: str) -> None:
    model = seeded(lambda: Branching(RERUN[kind]))
    plain = seeded(lambda: Branching(lambda inner, x: inner(x)))
    model.inner.again = functools.partial(checkpoint, use_reentrant=True)  # as transformers keep it: no autograd.grad
    assert_right(model, plain, linear=False)


@pytest.mark.parametrize("needs_input", [True, False])
def test_a_checkpoint_without_gradients_by_parameters_is_refused(needs_input: bool) -> None:
    def again(inner: nn.Module, x: Tensor) -> Tensor:
        entering = inner[0](x) if needs_input else x.clone().requires_grad_()
        return checkpoint(inner[1:] if needs_input else inner, entering, use_reentrant=True)

    loss, params = hf.functionalize(seeded(lambda: Branching(again)), F.mse_loss)
    for make in (hf.hvp, hf.linearized_hvp):
        with pytest.raises(InvalidInput, match="use_reentrant=True.*use_reentrant=False"):
            make(loss, params, BATCH)(params)


def test_a_backward_that_loses_its_derivative_is_seen() -> None:
    model = seeded(lambda: Branching(lambda inner, x: Adjoint.apply(inner, x, *inner.parameters())))
    plain = seeded(lambda: Branching(lambda inner, x: inner(x)))
    v, expected = differences(plain)
    loss, params = hf.functionalize(model, F.mse_loss)
    with pytest.warns(UserWarning, match="mode 'difference', which is not exact"):
        product = hf.hvp(loss, params, BATCH)(v)
    assert_same(product, expected, rtol=1e-6)
    with pytest.raises(hf.HessfnError, match="the backward of Adjoint has no derivative"):
        hf.hvp(loss, params, BATCH, mode="double_backward")(v)


# Complex parameters.


class Fourier(nn.Module):
    """A layer of a Fourier neural operator, with complex weights, a complex bias and a complex constant."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.weight = nn.Parameter(torch.randn(3, 4, dtype=torch.cdouble))
        self.bias = nn.Parameter(torch.randn(3, dtype=torch.cdouble))
        self.register_buffer("shift", torch.randn(3, dtype=torch.cdouble))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.lift(x))
        modes = torch.fft.rfft(hidden) * self.bias + self.shift
        return self.head(torch.tanh(torch.fft.irfft((modes[..., None] * self.weight).sum(-1), n=4)) + hidden)


def fourier() -> nn.Module:
    return doubled(Fourier)


def doubled(build: Callable[[], nn.Module]) -> nn.Module:
    """As ``seeded``, which would take the real parts alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().eval()
    for p in model.parameters():
        p.data = p.data.to(torch.cdouble if p.is_complex() else torch.float64)
    return model


def test_complex_parameters_are_their_real_and_imaginary_parts() -> None:
    model = fourier()
    params = hf.functionalize(model, F.mse_loss)[1]
    shapes = {name: tuple(p.shape) for name, p in params.items()}
    assert shapes["weight"] == (3, 4, 2) and shapes["bias"] == (3, 2)
    assert not any(p.is_complex() for p in params.values())
    with torch.no_grad():
        model.weight.mul_(1.5j)
    assert torch.equal(torch.view_as_complex(params["weight"]), model.weight), "they share memory with the model's"
    assert_right(model)


def test_every_routine_takes_a_model_with_complex_parameters() -> None:
    model = fourier()
    loss, params = hf.functionalize(model, F.mse_loss)
    forward, _ = hf.stateless(model)

    def written_out(p: dict[str, Tensor], batch: Any) -> Tensor:
        own = {name: torch.view_as_complex(x) if name in ("weight", "bias") else x for name, x in p.items()}
        return F.mse_loss(torch.func.functional_call(model, own, (batch[0],)), batch[1])

    hessian = dense_hessian(written_out, params, BATCH)
    for matvec in (hf.mean_hvp(loss, params, [BATCH]), hf.hvp(loss, params, BATCH, mode="double_backward")):
        assert torch.allclose(hf.dense(matvec, params), hessian, rtol=1e-10, atol=1e-12)
    top = hf.eigsh(hf.linearized_hvp(loss, params, BATCH), hf.gaussian(params, 1)[0], rtol=1e-9)
    assert torch.allclose(top.values.abs().max(), torch.linalg.eigvalsh(hessian).abs().max(), rtol=1e-8)
    flat, unravel = hf.tree.ravel(params)
    jacobian = torch.autograd.functional.jacobian(lambda p: forward(unravel(p), BATCH[0]).flatten(), flat)
    gauss_newton = hf.dense(hf.ggnvp(forward, F.mse_loss, params, BATCH), params)
    assert torch.allclose(gauss_newton, 0.2 * jacobian.T @ jacobian, rtol=1e-10, atol=1e-12)
    direction = hf.filter_normalized(hf.random_direction(params), params)
    rows = (direction["weight"].flatten(1).norm(dim=1), model.weight.flatten(1).abs().square().sum(1).sqrt())
    assert torch.allclose(*rows, rtol=1e-12)
    losses = hf.line(loss, params, direction, [0.0, 0.3], BATCH, batch_size=2)
    moved = {name: p + 0.3 * direction[name] for name, p in params.items()}
    assert torch.allclose(losses, torch.stack([loss(params, BATCH), written_out(moved, BATCH)]), rtol=1e-12)


def test_sensitivities_of_complex_weights_are_by_real_and_imaginary_parts() -> None:
    class Rotation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4, dtype=torch.cdouble))

        def forward(self, x: Tensor) -> Tensor:
            return torch.view_as_real(x @ self.weight.real + 1j * (x @ self.weight.imag) ** 2).flatten(1)

    model = doubled(lambda: nn.Sequential(nn.Linear(3, 3), Rotation(), nn.Linear(8, 2)))
    found = hf.sensitivities(model, F.mse_loss, [BATCH], num_probes=200)
    loss, params = hf.functionalize(model, F.mse_loss, params="1.weight")
    trace = dense_hessian(loss, params, BATCH).trace()
    assert found.weight_numel == {"0": 9, "1": 24, "2": 16}
    assert (found.weights.mean["1"] - trace).abs() < 4 * found.weights.stderr["1"]


def single_precision() -> nn.Module:
    model = fourier()
    for t in (*model.parameters(), *model.buffers()):
        t.data = t.data.to(torch.complex64 if t.is_complex() else torch.float32)
    return model


def test_imaginary_parts_stay_in_another_dtype() -> None:
    model = single_precision()
    copied, _ = converted(model, F.mse_loss, Options(dtype="float64"))
    for name, t in copied.state_dict().items():
        assert t.dtype in (torch.complex128, torch.float64)
        assert torch.equal(t, model.state_dict()[name].to(t.dtype))
    assert model.weight.dtype == torch.complex64


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["", "float64"])
def test_a_report_takes_a_model_with_complex_parameters(dtype: str, tmp_path: Path) -> None:
    model = single_precision()
    batch = BATCH[0].float(), BATCH[1].float()
    counts: dict[str, Any] = {"k": 2, "num_probes": 3, "num_runs": 1, "num_steps": 5, "num_activation_probes": 3}
    found = hf.report((model, F.mse_loss, [batch]), tmp_path / "out", **counts, **({"dtype": dtype} if dtype else {}))
    wide = converted(model, F.mse_loss, Options(dtype="float64"))[0]
    loss, params = hf.functionalize(wide, F.mse_loss)
    batch = batch[0].double(), batch[1].double()
    largest = torch.linalg.eigvalsh(dense_hessian(loss, params, batch)).abs().max()
    assert abs(max(map(abs, found["eigenvalues"])) - float(largest)) < 1e-3 * float(largest)


# Sparse gradients.

BAGS = classes(8, 7).reshape(4, 2)
SPARSE: dict[str, Callable[[bool], nn.Module]] = {
    "embedding": lambda sparse: nn.Embedding(7, 3, sparse=sparse),
    "padded": lambda sparse: nn.Embedding(7, 3, padding_idx=2, sparse=sparse),
    "bag": lambda sparse: nn.EmbeddingBag(7, 3, mode="sum", sparse=sparse),
    "weighted": lambda sparse: nn.Embedding(7, 3, scale_grad_by_freq=False, sparse=sparse),
}


@pytest.mark.parametrize("kind", SPARSE)
def test_sparse_gradients_are_dense_at_the_door(kind: str) -> None:
    model, plain = (
        seeded(lambda s=s: nn.Sequential(SPARSE[kind](s), nn.Tanh(), nn.Linear(3, 2))) for s in (True, False)
    )
    batch = BAGS, normal(*plain(BAGS).shape)
    v, expected = differences(plain, batch, fixed=plain[0].padding_idx)
    loss, params = hf.functionalize(model, F.mse_loss)
    for make in (hf.hvp, hf.linearized_hvp):
        product = make(loss, params, batch)(v)
        assert_same(product, expected)
        assert all(x.layout == torch.strided for x in product.values())
    assert hf.eigsh(hf.hvp(loss, params, batch), v).converged.all()
    assert hf.gradient_direction(loss, params, batch)["0.weight"].layout == torch.strided
    assert model[0].sparse


@pytest.mark.parametrize("lookup", ["by name", "by place", "bag"])
@pytest.mark.parametrize("mode", ["auto", "reverse", "double_backward", "difference"])
def test_a_loss_may_look_up_sparsely_by_itself(lookup: str, mode: str) -> None:
    def loss(p: dict[str, Tensor], sparse: bool = True) -> Tensor:
        if lookup == "bag":
            rows = F.embedding_bag(BAGS, p["table"], mode="sum", sparse=sparse)
        elif lookup == "by place":
            rows = F.embedding(BAGS, p["table"], None, None, 2.0, False, sparse)
        else:
            rows = F.embedding(BAGS, p["table"], sparse=sparse)
        return (torch.tanh(rows) * p["scale"]).sum(-1).square().mean()

    params = {"table": normal(7, 3), "scale": normal(3, seed=2)}
    v = hf.gaussian(params, 1)[0]

    def gradient(step: float) -> list[Tensor]:
        moved = {name: (p + step * v[name]).requires_grad_() for name, p in params.items()}
        return list(torch.autograd.grad(loss(moved, False), list(moved.values())))

    coarse, fine = ([(a - b) / (2 * h) for a, b in zip(gradient(h), gradient(-h), strict=True)] for h in (2e-4, 1e-4))
    expected = {name: (4 * b - a) / 3 for name, a, b in zip(params, coarse, fine, strict=True)}
    assert_same(hf.hvp(loss, params, mode=mode)(v), expected)
    if mode == "auto":
        assert_same(hf.linearized_hvp(loss, params)(v), expected)
        assert hf.eigsh(hf.hvp(loss, params), v).converged.all()
        assert hf.gradient_direction(loss, params)["table"].layout == torch.strided


# Kernels without derivatives.


class Encoder(nn.Module):
    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.lift, self.inner, self.head = nn.Linear(3, 12), make(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.lift(x).view(-1, 3, 4)
        if isinstance(self.inner, nn.MultiheadAttention):
            return self.head(self.inner(hidden, hidden, hidden, need_weights=False)[0].mean(1))
        mask = torch.tensor([[False, False, True]]).expand(len(x), -1)
        return self.head(self.inner(hidden, src_key_padding_mask=mask)[:, :2].mean(1))


def encoder_layer(**options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True, **options)


ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "layer": encoder_layer,
    "gelu, norm first": lambda: encoder_layer(activation="gelu", norm_first=True),
    "encoder": lambda: nn.TransformerEncoder(encoder_layer(), 2),
    "attention": lambda: nn.MultiheadAttention(4, 2, batch_first=True),
    "attention with dropout": lambda: nn.MultiheadAttention(4, 2, 0.5, batch_first=True),
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_no_kernel_without_derivatives_is_taken(kind: str) -> None:
    model = seeded(lambda: Encoder(ENCODERS[kind]))
    loss, params = hf.functionalize(model, F.mse_loss)
    value = F.mse_loss(model(BATCH[0]), BATCH[1])
    direction = hf.gradient_direction(loss, params, BATCH)
    slope = torch.autograd.grad(value, list(model.parameters()))
    length = torch.cat([g.flatten() for g in slope]).norm()
    assert all(torch.allclose(d, g / length, atol=1e-12) for d, g in zip(direction.values(), slope, strict=True))
    with torch.no_grad():
        losses = hf.line(loss, params, direction, [0.0, 1e-6], BATCH, batch_size=2)
        assert torch.allclose(losses[0], value, rtol=1e-12)
        assert torch.allclose((losses[1] - losses[0]) / 1e-6, length, rtol=1e-4)
        with sdpa_kernel(SDPBackend.MATH):
            along = torch.func.jvp(lambda p: loss(p, BATCH), (params,), (direction,))[1]
        assert torch.allclose(along, length, rtol=1e-10)


# What is live, and modes of torch.


def test_products_of_live_parameters_have_a_derivative_unless_it_is_off() -> None:
    model = seeded(mlp)
    loss, params = hf.functionalize(model, F.mse_loss)
    live = dict(model.named_parameters())
    v, expected = differences(model)
    product = hf.hvp(loss, live, BATCH)(v)
    assert all(x.requires_grad for name, x in product.items() if "weight" in name)
    assert_same({name: x.detach() for name, x in product.items()}, expected)
    with torch.no_grad():
        assert not any(x.requires_grad for x in hf.hvp(loss, live, BATCH)(v).values())
    assert not any(x.requires_grad for x in hf.hvp(loss, params, BATCH)(v).values())


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.autograd.set_detect_anomaly(True), torch.no_grad])
def test_products_are_those_of_the_loss_in_every_mode_of_torch(mode: Callable[[], Any]) -> None:
    model = seeded(mlp)
    v, expected = differences(model)
    with mode():
        before = torch.is_anomaly_enabled()
        loss, params = hf.functionalize(model, F.mse_loss)
        for make in (hf.hvp, hf.linearized_hvp, lambda loss, params, batch: hf.mean_hvp(loss, params, [batch])):
            matvec = make(loss, params, BATCH)
            for _ in range(5):  # of which the last are traced
                product = matvec({name: x.clone() for name, x in v.items()})
            assert_same(product, expected)
        assert hf.find_mode(loss, params, BATCH).mode == "traced"
        assert torch.is_anomaly_enabled() == before


def test_a_loss_of_ones_own_may_be_compiled() -> None:
    @compiled
    def loss(w: Tensor) -> Tensor:
        return compiled_tanh(w).pow(3).sum()

    w, v = normal(4), normal(4, seed=2)
    expected = torch.autograd.functional.hvp(lambda w: torch.tanh(w).pow(3).sum(), w, v)[1]
    for make in (hf.hvp, hf.linearized_hvp):
        assert torch.allclose(make(loss, w)(v), expected, rtol=1e-10)
    assert hf.find_mode(loss, w).mode == "traced"


# Several models at once.


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))


def test_stacked_models_have_their_own_statistics() -> None:
    models = [seeded(normalised, seed) for seed in range(3)]
    loss, _ = hf.functionalize(models[0], F.mse_loss)
    params, buffers = torch.func.stack_module_state(models)
    params = {name: p.detach() for name, p in params.items()}
    z = hf.rademacher({name: p[0] for name, p in params.items()}, 1)[0]

    def of_one(p: dict[str, Tensor], buffers: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        matvec = hf.hvp(lambda p, batch: loss({**p, **buffers}, batch), p, BATCH)
        return loss({**p, **buffers}, BATCH), hf.tree.dot(z, matvec(z))

    losses, curvatures = torch.func.vmap(of_one)(params, buffers)
    for model, value, curvature in zip(models, losses, curvatures, strict=True):
        assert torch.allclose(value, F.mse_loss(model(BATCH[0]), BATCH[1]), rtol=1e-12)
        own = dict(model.named_parameters())
        gradient = torch.autograd.grad(F.mse_loss(model(BATCH[0]), BATCH[1]), list(own.values()), create_graph=True)
        product = torch.autograd.grad(gradient, list(own.values()), list(z.values()), allow_unused=True)
        expected = sum((z[name] * x).sum() for name, x in zip(own, product, strict=True) if x is not None)
        assert torch.allclose(curvature, expected, rtol=1e-10)


def test_a_name_that_the_model_lacks_is_refused() -> None:
    loss, params = hf.functionalize(seeded(normalised), F.mse_loss)
    with pytest.raises(
        InvalidInput, match=r"'1\.running_men' is no parameter or buffer of the model; the model has: 0"
    ):
        loss({**params, "1.running_men": torch.zeros(4)}, BATCH)


def test_buffers_that_are_given_are_not_written_to() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.layer(x) * self.calls

    model = seeded(Counter)
    forward, params = hf.stateless(model)
    calls = torch.tensor(4.0, dtype=torch.float64)
    assert torch.allclose(forward({**params, "calls": calls}, BATCH[0]), 5 * model.layer(BATCH[0]))
    assert calls == 4 and model.calls == 0
