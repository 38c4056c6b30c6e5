from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import classes, normal, seeded
from torch import nn

from hessfn.core.errors import CannotWrite
from hessfn.core.notes import notes
from hessfn.reporting import activations, html, products, progress, text
from hessfn.reporting.cli import main
from hessfn.reporting.options import Options
from hessfn.reporting.progress import Lines
from hessfn.reporting.run import report
from hessfn.reporting.workspace import num_products, open_workspace
from hessfn.storage import records

QUICK: dict[str, Any] = {
    "k": 2,
    "num_probes": 4,
    "num_runs": 2,
    "num_steps": 5,
    "num_pairs": 3,
    "num_layers": 1,
    "num_plane_points": 0,
    "num_activation_probes": 0,
}


def mlp(seed: int = 0) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)), seed)


def batches(scale: float = 1.0) -> list[Any]:
    return [(scale * normal(5, 3), classes(5, 2)), (normal(3, 3, seed=3), classes(3, 2, seed=4))]


def problem() -> tuple[Any, Any, Any]:
    return mlp(), nn.CrossEntropyLoss(), batches()


@pytest.fixture
def numbers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pictures: they take most of the time of a report of so small a net."""
    monkeypatch.setattr(html, "write", lambda folder, _, x: (folder / "report.json").write_text(json.dumps(x)))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], list[int]]:
    """Counts the products that are computed, and interrupts after so many."""
    counted: list[int] = []
    most = float("inf")

    def limited(matvec: Any, *rest: Any) -> Any:
        def product(v: Any) -> Any:
            if len(counted) >= most:
                raise KeyboardInterrupt
            counted.append(1)
            return matvec(v)

        return progress.kept_and_counted(product, *rest)

    def at_most(number: float) -> list[int]:
        nonlocal most
        most = number
        counted.clear()
        return counted

    monkeypatch.setattr(products, "kept_and_counted", limited)
    monkeypatch.setattr(activations, "kept_and_counted", limited)
    return at_most


def of_the_problem(result: dict[str, Any]) -> dict[str, Any]:
    """A result without what depends on when and how often it was run."""
    return {**result, "date": None, "cost": result["cost"]["products"]}


def interrupted(made: Any, out: Path, num: int = 9) -> None:
    made(num)
    with pytest.raises(KeyboardInterrupt):
        report(problem(), out, **QUICK)
    assert num_products(out) == num
    made(float("inf"))


def everything(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


DRIVER = Path(__file__).parent / "bench" / "kill_resume.py"
PROBLEM = """
import torch

def small():
    draw = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=draw)
    x = torch.randn(20, 3, generator=draw)
    return model, torch.nn.CrossEntropyLoss(), [(x, (x[:, 0] > 0).long())]
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="kills by signal")
def test_killed_at_random_and_resumed_it_is_the_undisturbed_report(tmp_path: Path) -> None:
    file = tmp_path / "problem.py"
    file.write_text(PROBLEM)
    options = "--num-probes 10 --num-runs 1 --num-steps 10 -k 2 --num-plane-points 0 --num-activation-probes 3"
    run = [sys.executable, str(DRIVER), "--forked", "--kills", "3", f"{file}:small", "--", *options.split()]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "3 kills" in done.stdout
    assert "all equal" in done.stdout


@pytest.mark.slow
def test_resumed_with_other_options_it_makes_use_of_the_products(
    made: Any, numbers_only: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**QUICK, "num_probes": 8}
    counted = made(float("inf"))
    expected = report(problem(), tmp_path / "whole", **options)
    needed = len(counted)
    interrupted(made, tmp_path / "out", num=12)
    counted, bars = made(float("inf")), []
    monkeypatch.setattr(progress, "Lines", lambda *args, **options: bars.append(Lines(*args, **options)) or bars[-1])
    assert of_the_problem(report(problem(), tmp_path / "out", resume=True, **options)) == of_the_problem(expected)
    assert len(counted) == needed - 12
    assert sum(bar.initial for bar in bars) == 12  # done, but nothing to go by for the time left
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["report.json"]


