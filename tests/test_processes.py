"""Closures that go to other processes: pickled to those that are started, as they are to those that are forked."""

from __future__ import annotations

import faulthandler
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
from nets import classes, dense_hessian, normal, seeded
from torch import nn
from torch.utils.data import DataLoader, Dataset

import hessfn as hf
from hessfn.core import tree


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


class Problem:
    def __init__(self, net: Any = build, shape: tuple[int, ...] = (6, 4)) -> None:
        self.model = seeded(net)
        self.loss, self.params = hf.functionalize(self.model, nn.CrossEntropyLoss())
        self.forward, _ = hf.stateless(self.model)
        self.batch = normal(*shape), classes(shape[0], 3)
        self.hvp = hf.hvp(self.loss, self.params, self.batch)
        self.v = hf.gaussian(self.params, 1)[0]


def square(outputs: Any, _: Any) -> torch.Tensor:
    return (outputs[0] if isinstance(outputs, tuple) else outputs).square().mean()


cloudpickle.register_pickle_by_value(sys.modules[__name__])  # as for what a user's script defines

MODES = ("traced", "forward", "reverse", "double_backward", "difference")
MAKES: dict[str, Any] = {
    "hvp": lambda p, folder: p.hvp,
    **{mode: (lambda p, folder, m=mode: hf.hvp(p.loss, p.params, p.batch, mode=m)) for mode in MODES},
    "linearized_hvp": lambda p, folder: hf.linearized_hvp(p.loss, p.params, p.batch),
    "mean_hvp": lambda p, folder: hf.mean_hvp(p.loss, p.params, [p.batch, p.batch]),
    "ggnvp": lambda p, folder: hf.ggnvp(p.forward, nn.CrossEntropyLoss(), p.params, p.batch),
    "fvp": lambda p, folder: hf.fvp(p.forward, nn.CrossEntropyLoss(), p.params, p.batch),
    "deflate": lambda p, folder: hf.deflate(p.hvp, tree.map(lambda x: x[None] + 1, p.v)),
    "progress": lambda p, folder: hf.progress(p.hvp, total=9),
    "journal": lambda p, folder: hf.journal(p.hvp, folder, key={"net": "mlp"}),
    "restrict": lambda p, folder: hf.restrict(p.hvp, p.params, "0.*"),
    "block": lambda p, folder: hf.block(p.hvp, p.params, "2.*", "0.*"),
}

IN_ANOTHER_PROCESS = """
import pickle, sys
with open(sys.argv[1], "rb") as stream:
    products = {name: pickle.loads(closure)(v) for name, (closure, v) in pickle.load(stream).items()}
with open(sys.argv[1], "wb") as stream:
    pickle.dump(products, stream)
"""


def products_elsewhere(closures: dict[str, tuple[Any, Any]], file: Path) -> dict[str, Any]:
    """The products of pickled closures in a process that is started for it."""
    file.write_bytes(pickle.dumps({name: (cloudpickle.dumps(m), v) for name, (m, v) in closures.items()}))
    command = [sys.executable, "-W", "error", "-c", IN_ANOTHER_PROCESS, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return pickle.loads(file.read_bytes())


@pytest.mark.slow
@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
def test_products_are_the_same_in_a_process_that_was_started(used: bool, tmp_path: Path) -> None:
    p = Problem()
    vectors = dict.fromkeys(MAKES, p.v) | dict.fromkeys(("restrict", "block"), tree.select(p.v, "0.*"))
    closures = {name: make(p, tmp_path / "journal") for name, make in MAKES.items()}
    if used:
        for name, matvec in closures.items():
            for _ in range(4):
                matvec(vectors[name])
        closures.pop("journal")  # it holds its folder
    found = products_elsewhere({name: (m, vectors[name]) for name, m in closures.items()}, tmp_path / "pickle")
    for name, product in found.items():
        expected = MAKES[name](p, tmp_path / "again")(vectors[name])
        rtol = 1e-5 if name == "difference" else 1e-12
        assert tree.norm(tree.add(product, expected, -1.0)) <= rtol * tree.norm(expected), name
    flat, unravel = tree.ravel(p.v)
    exact = unravel(dense_hessian(p.loss, p.params, p.batch) @ flat)
    assert tree.norm(tree.add(found["linearized_hvp"], exact, -1.0)) <= 1e-12 * tree.norm(exact)


OTHER_NETS: dict[str, Any] = {
    "embedding": lambda: nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, 3)),
    "batch_norm": lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(18, 3)),
    "lstm": lambda: nn.LSTM(4, 3, batch_first=True),
    "transformer": lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
}


