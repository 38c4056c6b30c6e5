"""Attention by tiles and cross-entropy in chunks, against dense Hessians by torch's own operations, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import seeded
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import hessfn as hf
from hessfn.engine import pipeline
from hessfn.engine.fused import attention, cross_entropy, logits, tiles
from hessfn.engine.op_definitions import by_definition

LENGTH, WIDTH, CLASSES = 13, 8, 11
SOME = torch.rand(LENGTH, LENGTH, generator=torch.Generator().manual_seed(1)) > 0.3
SOME[3] = False  # attends to nothing
ADDED = torch.randn(2, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


class Attending(nn.Module):
    def __init__(self, num_keys: int = LENGTH, grouped: bool = False, **how: Any) -> None:
        super().__init__()
        self.num_keys, self.grouped, self.how = num_keys, grouped, how
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        k, v = k[:, :, : self.num_keys], v[:, :, : self.num_keys]
        if self.grouped:
            k, v = k[:, :1], v[:, :1]
        found = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.grouped, **self.how)
        return self.out(found.transpose(1, 2).flatten(2)).tanh()


class Classifying(nn.Module):
    def __init__(self, bias: bool = True, shifted: bool = False, scaled: bool = False) -> None:
        super().__init__()
        self.shifted, self.scaled = shifted, scaled
        self.hidden, self.head = nn.Linear(5, 6), nn.Linear(6, CLASSES, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        z = self.head(self.hidden(x).tanh())
        z = z[:, :-1].contiguous() if self.shifted else z
        return (2 * z if self.scaled else z).reshape(-1, CLASSES)


ATTENTION = {
    "plain": {},
    "causal": {"is_causal": True},
    "causal, fewer keys": {"is_causal": True, "num_keys": 9},
    "boolean mask": {"attn_mask": SOME},
    "added mask, scale": {"attn_mask": ADDED, "scale": 0.9},
    "added mask for all": {"attn_mask": ADDED[:1]},
    "grouped": {"is_causal": True, "grouped": True},
}
WEIGHTS = torch.linspace(0.5, 2, CLASSES, dtype=torch.float64)
CRITERIA: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "no bias, sum": ({"bias": False}, {"reduction": "sum"}),
    "shifted, ignored": ({"shifted": True}, {"ignore_index": 3}),
    "smoothed, no head": ({"scaled": True}, {"label_smoothing": 0.1}),
    "all": ({"shifted": True, "bias": False}, {"label_smoothing": 0.1, "weight": WEIGHTS, "ignore_index": 2}),
}


@pytest.fixture
def in_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles and chunks so small that even these nets have several."""
    monkeypatch.setattr(attention, "WORTH", 1)
    monkeypatch.setattr(cross_entropy, "WORTH", 1)
    monkeypatch.setattr(tiles, "COLUMNS", 5)
    monkeypatch.setattr(tiles, "ENTRIES", 2 * 5 * LENGTH)
    monkeypatch.setattr(logits, "ENTRIES", 7 * CLASSES)


def attending(how: dict[str, Any]) -> tuple[nn.Module, nn.Module, tuple[Tensor, Tensor]]:
    x = torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(3)).double()
    y = torch.randn(2, LENGTH, 2, generator=torch.Generator().manual_seed(4)).double()
    return seeded(lambda: Attending(**how)), nn.MSELoss(), (x, y)


def classifying(net: dict[str, Any], how: dict[str, Any]) -> tuple[nn.Module, nn.Module, tuple[Tensor, Tensor]]:
    x = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(3)).double()
    y = torch.randint(CLASSES, (3, 8 - net.get("shifted", False)), generator=torch.Generator().manual_seed(4))
    return seeded(lambda: Classifying(**net)), nn.CrossEntropyLoss(**how), (x, y.flatten())


def truth(loss: Any, params: Any, batch: Any) -> Tensor:
    flat, unravel = hf.tree.ravel(params)
    with sdpa_kernel(SDPBackend.MATH):
        return torch.autograd.functional.hessian(lambda w: loss(unravel(w), batch), flat)


def require_right(problem: Any, fused: Any) -> None:
    loss, params = hf.functionalize(problem[0], problem[1])
    batch, expected = problem[2], truth(loss, params, problem[2])
    made = {
        "traced": hf.hvp(loss, params, batch, trace_after=0),
        "linearized": hf.linearized_hvp(loss, params, batch),
        "double_backward": hf.hvp(loss, params, batch, mode="double_backward"),
    }
    for name, matvec in made.items():
        assert torch.allclose(hf.dense(matvec, params), expected, rtol=1e-10, atol=1e-12), name
    graph = pipeline.run(pipeline.LOSS, None, pipeline.Job(by_definition(loss), params, (batch,))).graph
    assert len(graph.find_nodes(op="call_function", target=fused)) == 1
    # Where transforms see operations, they see the definition.
    for name in ("traced", "linearized"):
        assert torch.allclose(hf.dense(made[name], params, batch_size=32), expected, rtol=1e-10, atol=1e-12), name


HOWS = [pytest.param(how, id=name, marks=[pytest.mark.slow] * (name != "causal")) for name, how in ATTENTION.items()]


