"""The kernel is compiled once on a machine, by whatever compiler works, and nothing is wrong where none does."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import loss_graph
from nets import needs_compiler, problem, two_convolutions

import hessfn as hf
from hessfn.core import tree
from hessfn.engine.conv3x3 import winograd
from hessfn.engine.conv3x3.kernel import KERNEL
from hessfn.engine.native import build
from hessfn.engine.native.kernel import is_off

pytestmark = [needs_compiler, pytest.mark.skipif(sys.platform == "win32", reason="the compilers here are scripts")]

SOURCE = Path(winograd.__file__).with_name("kernel.c")
REAL = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), "")
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A machine on which nothing has been compiled, in a process that has not asked for it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("CXX", "HESSFN_NATIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(KERNEL, "built", [])
    monkeypatch.setattr(build, "FLAGS", [*build.FLAGS, "-O0"])  # quickly
    caplog.set_level(logging.INFO, "hessfn")


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Makes a script ``CXX``; what it does comes before the compiler. It notes each of its lives in ``lives``."""

    def made(does: str, then: str = f'exec {REAL} "$@"') -> Path:
        script = tmp_path / "compiler"
        script.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/lives\ncd {tmp_path}\n{does}\n{then}\n')
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        return tmp_path

    return made


def lives(folder: Path) -> int:
    return len((folder / "lives").read_text().splitlines()) if (folder / "lives").exists() else 0


def cached(tmp_path: Path) -> list[str]:
    return [file.name for file in (tmp_path / "cache" / "hessfn").iterdir()]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_a_machine_compiles_once(compiler: Any, tmp_path: Path) -> None:
    compiler("")
    first, second = build.build(SOURCE), build.build(SOURCE)
    assert first and second
    assert first.digest == second.digest == KERNEL.identity()
    assert lives(tmp_path) == 1
    assert cached(tmp_path) == [f"{build.library_name(SOURCE)}-{first.digest}.so"]
    assert (tmp_path / "cache" / "hessfn").stat().st_mode & 0o777 == 0o700


def test_processes_that_compile_at_once_end_with_one_file(compiler: Any, tmp_path: Path) -> None:
    compiler("sleep 0.2")
    with ThreadPoolExecutor(3) as pool:  # build.build knows nothing of other threads
        found = list(pool.map(build.build, [SOURCE] * 3))
    assert lives(tmp_path) == 3
    assert len({built and built.digest for built in found}) == 1
    assert len(cached(tmp_path)) == 1


def test_threads_wait_for_one_compiler(compiler: Any, tmp_path: Path) -> None:
    compiler("sleep 0.2")
    with ThreadPoolExecutor(3) as pool:
        assert len({id(made) for made in pool.map(lambda _: KERNEL.library(), range(3))}) == 1
    assert lives(tmp_path) == 1


def test_the_file_is_of_source_flags_and_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = set()
    for change in (lambda: None, lambda: monkeypatch.setattr(build, "processor", lambda: {"flags": "none"}),
                   lambda: monkeypatch.setattr(build, "FLAGS", [*build.FLAGS, "-g"]),
                   lambda: (tmp_path / "kernel.c").write_text("int other;")):  # fmt: skip
        change()
        source = tmp_path / "kernel.c" if (tmp_path / "kernel.c").exists() else SOURCE
        names.add(build.library_name(source))
    assert len(names) == 4


