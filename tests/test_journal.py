from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import resource
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import normal

import hessfn as hf
from hessfn.core import config, tree
from hessfn.core.errors import FolderInUse
from hessfn.core.tree import MatVec, Tree
from hessfn.reporting.cli import main
from hessfn.reporting.workspace import num_products
from hessfn.storage import records as storage

LIKE = {"a": torch.zeros(5, 4), "b": [torch.zeros(()), torch.zeros(3)], "none": torch.zeros(0, 2)}
KEY = {"params": LIKE, "data": [normal(3), "train"], "rate": 0.5}


def symmetric(dtype: torch.dtype = torch.float64, scale: float = 1.0) -> MatVec:
    half = normal(24, 24).to(dtype)

    def matvec(v: Tree) -> Tree:
        flat, unravel = tree.ravel(v)
        return unravel(scale * (half + half.T) @ flat)

    return matvec


def like(dtype: torch.dtype = torch.float64) -> Tree:
    return tree.map(lambda x: x.to(dtype), LIKE)


class Killed(BaseException):
    pass


def counted(matvec: MatVec, most: float = float("inf")) -> tuple[MatVec, list[int]]:
    made: list[int] = []

    def limited(v: Tree) -> Tree:
        if len(made) >= most:
            raise Killed
        made.append(1)
        return matvec(v)

    return limited, made


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def records(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.name not in ("journal.json", "lock"))


ROUTINES: dict[str, Callable[[MatVec, Tree], Any]] = {
    "power_iter": lambda A, z: hf.power_iter(A, hf.gaussian(z, 1)[0], max_matvecs=12),
    "eigsh with restarts": lambda A, z: hf.eigsh(A, hf.gaussian(z, 1)[0], 2, basis_size=6),
    "slq": lambda A, z: hf.slq(A, hf.gaussian(z, 2), 5),
    "hutchinson": lambda A, z: hf.hutchinson_diag(A, hf.rademacher(z, 8)),
    "xtrace": lambda A, z: hf.xtrace(A, hf.gaussian(z, 5)),
    "check": lambda A, z: hf.check_matvec(A, z) or 1,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ROUTINES)
