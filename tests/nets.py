"""Small float64 problems with known, dense Hessians, shared by the tests."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hessfn
from hessfn.losses.functional import functionalize


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A float64 module in eval mode whose parameters and buffers are a function of the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build().double().eval()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
        for p in model.parameters():
            if p.dim() == 1:  # biases and norm scales that are zero or one would hide errors
                p.data.add_(0.3 * torch.randn_like(p))
    return model


needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile and kernel.c need a compiler"
)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def classes(n: int, high: int, seed: int = 2) -> Tensor:
    return torch.randint(high, (n,), generator=torch.Generator().manual_seed(seed))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.norm = nn.Linear(4, 12), nn.Linear(4, 3), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unsqueeze(1).chunk(3, dim=-1)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1).mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.rnn, self.out = kind(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0][:, -1])


def conv_net(*norms: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        *norms,
        nn.Softplus(),
        nn.Conv2d(4, 2, 2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (6, 4)),
    "conv": (lambda: conv_net(), (5, 1, 5, 5)),
    "batch_norm": (lambda: conv_net(nn.BatchNorm2d(4)), (5, 1, 5, 5)),
    "group_norm": (lambda: conv_net(nn.GroupNorm(2, 4)), (5, 1, 5, 5)),
    "layer_norm": (lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 3)), (6, 4)),
    "rms_norm": (lambda: nn.Sequential(nn.Linear(4, 5), nn.RMSNorm(5), nn.SiLU(), nn.Linear(5, 3)), (6, 4)),
    "attention": (Attention, (4, 5, 4)),
    "lstm": (Recurrent, (4, 5, 4)),
}


def focal(outputs: Tensor, targets: Tensor) -> Tensor:
    p = outputs.softmax(1).gather(1, targets[:, None])
    return (-((1 - p) ** 2) * p.log()).mean()


CRITERIA: dict[str, tuple[Callable[[Any, Any], Tensor], Callable[[int], Tensor]]] = {
    "cross_entropy": (nn.CrossEntropyLoss(), lambda n: classes(n, 3)),
    "mse": (nn.MSELoss(), lambda n: normal(n, 3, seed=3)),
    "custom": (focal, lambda n: classes(n, 3)),
}


def problem(net: str, criterion: str = "cross_entropy", seed: int = 0) -> tuple[Any, Any, Any, nn.Module]:
    """``(loss, params, batch, model)`` of a net and a criterion by name."""
    build, shape = NETS[net]
    function, targets = CRITERIA[criterion]
    model = seeded(build, seed)
    loss, params = functionalize(model, function)
    return loss, params, (normal(*shape), targets(shape[0])), model


def dense_hessian(loss: Any, params: Any, *args: Any) -> Tensor:
    """The Hessian by torch's own double backward, one row at a time: what every product is held against."""
    flat, unravel = hessfn.tree.ravel(params)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return torch.autograd.functional.hessian(lambda p: loss(unravel(p), *args), flat)


def two_convolutions(channels: int, n: int, size: int, dtype: torch.dtype = torch.float64) -> tuple[Any, Any, Tensor]:
    """A loss, its parameters and its images."""
    params = {name: normal(channels, channels, 3, 3).to(dtype) / (9 * channels) ** 0.5 for name in ("first", "second")}
    params["bias"] = normal(channels).to(dtype)

    def loss(p: Any, x: Tensor) -> Tensor:
        hidden = F.conv2d(x, p["first"], p["bias"], padding=1).tanh()
        return F.conv2d(hidden, p["second"], padding=1).square().mean()

    return loss, params, normal(n, channels, size, size).to(dtype)
