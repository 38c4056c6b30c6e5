"""The models of the benchmarks: ResNet20 on CIFAR-10 (trained where its files are there), a small GPT, an MLP."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessfn import problems

DATA = Path(os.environ.get("HESSFN_DATA", Path(__file__).parents[3] / "shared" / "data"))
FILES = {"weights": DATA / "resnet20_cifar10_trained.pth", "data": DATA / "cifar10_train_first4000.npz"}

Problem = tuple[nn.Module, nn.Module, tuple[Tensor, Tensor]]


def resnet20(batch: int = 128) -> Problem:
    if all(path.is_file() for path in FILES.values()):
        model, criterion, batches = problems.cifar10_resnet20(**FILES, num_images=batch, batch_size=batch)
        return model, criterion, batches[0]
    from pytorchcv.model_provider import get_model

    torch.manual_seed(0)
    images = torch.randn(batch, 3, 32, 32)
    return get_model("resnet20_cifar10").eval(), nn.CrossEntropyLoss(), (images, torch.randint(10, (batch,)))


def mlp(batch: int = 512, width: int = 512) -> Problem:
    torch.manual_seed(0)
    layers = nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    return nn.Sequential(*layers).eval(), nn.CrossEntropyLoss(), (torch.randn(batch, 784), torch.randint(10, (batch,)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, tokens: int = 256, width: int = 128, layers: int = 4, length: int = 128) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(tokens, width), nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*[Block(width, 4) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens, bias=False)

    def forward(self, ids: Tensor) -> Any:
        return self.head(self.norm(self.blocks(self.token(ids) + self.place))).flatten(0, 1)


def gpt(batch: int = 8) -> Problem:
    torch.manual_seed(0)
    ids = torch.randint(256, (batch, 129))
    return GPT().eval(), nn.CrossEntropyLoss(), (ids[:, :-1], ids[:, 1:].flatten())


MODELS = {"resnet20": resnet20, "gpt": gpt, "mlp": mlp}