def test_a_routine_killed_at_any_product_goes_on_to_the_same_bits(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    routine, matvec, z = ROUTINES[name], symmetric(dtype), like(dtype)
    undisturbed, made = counted(matvec)
    expected = tree.leaves(routine(undisturbed, z))
    total = 0
    for lifetime in [1, 3, 0, 2, 1000]:
        mortal, ours = counted(matvec, lifetime)
        with contextlib.suppress(Killed):
            result = routine(hf.journal(mortal, tmp_path, key=KEY), z)
        total += len(ours)
    assert total == len(made)
    for a, b in zip(tree.leaves(result), expected, strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def test_more_probes_make_use_of_the_products_there_are(tmp_path: Path) -> None:
    matvec, made = counted(symmetric())
    for num, new in ((10, 10), (15, 5), (7, 0)):
        made.clear()
        estimate = hf.hutchinson(hf.journal(matvec, tmp_path, key=KEY), hf.rademacher(like(), num))
        assert len(made) == new
        assert estimate == hf.hutchinson(symmetric(), hf.rademacher(like(), num))


def test_a_vector_asked_for_twice_is_computed_twice(tmp_path: Path) -> None:
    noise = iter(range(100))
    random = hf.journal(lambda v: (1 + next(noise)) * v, tmp_path, key={})
    with pytest.raises(ValueError, match="not deterministic"):
        hf.check_matvec(random, torch.zeros(4))
    again = hf.journal(lambda v: 1 / 0, tmp_path, key={})
    x = hf.gaussian(torch.zeros(4), 2)[0]
    assert torch.equal(again(x), x)
    assert torch.equal(again(x), 2 * x)


def test_without_a_key_a_run_computes_one_product_to_know_the_matrix(tmp_path: Path) -> None:
    for expected in (7, 1):
        matvec, made = counted(symmetric())
        hf.hutchinson(hf.journal(matvec, tmp_path), hf.rademacher(like(), 6))
        assert len(made) == expected
    before = files(tmp_path)
    for other in (symmetric(scale=1 + 1e-15), lambda v: tree.scale(1 + 1e-15, symmetric()(v))):
        with pytest.raises(ValueError, match="another 'matrix'"):
            hf.journal(other, tmp_path)(like())
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("key", "dtype", "message"),
    [
        ({**KEY, "params": {"a": torch.ones(5, 4)}}, torch.float64, "another 'params'"),
        ({**KEY, "data": [normal(3).float(), "train"]}, torch.float64, "another 'data'"),
        ({**KEY, "data": [normal(3), "test"]}, torch.float64, "another 'data'"),
        ({**KEY, "rate": 0.25}, torch.float64, r"another 'rate' \(0.5, here 0.25\)"),
        ({"params": LIKE}, torch.float64, "another 'data', another 'rate'"),
        (KEY, torch.float32, r"another 'vectors' \(24 float64, .*, here 24 float32"),
        (None, torch.float64, "another 'matrix'"),
    ],
)
def test_the_journal_of_another_matrix_is_refused_and_left_alone(
    key: Any, dtype: torch.dtype, message: str, tmp_path: Path
) -> None:
    z = like()
    hf.journal(symmetric(), tmp_path, key=KEY)(z)
    before = files(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        hf.journal(symmetric(dtype), tmp_path, key=key)(tree.map(lambda x: x.to(dtype), z))
    assert str(tmp_path) in str(error.value)
    assert "delete" in str(error.value)
    assert files(tmp_path) == before


def damages(whole: bytes) -> Iterator[bytes]:
    for i in range(0, len(whole), 7):
        yield whole[:i]
        yield whole[:i] + bytes([whole[i] ^ 16]) + whole[i + 1 :]
    yield whole + b"\0"
    yield b"\0" * len(whole)


def test_a_damaged_product_is_named_and_computed_again(tmp_path: Path) -> None:
    z = hf.gaussian(like(), 1)[0]
    product = hf.journal(symmetric(), tmp_path, key=KEY)(z)
    (record,) = records(tmp_path)
    whole = record.read_bytes()
    for damaged in damages(whole):
        record.write_bytes(damaged)
        matvec, made = counted(symmetric())
        with pytest.warns(UserWarning, match=f"{record.name}' is damaged .*: its product is computed again"):
            again = hf.journal(matvec, tmp_path, key=KEY)(z)
        assert len(made) == 1
        assert all(torch.equal(a, b) for a, b in zip(tree.leaves(again), tree.leaves(product), strict=True))
        assert record.read_bytes() == whole


@pytest.mark.parametrize("leaves", [[["float64", [10**30, 0]]], [["float64", [-1, -24]]], [["nn", [3]]], 3, [[1, 2]]])
def test_a_header_of_anything_is_a_damaged_product(leaves: Any, tmp_path: Path) -> None:
    z = hf.gaussian(like(), 1)[0]
    hf.journal(symmetric(), tmp_path, key=KEY)(z)
    (record,) = records(tmp_path)
    rest = record.read_bytes().split(b"\n", 1)[1]
    record.write_bytes(json.dumps({"leaves": leaves}).encode() + b"\n" + rest)
    with pytest.warns(UserWarning, match="is damaged"):
        hf.journal(symmetric(), tmp_path, key=KEY)(z)


def test_a_product_that_cannot_be_read_is_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf.journal(symmetric(), tmp_path, key=KEY)(like())
    (record,) = records(tmp_path)
    opened = Path.open

    def lost_sector(self: Path, *args: Any, **options: Any) -> Any:
        if self == record:
            raise OSError(errno.EIO, "Input/output error")
        return opened(self, *args, **options)

    monkeypatch.setattr(Path, "open", lost_sector)
    matvec, made = counted(symmetric())
    with pytest.warns(UserWarning, match="is damaged"):
        hf.journal(matvec, tmp_path, key=KEY)(like())
    assert len(made) == 1


@pytest.mark.parametrize("damage", ["", "{}", "[]", '{"format": "hessfn journal 0", "key": {}}', "\xff", None])
def test_a_journal_that_does_not_say_what_it_is_of_is_refused(damage: str | None, tmp_path: Path) -> None:
    hf.journal(symmetric(), tmp_path, key=KEY)(like())
    about = tmp_path / "journal.json"
    about.unlink() if damage is None else about.write_text(damage, "latin-1")
    with pytest.raises(ValueError, match=r"journal.json' is (damaged|missing).*delete the folder"):
        hf.journal(symmetric(), tmp_path, key=KEY)(like())


def test_a_product_carried_over_from_another_journal_is_not_taken(tmp_path: Path) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    hf.journal(symmetric(), mine, key=KEY)(tree.map(torch.ones_like, like()))
    hf.journal(symmetric(scale=2.0), other, key={})(like())
    (stray,) = records(other)
    (mine / stray.name).write_bytes(stray.read_bytes())
    expected = tree.leaves(symmetric()(like()))
    with pytest.warns(UserWarning, match="of another journal"):
        found = tree.leaves(hf.journal(symmetric(), mine, key=KEY)(like()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_journal_is_a_line_of_json_and_the_bytes_of_the_product(tmp_path: Path) -> None:
    z = hf.gaussian(like(), 1)[0]
    product = hf.journal(symmetric(), tmp_path, key=KEY)(z)
    (record,) = records(tmp_path)
    first, rest = record.read_bytes().split(b"\n", 1)
    assert json.loads(first)["leaves"] == [["float64", list(x.shape)] for x in tree.leaves(z)]
    assert rest == b"".join(x.numpy().tobytes() for x in tree.leaves(product))


def test_products_lie_in_memory_alike_whether_computed_or_read(tmp_path: Path) -> None:
    wide = normal(4, 6).T
    both = [hf.journal(lambda v: v, tmp_path, key={})(wide) for _ in range(2)]
    assert both[0].stride() == both[1].stride() == (4, 1)
    assert torch.equal(both[1], wide)


def test_starting_over_drops_the_products_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    hf.journal(symmetric(), tmp_path, key=KEY)(like())
    hf.journal(lambda v: v, tmp_path, key={}, resume=False)(torch.ones(2))
    assert len(records(tmp_path)) == 2
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert torch.equal(hf.journal(lambda v: 1 / 0, tmp_path, key={})(torch.ones(2)), torch.ones(2))


def test_a_full_disk_is_an_error_that_leaves_the_journal_good(tmp_path: Path) -> None:
    z = list(hf.rademacher(torch.zeros(1000, dtype=torch.float64), 3))
    hf.journal(lambda v: 2 * v, tmp_path, key={})(z[0])
    before, limits = files(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot be written \(File too large\).*make room"):
            hf.journal(lambda v: 2 * v, tmp_path, key={})(z[1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(tmp_path) == before
    matvec, made = counted(lambda v: 2 * v)
    hf.hutchinson(hf.journal(matvec, tmp_path, key={}), z)
    assert len(made) == 2


forks = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@forks
def test_two_processes_do_not_share_a_journal_and_a_dead_one_gives_it_back(tmp_path: Path) -> None:
    hears, says = os.pipe()
    holder = os.fork()
    if holder == 0:
        kept = hf.journal(lambda v: 2 * v, tmp_path, key={})
        kept(torch.ones(2))
        os.write(says, b"held")
        signal.pause()
    try:
        assert os.read(hears, 4) == b"held"
        with pytest.raises(BlockingIOError, match="in use by another process.*take another folder") as error:
            hf.journal(lambda v: 2 * v, tmp_path, key={})(torch.ones(2))
        assert isinstance(error.value, FolderInUse)
        assert str(tmp_path) in str(error.value)
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        os.close(hears)
        os.close(says)
    (tmp_path / "tmpabc.part").write_bytes(b"half a product")
    assert torch.equal(hf.journal(lambda v: 1 / 0, tmp_path, key={})(torch.ones(2)), torch.full((2,), 2.0))
    assert not list(tmp_path.glob("*.part"))


def refused_to_a_fork(use: Callable[[], Any]) -> bool:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            use()
            status = 0
        except FolderInUse:
            status = 2
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status != 1
    return status == 2


@forks
def test_journals_of_one_process_hold_a_folder_together_until_the_last_is_gone(tmp_path: Path) -> None:
    def use() -> MatVec:
        kept = hf.journal(lambda v: 2 * v, tmp_path, key={})
        kept(torch.ones(2))
        return kept

    kept = [use(), use(), use()]
    assert refused_to_a_fork(use)
    assert refused_to_a_fork(lambda: kept[0](torch.ones(2)))  # nor may it go on with its parent's
    del kept[::2]
    gc.collect()
    assert refused_to_a_fork(use)
    assert torch.equal(kept[0](torch.zeros(2)), torch.zeros(2))
    kept.clear()
    gc.collect()
    assert not refused_to_a_fork(use)


@forks
def test_a_folder_deleted_and_made_anew_is_held_anew(tmp_path: Path) -> None:
    folder = tmp_path / "products"
    kept = hf.journal(lambda v: 2 * v, folder, key={})
    kept(torch.ones(2))
    shutil.rmtree(folder)
    again = hf.journal(lambda v: 2 * v, folder, key={})
    again(torch.ones(2))
    assert refused_to_a_fork(lambda: hf.journal(lambda v: 2 * v, folder, key={})(torch.ones(2)))


def test_a_lock_for_one_alone_is_refused_to_all_others(tmp_path: Path) -> None:
    with storage.lock(tmp_path / "lock"):
        for other in (storage.lock, storage.share):
            with pytest.raises(BlockingIOError, match="in use by another process or thread"):
                other(tmp_path / "lock")
    held = storage.lock(tmp_path / "lock")
    held.close()
    with storage.share(tmp_path / "lock"):
        pass


def test_threads_use_one_folder_at_once_and_wait_only_for_the_disk(tmp_path: Path) -> None:
    meet = threading.Barrier(4, timeout=30)

    def doubled(v: Tree) -> Tree:
        meet.wait()  # while all four are computing
        return 2 * v

    def work(i: int) -> list[Tree]:
        kept = hf.journal(doubled, tmp_path, key={})
        return [kept(torch.full((500,), float(10 * j + i % 2))) for j in range(20)]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, range(4)))
    for i, products in enumerate(found):
        assert [p[0].item() for p in products] == [2.0 * (10 * j + i % 2) for j in range(20)]
    assert len(records(tmp_path)) == 40
    assert not list(tmp_path.glob("*.part"))


def test_threads_that_ask_one_journal_for_one_vector_count_as_one_run(tmp_path: Path) -> None:
    meet, noise = threading.Barrier(3, timeout=30), iter([1.0, 2.0, 3.0])

    def random(v: Tree) -> Tree:
        meet.wait()
        return next(noise) * v

    kept = hf.journal(random, tmp_path, key={})
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(kept, [torch.ones(2)] * 3))
    again = hf.journal(lambda v: 1 / 0, tmp_path, key={})
    assert sorted(again(torch.ones(2))[0].item() for _ in range(3)) == sorted(p[0].item() for p in found) == [1, 2, 3]


def test_a_product_that_failed_is_asked_for_again(tmp_path: Path) -> None:
    fails = iter([True, False])
    kept = hf.journal(lambda v: 1 / 0 if next(fails) else 2 * v, tmp_path, key={})
    with pytest.raises(ZeroDivisionError):
        kept(torch.ones(2))
    assert torch.equal(kept(torch.ones(2)), torch.full((2,), 2.0))
    assert torch.equal(hf.journal(lambda v: 1 / 0, tmp_path, key={})(torch.ones(2)), torch.full((2,), 2.0))


def test_a_journal_started_over_under_another_key_is_no_longer_the_first_ones(tmp_path: Path) -> None:
    first = hf.journal(lambda v: 2 * v, tmp_path, key={"scale": 2})
    first(torch.ones(2))
    second = hf.journal(lambda v: 3 * v, tmp_path, key={"scale": 3}, resume=False)
    second(torch.ones(2))
    with pytest.raises(ValueError, match="started over for another matrix since"):
        first(torch.zeros(2))
    assert torch.equal(second(torch.zeros(2)), torch.zeros(2))


def test_the_order_of_a_key_does_not_count(tmp_path: Path) -> None:
    hf.journal(lambda v: 2 * v, tmp_path, key={"a": 1, "b": 2})(torch.ones(2))
    assert hf.journal(lambda v: 1 / 0, tmp_path, key={"b": 2, "a": 1})(torch.ones(2))[0] == 2


def test_other_threads_or_another_kernel_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(config.KERNELS, "conv3x3", lambda: {"kernel": "0123abcd", "compiler": "gcc 12"})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    hf.journal(symmetric(), tmp_path, key=KEY)(like())
    monkeypatch.setitem(config.KERNELS, "conv3x3", lambda: {"kernel": "0123abcd", "compiler": "gcc 13"})
    hf.journal(lambda v: 1 / 0, tmp_path, key=KEY)(like())
    monkeypatch.setitem(config.KERNELS, "conv3x3", lambda: {"kernel": "off", "compiler": ""})
    with pytest.raises(ValueError, match=r"another 'conv3x3 kernel' \(0123abcd, here off\)\. Take another folder"):
        hf.journal(symmetric(), tmp_path, key=KEY)(like())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(ValueError, match=r"another 'threads' \(1, here 2\), another 'conv3x3 kernel'"):
        hf.journal(symmetric(), tmp_path, key=KEY)(like())


def test_what_a_key_calls_threads_is_not_lost(tmp_path: Path) -> None:
    hf.journal(symmetric(), tmp_path, key={"threads": "red"})(like())
    with pytest.raises(ValueError, match=r"another 'key threads' \(red, here blue\)"):
        hf.journal(symmetric(), tmp_path, key={"threads": "blue"})(like())


PROBLEM = """
import torch
from torch import nn

def small():
    draw = torch.Generator().manual_seed(0)
    model = nn.Linear(3, 2)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=draw)
    x = torch.randn(20, 3, generator=draw)
    return model, nn.CrossEntropyLoss(), [(x, (x[:, 0] > 0).long())]
"""


def test_a_report_is_resumed_with_the_threads_it_was_begun_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "problem.py").write_text(PROBLEM)
    arguments = ["report", f"{tmp_path / 'problem.py'}:small", "--out", str(tmp_path / "out")]
    write, num_written = storage.write, 0

    def interrupted(*given: Any) -> None:
        nonlocal num_written
        num_written += 1
        if num_written > 5:
            raise KeyboardInterrupt
        write(*given)

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write", interrupted)
        with contextlib.suppress(KeyboardInterrupt):
            assert main(arguments) != 0
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    capsys.readouterr()
    assert main([*arguments, "--resume"]) == 2
    assert "another 'threads' (1, here 2)" in capsys.readouterr().err
    assert num_products(tmp_path / "out") == 5


def test_a_journal_takes_plain_tensors_only(tmp_path: Path) -> None:
    matvec = hf.journal(lambda v: 2 * v, tmp_path, key={})
    for transformed in (
        lambda: torch.func.vmap(matvec)(torch.ones(2, 3)),
        lambda: torch.func.grad(lambda v: matvec(v).sum())(torch.ones(3)),
        lambda: matvec(torch.ones(3, requires_grad=True)),
        lambda: matvec(torch.ones(3, device="meta")),
    ):
        with pytest.raises(ValueError, match="plain tensors"):
            transformed()
    assert list(tmp_path.iterdir()) == []


def test_a_journal_is_of_a_function(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"journal\(matvec, folder\): matvec is .*, not a function"):
        hf.journal(torch.eye(3), tmp_path)  # type: ignore[arg-type]


def test_what_has_no_bytes_is_no_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'model' is a Linear: only tensors"):
        hf.journal(lambda v: v, tmp_path, key={"net": {"model": torch.nn.Linear(1, 1)}})(torch.ones(1))