@pytest.mark.parametrize("how", HOWS)
def test_attention_by_tiles_is_attention(in_small: None, how: dict[str, Any]) -> None:
    require_right(attending(how), attention.attention)


@pytest.mark.parametrize(("net", "how"), CRITERIA.values(), ids=CRITERIA)
def test_cross_entropy_in_chunks_is_cross_entropy(in_small: None, net: Any, how: Any) -> None:
    problem = classifying(net, how)
    require_right(problem, cross_entropy.losses)
    loss, params = hf.functionalize(*problem[:2])
    module = pipeline.run(pipeline.LOSS, None, pipeline.Job(by_definition(loss), params, (problem[2],)))
    (node,) = module.graph.find_nodes(op="call_function", target=cross_entropy.losses)
    through_head = node.args[1] is not None
    assert through_head is not net.get("scaled", False)
    wide = [n for n in module.graph.nodes if "val" in n.meta and n.meta["val"].shape[-1:] == (CLASSES,)]
    assert not through_head or all(n.meta["val"].dim() < 2 or len(n.meta["val"]) < 7 for n in wide)


def test_a_mask_that_is_learned_has_its_gradient(in_small: None) -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias, self.net = nn.Parameter(torch.randn(LENGTH, LENGTH)), Attending()

        def forward(self, x: Tensor) -> Tensor:
            self.net.how = {"attn_mask": self.bias}
            return self.net(x)

    problem = attending({})
    loss, params = hf.functionalize(seeded(Biased), problem[1])
    v = hf.gaussian(params, 1)[0]
    flat, unravel = hf.tree.ravel(params)
    expected = unravel(truth(loss, params, problem[2]) @ hf.tree.ravel(v)[0])
    for matvec in (hf.hvp(loss, params, problem[2], trace_after=0), hf.linearized_hvp(loss, params, problem[2])):
        found = matvec(v)
        assert all(torch.allclose(found[name], expected[name], rtol=1e-9, atol=1e-12) for name in expected)
    assert expected["bias"].norm() > 0 and flat.numel() > LENGTH**2


@pytest.mark.parametrize("problem", [attending({"is_causal": True}), classifying({}, {})], ids=["attention", "entropy"])
def test_a_product_has_derivatives_by_the_parameters(in_small: None, problem: Any) -> None:
    loss, params = hf.functionalize(*problem[:2])
    flat, unravel = hf.tree.ravel(params)
    v, along = (hf.tree.ravel(x)[0] for x in hf.gaussian(params, 2))

    def form(w: Tensor) -> Tensor:
        return hf.tree.dot(unravel(v), hf.hvp(loss, unravel(w), problem[2])(unravel(v)))

    point = flat.clone().requires_grad_()
    (slope,) = torch.autograd.grad(form(point), point)
    h = 1e-5
    difference = (form(flat + h * along) - form(flat - h * along)) / (2 * h)
    assert float(slope @ along) == pytest.approx(float(difference), rel=1e-5)


def test_a_language_model_never_has_its_logits_or_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    # The graph of a product of a net as large as those that are fused by themselves.
    length, classes = 512, 4096
    net = nn.Sequential(nn.Embedding(classes, 16), Attending_of(16), nn.Linear(16, classes), nn.Flatten(0, 1)).eval()
    ids = torch.randint(classes, (1, length + 1), generator=torch.Generator().manual_seed(0))
    loss, params = hf.functionalize(net, nn.CrossEntropyLoss())
    job = pipeline.Job(by_definition(loss), params, ((ids[:, :-1], ids[:, 1:].flatten()),))
    module = pipeline.run(pipeline.LOSS + pipeline.PRODUCT, None, job)
    sizes = [n.meta["val"].numel() for n in module.graph.nodes if n.op == "call_function" and "val" in n.meta]
    assert max(sizes) <= max(classes * 16, length * 48)


class Attending_of(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("mode", ["auto", "double_backward"])
def test_float32_is_as_exact_as_before(mode: Any) -> None:
    # Long enough to be fused, and small enough for a dense product in float64 by torch's own operations.
    problem = attending({"is_causal": True})
    net = seeded(lambda: Attending(is_causal=True))
    x = torch.randn(1, 600, WIDTH, generator=torch.Generator().manual_seed(5)).double()
    batch = (x, torch.zeros(1, 600, 2).double())
    net.num_keys = 600
    loss, params = hf.functionalize(net, problem[1])
    v = hf.gaussian(params, 1)[0]
    with sdpa_kernel(SDPBackend.MATH):
        _, expected = torch.autograd.functional.hvp(
            lambda *w: loss(dict(zip(params, w, strict=True)), batch), tuple(params.values()), tuple(v.values())
        )
    narrow, loss32 = hf.tree.map(Tensor.float, (params, v, batch)), hf.functionalize(net.float(), problem[1])[0]
    found = hf.hvp(loss32, narrow[0], narrow[2], mode=mode, trace_after=0)(narrow[1])
    apart = hf.tree.norm([f.double() - e for f, e in zip(found.values(), expected, strict=True)])
    assert float(apart) < 1e-5 * float(hf.tree.norm(list(expected)))
