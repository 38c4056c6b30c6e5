from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hessfn.problems import cifar10_resnet20, digits, train_digits

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


def correct(model: nn.Module, batches: Any) -> float:
    with torch.no_grad():
        hits = [(model(inputs).argmax(1) == targets) for inputs, targets in batches]
    return float(torch.cat(hits).double().mean())


def test_digits_is_a_trained_net_in_eval_mode() -> None:
    model, criterion, batches = digits(num_images=1797, batch_size=1000)
    assert not any(module.training for module in model.modules())
    assert [len(targets) for _, targets in batches] == [1000, 797]
    assert batches[0][0].shape == (1000, 1, 8, 8)
    assert correct(model, batches) > 0.98
    assert criterion(model(batches[0][0]), batches[0][1]) < 0.1
    assert all(p.grad is None for p in model.parameters())


def test_digits_is_a_function_of_its_seed_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = (digits(seed=seed, epochs=1)[0].state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


NUMBERS = """
import json, torch
import hessfn as hf
from hessfn.problems import digits
model, criterion, batches = digits(num_images=300, batch_size=300)
loss, params = hf.functionalize(model, criterion)
matvec = hf.hvp(loss, params, batches[0])
pairs = hf.eigsh(matvec, hf.gaussian(params, 1)[0], k=3, rtol=1e-5)
trace = hf.hutchinson(matvec, hf.rademacher(params, 20))
print(json.dumps([torch.get_num_threads(), *pairs.values.tolist(), float(trace.mean)]))
"""


@pytest.mark.slow
def test_digits_has_the_same_curvature_with_any_number_of_threads() -> None:
    found = []
    for threads in (1, 2):
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        run = [sys.executable, "-c", NUMBERS]
        done = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
        used, *numbers = json.loads(done.stdout)
        assert used == threads
        found.append(numbers)
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    # As they were found on the machine where the net was trained: what a page of the demo says anywhere.
    assert found[0] == pytest.approx([23.815405, 20.330973, 7.910957, 67.021884], rel=1e-3)


def test_digits_is_not_trained_where_its_weights_come_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim, "SGD", None)
    first, second = digits()[0], digits(num_images=3)[0]
    assert first is not second
    assert {p.dtype for p in first.parameters()} == {torch.float32}
    assert all(torch.equal(a, second.state_dict()[name]) for name, a in first.state_dict().items())


@pytest.mark.slow
def test_the_weights_that_come_along_are_those_of_the_training() -> None:
    shipped, trained = digits()[0].state_dict(), train_digits(seed=0, epochs=12).state_dict()
    assert list(shipped) == list(trained)
    for name, x in trained.items():
        torch.testing.assert_close(shipped[name], x, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("option", "value"), [("num_images", 0), ("num_images", 1798), ("batch_size", 0), ("epochs", -1)]
)
def test_sizes_out_of_range_are_named(option: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{option}={value}"):
        digits(**{option: value})


def test_digits_without_scikit_learn_names_the_extra(monkeypatch: Any) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"hessfn\[demo\]"):
        digits()


DATA = Path(__file__).parents[2] / "shared" / "data"
real = pytest.mark.skipif(not DATA.is_dir(), reason="the trained ResNet20 and its images are not here")


@real
def test_resnet20_is_trained_and_its_images_are_normalised() -> None:
    pytest.importorskip("pytorchcv")
    before = torch.get_rng_state()
    weights, data = DATA / "resnet20_cifar10_trained.pth", DATA / "cifar10_train_first4000.npz"
    model, criterion, batches = cifar10_resnet20(weights=weights, data=data, num_images=300)
    assert torch.equal(torch.get_rng_state(), before)
    assert [tuple(inputs.shape) for inputs, _ in batches] == [(200, 3, 32, 32), (100, 3, 32, 32)]
    assert correct(model, batches) > 0.99
    with torch.no_grad():
        assert criterion(model(batches[0][0]), batches[0][1]) < 0.02


def images(path: Path, **arrays: Any) -> Path:
    np.savez(path, **{"images": np.zeros((4, 32, 32, 3), np.uint8), "labels": np.zeros(4, np.uint8), **arrays})
    return path


def test_resnet20_says_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    pytest.importorskip("pytorchcv")
    pytest.importorskip("torchvision")
    good = images(tmp_path / "good.npz")
    with pytest.raises(FileNotFoundError, match=r"missing\.pth' is no file"):
        cifar10_resnet20(weights=tmp_path / "missing.pth", data=good, num_images=1)
    torch.save({"conv.weight": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth' holds no state_dict of resnet20_cifar10"):
        cifar10_resnet20(weights=tmp_path / "other.pth", data=good, num_images=1)
    with pytest.raises(ValueError, match=r"images uint8 \(N, 32, 32, 3\).*not uint8 \(4, 3, 32, 32\)"):
        cifar10_resnet20(data=images(tmp_path / "bad.npz", images=np.zeros((4, 3, 32, 32), np.uint8)))
    with pytest.raises(FileNotFoundError, match=r"no CIFAR-10 in .*cifar-10-python\.tar\.gz.*--set data=DIR"):
        cifar10_resnet20(data=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none\.npz"):
        cifar10_resnet20(data=tmp_path / "none.npz")


def test_resnet20_without_network_says_which_file_to_put_where(tmp_path: Path, monkeypatch: Any) -> None:
    provider = pytest.importorskip("pytorchcv.model_provider")
    torchvision = pytest.importorskip("torchvision")

    def offline(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no network")

    monkeypatch.setattr(provider, "get_model", offline)
    with pytest.raises(FileNotFoundError, match=r"resnet20_cifar10-0597-9b0024ac\.pth.*--set weights=PATH"):
        cifar10_resnet20(data=images(tmp_path / "data.npz"), num_images=4)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
    with pytest.raises(FileNotFoundError, match=r"cannot be downloaded \(ConnectionError\).*--set data=DIR"):
        cifar10_resnet20()