@pytest.mark.slow
def test_traces_by_layer_go_on_where_they_were(made: Any, numbers_only: None, tmp_path: Path) -> None:
    options = {**QUICK, "num_activation_probes": 3}
    counted = made(float("inf"))
    expected = report(problem(), tmp_path / "whole", **options)
    needed = len(counted)
    made(needed - 2)  # of six: three with each of two batches
    with pytest.raises(KeyboardInterrupt):
        report(problem(), tmp_path / "out", **options)
    assert num_products(tmp_path / "out") == needed - 2
    record = min((tmp_path / "out" / ".unfinished" / "activations-1").glob("*-1"))
    record.write_bytes(record.read_bytes()[:-1])
    counted = made(3)  # the two that are missing, and the damaged one
    with pytest.warns(UserWarning, match=f"{record.name}' is damaged .*: its product is computed again"):
        found = report(problem(), tmp_path / "out", resume=True, **options)
    assert of_the_problem(found) == of_the_problem(expected)
    assert len(counted) == 3


def other_code() -> tuple[Any, Any, Any]:
    class Same(nn.CrossEntropyLoss):
        pass

    return mlp(), Same(), batches()


def other_buffer() -> tuple[Any, Any, Any]:
    model = mlp()
    model[1].running_mean.add_(1)
    return model, nn.CrossEntropyLoss(), batches()


