"""Exact diagonals and traces of the Gauss-Newton matrix, against J' H J of torch's own dense derivatives, by numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import NETS, classes, conv_net, normal, seeded
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import hessfn as hf
from hessfn.core import tree


def exact(forward: Any, criterion: Any, params: Any, batch: Any, logits: Callable[[Any], Tensor] = lambda x: x) -> Any:
    """The diagonal from the Jacobian of all outputs and the Hessian of the criterion, both by double backward."""
    inputs, targets = batch if isinstance(batch, tuple) else (batch, batch)
    flat, unravel = tree.ravel(params)
    whole = forward(params, inputs)
    shape = logits(whole).shape

    def of_logits(x: Tensor) -> Tensor:
        out = x.reshape(shape)
        return criterion({**whole, "logits": out} if isinstance(whole, dict) else out, targets)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        J = torch.autograd.functional.jacobian(lambda p: logits(forward(unravel(p), inputs)).reshape(-1), flat)
        H = torch.autograd.functional.hessian(of_logits, logits(whole).detach().reshape(-1))
    J, H = J.detach().numpy(), H.detach().numpy()
    return unravel(torch.from_numpy(np.einsum("an,ab,bn->n", J, H, J, optimize=True)))


def agree(found: Any, wanted: Any, rtol: float = 1e-10) -> None:
    assert tree.names(found) == tree.names(wanted)
    error = tree.norm(tree.add(found, wanted, -1.0))
    assert error <= rtol * tree.norm(wanted), float(error / tree.norm(wanted))
    assert tree.norm(wanted) > 0


WEIGHT = torch.tensor([0.2, 1.0, 3.0]).double()
CRITERIA: dict[str, tuple[Any, Callable[[int], Tensor]]] = {
    "cross_entropy": (nn.CrossEntropyLoss(), lambda n: classes(n, 3)),
    "weighted": (
        nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=2, label_smoothing=0.1),
        lambda n: classes(n, 3),
    ),
    "mse": (nn.MSELoss(), lambda n: normal(n, 3, seed=3)),
    "bce": (nn.BCEWithLogitsLoss(pos_weight=WEIGHT), lambda n: (normal(n, 3, seed=3) > 0).double()),
    "indefinite": (lambda out, targets: (3 * out).sin().mean(), lambda n: classes(n, 3)),
}


@pytest.mark.parametrize("criterion", list(CRITERIA))
def test_the_diagonal_is_that_of_the_dense_matrix(criterion: str) -> None:
    build, shape = NETS["mlp"]
    forward, params = hf.stateless(seeded(build))
    function, targets = CRITERIA[criterion]
    batch = normal(*shape), targets(shape[0])
    wanted = exact(forward, function, params, batch)
    assert criterion != "indefinite" or min(float(x.min()) for x in wanted.values()) < 0
    agree(hf.ggn_diagonal(forward, function, params, [batch]), wanted)
    traces = hf.ggn_traces(forward, function, params, [batch])
    agree(traces, {name: x.sum() for name, x in wanted.items()})


@pytest.mark.parametrize(
    "net",
    [
        "batch_norm",
        "layer_norm",
        "attention",
        "lstm",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("conv", "group_norm")),
    ],
)
def test_nets_of_every_kind(net: str) -> None:
    build, shape = NETS[net]
    forward, params = hf.stateless(seeded(build))
    batch = normal(*shape), classes(shape[0], 3)
    agree(
        hf.ggn_diagonal(forward, nn.CrossEntropyLoss(), params, [batch]), exact(forward, F.cross_entropy, params, batch)
    )


class Tokens(nn.Module):
    """A transformer in small: embeddings, attention, a head at every position; outputs beside the logits."""

    def __init__(self, flat: bool = False) -> None:
        super().__init__()
        self.embed, self.qkv, self.norm = nn.Embedding(7, 4), nn.Linear(4, 12), nn.LayerNorm(4)
        self.head, self.flat = nn.Linear(4, 7, bias=False), flat

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Any:
        hidden = self.embed(ids)
        q, k, v = self.qkv(self.norm(hidden)).unsqueeze(1).chunk(3, dim=-1)
        hidden = hidden + F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)
        logits = self.head(hidden if mask is None else hidden * mask[..., None])
        return logits.flatten(0, 1) if self.flat else {"logits": logits, "hidden": hidden, "loss": logits.sum()}


def of_tokens(out: Any, targets: Any) -> Tensor:
    logits = out["logits"] if isinstance(out, dict) else out
    return F.cross_entropy(logits.reshape(-1, 7), targets.flatten())


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("most", [None, pytest.param(1, marks=pytest.mark.slow)])
def test_positions_are_outputs_of_their_sample(flat: bool, most: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of all positions, in an object with other tensors or flat; also few backward passes at a time."""
    if most:
        monkeypatch.setattr("hessfn.products.exact_gauss_newton._MOST_BYTES", most)
    forward, params = hf.stateless(seeded(lambda: Tokens(flat)))
    ids, targets = classes(15, 7).view(3, 5), classes(15, 7, seed=4).view(3, 5)
    targets[0, :2] = -100
    wanted = exact(forward, of_tokens, params, (ids, targets), (lambda x: x) if flat else (lambda x: x["logits"]))
    agree(hf.ggn_diagonal(forward, of_tokens, params, [(ids, targets)], weights=[1]), wanted)


