"""Hugging Face models: batches are mappings, outputs are objects, losses are averaged over tokens."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from nets import dense_hessian

import hessfn as hf
from hessfn.core import tree
from hessfn.reporting.cli import main

transformers = pytest.importorskip("transformers")


def gpt2():
    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, n_inner=8)
    return transformers.GPT2LMHeadModel(config)


def bert():
    config = transformers.BertConfig(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
    )
    return transformers.BertForSequenceClassification(config)


def build(kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind().double().eval()


def tokens(*shape, seed=0):
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(seed))


def next_token(outputs, labels):
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)


def check(loss, params, batch, rtol=1e-10):
    matvec = hf.hvp(loss, params, batch)
    hessian = dense_hessian(loss, params, batch)
    for i, v in enumerate(hf.gaussian(params, 2, seed=1)):
        wanted = hessian @ tree.ravel(v)[0]
        assert torch.allclose(tree.ravel(matvec(v))[0], wanted, atol=rtol * float(wanted.abs().max())), i
    assert hf.find_mode(loss, params, batch).mode in ("traced", "forward")


@pytest.mark.parametrize("kind", [gpt2, bert])
def test_a_model_that_computes_its_own_loss(kind):
    loss, params = hf.functionalize(build(kind), lambda outputs, batch: outputs.loss)
    labels = tokens(2, 6) if kind is gpt2 else torch.tensor([0, 1])
    # Its own loss is computed in float32, whatever the dtype of the model.
    check(loss, params, {"input_ids": tokens(2, 6), "attention_mask": torch.ones(2, 6).long(), "labels": labels}, 1e-5)


def test_a_criterion_on_the_output_object():
    loss, params = hf.functionalize(build(gpt2), next_token)
    ids = tokens(2, 6)
    check(loss, params, ({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids))


def test_a_loss_averaged_over_tokens_is_weighed_by_its_tokens():
    loss, params = hf.functionalize(build(gpt2), next_token)
    ids, labels = tokens(4, 6), tokens(4, 6).clone()
    labels[0, 2:] = labels[3, 4:] = -100
    batches = [({"input_ids": ids[rows]}, labels[rows]) for rows in (slice(0, 1), slice(1, 4))]
    v = hf.gaussian(params, 1)[0]
    whole = hf.hvp(loss, params, ({"input_ids": ids}, labels))(v)
    by_tokens = hf.mean_hvp(loss, params, batches, weights=lambda batch: (batch[1][:, 1:] != -100).sum())(v)
    assert tree.norm(tree.add(whole, by_tokens, -1.0)) <= 1e-10 * tree.norm(whole)
    with pytest.raises(hf.HessfnError, match="no mean over samples by these weights.*weights="):
        hf.mean_hvp(loss, params, batches)(v)


def test_the_loss_of_a_causal_model_is_weighed_by_the_labels_that_count():
    model = build(gpt2)
    ids, labels = tokens(4, 6), tokens(4, 6).clone()
    labels[0, 2:] = labels[3, 4:] = -100
    batches = [{"input_ids": ids[rows], "labels": labels[rows]} for rows in (slice(0, 1), slice(1, 4))]
    loss, params = hf.functionalize(model, lambda outputs, batch: outputs.loss)
    v = hf.gaussian(params, 1)[0]
    whole = hf.hvp(loss, params, {"input_ids": ids, "labels": labels})(v)
    for microbatch in (None, 2):
        found = hf.mean_hvp(loss, params, batches, microbatch=microbatch)(v)
        assert tree.norm(tree.add(whole, found, -1.0)) <= 1e-5 * tree.norm(whole)


@pytest.mark.slow
def test_the_page_is_a_problem_of_the_command_line(tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "howto" / "huggingface.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page.partition("## Your own criterion")[0], re.DOTALL | re.MULTILINE)
    (command,) = re.findall(r"^hessfn (report .*)$", page, re.MULTILINE)
    shown = float(re.findall(r"^([\d.]+) True$", page, re.MULTILINE)[0])
    (tmp_path / "texts.py").write_text("\n".join(blocks), "utf-8")
    monkeypatch.chdir(tmp_path)
    quick = "-k 1 --num-probes 3 --num-runs 1 --num-steps 8 --num-plane-points 0 --num-activation-probes 2"
    with torch.random.fork_rng(devices=[]):
        assert main([*shlex.split(command), *quick.split()]) == 0
    result = json.loads((tmp_path / "report" / "report.json").read_text("utf-8"))
    assert result["sharpness"]["value"] == pytest.approx(shown, abs=0.06)
