"""Language models as Hugging Face writes them: products in float64 against differences, traces, fused operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_families import DECODER, TEXTS, Case, transformer
from test_model_families import Wide, copied, differences, drawn
from torch import Tensor, nn

import hessfn as hf
from hessfn.core import tree
from hessfn.engine.fused import attention, cross_entropy, logits, tiles
from hessfn.products.loss_memory import memory_of, shapes_of

pytest.importorskip("transformers", minversion="5.0")

LENGTH, LAYERS = 7, 2
TIED = {**DECODER, "num_hidden_layers": LAYERS, "tie_word_embeddings": True}
WINDOWS = {**TIED, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": ("GPT2LMHeadModel", {**TEXTS["GPT-2"][1], "n_layer": LAYERS}),
    "Llama": ("LlamaForCausalLM", TIED),
    "Qwen 2": ("Qwen2ForCausalLM", {**WINDOWS, "use_sliding_window": True, "max_window_layers": 0}),
    "Qwen 3": ("Qwen3ForCausalLM", {**TIED, "tie_word_embeddings": False}),
    "Gemma": ("GemmaForCausalLM", TIED),
    "Gemma 2": ("Gemma2ForCausalLM", {**WINDOWS, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 2.0}),
    "Gemma 3": ("Gemma3ForCausalLM", WINDOWS),
}
CAPPED = (
    "Gemma 2",
)  # whose scores go through a tanh: no scaled dot products, and no cross-entropy of a matrix product
CASES = [(name, kind) for name in MODELS for kind in ("sdpa", "eager") if kind == "eager" or name not in CAPPED]


def built(name: str, kind: str = "sdpa") -> Callable[[], nn.Module]:
    return lambda: transformer(MODELS[name][0], kind, MODELS[name][1])


def batch_of(*lengths: int, seed: int = 0) -> dict[str, Tensor]:
    """Texts of so many tokens, every second one padded on the left, with a label for each token that is predicted."""
    ids = torch.randint(3, 13, (len(lengths), LENGTH), generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros_like(ids)
    for i, n in enumerate(lengths):
        mask[i, slice(n) if i % 2 else slice(LENGTH - n, None)] = 1
    labels = ids.masked_fill(mask == 0, -100)
    for i, n in enumerate(lengths):
        if not i % 2 and n < LENGTH:
            labels[i, LENGTH - n] = -100  # a pad would predict it
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def own_loss(outputs: Any, batch: Any) -> Tensor:
    return outputs.loss


def next_token(outputs: Any, batch: Any) -> Tensor:
    return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def in_double(function: Any) -> Any:
    """The same, with nothing cast to float32 on the way, as norms, softmax and losses of these models do."""

    def wide(*args: Any) -> Any:
        with Wide():
            return function(*args)

    return wide


def error(found: Any, truth: Tensor) -> float:
    return float((tree.ravel(found)[0] - truth).norm() / truth.norm())


def gauss_newton(model: nn.Module, batch: Any, v: Any) -> Tensor:
    """``J' H_out J v``: ``J v`` by differences of outputs, ``J'`` and ``H_out`` by plain autograd."""
    moved, starts = copied(model), dict(model.named_parameters())
    leaves, inputs = dict(moved.named_parameters()), {k: x for k, x in batch.items() if k != "labels"}

    def logits(c: float) -> Tensor:
        with torch.no_grad():
            for name, p in leaves.items():
                p.copy_(starts[name] + c * v[name])
        with Wide():
            return moved(**inputs).logits

    h = 1e-4 / float(tree.norm(v))

    def slope(h: float) -> Tensor:
        return (logits(h).detach() - logits(-h).detach()) / (2 * h)

    image = (4 * slope(h / 2) - slope(h)) / 3
    out = logits(0.0)
    at = out.detach().requires_grad_()
    with Wide():
        value = F.cross_entropy(at[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    (gradient,) = torch.autograd.grad(value, at, create_graph=True)
    (image,) = torch.autograd.grad(gradient, at, image)
    return torch.cat([g.flatten() for g in torch.autograd.grad(out, list(leaves.values()), image)])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), CASES, ids=map(", ".join, CASES))
def test_products_are_right_in_a_trace(name: str, kind: str) -> None:
    model, batch = drawn(built(name, kind)), batch_of(5, 4, LENGTH)
    loss, params = hf.functionalize(model, own_loss)
    v = hf.gaussian(params, 1, seed=5)[0]
    truth, wide = differences(model, Case("", built(name, kind), batch), v), in_double(loss)
    # Eager attention casts its scores to float32, in which the mask of float64 is infinite: a padded row is then NaN.
    assert hf.find_mode(loss if kind == "sdpa" else wide, params, batch).mode == "traced"
    assert error(hf.hvp(wide, params, batch, mode="traced", check=False)(v), truth) <= 1e-7
    assert error(hf.linearized_hvp(wide, params, batch, check=False)(v), truth) <= 1e-7
    forward = in_double(hf.stateless(model)[0])
    inputs = {key: x for key, x in batch.items() if key != "labels"}
    product = hf.ggnvp(forward, lambda out, batch: next_token(out, batch), params, (inputs, batch))(v)
    assert error(product, gauss_newton(model, batch, v)) <= 1e-7


@pytest.mark.parametrize("name", ["Llama", pytest.param("Gemma 3", marks=pytest.mark.slow)])
def test_a_trace_serves_other_masks_and_another_branch_has_its_own(name: str) -> None:
    """Transformers look whether a mask hides anything, and take another attention where it does not."""
    model = drawn(built(name))
    loss, params = hf.functionalize(model, own_loss)
    wide, v = in_double(loss), hf.gaussian(params, 1, seed=5)[0]
    batches = [batch_of(5, 4, seed=1), batch_of(3, 6, seed=2), batch_of(LENGTH, LENGTH, seed=3)]
    key = shapes_of((params, (batches[0],)))
    num_traces = []
    for batch in batches:
        truth = differences(model, Case("", built(name), batch), v)
        assert error(hf.hvp(wide, params, batch, mode="traced", check=False)(v), truth) <= 1e-7
        num_traces.append(len(memory_of(wide).traces[key]))
    assert num_traces == [1, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "counted"), [*((name, False) for name in MODELS), ("Llama", True)])
def test_attention_and_cross_entropy_are_fused(name: str, counted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "WORTH", 1)
    monkeypatch.setattr(cross_entropy, "WORTH", 1)
    monkeypatch.setattr(tiles, "COLUMNS", 3)
    monkeypatch.setattr(logits, "ENTRIES", 5 * 13)
    build = built(name, "eager" if name in CAPPED else "sdpa")
    model, batch = drawn(build), batch_of(5, 4, LENGTH)
    if counted:  # a sum over the labels, divided by their number in all batches of a step
        batch["num_items_in_batch"] = torch.tensor(20)
    loss, params = hf.functionalize(model, own_loss)
    wide = in_double(loss)
    v = hf.gaussian(params, 1, seed=5)[0]
    product = hf.hvp(wide, params, batch, mode="traced", check=False)(v)
    assert error(product, differences(model, Case("", build, batch), v)) <= 1e-7
    (trace,) = memory_of(wide).traces[shapes_of((params, (batch,)))]
    of_attention = trace.loss.graph.find_nodes(op="call_function", target=attention.attention)
    assert len(of_attention) == (0 if name in CAPPED else LAYERS)
    (of_entropy,) = trace.loss.graph.find_nodes(op="call_function", target=cross_entropy.losses)
    assert (of_entropy.args[1] is None) == (name in CAPPED)