@pytest.mark.parametrize(
    ("other", "options", "message"),
    [
        (lambda: (mlp(1), nn.CrossEntropyLoss(), batches()), {}, "another 'parameters or buffers'"),
        (other_buffer, {}, "another 'parameters or buffers'"),
        (lambda: (mlp(), nn.CrossEntropyLoss(), batches(1.01)), {}, "another 'data'"),
        (lambda: (mlp(), nn.CrossEntropyLoss(label_smoothing=0.1), batches()), {}, "another 'losses'"),
        (lambda: (mlp().train(), nn.CrossEntropyLoss(), batches()), {}, "another 'train or eval mode'"),
        (other_code, {}, "another 'code'"),
        (problem, {"num_batches": 1}, "another 'data'"),
        (problem, {"params": "0.*"}, "another 'vectors'"),
        (problem, {"dtype": "float32"}, r"another 'vectors' \(.*float64.*, here .*float32"),
    ],
)
def test_the_products_of_another_problem_are_refused_and_kept(
    other: Any, options: Any, message: str, made: Any, numbers_only: None, tmp_path: Path
) -> None:
    interrupted(made, tmp_path, num=3)
    before = everything(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        report(other(), tmp_path, resume=True, **{**QUICK, **options})
    assert str(tmp_path / ".unfinished" / "products") in str(error.value)
    assert everything(tmp_path) == before


def test_the_products_of_another_number_of_threads_are_refused_and_kept(
    made: Any, numbers_only: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "problem.py", tmp_path / "out"
    file.write_text(PROBLEM)
    arguments = ["report", f"{file}:small", "--out", str(out), "--num-probes", "3", "--num-plane-points", "0"]
    made(5)
    assert main(arguments) == 130
    assert "5 products are kept, --resume goes on from there" in capsys.readouterr().err
    made(float("inf"))
    before = everything(out)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert main([*arguments, "--resume"]) == 2
    finally:
        torch.set_num_threads(threads)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hessfn: error: ")]
    assert len(said) == 1
    assert f"another 'threads' ({threads}, here {threads + 1})" in said[0]
    assert everything(out) == before
    assert main([*arguments, "--resume"]) == 0


def test_without_resume_a_report_starts_over(made: Any, numbers_only: None, tmp_path: Path) -> None:
    interrupted(made, tmp_path)
    counted = made(3)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            report((mlp(1), *problem()[1:]), tmp_path, **QUICK)
        assert len(counted) == num_products(tmp_path) == 3
        counted.clear()


def test_a_mistake_leaves_nothing_of_its_own_and_all_of_what_was_there(
    made: Any, numbers_only: None, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="which='XX'"):
        report(problem(), tmp_path / "deep" / "out", **{**QUICK, "which": "XX"})
    assert list(tmp_path.iterdir()) == []
    interrupted(made, tmp_path)
    before = everything(tmp_path)
    for wrong in ({"k": 0}, {"which": "XX", "resume": True}):
        with pytest.raises(ValueError, match="must be"):
            report(problem(), tmp_path, **{**QUICK, **wrong})
    assert everything(tmp_path) == before


def test_without_a_journal_nothing_is_kept_and_nothing_can_be_resumed(
    made: Any, numbers_only: None, tmp_path: Path
) -> None:
    made(5)
    with pytest.raises(KeyboardInterrupt):
        report(problem(), tmp_path / "out", journal=False, **QUICK)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="resume needs the journal"):
        report(problem(), tmp_path / "out", journal=False, resume=True, **QUICK)


HOLDER = """
import sys, time
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
time.sleep(600)
"""


def test_what_a_killed_report_left_half_written_goes_and_a_second_one_waits(numbers_only: None, tmp_path: Path) -> None:
    (tmp_path / ".report-killed").mkdir()
    (tmp_path / ".report-killed" / "density.png").write_bytes(b"half")
    (tmp_path / ".unfinished").mkdir()
    command = [sys.executable, "-c", HOLDER, tmp_path / ".unfinished" / "lock"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
            with pytest.raises(BlockingIOError, match="in use by another process") as error:
                report(problem(), tmp_path, **QUICK)
            assert notes(error.value) == []
        finally:
            other.send_signal(signal.SIGKILL)
    report(problem(), tmp_path, **QUICK)
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_a_full_disk_says_how_to_go_on(
    numbers_only: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "problem.py"
    file.write_text(PROBLEM)
    quick = ["--num-probes", "3", "--num-runs", "1", "--num-steps", "4", "--num-plane-points", "0"]
    arguments = ["report", f"{file}:small", "--out", str(tmp_path / "out"), *quick]
    write, limits = records.write, resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(where: Path, *rest: Any) -> None:
        room = 100 if len(list(where.parent.iterdir())) > 7 else limits[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            write(where, *rest)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(records, "write", full)
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "hessfn: error: " in said
    assert "cannot be written (File too large)" in said
    assert "6 products are kept, --resume goes on from there" in said
    monkeypatch.undo()
    monkeypatch.setattr(html, "write", lambda folder, *_: (folder / "report.json").write_text("{}"))
    assert main([*arguments, "--resume"]) == 0


def test_no_advice_is_given_about_products_that_may_be_of_another_problem(
    made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "problem.py", tmp_path / "out"
    file.write_text(f"{PROBLEM}\ndef interrupted():\n    raise KeyboardInterrupt\n")
    run = ["report", f"{file}:small", "--out", str(out), "--num-plane-points", "0"]
    made(5)
    assert main(run) == 130
    assert "; 5 products are kept, --resume goes on from there" in capsys.readouterr().err
    with records.lock(out / ".unfinished" / "lock"):  # of a process whose report these products are
        assert main([*run, "--resume"]) == 2
        said = capsys.readouterr().err
    assert "in use by another process" in said
    assert "--resume" not in said
    made(2)
    assert main([*run, "--no-journal"]) == 130
    assert "--resume" not in capsys.readouterr().err
    assert main(["report", f"{file}:interrupted", "--out", str(out)]) == 130
    assert "--resume" not in capsys.readouterr().err
    assert num_products(out) == 5


def test_there_must_be_something_to_resume(numbers_only: None, tmp_path: Path) -> None:
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(ValueError, match="there is nothing to resume in"):
            report(problem(), folder, resume=True, **QUICK)
        assert list(tmp_path.iterdir()) == []
    report(problem(), tmp_path / "done", **QUICK)
    with pytest.raises(ValueError, match="there is nothing to resume in"):
        report(problem(), tmp_path / "done", resume=True, **QUICK)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="ends by signal")
def test_what_is_ended_by_a_scheduler_leaves_its_products_and_nothing_half_written(tmp_path: Path) -> None:
    file, out = tmp_path / "problem.py", tmp_path / "out"
    file.write_text(PROBLEM)
    run = [sys.executable, "-m", "hessfn", "report", f"{file}:small", "--out", str(out), "--num-probes", "100000"]
    with subprocess.Popen(run, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and num_products(out) < 5:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        said = process.stderr.read().replace("\r", "\n").splitlines()[-1]
    assert process.returncode == 143, said
    assert said.startswith("hessfn: ended by SIGTERM, no report was written; ")
    assert said.endswith(f"{num_products(out)} products are kept, --resume goes on from there")
    assert [file.name for file in out.iterdir()] == [".unfinished"]


def test_a_full_disk_names_the_file_of_the_report(tmp_path: Path) -> None:
    with pytest.raises(CannotWrite, match=r"out/density\.png' cannot be written \(File too large\): make room"):
        fill_the_disk(tmp_path / "out", "density.png")
    assert list(tmp_path.iterdir()) == []


def fill_the_disk(out: Path, name: str) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_workspace(out, Options()) as (_, scratch):
        assert scratch is not None
        (scratch / "report.json").write_text("{}")
        os.utime(scratch / "report.json", ns=(0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            (scratch / name).write_bytes(bytes(2000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def write_both(out: Path) -> None:
    with open_workspace(out, Options()) as (_, scratch):
        assert scratch is not None
        for name in ("before.txt", "report.json"):
            (scratch / name).write_text("after")


def test_a_report_replaces_files_alone(tmp_path: Path) -> None:
    (tmp_path / "report.json").mkdir()
    (tmp_path / "before.txt").write_text("before")
    with pytest.raises(CannotWrite, match=r"report\.json' cannot be written \(it is no file\)"):
        write_both(tmp_path)
    assert (tmp_path / "before.txt").read_text() == "before"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["before.txt", "report.json"]


def test_unfinished_work_is_gone_with_its_folders_once_it_is_done(tmp_path: Path) -> None:
    with open_workspace(tmp_path / "deep" / "out", Options()) as (journals, scratch):
        assert journals is not None and journals.is_dir()
        assert scratch is not None and scratch.is_dir()
    assert list(tmp_path.iterdir()) == []


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.mark.slow
def test_names_in_a_report_are_text(tmp_path: Path) -> None:
    hostile = ["<script>alert(1)</script>", "</script><img src=x onerror=alert(1)>", "\"'><b id=x>$\\frac$"]
    model = nn.Sequential()
    for name in hostile:
        model.add_module(name, nn.Linear(3, 3).double())
    problem = model, nn.CrossEntropyLoss(), batches()
    report(problem, tmp_path / "out", name=" ".join(hostile), command=" ".join(hostile), **QUICK)
    text = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert not any(name in text for name in hostile)
    parsed = _Tags()
    parsed.feed(text)
    assert not any(attrs.get("src") == "x" or attrs.get("id") == "x" for _, attrs in parsed.found)
    assert not any(name.startswith("on") for _, attrs in parsed.found for name in attrs)


def test_names_cannot_steer_the_terminal(numbers_only: None, tmp_path: Path) -> None:
    result = report(problem(), tmp_path, name="\x1b[2Jgone\r\n", **QUICK)
    evil = "\x1b]0;title\x07\u202eevil"
    lines = text.summary({**result, "layers": {evil: next(iter(result["layers"].values()))}}).splitlines()
    assert all(line.isprintable() for line in lines)
    assert lines[0] == r"\x1b[2Jgone\r\n"
    assert any(r"\x1b]0;title\x07\u202eevil" in line for line in lines)