def test_a_batch_of_one_mapping() -> None:
    forward, params = hf.stateless(seeded(Tokens), params="head.*")
    batch = {"ids": classes(15, 7).view(3, 5), "mask": (normal(3, 5) > 0).double()}
    found = hf.ggn_diagonal(forward, lambda out, batch: of_tokens(out, batch["ids"]), params, [batch])
    wanted = exact(forward, lambda out, batch: of_tokens(out, batch["ids"]), params, batch, lambda x: x["logits"])
    agree(found, wanted)


def branching(p: Any, x: Tensor) -> Tensor:
    """What vmap refuses."""
    return x @ p["w"] if float(x.sum()) > 0 else -(x @ p["w"])


def nested(p: Any, x: Tensor) -> Tensor:
    return torch.tanh(x @ p["a"][0]) @ p["b"]["w"] + p["b"]["c"]


@pytest.mark.parametrize(
    ("forward", "params"),
    [
        (branching, {"w": normal(4, 3, seed=5)}),
        (nested, {"a": [normal(4, 5), None], "b": {"w": normal(5, 3, seed=7), "c": normal(3, seed=8)}}),
    ],
)
@pytest.mark.parametrize("kind", ["tensors", "arrays", "a loader", "one sample"])
def test_any_forward_any_tree_and_any_batches(forward: Any, params: Any, kind: str) -> None:
    batch = normal(6, 4).abs(), classes(6, 3)
    if kind == "one sample":
        batch = batch[0][:1], batch[1][:1]
    batches: Any = {
        "arrays": [tuple(x.numpy() for x in batch)],
        "a loader": DataLoader(TensorDataset(*batch), batch_size=4),
    }.get(kind, [batch])
    agree(hf.ggn_diagonal(forward, F.cross_entropy, params, batches), exact(forward, F.cross_entropy, params, batch))


def test_several_outputs_and_complex_ones() -> None:
    params, batch = {"w": normal(4, 3, seed=5)}, (normal(6, 4), classes(6, 3))

    def several(p: Any, x: Tensor) -> Any:
        return {"u": x @ p["w"], "v": [(x @ p["w"]).sin()], "n": 3}

    def of_both(out: Any, y: Tensor) -> Tensor:
        return F.cross_entropy(out["u"], y) + out["v"][0].square().mean()

    wanted = exact(
        lambda p, x: torch.cat([several(p, x)["u"], several(p, x)["v"][0]], 1),
        lambda out, y: of_both({"u": out[:, :3], "v": [out[:, 3:]]}, y),
        params,
        batch,
    )
    agree(hf.ggn_diagonal(several, of_both, params, [batch]), wanted)
    # The mean square of the entries of a real Fourier transform, by the real matrix that it is.
    parts = torch.view_as_real(torch.fft.rfft(torch.eye(3).double())).permute(1, 2, 0).reshape(4, 3)
    wanted = exact(lambda p, x: x @ p["w"] @ parts.T, lambda out, y: out.square().sum() / (2 * len(y)), params, batch)
    transformed = hf.ggn_diagonal(
        lambda p, x: torch.fft.rfft(x @ p["w"]), lambda out, y: out.abs().square().mean(), params, [batch]
    )
    agree(transformed, wanted)