def test_compilers_make_the_same_bytes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for name in ("one", "two"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        found.append(build.build(SOURCE))
    assert found[0] and found[1]
    assert found[0].digest == found[1].digest


@pytest.mark.parametrize(
    "damage", [lambda x: x[: len(x) // 2], lambda x: b"", lambda x: x[:-9] + bytes([x[-9] ^ 1]) + x[-8:]]
)
def test_a_damaged_file_is_never_loaded_but_made_anew(damage: Any, tmp_path: Path, caplog: Any) -> None:
    first = build.build(SOURCE)
    (name,) = cached(tmp_path)
    file = tmp_path / "cache" / "hessfn" / name
    whole = file.read_bytes()
    file.unlink()  # this process has it in memory
    file.write_bytes(damage(whole))
    assert first == build.build(SOURCE)._replace(library=first.library)
    assert file.read_bytes() == whole
    assert "is damaged" in warnings(caplog)[0]


def test_a_folder_that_others_may_write_to_is_not_used(tmp_path: Path, caplog: Any) -> None:
    folder = tmp_path / "cache" / "hessfn"
    folder.mkdir(parents=True)
    (folder / f"{build.library_name(SOURCE)}-0000000000000000.so").write_bytes(b"planted")
    for mode in (0o777, 0o770):
        folder.chmod(mode)
        assert build.build(SOURCE)
    assert len(cached(tmp_path)) == 1
    assert "others may write to it" in caplog.text
    assert not warnings(caplog)


@pytest.mark.parametrize("base", ["", "relative"])
def test_without_a_usable_xdg_folder_the_cache_is_in_the_home(base: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", base)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert build.cache_folder() == tmp_path / "home" / ".cache" / "hessfn"


def test_a_disk_from_which_no_code_runs_is_no_obstacle(tmp_path: Path, monkeypatch: Any) -> None:
    load = build.ctypes.CDLL

    def refusing(name: str) -> Any:
        if name.startswith(str(tmp_path)):
            raise OSError("failed to map segment from shared object")
        return load(name)

    monkeypatch.setattr(build.ctypes, "CDLL", refusing)
    assert build.build(SOURCE)


def test_a_compiler_may_be_of_several_words(compiler: Any, tmp_path: Path, monkeypatch: Any) -> None:
    compiler("", then='exec "$@"')
    monkeypatch.setenv("CXX", f"'{os.environ['CXX']}' {REAL}")
    assert build.build(SOURCE)
    assert (tmp_path / "lives").read_text().startswith(f"{REAL} -x c")


@pytest.mark.parametrize("given", ["no-such-compiler", "'g++", " "])
def test_a_compiler_that_is_not_there_is_passed_over(given: str, monkeypatch: Any) -> None:
    expected = build.compilers()
    monkeypatch.setenv("CXX", given)
    assert build.compilers() == expected
    assert build.build(SOURCE)


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("for i in 1 2 3 4; do echo line $i >&2; done; exit 1", "line 1; line 2; line 3"),
        ("exit 3", "it ended with status 3"),
        ("exit 0", "cannot be loaded"),
    ],
)
def test_a_compiler_that_fails_is_said_and_left_for_the_next(
    does: str, said: str, compiler: Any, tmp_path: Path, caplog: Any
) -> None:
    compiler(does)
    assert build.build(SOURCE)
    (warned,) = warnings(caplog)
    assert warned.endswith(said) or said in warned
    assert lives(tmp_path) == 1
    assert len(cached(tmp_path)) == 1


def test_a_compiler_that_hangs_is_ended_with_its_children(
    compiler: Any, tmp_path: Path, caplog: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(build, "SECONDS", 0.5)
    compiler("(sleep 1.5; touch late) & sleep 30")
    start = time.monotonic()
    assert build.compiled_by([str(tmp_path / "compiler")], SOURCE, tmp_path) is None
    assert time.monotonic() - start < 5
    assert "not done after 0.5 s" in warnings(caplog)[0]
    time.sleep(1.5)
    assert not (tmp_path / "late").exists()
    assert not list(tmp_path.glob("*.part"))


def test_a_compiler_is_interrupted_with_the_program(compiler: Any, tmp_path: Path) -> None:
    compiler("(sleep 1.2; touch late) & sleep 0.2; kill -INT $PPID; sleep 30")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            KERNEL.library()
    finally:
        signal.signal(signal.SIGINT, before)
    time.sleep(1.2)
    assert not (tmp_path / "late").exists()
    assert cached(tmp_path) == []


def test_nothing_is_compiled_to_know_what_to_expect_or_where_nothing_needs_it(compiler: Any, tmp_path: Path) -> None:
    compiler("")
    assert KERNEL.is_expected()
    loss, params, batch, _ = problem("mlp")
    hf.hvp(loss, params, batch)(params)
    hf.linearized_hvp(loss, params, batch)(params)
    assert lives(tmp_path) == 0
    assert KERNEL.identity()
    assert lives(tmp_path) == 1


def test_switched_off_is_read_when_it_is_asked(compiler: Any, tmp_path: Path, monkeypatch: Any) -> None:
    compiler("")
    for value, off in (("0", True), ("1", False), ("0", True)):
        monkeypatch.setenv("HESSFN_NATIVE", value)
        assert is_off() == off
        assert KERNEL.is_expected() == (KERNEL.library() is not None) == (KERNEL.identity() != "") == (not off)
        assert (KERNEL.describe() == {"kernel": "off (HESSFN_NATIVE=0)"}) == off
    assert lives(tmp_path) == 1


def test_without_a_compiler_there_is_none(tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not KERNEL.is_expected()
    assert KERNEL.library() is None
    assert KERNEL.identity() == ""
    assert KERNEL.describe() == {"kernel": "none: no compiler"}
    assert "there is no compiler" in caplog.text
    assert not warnings(caplog)


@pytest.mark.parametrize("make", [partial(hf.hvp, trace_after=0), hf.linearized_hvp], ids=["hvp", "linearized_hvp"])
def test_products_are_right_where_the_expected_compiler_fails(
    make: Any, compiler: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    compiler("exit 1")
    monkeypatch.setattr(build, "compilers", lambda: [[str(tmp_path / "compiler")]])
    loss, params, x = two_convolutions(32, 8, 14, torch.float32)
    v = hf.gaussian(params, 1)[0]
    exact = hf.hvp(*two_convolutions(32, 8, 14), mode="double_backward")(tree.map(torch.Tensor.double, v))
    found = make(loss, params, x)(v)
    assert tree.norm(tree.add(tree.map(torch.Tensor.double, found), exact, -1.0)) <= 1e-5 * tree.norm(exact)
    assert lives(tmp_path) == 1
    assert KERNEL.describe() == {"kernel": "none: no compiler that works"}
    # Now that it is known, the next trace goes by tiles in operations of torch.
    assert not KERNEL.is_expected()
    assert winograd.convolution in {node.target for node in loss_graph(loss, params, x).graph.nodes}


def test_nobody_waits_for_the_compiler_but_who_needs_it(compiler: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(build, "SECONDS", 60.0)
    compiler("touch begun; while [ ! -e go ]; do sleep 0.02; done")
    made: list[Any] = []
    loss, params, x = two_convolutions(16, 8, 14, torch.float32)
    waiting = threading.Thread(target=lambda: made.append(hf.hvp(loss, params, x, trace_after=0)(params)))
    waiting.start()
    try:
        until = time.monotonic() + 30
        while not (tmp_path / "begun").exists() and time.monotonic() < until:
            time.sleep(0.02)
        assert (tmp_path / "begun").exists()
        for net in ("mlp", "conv"):
            other, point, batch, _ = problem(net)
            hf.hvp(other, point, batch)(point)
        loss_graph(loss, params, x)  # what is done under the lock, also of a net that will need the kernel
        assert not made
    finally:
        (tmp_path / "go").touch()
        waiting.join()
    assert made
    assert lives(tmp_path) == 1


REST = ["trace_graph", "fused", "recorder", "memory_plan", "products", "operations", "reassociation", "journal"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_folders_of_the_kernels_are_guests(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for name in ("hessfn", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    (copy / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "operations.md", copy / "docs")  # a test holds it against the code
    for name in ("conv3x3", "flash_attention"):
        shutil.rmtree(copy / "hessfn" / "engine" / name)
    for name in ("conv3x3", "winograd", "kernel_build", "flash_attention"):
        (copy / "tests" / f"test_{name}.py").unlink()
    (copy / "tests" / "test_without.py").write_text(
        "import sys, hessfn\n"
        "def test_it_is_the_copy_that_is_tested():\n"
        f"    assert hessfn.__file__.startswith({str(copy)!r})\n"
        "    hessfn.show_config()\n"
        "    assert not {'hessfn.engine.conv3x3', 'hessfn.engine.flash_attention'} & {*sys.modules}\n"
    )
    files = [f"tests/test_{name}.py" for name in [*REST, "without"]]
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
