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


def trained_gpt(batches: int = 20, batch: int = 4) -> tuple[nn.Module, nn.Module, list[tuple[Tensor, Tensor]]]:
    """A small GPT that has learned part of a Markov chain, and a data set of so many batches of it.

    Data and training are in float64 from seeds, so that the net is the same everywhere but for rounding.
    """
    length, tokens, draw = 64, 64, torch.Generator().manual_seed(0)
    chances = torch.softmax(3 * torch.randn(tokens, tokens, generator=draw, dtype=torch.float64), 1)
    ids = [torch.randint(tokens, (batches * batch,), generator=draw)]
    for _ in range(length):
        ids.append(torch.multinomial(chances[ids[-1]], 1, generator=draw).squeeze(1))
    text, criterion = torch.stack(ids, 1), nn.CrossEntropyLoss()
    data = [(part[:, :-1].contiguous(), part[:, 1:].flatten()) for part in text.split(batch)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT(tokens, width=64, layers=2, length=length).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for inputs, targets in 10 * data:
        optimizer.zero_grad()
        criterion(model(inputs), targets).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.float().eval(), criterion, data


MODELS = {"resnet20": resnet20, "gpt": gpt, "mlp": mlp}
