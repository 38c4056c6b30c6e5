"""Products in bfloat16, by weights and by autocast, of a language model as it is written, against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from model_families import TEXTS, Case, transformer
from test_language_models import batch_of, gauss_newton, next_token, own_loss
from test_model_families import differences
from torch import Tensor, nn

import hessfn as hf
from hessfn.core import tree
from hessfn.engine import pipeline
from hessfn.engine.fused import attention
from hessfn.engine.op_definitions import by_definition

pytest.importorskip("transformers", minversion="5.0")

EPS = torch.finfo(torch.bfloat16).eps  # 0.0078
HOW = ("weights", "autocast")


class Narrow(NamedTuple):
    model: nn.Module  # in float64, whose parameters are numbers of bfloat16
    loss: Any
    forward: Any
    params: Any
    v: Any  # a vector of such numbers
    batch: Any


def narrow(how: str, kind: str = "sdpa") -> Narrow:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = {**TEXTS["GPT-2"][1], "n_embd": 32, "n_layer": 2, "vocab_size": 40}
        model = transformer("GPT2LMHeadModel", kind, config).eval().bfloat16()
    exact = transformer("GPT2LMHeadModel", kind, config).eval().double()
    exact.load_state_dict(model.state_dict())
    model = model if how == "weights" else model.float()
    loss, params = hf.functionalize(model, own_loss)
    forward = hf.stateless(model)[0]
    if how == "autocast":
        loss, forward = under_autocast(loss), under_autocast(forward)
    v = tree.map(lambda x: x.bfloat16().to(next(model.parameters()).dtype), hf.gaussian(params, 1, seed=1)[0])
    return Narrow(exact, loss, forward, params, v, batch_of(7, 5, 6, 4))


def under_autocast(function: Any) -> Any:
    def cast(*args: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return function(*args)

    return cast


def in_double(x: Any) -> Any:
    return tree.map(Tensor.double, x)


def error(found: Any, truth: Tensor) -> float:
    return float((tree.ravel(found)[0].double() - truth).norm() / truth.norm())


PRODUCTS: dict[str, Callable[..., Any]] = {
    "forward": lambda *args: hf.hvp(*args, mode="forward"),
    "traced": lambda *args: hf.hvp(*args, mode="traced"),
    "as it is": lambda *args: hf.hvp(*args, mode="double_backward"),
    "linearized": hf.linearized_hvp,
}


@pytest.mark.slow
@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("how", HOW)
def test_products_are_off_by_the_rounding_of_bfloat16(how: str, tiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss, _, params, v, batch = narrow(how)
    if tiled:
        monkeypatch.setattr(attention, "WORTH", 1)
        graph = pipeline.run(pipeline.LOSS, None, pipeline.Job(by_definition(loss), params, (batch,))).graph
        assert len(graph.find_nodes(op="call_function", target=attention.attention)) == 2
    assert hf.find_mode(loss, params, batch).mode == "traced"
    truth = differences(model, Case("", lambda: model, batch), in_double(v))
    w = tree.map(lambda x: x.bfloat16().to(x.dtype), hf.gaussian(params, 1, seed=2)[0])
    for name, make in PRODUCTS.items():
        matvec = make(loss, params, batch)
        along_v, along_w = matvec(v), matvec(w)
        assert EPS / 50 < error(along_v, truth) < 1.5 * EPS, name
        asymmetry = abs(float(tree.dot(w, along_v) - tree.dot(v, along_w)))
        assert asymmetry < EPS * float(tree.norm(w)) * float(truth.norm()), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("how", HOW)
def test_gauss_newton_products_are_off_by_the_rounding_of_bfloat16(how: str, kind: str) -> None:
    model, _, forward, params, v, batch = narrow(how, kind)

    def criterion(outputs: Any, batch: Any) -> Tensor:
        return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten())

    inputs = {name: x for name, x in batch.items() if name != "labels"}
    found = hf.ggnvp(forward, criterion, params, (inputs, batch))(v)
    assert EPS / 50 < error(found, gauss_newton(model, batch, in_double(v))) < 1.5 * EPS


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_the_stated_rounding_covers_exact_eigenvalues(how: str) -> None:
    model, loss, _, params, _, batch = narrow(how)
    matvec = hf.hvp(loss, params, batch, mode="traced")
    exact_loss, wide = hf.functionalize(model, next_token)
    exact = hf.hvp(exact_loss, wide, batch, mode="traced")
    found = hf.eigsh(matvec, hf.gaussian(params, 1)[0], k=3, which="LA", rtol=1e-2)
    truth = hf.eigsh(exact, hf.gaussian(wide, 1)[0], k=6, which="LA", rtol=1e-5)
    rounding = hf.rounding_of_pairs(matvec, exact, found)
    nearest = (found.values[:, None] - truth.values).abs().min(1).values
    assert (nearest <= found.residuals + rounding).all()
    assert (rounding <= 4 * EPS * found.values).all()  # it is not far too wide