@pytest.mark.slow
def test_a_model_of_hugging_face() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 11, "n_positions": 8}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    forward, params = hf.stateless(seeded(lambda: transformers.GPT2LMHeadModel(config)), params="*attn.c_attn.*")
    ids = classes(12, 11).view(3, 4)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def next_token(out: Any, batch: Any) -> Tensor:
        logits = out["logits"] if isinstance(out, dict) else out.logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())

    found = hf.ggn_diagonal(forward, next_token, params, [batch])
    as_dict = hf.stateless(seeded(lambda: transformers.GPT2LMHeadModel(config)), params="*attn.c_attn.*")[0]
    agree(found, exact(lambda p, b: {"logits": as_dict(p, b).logits}, next_token, params, batch, lambda x: x["logits"]))


def test_how_many_samples_at_a_time_changes_nothing() -> None:
    build, shape = NETS["mlp"]
    forward, params = hf.stateless(seeded(build))
    batch = normal(*shape), classes(shape[0], 3)
    whole = hf.ggn_diagonal(forward, nn.CrossEntropyLoss(), params, [batch])
    for options in ({"chunk_size": 1}, {"chunk_size": 4}, {"chunk_size": 100}, {"microbatch": 2}):
        agree(hf.ggn_diagonal(forward, nn.CrossEntropyLoss(), params, [batch], **options), whole, 1e-13)


@pytest.mark.parametrize("criterion", ["weighted", "mse"])
def test_a_data_set_is_one_batch_cut_in_pieces(criterion: str) -> None:
    """By what the criterion divides by: of class weights and ignored targets that is no number of samples."""
    function, targets = CRITERIA[criterion]
    forward, params = hf.stateless(seeded(NETS["mlp"][0]))
    inputs, wanted = normal(11, 4), targets(11)
    batches = [(inputs[a:b], wanted[a:b]) for a, b in ((0, 2), (2, 7), (7, 11))]
    agree(hf.ggn_diagonal(forward, function, params, batches), exact(forward, function, params, (inputs, wanted)))
    parts = [exact(forward, function, params, batch) for batch in batches]
    mean = tree.map(lambda a, b, c: (a + 2 * b + 5 * c) / 8, *parts)
    agree(hf.ggn_diagonal(forward, function, params, batches, weights=[1, 2, 5]), mean)


def test_traces_are_what_probes_estimate() -> None:
    forward, params = hf.stateless(seeded(NETS["conv"][0]))
    batch = normal(5, 1, 5, 5), classes(5, 3)
    traces = hf.ggn_traces(forward, nn.CrossEntropyLoss(), params, [batch])
    matvec = hf.ggnvp(forward, nn.CrossEntropyLoss(), params, batch)
    found = hf.hutchinson_per_leaf(matvec, hf.rademacher(params, 30))
    for name, trace in traces.items():
        assert (found.mean[name] - trace).abs() <= 4.5 * found.stderr[name], name


def test_float32_says_what_float64_does() -> None:
    model = seeded(lambda: conv_net(nn.BatchNorm2d(4)))
    batch = normal(20, 1, 5, 5), classes(20, 3)
    wide = hf.ggn_diagonal(*_given(model), [batch])
    narrow = hf.ggn_diagonal(*_given(model.float()), [(batch[0].float(), batch[1])])
    assert all(x.dtype == torch.float32 for x in narrow.values())
    agree(tree.map(Tensor.double, narrow), wide, 1e-5)


def _given(model: nn.Module) -> tuple[Any, Any, Any]:
    forward, params = hf.stateless(model)
    return forward, nn.CrossEntropyLoss(), params


