"""Batches of every kind: what holds tensors is opened, what it says counts, and what cannot be known is not traced.

Truth is the dense Hessian of the loss by ``torch.autograd.functional``, which knows no batch but plain tensors.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import hessfn as hf
from hessfn.core import tree
from hessfn.losses.samples import moved
from hessfn.reporting.options import Options
from hessfn.reporting.problem import first_pass, prepare


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(number: int, seed: int = 0) -> Tensor:
    return torch.randint(3, (number,), generator=torch.Generator().manual_seed(seed))


W = {"w": normal(4, 3, seed=9), "b": normal(3, seed=8)}
V = hf.gaussian(W, 1, seed=7)[0]
DATA = [(normal(6, 4, seed=i), labels(6, seed=i)) for i in (1, 2)]


def plain(w: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(torch.tanh(x @ w["w"]) + w["b"], y)


def truth(function: Callable[[Any], Tensor], params: Any, v: Any) -> Tensor:
    """``H v`` of a function of a tree, from its dense Hessian."""
    leaves, spec = pytree.tree_flatten(params)
    sizes = [x.numel() for x in leaves]

    def of_flat(flat: Tensor) -> Tensor:
        parts = [p.reshape(x.shape) for p, x in zip(flat.split(sizes), leaves, strict=True)]
        return function(pytree.tree_unflatten(parts, spec))

    flat = torch.cat([x.detach().reshape(-1) for x in leaves])
    along = torch.cat([x.reshape(-1) for x in pytree.tree_leaves(v)])
    return torch.autograd.functional.hessian(of_flat, flat) @ along


def off(found: Any, expected: Tensor) -> float:
    flat = torch.cat([x.detach().reshape(-1) for x in pytree.tree_leaves(found) if x is not None])
    return float((flat - expected).norm() / expected.norm())


# Every kind of batch: how it is made, and how a loss reads it


class Named(NamedTuple):
    x: Tensor
    y: Tensor


@dataclasses.dataclass
class Data:
    x: Any
    y: Any = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        assert isinstance(self.x, Tensor) and self.x.dim() == 2  # nobody's __init__ is called with anything else


class Masked(collections.UserDict[str, Any]):
    """A mapping with tensors beside its entries."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__(x=x)
        self.targets = [y, {"n": 1}]


class Slots:
    __slots__ = ("__weakref__", "_y", "unset", "x")

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self._y = x, y

    @property
    def y(self) -> Tensor:
        return self._y


