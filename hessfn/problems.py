"""Ready-made problems: each a net, its loss and its data, as ``(model, criterion, batches)``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hessfn.core.errors import InvalidInput, MissingExtra, NotThere

Problem = tuple[nn.Module, nn.Module, list[tuple[Tensor, Tensor]]]


_SHIPPED = {"seed": 0, "epochs": 12}  # with which tools/train_digits.py has trained the net in data/digits.npz


def digits(*, seed: int = 0, epochs: int = 12, num_images: int = 500, batch_size: int = 250) -> Problem:
    """A small residual convolutional net with BatchNorm, trained on scikit-learn's handwritten digits.

    With the default ``seed`` and ``epochs`` the trained net comes with the library, so that its curvature is the same
    on every machine, up to rounding. For others the net is trained here, for some seconds, in float64; two machines
    then differ by what training makes of rounding errors, usually little.

    Args:
        seed: of the weights and of the order of the data in training; the same seed gives the same net.
        epochs: passes of training over all 1797 images.
        num_images: how many of them the batches hold, the first ones.
        batch_size: images in a batch; the last one may be smaller.

    Returns:
        The model in eval mode, cross-entropy, and the batches: ``(images (B, 1, 8, 8), labels (B,))``, in float32.

    Cost: reading the data; for another ``seed`` or ``epochs`` the training, some seconds.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
        ValueError: ``epochs``, ``num_images`` or ``batch_size`` is out of range.

    Source: the data are those of Alpaydin and Kaynak (1998), UCI Machine Learning Repository.

    >>> model, criterion, batches = digits(num_images=100, batch_size=60)
    >>> [tuple(images.shape) for images, labels in batches]
    [(60, 1, 8, 8), (40, 1, 8, 8)]
    """
    images, labels = _digits()
    batches = _batches(images, labels, num_images, batch_size)
    given = {"seed": seed, "epochs": epochs}
    model = _shipped() if given == _SHIPPED else train_digits(**given)
    return model, nn.CrossEntropyLoss(), batches


def train_digits(seed: int, epochs: int) -> nn.Module:
    """The net of :func:`digits`, trained here, in eval mode.

    In float64, and rounded to float32 at the end. Training is unstable: between one thread and two, the rounding of
    float32 grew to a third of the sharpness of the trained net, that of float64 to 1e-7 of it.
    """
    if epochs < 0:
        raise InvalidInput(f"epochs={epochs} must be at least 0")
    images, labels = _digits()
    with _seeded(seed):
        model = _DigitsNet().double()
    _train(model, nn.CrossEntropyLoss(), images.double(), labels, epochs, seed)
    return model.float().eval()


def _digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtra('the digits come with scikit-learn: pip install "hessfn[demo]"') from error
    data = load_digits()
    return torch.from_numpy(data.images).float().sub(8).div(8).unsqueeze(1), torch.from_numpy(data.target).long()


def _shipped() -> nn.Module:
    with _seeded(0):  # what it draws is overwritten, and the global generator left as it is
        model = _DigitsNet()
    file = resources.files("hessfn") / "data" / "digits.npz"
    with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
        model.load_state_dict({name: torch.from_numpy(arrays[name]) for name in arrays.files})
    return model.eval()


class _Block(nn.Module):
    def __init__(self, entering: int, leaving: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(entering, leaving, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(leaving)
        self.conv2 = nn.Conv2d(leaving, leaving, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(leaving)
        self.shortcut = nn.Conv2d(entering, leaving, 1, stride, bias=False) if entering != leaving else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class _DigitsNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.block1 = _Block(8, 8, stride=1)
        self.block2 = _Block(8, 16, stride=2)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.block1(F.relu(self.bn(self.conv(x)))))
        return self.head(x.mean((2, 3)))


def _train(model: nn.Module, criterion: nn.Module, images: Tensor, labels: Tensor, epochs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    orders = [
        order
        for _ in range(epochs)
        for order in torch.randperm(len(images), generator=generator, device="cpu").split(64)
    ]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(len(orders), 1))
    for order in orders:
        optimizer.zero_grad()
        criterion(model(images[order]), labels[order]).backward()
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()


def cifar10_resnet20(
    *,
    weights: str | Path | None = None,
    data: str | Path | None = None,
    num_images: int = 200,
    batch_size: int = 200,
) -> Problem:
    """The pretrained ``resnet20_cifar10`` of pytorchcv, with cross-entropy on images of CIFAR-10's training set.

    Args:
        weights: a file with a ``state_dict`` for the net; by default pytorchcv downloads its own.
        data: a folder as ``torchvision.datasets.CIFAR10`` keeps it, or a ``.npz`` file with ``images (N, 32, 32, 3)``
            and ``labels (N,)``, both uint8; by default torchvision downloads to ``~/.cache/hessfn``.
        num_images: how many images the batches hold.
        batch_size: images in a batch; the last one may be smaller.

    Returns:
        The model in eval mode, cross-entropy, and the batches: ``(images (B, 3, 32, 32), labels (B,))``, the images
        normalised by ImageNet's mean and standard deviation, as the net was trained.

    Cost: reading the files; the first call downloads what is not given.

    Raises:
        ModuleNotFoundError: pytorchcv or torchvision is not installed.
        FileNotFoundError: a file is not there, or cannot be downloaded; the message says which one to put where.
        ValueError: a file holds something else, or ``num_images`` or ``batch_size`` is out of range.

    Source: He, Zhang, Ren and Sun (2016), for the net; Krizhevsky (2009), for the data.
    """
    try:
        from pytorchcv.model_provider import get_model
    except ImportError as error:
        raise MissingExtra('the net comes with pytorchcv: pip install "hessfn[vision]"') from error
    images, labels = _cifar10(data)
    batches = _batches(images, labels, num_images, batch_size)
    # pytorchcv says what it downloads on stdout, which belongs to the caller's results.
    with _seeded(0), contextlib.redirect_stdout(sys.stderr):
        try:
            model = get_model("resnet20_cifar10", pretrained=weights is None)
        except OSError as error:
            raise NotThere(
                f"the weights of resnet20_cifar10 cannot be downloaded ({type(error).__name__}). Where there is "
                "network, fetch resnet20_cifar10-0597-9b0024ac.pth.zip from github.com/osmr/imgclsmob, release "
                "v0.0.163, and unzip it; then pass weights=PATH of the .pth file (hessfn report: --set weights=PATH)"
            ) from error
    if weights is not None:
        _load(model, Path(weights).expanduser())
    return model.eval(), nn.CrossEntropyLoss(), batches


def _load(model: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise NotThere(f"weights={str(path)!r} is no file")
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise InvalidInput(f"weights={str(path)!r} holds no state_dict of resnet20_cifar10: {reason}") from error


def _cifar10(data: str | Path | None) -> tuple[Tensor, Tensor]:
    path = Path("~/.cache/hessfn" if data is None else data).expanduser()
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as arrays:
                pixels, labels = arrays["images"], arrays["labels"]
        except (KeyError, ValueError) as error:
            raise InvalidInput(f"data={str(path)!r} must hold the arrays 'images' and 'labels': {error}") from error
        if pixels.shape[1:] != (32, 32, 3) or pixels.dtype != np.uint8 or labels.shape != pixels.shape[:1]:
            found = f"{pixels.dtype} {pixels.shape} and {labels.shape}"
            raise InvalidInput(f"data={str(path)!r} must hold images uint8 (N, 32, 32, 3) and labels (N,), not {found}")
    else:
        try:
            from torchvision.datasets import CIFAR10
        except ImportError as error:
            raise MissingExtra('the images come with torchvision: pip install "hessfn[vision]"') from error
        try:
            with contextlib.redirect_stdout(sys.stderr):
                dataset = CIFAR10(str(path), train=True, download=data is None)
        except (OSError, RuntimeError) as error:
            raise NotThere(
                f"there is no CIFAR-10 in {str(path)!r}"
                + (f", and it cannot be downloaded ({type(error).__name__})" if data is None else "")
                + ". Fetch cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html, unpack it so that "
                "DIR/cifar-10-batches-py exists, and pass data=DIR (hessfn report: --set data=DIR)"
            ) from error
        pixels, labels = dataset.data, np.asarray(dataset.targets)
    images = torch.from_numpy(pixels).float().div(255)
    images = (images - images.new_tensor([0.485, 0.456, 0.406])) / images.new_tensor([0.229, 0.224, 0.225])
    return images.permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels).long()


def _batches(images: Tensor, labels: Tensor, num_images: int, batch_size: int) -> list[tuple[Tensor, Tensor]]:
    if not 1 <= num_images <= len(images):
        raise InvalidInput(
            f"num_images={num_images} must be between 1 and {len(images)}, the number of images there are"
        )
    if batch_size < 1:
        raise InvalidInput(f"batch_size={batch_size} must be at least 1")
    pairs = zip(images[:num_images].split(batch_size), labels[:num_images].split(batch_size), strict=True)
    return list(pairs)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[Any]:
    """Modules draw their first weights from the global generator: lend them a seeded one, on the CPU alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