def test_it_runs_under_vmap_and_autograd() -> None:
    forward, params = hf.stateless(seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))))
    inputs, targets = normal(2, 5, 4), classes(10, 3).view(2, 5)

    def total(p: Any, x: Tensor, y: Tensor) -> Tensor:
        traces = hf.ggn_traces(forward, F.cross_entropy, p, [(x, y)])
        return torch.stack(list(traces.values())).sum()

    looped = torch.stack([total(params, x, y) for x, y in zip(inputs, targets, strict=True)])
    assert torch.allclose(torch.func.vmap(total, (None, 0, 0))(params, inputs, targets), looped, rtol=1e-12)
    step, v = 1e-5, hf.gaussian(params, 1)[0]
    slope = tree.dot(torch.func.grad(total)(params, inputs[0], targets[0]), v)
    ends = [total(tree.add(params, v, c), inputs[0], targets[0]) for c in (step, -step)]
    assert torch.allclose(slope, (ends[0] - ends[1]) / (2 * step), rtol=1e-7)
    live = {name: p.clone().requires_grad_() for name, p in params.items()}
    gradient = torch.autograd.grad(total(live, inputs[0], targets[0]), list(live.values()))
    assert torch.allclose(tree.dot(dict(zip(live, gradient, strict=True)), v), slope, rtol=1e-12)


def test_nothing_of_the_callers_is_changed() -> None:
    model = seeded(lambda: conv_net(nn.BatchNorm2d(4)))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    state = torch.get_rng_state()
    hf.ggn_traces(*_given(model), [(normal(6, 1, 5, 5), classes(6, 3))])
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state()) and all(p.grad is None for p in model.parameters())


class Centred(nn.Module):
    """Takes the mean of the batch off, as some losses do: what a sample has depends on the others."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        return out - out.mean(0)


def contrastive(out: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(out @ out.T, torch.arange(len(out)))


@pytest.mark.parametrize(
    ("build", "criterion", "shape", "message"),
    [
        (lambda: conv_net(nn.BatchNorm2d(4)).train(), nn.CrossEntropyLoss(), (6, 1, 5, 5), "samples? .*eval"),
        (
            lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)),
            nn.CrossEntropyLoss(),
            (6, 4),
            "eval",
        ),
        (Centred, nn.CrossEntropyLoss(), (6, 4), "samples meet in the model"),
        (lambda: nn.Linear(4, 3), contrastive, (6, 4), "samples meet in the criterion"),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.Flatten(0)), lambda out, y: out[:4].square().sum(), (5, 4), ""),
    ],
)
def test_where_samples_meet_it_refuses(build: Any, criterion: Any, shape: tuple[int, ...], message: str) -> None:
    model = build().double()
    model.train()
    forward, params = hf.stateless(model)
    batch = normal(*shape), classes(shape[0], 3)
    if not message:  # entries of one sample's outputs that the criterion leaves out
        agree(
            hf.ggn_diagonal(forward, criterion, params, [batch], weights=[1]), exact(forward, criterion, params, batch)
        )
        return
    with pytest.raises(hf.HessfnError, match=message):
        hf.ggn_diagonal(forward, criterion, params, [batch], weights=[1])


def test_arguments_that_are_none() -> None:
    forward, criterion, params = _given(seeded(NETS["mlp"][0]))
    batch = normal(6, 4), classes(6, 3)
    with pytest.raises(ValueError, match=r"batches is a tuple of 2 with a tensor in it.* give \[batch\]"):
        hf.ggn_diagonal(forward, criterion, params, batch)
    with pytest.raises(ValueError, match="chunk_size=0 must be at least 1"):
        hf.ggn_traces(forward, criterion, params, [batch], chunk_size=0)
    with pytest.raises(ValueError, match="forward is the loss of functionalize"):
        hf.ggn_traces(hf.functionalize(seeded(NETS["mlp"][0]), criterion)[0], criterion, params, [batch])
    with pytest.raises(ValueError, match="CrossEntropyLoss.* is a sum over samples"):
        hf.ggn_traces(forward, nn.CrossEntropyLoss(reduction="sum"), params, [batch, batch])
    with pytest.raises(ValueError, match="single number"):
        hf.ggn_traces(
            lambda p, x: {"loss": forward(p, x).square().mean(), "out": forward(p, x)},
            lambda o, y: o["loss"],
            params,
            [batch],
        )
