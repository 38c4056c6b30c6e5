"""Why a mode is not taken is said in a few words, which are the user's, and no reason twice."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import hessfn as hf


class Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        return g * ctx.saved_tensors[0].cos()


class SineOnce(Sine):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Any) -> Any:
        return g * ctx.saved_tensors[0].cos()


def checkpointed(w: Any) -> Any:
    total = checkpoint(lambda x: x.sin().pow(2), w, use_reentrant=False).sum()
    return 2 * total if total > 0 else total


def hooked(w: Any) -> Any:
    y = w * 1
    if y.requires_grad:
        y.register_hook(lambda g: g * 1)
    return y.pow(3).sum()


PROGRAMS: dict[str, tuple[Any, str, str]] = {
    "a Function of the old style": (lambda w: Sine.apply(w).pow(2).sum(), "double_backward", "autograd.Function"),
    "once differentiable": (lambda w: SineOnce.apply(w).pow(2).sum(), "difference", "once"),
    "checkpointing and control flow": (checkpointed, "double_backward", "checkpointing"),
    "no forward rule": (lambda w: F.multi_margin_loss(w.view(2, 3).exp(), torch.tensor([0, 2])), "traced", ""),
    "a branch": (lambda w: w.pow(3).sum() if w.sum() > 0 else w.sum(), "forward", "branches on"),
    "NumPy": (lambda w: w.pow(3).sum() * float(w.detach().numpy()[0]), "double_backward", "value of a tensor"),
    "no second derivative": (
        lambda w: F.embedding_bag(torch.tensor([[0, 1]]), w.view(3, 2), mode="max").pow(2).sum(),
        "difference",
        "no second derivative of _embedding_bag_backward",
    ),
    "a transducer": (
        lambda w: F.ctc_loss(
            w.view(3, 1, 2).log_softmax(-1), torch.tensor([[1]]), torch.tensor([3]), torch.tensor([1])
        ),
        "difference",
        "no second derivative of _ctc_loss_backward",
    ),
    "a hook": (hooked, "traced", ""),
    "a segment": (
        lambda w: torch.segment_reduce(w, "sum", lengths=torch.tensor([2, 4])).pow(2).sum(),
        "difference",
        "no second derivative of _segment_reduce_backward",
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_reason_is_short_and_told_once(name: str) -> None:
    loss, mode, words = PROGRAMS[name]
    w = torch.linspace(0.1, 1.0, 6, dtype=torch.float64)
    found = hf.find_mode(loss, w)
    assert found.mode == mode, found
    assert words in found.reason
    modes = r"(?:^|; )(?:(?:traced|forward|reverse|double_backward)(?:, )?)+: "
    reasons = re.split(modes, found.reason)[1:]
    assert len(set(reasons)) == len(reasons) and bool(reasons) == bool(found.reason)
    assert all(len(why) <= 220 and "Please" not in why and "open an issue" not in why for why in reasons)


def test_an_error_of_the_loss_itself_is_the_users() -> None:
    def broken(w: Any) -> Any:
        raise KeyError("blue")

    w = torch.ones(3, 2, dtype=torch.float64)
    with pytest.raises(KeyError, match="blue"):
        hf.hvp(broken, w)(w)