@pytest.mark.slow
def test_losses_of_other_nets_go_along(tmp_path: Path) -> None:
    closures, exact = {}, {}
    for name, net in OTHER_NETS.items():
        inputs = {"embedding": classes(6, 5).repeat(3, 1).T, "batch_norm": normal(4, 1, 5, 5)}
        batch = inputs.get(name, normal(2, 3, 4)), torch.zeros(())
        loss, params = hf.functionalize(seeded(net), square)
        v = hf.gaussian(params, 1)[0]
        closures[name] = hf.hvp(loss, params, batch), v
        closures[f"{name}, linearized"] = hf.linearized_hvp(loss, params, batch), v
        flat, unravel = tree.ravel(v)
        exact[name] = unravel(dense_hessian(loss, params, batch) @ flat)
    for name, product in products_elsewhere(closures, tmp_path / "pickle").items():
        expected = exact[name.partition(",")[0]]
        assert tree.norm(tree.add(product, expected, -1.0)) <= 1e-12 * tree.norm(expected), name


# Forks.

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


@pytest.fixture
def busy() -> Iterator[Problem]:
    """A problem of which another thread makes products all the time."""
    p = Problem()
    linear = hf.linearized_hvp(p.loss, p.params, p.batch)
    forward = hf.hvp(p.loss, p.params, p.batch, mode="forward")
    p.hvp(p.v), forward(p.v)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            forward(p.v), linear(p.v), p.loss(p.params, p.batch)

    thread = threading.Thread(target=work)
    thread.start()
    yield p
    stop.set()
    thread.join()


def in_a_child(function: Any) -> int:
    """The exit code of a forked child that runs a function: 0 where it returns true."""
    child = os.fork()
    if child == 0:
        faulthandler.dump_traceback_later(20, exit=True)
        code = 1
        try:
            code = 0 if function() else 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@needs_fork
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_while_another_thread_computes_does_not_hang(busy: Problem) -> None:
    p = busy
    expected = hf.hvp(p.loss, p.params, p.batch, mode="reverse")(p.v)

    def again() -> bool:
        with torch.autograd.forward_ad.dual_level():  # which is an error within another
            pass
        products = [hf.hvp(p.loss, p.params, p.batch, mode=mode)(p.v) for mode in ("traced", "double_backward")]
        products.append(hf.linearized_hvp(p.loss, p.params, p.batch)(p.v))
        return all(tree.norm(tree.add(x, expected, -1.0)) <= 1e-12 * tree.norm(expected) for x in products)

    assert [in_a_child(again) for _ in range(10)] == [0] * 10


class Curvatures(Dataset[Any]):
    """A data set that uses products: of each sample the sharpness."""

    def __init__(self, p: Problem) -> None:
        self.p = p

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        sample = tuple(x[index : index + 1] for x in self.p.batch)
        return tree.norm(hf.hvp(self.p.loss, self.p.params, sample)(self.p.v))


@needs_fork
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_of_a_loader_do_not_hang(busy: Problem) -> None:
    data = Curvatures(busy)
    loader = DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60)
    found = torch.cat(list(loader))
    expected = []
    for x, y in zip(*busy.batch, strict=True):
        flat, _ = tree.ravel(busy.v)
        expected.append((dense_hessian(busy.loss, busy.params, (x[None], y[None])) @ flat).norm())
    assert torch.allclose(found, torch.stack(expected), rtol=1e-12)


@needs_fork
def test_who_forks_keeps_what_it_holds() -> None:
    from hessfn.core.locks import TORCH, Lock

    lock = Lock()

    def child() -> bool:
        other = threading.Thread(target=lock.__enter__, daemon=True)
        other.start()
        other.join(0.2)
        return other.is_alive()  # it waits for this thread, which holds the lock here too

    with TORCH, lock:
        code = in_a_child(child)
    assert code == 0


@needs_fork
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_lock_that_another_thread_holds_is_open_in_a_child() -> None:
    from hessfn.core.locks import Lock

    lock, taken, leave = Lock(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            taken.set()
            leave.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()

    def child() -> bool:
        with lock:
            return True

    code = in_a_child(child)
    leave.set()
    thread.join()
    assert code == 0