class AttributeDict(dict[str, Any]):
    """Its attributes are its entries."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__dict__ = self


class Items(dict[str, Any]):
    scale: float

    def __setitem__(self, name: str, value: Any) -> None:
        raise TypeError("it is read only")


class Many(list[Any]):
    pass


class Graph:
    """As PyG's ``Data``: attributes are in a store, which knows its parent weakly."""

    def __init__(self, **values: Any) -> None:
        self.__dict__["store"] = Store(self, values)

    def __getattr__(self, name: str) -> Any:
        if name == "store":  # as in a copy that is half made
            raise AttributeError(name)
        return getattr(self.store, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.store.mapping[name] = value


class Store:
    def __init__(self, parent: Graph, values: dict[str, Any]) -> None:
        self.mapping, self.parent_ref, self.kind = values, weakref.ref(parent), Graph

    def __getattr__(self, name: str) -> Any:
        if "mapping" not in self.__dict__ or name not in self.mapping:
            raise AttributeError(name)
        return self.mapping[name]


class Child:
    """What points back to its parent, by which it is read."""

    def __init__(self, parent: Any) -> None:
        self.parent = parent


def parent_and_child(x: Tensor, y: Tensor) -> Any:
    top = types.SimpleNamespace(x=x, y=y, itself=None)
    top.itself, top.child = top, Child(top)
    return top


def default_dict(x: Tensor, y: Tensor) -> Any:
    found: Any = collections.defaultdict(list)
    found.update(x=x, y=y)
    return found


def by_key(b: Any) -> tuple[Tensor, Tensor]:
    return b["x"], b["y"]


def by_name(b: Any) -> tuple[Tensor, Tensor]:
    return b.x, b.y


def user_dict(x: Tensor, y: Tensor) -> Any:
    return collections.UserDict(x=x, y=y)


KINDS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], tuple[Tensor, Tensor]]]] = {
    "pair": (lambda x, y: (x, y), lambda b: (b[0], b[1])),
    "ordered dict": (lambda x, y: collections.OrderedDict(x=x, y=y), by_key),
    "default dict": (default_dict, by_key),
    "mapping proxy": (lambda x, y: types.MappingProxyType({"x": x, "y": y}), by_key),
    "user dict": (user_dict, by_key),
    "user dict in one": (lambda x, y: collections.UserDict(d=user_dict(x, y)), lambda b: by_key(b["d"])),
    "user dict and more": (Masked, lambda b: (b["x"], b.targets[0])),
    "attribute dict": (lambda x, y: AttributeDict(x=x, y=y, n=3), lambda b: (b.x, b["y"])),
    "dict of one's own": (lambda x, y: Items(x=x, y=y), by_key),
    "list of one's own": (lambda x, y: Many([x, y]), lambda b: (b[0], b[1])),
    "named tuple": (Named, by_name),
    "dataclass": (Data, by_name),
    "frozen dataclass": (Frozen, by_name),
    "dataclass in a list": (lambda x, y: [Data(Data(x, 1)), {"y": y}], lambda b: (b[0].x.x, b[1]["y"])),
    "namespace": (lambda x, y: types.SimpleNamespace(x=x, y=y, name="a"), by_name),
    "slots": (Slots, by_name),
    "list in an object": (lambda x, y: Data([x, {"y": y}]), lambda b: (b.x[0], b.x[1]["y"])),
    "graph": (lambda x, y: Graph(x=x, y=y, num=len(x)), by_name),
    "weak reference": (lambda x, y: Graph(x=x, y=y), lambda b: by_name(b.store.parent_ref())),
    "back reference": (parent_and_child, lambda b: by_name(b.child.parent.itself)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_two_batches_of_one_shape_have_their_own_hessians(kind: str) -> None:
    make, read = KINDS[kind]

    def loss(w: dict[str, Tensor], batch: Any) -> Tensor:
        return plain(w, *read(batch))

    batches = [make(*data) for data in DATA]
    expected = [truth(lambda w, data=data: plain(w, *data), W, V) for data in DATA]
    assert float((expected[0] - expected[1]).norm() / expected[0].norm()) > 0.1
    for batch, hv in zip(batches, expected, strict=True):
        assert off(hf.hvp(loss, W, batch, mode="traced")(V), hv) < 1e-12
        assert off(hf.hvp(loss, W, batch)(V), hv) < 1e-12
        assert off(hf.linearized_hvp(loss, W, batch)(V), hv) < 1e-12
    mean = (expected[0] + expected[1]) / 2
    assert off(hf.mean_hvp(loss, W, batches)(V), mean) < 1e-12
    assert off(hf.mean_hvp(loss, W, batches, microbatch=4)(V), mean) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_is_of_its_kind_and_the_original_stays_what_it_is(kind: str) -> None:
    make, read = KINDS[kind]
    x, y = DATA[0]
    batch = make(x, y)
    twice = tree.map(lambda leaf: 2 * leaf if isinstance(leaf, Tensor) else leaf, batch)
    assert type(twice) is type(batch)
    assert read(batch)[0] is x and read(batch)[1] is y
    assert torch.equal(read(twice)[0], 2 * x) and torch.equal(read(twice)[1], 2 * y)
    assert tree.structure(twice) == tree.structure(batch)
    assert len(tree.names(batch)) == len(tree.leaves(batch)) >= 2
    again = tree.unflatten(tree.leaves(twice), batch)
    assert torch.equal(read(again)[0], 2 * x)


def test_batches_of_a_tokenizer() -> None:
    transformers = pytest.importorskip("transformers")
    x, y = DATA[0]
    loss = lambda w, batch: plain(w, batch["x"], batch.y)  # noqa: E731
    batch = transformers.BatchEncoding({"x": x, "y": y}, encoding=[object()], n_sequences=1)
    found = hf.find_mode(loss, W, batch)
    assert found.mode == "traced", found
    assert off(hf.mean_hvp(loss, W, [batch], microbatch=2)(V), truth(lambda w: plain(w, x, y), W, V)) < 1e-12
    assert type(tree.map(lambda leaf: leaf, batch)) is transformers.BatchEncoding


# What the key of a trace has to know of a batch


def test_a_number_in_an_object_leads_to_a_trace_of_its_own() -> None:
    x, y = DATA[0]

    def loss(w: Any, batch: Any) -> Tensor:
        return batch.scale * plain(w, batch.x, y)

    batch = types.SimpleNamespace(x=x, scale=2.0)
    matvec, once = hf.hvp(loss, W, batch, mode="traced"), truth(lambda w: plain(w, x, y), W, V)
    assert off(matvec(V), 2 * once) < 1e-12
    batch.scale = 3.0
    assert off(matvec(V), 3 * once) < 1e-12


@pytest.mark.parametrize("absent", [{}, {"mask": None}, {"other": None}])
def test_what_is_none_is_not_what_is_not_there(absent: dict[str, Any]) -> None:
    x, y = DATA[0]

    def loss(w: Any, batch: Any) -> Tensor:
        return plain(w, batch["x"], y) * (1 + len(batch)) * (5 if "mask" in batch else 1)

    once = truth(lambda w: plain(w, x, y), W, V)
    for batch in ({"x": x}, {"x": x, **absent}):
        factor = (1 + len(batch)) * (5 if "mask" in batch else 1)
        assert off(hf.hvp(loss, W, batch, mode="traced")(V), factor * once) < 1e-12


def test_classes_of_the_same_attributes_are_told_apart() -> None:
    class Twice(Data):
        pass

    x, y = DATA[0]

    def loss(w: Any, batch: Any) -> Tensor:
        return plain(w, batch.x, y) * (2 if isinstance(batch, Twice) else 1)

    once = truth(lambda w: plain(w, x, y), W, V)
    for kind, factor in ((Data, 1), (Twice, 2), (Data, 1)):
        assert off(hf.hvp(loss, W, kind(x), mode="traced")(V), factor * once) < 1e-12


class Hidden:
    """It holds what no tree shows."""

    def __init__(self, scale: float) -> None:
        self.read = lambda: scale


@pytest.mark.parametrize(
    "hold", [lambda h: {"h": h}, lambda h: [h], lambda h: Data(DATA[0][0], h), lambda h: Graph(x=DATA[0][0], y=h)]
)
def test_what_cannot_be_known_is_not_traced(hold: Any) -> None:
    x, y = DATA[0]

    def loss(w: Any, batch: Any) -> Tensor:
        held = batch["h"] if isinstance(batch, dict) else batch[0] if isinstance(batch, list) else batch.y
        return held.read() * plain(w, x, y)

    once = truth(lambda w: plain(w, x, y), W, V)
    for scale in (1.0, 2.0):
        assert off(hf.hvp(loss, W, hold(Hidden(scale)))(V), scale * once) < 1e-12
    assert "cannot see into" in hf.find_mode(loss, W, hold(Hidden(1.0))).reason
    with pytest.raises(hf.Untraceable, match="cannot see into"):
        hf.linearized_hvp(loss, W, hold(Hidden(1.0)))


class Plain:
    def __init__(self) -> None:
        self.n = 2


@pytest.mark.parametrize("x", [nn.Linear(2, 2), len, Plain(), object(), torch.Generator(), iter([torch.ones(1)])])
def test_what_holds_no_tensor_in_its_attributes_is_a_leaf(x: Any) -> None:
    assert tree.leaves({"x": x})[0] is x
    assert tree.leaves([x, torch.ones(1)])[0] is x


def test_what_never_ends_is_not_looked_into() -> None:
    endless: list[Any] = []
    endless.append(endless)
    first = last = types.SimpleNamespace(x=X)
    for _ in range(3000):
        last.next = types.SimpleNamespace(x=X)
        last = last.next
    for x in (types.SimpleNamespace(x=X, parts=endless), first):
        assert tree.leaves([x])[0] is x
        assert off(hf.hvp(lambda w, b: plain(w, b.x, Y), W, x)(V), truth(lambda w: plain(w, X, Y), W, V)) < 1e-12


def test_a_tensor_of_another_class_is_a_leaf() -> None:
    class Own(Tensor):
        pass

    own = torch.ones(2).as_subclass(Own)
    own.note = torch.ones(3)
    assert tree.leaves({"a": own, "b": nn.Parameter(torch.ones(1))})[0] is own
    assert tree.names(Data(own)) == ["x"]


def test_a_class_that_was_registered_without_names_has_numbers() -> None:
    class Pair:
        def __init__(self, a: Any, b: Any) -> None:
            self.a, self.b = a, b

    pytree.register_pytree_node(Pair, lambda p: ([p.a, p.b], None), lambda parts, _: Pair(*parts))
    given = {"p": Pair(torch.ones(2), {"w": torch.ones(1)})}
    assert tree.names(given) == ["p.0", "p.1.w"]
    assert tree.matched(tree.scale(2.0, given), given, "x", "y")["p"].a.tolist() == [2.0, 2.0]


def test_ordinary_trees_are_what_torch_makes_of_them() -> None:
    given = {"b": [torch.ones(2), Named(torch.zeros(1), torch.ones(1))], "a": (1, "x", collections.deque([2.0]))}
    assert all(a is b for a, b in zip(tree.leaves(given), pytree.tree_leaves(given), strict=True))
    assert tree.names(given) == ["b.0", "b.1.x", "b.1.y", "a.0", "a.1", "a.2.0"]
    same = tree.map(lambda leaf: leaf, given)
    assert pytree.tree_structure(same) == pytree.tree_structure(given)


# Vectors are of torch's own kinds, and None is an empty tree


@pytest.mark.parametrize("kind", ["user dict", "namespace", "graph", "dict of one's own"])
def test_parameters_in_an_object_are_refused_with_the_remedy(kind: str) -> None:
    params = KINDS[kind][0](W["w"], W["b"])
    remedy = r"give dict\(params\)" if "dict" in kind else "give a dict of its tensors"
    with pytest.raises(hf.HessfnError, match=rf"params is .*a vector is a dict, list or tuple of tensors: {remedy}"):
        hf.hvp(lambda w: w["x"].sum(), params)
    with pytest.raises(hf.HessfnError, match="params has"):
        hf.hvp(lambda w: w["x"].sum(), {"part": params})


WITH_HOLES = {"w": normal(3, seed=1), "b": None, "c": [normal(2, seed=2), None]}


def of_holes(w: Any) -> Tensor:
    assert w["b"] is None and w["c"][1] is None
    return w["w"].pow(4).sum() * w["c"][0].square().sum()


def dense_of_holes() -> Tensor:
    def of_flat(flat: Tensor) -> Tensor:
        return of_holes({"w": flat[:3], "b": None, "c": [flat[3:], None]})

    return torch.autograd.functional.hessian(of_flat, torch.cat([WITH_HOLES["w"], WITH_HOLES["c"][0]]))


@pytest.mark.parametrize("mode", ["traced", "forward", "reverse", "double_backward", "difference"])
def test_none_among_the_parameters(mode: Any) -> None:
    v = hf.gaussian(WITH_HOLES, 1)[0]
    assert v["b"] is None and hf.tree.numel(v) == 5
    found = hf.hvp(of_holes, WITH_HOLES, mode=mode)(v)
    assert found["b"] is None and found["c"][1] is None
    expected = dense_of_holes() @ hf.tree.ravel(v)[0]
    assert off(hf.tree.ravel(found)[0], expected) < (1e-6 if mode == "difference" else 1e-12)


def test_none_among_the_vectors_of_every_routine() -> None:
    dense, params = dense_of_holes(), WITH_HOLES
    matvec, v = hf.hvp(of_holes, params), hf.gaussian(params, 1)[0]
    exact = torch.linalg.eigvalsh(dense)
    assert torch.allclose(hf.dense(matvec, params), dense)
    pairs = hf.eigsh(matvec, v, 2, which="LA", rtol=1e-10)
    assert torch.allclose(pairs.values, exact.flip(0)[:2]) and pairs.vectors["b"] is None
    signs = list(hf.rademacher(params, 4))
    flat = [hf.tree.ravel(z)[0] for z in signs]
    mean = torch.stack([z @ dense @ z for z in flat]).mean()
    for batch_size in (1, 2):
        assert torch.allclose(hf.hutchinson(matvec, signs, batch_size=batch_size).mean, mean)
        diag = hf.hutchinson_diag(matvec, signs, batch_size=batch_size).mean
        assert torch.allclose(hf.tree.ravel(diag)[0], torch.stack([z * (dense @ z) for z in flat]).mean(0))
    rest = hf.tree.ravel(hf.deflate(matvec, pairs.vectors)(v))[0]
    q = torch.linalg.eigh(dense).eigenvectors[:, -2:]
    off_q = torch.eye(5, dtype=torch.float64) - q @ q.T
    assert torch.allclose(rest, off_q @ dense @ off_q @ hf.tree.ravel(v)[0], atol=1e-6)
    found = hf.linearized_hvp(of_holes, params)(v)
    assert off(hf.tree.ravel(found)[0], dense @ hf.tree.ravel(v)[0]) < 1e-12
    w, c = params["w"], params["c"][0]
    slope = torch.cat([4 * w**3 * c.square().sum(), 2 * c * w.pow(4).sum()])
    assert torch.allclose(hf.tree.ravel(hf.gradient_direction(of_holes, params))[0], slope / slope.norm())
    flat_one, unravel = hf.tree.ravel(params)
    assert unravel(flat_one)["c"][1] is None and torch.equal(unravel(flat_one)["w"], params["w"])


# Arrays


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def truth_of_net(model: nn.Module, batches: list[tuple[Tensor, Tensor]], v: dict[str, Tensor]) -> Tensor:
    """Of the mean over all samples, by ``torch.func.functional_call`` alone."""
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    params = {name: p.detach() for name, p in model.named_parameters()}
    call = torch.func.functional_call
    return truth(lambda p: F.cross_entropy(call(model, p, (x,)), y), params, v)


ARRAYS: dict[str, Callable[[Tensor], Any]] = {
    "plain": lambda x: x.numpy(),
    "reversed": lambda x: x.flip(0).numpy()[::-1],
    "read only": lambda x: np.broadcast_to(x.numpy(), x.shape),
}


@pytest.mark.parametrize("kind", ARRAYS)
@pytest.mark.filterwarnings("error")
def test_a_model_gets_arrays_as_tensors(kind: str) -> None:
    model, criterion, asarray = net(), nn.CrossEntropyLoss(), ARRAYS[kind]
    loss, params = hf.functionalize(model, criterion)
    v = hf.gaussian(params, 1)[0]
    data = [(x[:n], y[:n]) for (x, y), n in zip(DATA, (6, 4), strict=True)]
    batches = [(asarray(x), asarray(y)) for x, y in data]
    one, both = truth_of_net(model, data[:1], v), truth_of_net(model, data, v)
    assert off(hf.hvp(loss, params, batches[0])(v), one) < 1e-12
    assert off(hf.linearized_hvp(loss, params, batches[0])(v), one) < 1e-12
    assert off(hf.mean_hvp(loss, params, batches)(v), both) < 1e-12
    assert off(hf.mean_hvp(loss, params, batches, microbatch=3)(v), both) < 1e-12
    changed = copy.deepcopy(batches)
    matvec = hf.mean_hvp(loss, params, changed)
    matvec(v)
    changed[0] = (changed[0][0] + 1, changed[0][1])
    with pytest.raises(hf.HessfnError, match="not those of the first one"):
        matvec(v)


def test_a_loss_of_ones_own_gets_its_array() -> None:
    seen = set()

    def loss(w: Any, batch: Any) -> Tensor:
        seen.add(type(batch["x"]))
        return plain(w, torch.from_numpy(np.sqrt(np.square(batch["x"]))), torch.from_numpy(batch["y"]))

    for x, y in DATA:
        batch = {"x": x.numpy(), "y": y.numpy()}
        assert off(hf.hvp(loss, W, batch)(V), truth(lambda w: plain(w, x.abs(), y), W, V)) < 1e-12  # noqa: B023
    assert seen == {np.ndarray}


# What a batch counts, and where its samples are


def test_a_first_tensor_without_an_axis_is_not_that_of_the_samples() -> None:
    def loss(w: Any, batch: Any) -> Tensor:
        return batch[0] * plain(w, batch[1], batch[2])

    x, y = (torch.cat(parts) for parts in zip(*DATA, strict=True))
    scale = torch.tensor(2.0, dtype=torch.float64)
    batches = [(scale, x[:8], y[:8]), (scale, x[8:], y[8:])]
    expected = truth(lambda w: 2 * plain(w, x, y), W, V)
    assert off(hf.mean_hvp(loss, W, batches)(V), expected) < 1e-12
    assert off(hf.mean_hvp(loss, W, batches, microbatch=3)(V), expected) < 1e-12


def test_batches_without_an_axis_need_weights() -> None:
    batches = [{"t": torch.tensor(1.0, dtype=torch.float64)}, {"t": torch.tensor(3.0, dtype=torch.float64)}]

    def loss(w: Tensor, batch: Any) -> Tensor:
        return (batch["t"] * w).pow(2).sum()

    w = normal(2)
    with pytest.raises(hf.HessfnError, match=r"no tensor with an axis, only 1 of shape \(\): .* weights="):
        hf.mean_hvp(loss, w, batches)(w)
    assert torch.allclose(hf.mean_hvp(loss, w, batches, weights=[1, 3])(w), 2 * (1 + 3 * 9) / 4 * w)


def test_samples_are_those_of_the_targets() -> None:
    """A batch of graphs has more nodes than graphs, and the criterion is a mean over graphs."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh()).double()

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, nodes: Tensor, graph: Tensor) -> Tensor:
            return torch.zeros(int(graph.max()) + 1, 3, dtype=torch.float64).index_add(0, graph, self.net(nodes))

    loss, params = hf.functionalize(Pooled(), nn.MSELoss())
    v = hf.gaussian(params, 1)[0]
    graph = [torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 0, 0, 0])]
    nodes, y = [normal(5, 4, seed=1), normal(4, 4, seed=2)], [normal(2, 3, seed=3), normal(1, 3, seed=4)]
    whole = torch.cat(nodes), torch.cat([graph[0], graph[1] + 2])

    def of_all(p: dict[str, Tensor]) -> Tensor:
        flows = torch.tanh(F.linear(whole[0], p["net.0.weight"], p["net.0.bias"]))
        return F.mse_loss(torch.zeros(3, 3, dtype=torch.float64).index_add(0, whole[1], flows), torch.cat(y))

    batches = [((n, g), t) for n, g, t in zip(nodes, graph, y, strict=True)]
    assert off(hf.mean_hvp(loss, params, batches)(v), truth(of_all, params, v)) < 1e-12
    with pytest.raises(hf.HessfnError, match=r"'1' has shape \(2, 3\) in a batch of 5 samples"):
        hf.mean_hvp(loss, params, batches, microbatch=2)(v)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_moved_is_all_of_it_and_what_is_there_is_itself(kind: str) -> None:
    make, read = KINDS[kind]
    batch = make(*DATA[0])
    assert moved(batch, torch.device("cpu")) is batch
    there = moved(batch, torch.device("meta"))
    assert type(there) is type(batch)
    assert all(x.is_meta for x in read(there)) and not any(x.is_meta for x in read(batch))


def test_a_packed_sequence_keeps_its_sizes_on_the_cpu() -> None:
    packed = nn.utils.rnn.pack_sequence([normal(3, 2), normal(1, 2)])
    there, y = moved((packed, Y), torch.device("meta"))
    assert there.data.is_meta and y.is_meta and there.batch_sizes.device.type == "cpu"


# Loaders whose length nobody knows


class Stream(torch.utils.data.IterableDataset[Any]):
    def __init__(self, samples: Callable[[], Iterator[Any]]) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[Any]:
        return self.samples()


def test_a_loader_over_a_stream() -> None:
    x, y = (torch.cat(parts) for parts in zip(*DATA, strict=True))
    loader: Any = torch.utils.data.DataLoader(Stream(lambda: iter(zip(x, y, strict=True))), 5)
    model = net()
    loss, params = hf.functionalize(model, nn.CrossEntropyLoss())
    v = hf.gaussian(params, 1)[0]
    matvec, expected = hf.mean_hvp(loss, params, loader), truth_of_net(model, [(x, y)], v)
    assert off(matvec(v), expected) < 1e-12
    assert off(matvec(v), expected) < 1e-12
    found = hf.sensitivities(model, nn.CrossEntropyLoss(), loader, num_probes=2)
    listed = hf.sensitivities(model, nn.CrossEntropyLoss(), list(loader), num_probes=2)
    assert torch.equal(found.weights.mean["0"], listed.weights.mean["0"])


def test_a_stream_that_is_used_up_is_said_to_be() -> None:
    samples = iter(zip(*DATA[0], strict=True))
    loader: Any = torch.utils.data.DataLoader(Stream(lambda: samples), 3)
    loss, params = hf.functionalize(net(), nn.CrossEntropyLoss())
    matvec, v = hf.mean_hvp(loss, params, loader), hf.gaussian(net_params(), 1)[0]
    matvec(v)
    with pytest.raises(hf.HessfnError, match=r"can be run through only once.*list\(loader\)"):
        matvec(v)


def net_params() -> dict[str, Tensor]:
    return {name: p.detach() for name, p in net().named_parameters()}


def endless() -> Iterator[Any]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randn(4, generator=generator).double(), torch.randint(3, (), generator=generator)


def test_a_report_takes_the_first_batches_of_an_endless_stream() -> None:
    loader: Any = torch.utils.data.DataLoader(Stream(endless), 5)
    model = net()
    found = first_pass(prepare((model, nn.CrossEntropyLoss(), loader), Options(num_batches=2)))
    source = endless()
    x, y = zip(*[next(source) for _ in range(10)], strict=True)
    with torch.no_grad():
        expected = F.cross_entropy(model(torch.stack(x)), torch.stack(y))
    assert sum(found.sizes) == 10
    assert float(found.loss) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["user dict", "dataclass", "graph"])
def test_a_report_of_batches_of_every_kind(kind: str, tmp_path: Any) -> None:
    make, read = KINDS[kind]

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, data: Any) -> Tensor:
            return self.net(read(data)[0])

    counts = {"k": 1, "num_probes": 2, "num_runs": 1, "num_steps": 2, "num_activation_probes": 2, "num_plane_points": 0}
    of_pairs = hf.report((net(), nn.CrossEntropyLoss(), DATA), tmp_path / "pairs", **counts)
    problem = Reads(), lambda out, batch: F.cross_entropy(out, read(batch)[1]), [make(*data) for data in DATA]
    found = hf.report(problem, tmp_path / kind, **counts)
    assert found["loss"] == pytest.approx(of_pairs["loss"], rel=1e-12)
    assert found["eigenvalues"] == pytest.approx(of_pairs["eigenvalues"], rel=1e-2)
    assert found["trace"] == pytest.approx(of_pairs["trace"], rel=1e-8)


# What a model is called with


class Takes(nn.Module):
    def __init__(self, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.l = nn.Linear(4, 3).double()
        self.forward = types.MethodType(forward, self)


def of_x(self: Any, x: Tensor) -> Tensor:
    return self.l(x)


def of_data(self: Any, data: Any) -> Tensor:
    return self.l(data["x"])


def of_x_that_is_a_dict(self: Any, x: Any) -> Tensor:
    return self.l(x["x"]) + x["shift"]


def of_x_and_scale(self: Any, x: Tensor, scale: float = 1.0) -> Tensor:
    return scale * self.l(x)


def of_anything(self: Any, **values: Any) -> Tensor:
    return self.l(values["x"])


def of_data_and_more(self: Any, data: Any, flag: bool = True) -> Tensor:
    return self.l(data["x"])


def of_an_object(self: Any, data: Any) -> Tensor:
    return self.l(data.x)


X, Y = DATA[0]
CALLS: dict[str, tuple[Callable[..., Tensor], Any]] = {
    "its names": (of_x, {"x": X}),
    "a tensor": (of_x, X),
    "some of its names": (of_x_and_scale, {"x": X, "scale": 1.0}),
    "any names": (of_anything, {"x": X, "other": 1}),
    "the dict": (of_data, {"x": X}),
    "the dict, of several": (of_data, {"x": X, "y": Y}),
    "the dict, of other keys": (of_data, {"x": X, 3: Y}),
    "the dict, and defaults": (of_data_and_more, {"x": X, "y": Y}),
    "a dict by the name of a key": (of_x_that_is_a_dict, {"x": X, "shift": torch.zeros(3).double()}),
    "a user dict": (of_data, collections.UserDict(x=X)),
    "an object": (of_an_object, Data(X)),
    "a named tuple of its own": (of_an_object, (Named(X, Y),)),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_signature_says_what_a_mapping_is(name: str) -> None:
    forward, inputs = CALLS[name]
    model = Takes(forward)
    loss, params = hf.functionalize(model, nn.CrossEntropyLoss())
    v = hf.gaussian(params, 1)[0]
    expected = truth(lambda p: F.cross_entropy(F.linear(X, p["l.weight"], p["l.bias"]), Y), params, v)
    assert off(hf.hvp(loss, params, (inputs, Y))(v), expected) < 1e-12
    assert off(hf.mean_hvp(loss, params, [(inputs, Y)])(v), expected) < 1e-12


def test_a_name_too_many_is_python_s_own_error() -> None:
    loss, params = hf.functionalize(Takes(of_x_and_scale), nn.CrossEntropyLoss())
    with pytest.raises(TypeError, match="unexpected keyword argument 'mask'"):
        loss(params, ({"x": X, "mask": X}, Y))


@pytest.mark.parametrize("kind", ["user dict", "dataclass", "namespace", "graph", "attribute dict"])
def test_a_batch_that_is_one_goes_to_both_sides(kind: str) -> None:
    make, read = KINDS[kind]
    torch.manual_seed(0)

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()

        def forward(self, data: Any) -> Tensor:
            return self.b(torch.tanh(self.a(read(data)[0])))

    def criterion(out: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(out, read(batch)[1])

    model, batches = Reads(), [make(*data) for data in DATA]
    loss, params = hf.functionalize(model, criterion)
    v = hf.gaussian(params, 1)[0]
    x, y = (torch.cat(parts) for parts in zip(*DATA, strict=True))

    def of_all(p: dict[str, Tensor]) -> Tensor:
        hidden = torch.tanh(F.linear(x, p["a.weight"], p["a.bias"]))
        return F.cross_entropy(F.linear(hidden, p["b.weight"], p["b.bias"]), y)

    assert off(hf.mean_hvp(loss, params, batches, microbatch=4)(v), truth(of_all, params, v)) < 1e-12
    pairs = [hf.sensitivities(model, criterion, batches, num_probes=2), None]
    plain_model = nn.Sequential(collections.OrderedDict(a=model.a, t=nn.Tanh(), b=model.b))
    pairs[1] = hf.sensitivities(plain_model, nn.CrossEntropyLoss(), DATA, num_probes=2)
    for layer in ("a", "b"):
        assert torch.allclose(pairs[0].weights.mean[layer], pairs[1].weights.mean[layer], rtol=1e-10)
    of_shifts, shifts = hf.activation_loss(model, criterion, batches[0], "b")
    found = hf.hvp(of_shifts, shifts)(hf.gaussian(shifts, 1)[0])["b"].reshape(-1)
    hidden = torch.tanh(model.a(DATA[0][0])).detach()
    direction = hf.gaussian(shifts, 1)[0]
    exact = truth(lambda s: F.cross_entropy(model.b(hidden + s["b"]), DATA[0][1]), shifts, direction)
    assert off(found, exact) < 1e-12


@pytest.mark.parametrize("mode", ["traced", "forward", "double_backward"])
@pytest.mark.parametrize("make", [dict, collections.UserDict, lambda d: Graph(**d), lambda d: AttributeDict(d)])
def test_a_model_may_write_into_its_batch(make: Any, mode: Any) -> None:
    torch.manual_seed(0)

    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(4, 3).double()

        def forward(self, data: Any) -> Tensor:
            kept = data.store.mapping if isinstance(data, Graph) else data
            kept["h"] = self.l(kept.pop("x"))
            kept["count"] = kept["count"] + 1
            return kept["h"] * kept["count"]

    def criterion(out: Tensor, data: Any) -> Tensor:
        kept = data.store.mapping if isinstance(data, Graph) else data
        assert "x" not in kept and kept["h"] is not None
        return F.cross_entropy(out, kept["y"])

    batch = make({"x": X, "y": Y, "count": 0})
    loss, params = hf.functionalize(Writes(), criterion)
    v = hf.gaussian(params, 1)[0]
    expected = truth(lambda p: F.cross_entropy(F.linear(X, p["l.weight"], p["l.bias"]), Y), params, v)
    for _ in range(2):
        assert off(hf.hvp(loss, params, batch, mode=mode)(v), expected) < 1e-12
        assert off(hf.mean_hvp(loss, params, [batch], mode=mode)(v), expected) < 1e-12
    assert tree.names(batch) == tree.names(make({"x": X, "y": Y, "count": 0}))
    forward, _ = hf.stateless(Writes())
    hf.ggnvp(forward, lambda out, data: F.cross_entropy(out, Y), params, batch)(v)
    assert tree.leaves(batch)[0] is X


def test_a_packed_sequence_is_one_argument() -> None:
    torch.manual_seed(0)

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = nn.RNN(4, 3).double(), nn.Linear(3, 3).double()

        def forward(self, packed: Any) -> Tensor:
            return self.out(self.rnn(packed)[1][-1])

    model = Reader()
    sequences = [normal(5, 4, seed=1), normal(3, 4, seed=2)]
    packed = nn.utils.rnn.pack_sequence(sequences)
    y = torch.tensor([0, 2])
    loss, params = hf.functionalize(model, nn.CrossEntropyLoss())
    v = hf.gaussian(params, 1)[0]

    def by_hand(p: dict[str, Tensor]) -> Tensor:
        ends, bias = [], p["rnn.bias_ih_l0"] + p["rnn.bias_hh_l0"]
        for sequence in sequences:
            h = torch.zeros(3, dtype=torch.float64)
            for x in sequence:
                h = torch.tanh(F.linear(x, p["rnn.weight_ih_l0"]) + F.linear(h, p["rnn.weight_hh_l0"]) + bias)
            ends.append(F.linear(h, p["out.weight"], p["out.bias"]))
        return F.cross_entropy(torch.stack(ends), y)

    assert off(hf.hvp(loss, params, (packed, y))(v), truth(by_hand, params, v)) < 1e-12
