"""The nets and data of bench_gpu.py, at full size for a GPU and tiny, so that a CPU can try the script itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from models import FILES, GPT, Block
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
Problem = tuple[nn.Module, nn.Module, Batch]
Job = tuple[nn.Module, nn.Module, list[Batch]]

SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "full": {
        "resnet18": {"batch": 512, "pixels": 32, "blocks": (2, 2, 2, 2)},
        "resnet50": {"batch": 64, "pixels": 224, "blocks": (3, 4, 6, 3), "classes": 1000},
        "vit": {"batch": 32, "pixels": 224, "patch": 16, "width": 768, "layers": 12, "heads": 12},
        "nanogpt": {"batch": 4, "length": 1024, "tokens": 50257, "width": 768, "layers": 12, "heads": 12},
        "mlp": {"batch": 512, "width": 512},
    },
    "tiny": {
        "resnet18": {"batch": 2, "pixels": 8, "blocks": (1, 0, 0, 0)},
        "resnet50": {"batch": 2, "pixels": 32, "blocks": (1, 0, 0, 0), "classes": 10},
        "vit": {"batch": 2, "pixels": 8, "patch": 4, "width": 16, "layers": 1, "heads": 2},
        "nanogpt": {"batch": 2, "length": 8, "tokens": 32, "width": 16, "layers": 1, "heads": 2},
        "mlp": {"batch": 8, "width": 16},
    },
}


def residual(pixels: int, blocks: tuple[int, ...], classes: int, bottleneck: bool) -> nn.Module:
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

    kind = Bottleneck if bottleneck else BasicBlock
    model = ResNet(kind, list(blocks), num_classes=classes)
    if not all(blocks):  # a tiny one, of the first stage alone
        model.layer2 = model.layer3 = model.layer4 = nn.Identity()
        model.fc = nn.Linear(64 * kind.expansion, classes)
    if pixels <= 32:  # as usual on CIFAR
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return model


def images(batch: int, pixels: int, classes: int) -> Batch:
    return torch.randn(batch, 3, pixels, pixels), torch.randint(classes, (batch,))


def resnet18(batch: int, pixels: int, blocks: tuple[int, ...]) -> Problem:
    return residual(pixels, blocks, 10, False).eval(), nn.CrossEntropyLoss(), images(batch, pixels, 10)


def resnet50(batch: int, pixels: int, blocks: tuple[int, ...], classes: int) -> Problem:
    return residual(pixels, blocks, classes, True).eval(), nn.CrossEntropyLoss(), images(batch, pixels, classes)


def vit(batch: int, pixels: int, patch: int, width: int, layers: int, heads: int) -> Problem:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(pixels, patch, layers, heads, width, 4 * width)
    nn.init.normal_(model.heads[-1].weight, std=0.02)  # torchvision's zeros have a Hessian that is mostly zero
    return model.eval(), nn.CrossEntropyLoss(), images(batch, pixels, 1000)


def language_model(tokens: int, width: int, layers: int, heads: int, length: int) -> nn.Module:
    """The nanoGPT of GPT-2's size: 12 heads, and the head's weight is the embedding's: 124 million parameters."""
    model = GPT(tokens, width, 0, length)
    model.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
    nn.init.normal_(model.token.weight, std=0.02)
    model.head.weight = model.token.weight
    return model


def nanogpt(batch: int, length: int, tokens: int, **sizes: int) -> Problem:
    ids = text(batch * (length + 1), tokens).reshape(batch, length + 1)
    model = language_model(tokens, length=length, **sizes)
    return model.eval(), nn.CrossEntropyLoss(), (ids[:, :-1].contiguous(), ids[:, 1:].flatten())


def mlp(batch: int, width: int) -> Problem:
    layers = nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    return nn.Sequential(*layers).eval(), nn.CrossEntropyLoss(), (torch.randn(batch, 784), torch.randint(10, (batch,)))


def text(count: int, tokens: int) -> Tensor:
    """Words as frequent as Zipf's law has them; after every second one comes the word that always follows it."""
    shares = 1 / torch.arange(1, tokens + 1).double()
    drawn = torch.multinomial(shares, count, replacement=True, generator=torch.Generator().manual_seed(1))
    follower = (drawn * 7 + 3) % tokens
    return torch.where(torch.arange(count) % 2 == 1, follower.roll(1), drawn)


MODELS: dict[str, Callable[..., Problem]] = {
    "resnet18": resnet18,
    "nanogpt": nanogpt,
    "resnet50": resnet50,
    "vit": vit,
    "mlp": mlp,
}


def problem(name: str, scale: str, device: torch.device) -> Problem:
    """The same weights and data on every device."""
    torch.manual_seed(0)
    model, criterion, (inputs, targets) = MODELS[name](**SIZES[scale][name])
    return model.to(device), criterion, (inputs.to(device), targets.to(device))


def trained(
    model: nn.Module, criterion: nn.Module, batches: list[Batch], optimizer: torch.optim.Optimizer, steps: int
) -> None:
    """Some steps: so that the spectrum is that of a net which has learned something."""
    model.train()
    for i in range(steps):
        inputs, targets = batches[i % len(batches)]
        optimizer.zero_grad(set_to_none=True)
        criterion(model(inputs), targets).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    model.eval()


def job(name: str, scale: str, device: torch.device, num_images: int) -> Job:
    """``resnet18``: on so many of CIFAR's images, repeated where there are fewer. ``gpt``: on one batch of tokens."""
    full = scale == "full"
    if name == "gpt":
        model, criterion, batch = problem("nanogpt", scale, device)
        trained(model, criterion, [batch], torch.optim.AdamW(model.parameters(), 3e-4 if full else 3e-2), 30)
        return model, criterion, [batch]
    model, criterion, (found, _) = problem("resnet18", scale, device)
    size = 500 if full else len(found)
    inputs, labels = cifar(num_images, found.shape[-1])
    batches = [(x.to(device), y.to(device)) for x, y in zip(inputs.split(size), labels.split(size), strict=True)]
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    trained(model, criterion, batches, optimizer, 100 if full else 2)
    return model, criterion, batches


def cifar(count: int, pixels: int) -> Batch:
    """The images that ``HESSFN_DATA`` holds, and noise where it holds none."""
    if not FILES["data"].is_file():
        print("no CIFAR images in HESSFN_DATA: noise instead")
        return images(count, pixels, 10)
    with np.load(FILES["data"]) as arrays:
        pictures, labels = arrays["images"], arrays["labels"]
    which = np.arange(count) % len(labels)
    x = torch.from_numpy(pictures[which]).permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.25)
    return x[..., :pixels, :pixels].contiguous(), torch.from_numpy(labels[which]).long()
