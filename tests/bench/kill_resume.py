"""A report killed (kill -9) at random moments and resumed each time, against an undisturbed one.

    python tests/bench/kill_resume.py --kills 20
    python tests/bench/kill_resume.py --kills 3 --forked my_problem.py:small -- --num-probes 10

Ends with an error unless every number is the same to the last bit, and no product was computed twice but the one under
way at a kill. A report that ends before its kill is compared, and the next one begins.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import shlex
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

from hessfn.core.fingerprints import fingerprint
from hessfn.reporting import activations, html
from hessfn.reporting import products as report_products
from hessfn.reporting.cli import main
from hessfn.reporting.progress import kept_and_counted
from hessfn.reporting.workspace import num_products


def live(log: str, arguments: list[str]) -> int:
    """One life of a report; every product it begins is noted."""

    def noting(matvec, keep, name, bar):
        def product(v):
            note(log, fingerprint((name, v)))
            return matvec(v)

        return kept_and_counted(product, keep, name, bar)

    report_products.kept_and_counted = activations.kept_and_counted = noting
    note(log, "begun")
    return main(["report", *arguments])


def note(log: str, line: str) -> None:
    with open(log, "a") as file:
        file.write(line + "\n")


def begin(log: Path, arguments: list[str], forked: bool) -> int:
    log.write_text("")
    pid = os.fork()
    if pid:
        return pid
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    if not forked:
        os.dup2(quiet, 2)
        os.execv(sys.executable, [sys.executable, __file__, "--live", str(log), *arguments])
    html.write = lambda folder, _, result: (folder / "report.json").write_text(json.dumps(result))
    os._exit(live(str(log), arguments))


def ended(pid: int, within: float) -> bool:
    until = time.monotonic() + within
    while time.monotonic() < until:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            assert status == 0, "a report failed"
            return True
        time.sleep(0.002)
    return False


def products(log: Path) -> list[str]:
    return [line for line in log.read_text().split() if line != "begun"]


def numbers(out: Path) -> dict:
    result = json.loads((out / "report.json").read_text())
    del result["settings"]["command"]  # it names the folder
    cost = result.pop("cost")  # how long it took, and how those products were made that were not there yet
    return {**result, "date": None, "num_products": cost["products"]}


def soak(problem: str, kills: int, seed: int, forked: bool, options: list[str], folder: Path) -> None:
    log, rng = folder / "log", random.Random(seed)
    pid, start = begin(log, [problem, "--out", str(folder / "whole"), *options], forked), time.monotonic()
    assert ended(pid, 3600)
    took = time.monotonic() - start
    expected, whole = numbers(folder / "whole"), collections.Counter(products(log))
    num = sum(whole.values())
    print(f"undisturbed: {num} products, {took:.1f} s", flush=True)

    report, left, again = 0, kills, 0
    made: collections.Counter[str] = collections.Counter()
    lost: list[str] = []
    while True:
        out = folder / f"report{report}"
        before, over = num_products(out), False
        again_there = ["--resume"] if (out / ".unfinished").exists() else []
        pid = begin(log, [problem, "--out", str(out), *again_there, *options], forked)
        while "begun" not in log.read_text():
            assert not ended(pid, 0.01), "a report did not begin"
        most, limit = rng.randint(0, max(2, 2 * num // kills)), time.monotonic() + rng.uniform(0, took)
        while left and len(products(log)) < most and time.monotonic() < limit and not (over := ended(pid, 0.002)):
            pass
        killed = left > 0 and not over and not ended(pid, rng.uniform(0, 2 * took / num))
        if killed:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            left -= 1
            begun, kept = products(log), num_products(out)
            print(f"killed with {kept} products on disk, {len(begun)} begun in this life", flush=True)
            made.update(begun)
            if (out / ".unfinished").exists():
                assert kept - before in (len(begun), len(begun) - 1), "more than one product was lost"
                lost += begun[-1:] if kept - before < len(begun) else []
                continue
        else:
            assert over or left or ended(pid, 3600)
            made.update(products(log))
            assert [x for x in out.iterdir() if x.name.startswith(".")] == []
        assert numbers(out) == expected, "a resumed report differs from the undisturbed one"
        assert made == whole + collections.Counter(lost), "a product was computed twice"
        again += len(lost)
        print(f"report {report}: equal to the last bit; {len(lost)} of {num} products computed again", flush=True)
        made.clear()
        lost.clear()
        report += 1
        if left == 0:
            break
    print(f"{kills} kills, {report} reports: all equal; {again} products under way at a kill were computed again")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--live"]:
        sys.exit(live(sys.argv[2], sys.argv[3:]))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("problem", nargs="?", default="hessfn.problems:digits")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--forked", action="store_true", help="lives share one start of Python and draw nothing: quicker, less real"
    )
    parser.add_argument("options", nargs="*", help="of hessfn report, after --")
    given = parser.parse_args()
    small = shlex.split(
        "--set epochs=1 --set num_images=250 --num-probes 20 --num-runs 2 --num-steps 20 --num-plane-points 5 "
        "--num-activation-probes 4"
    )
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
    if given.forked:
        import torch._dynamo
    with tempfile.TemporaryDirectory() as scratch:
        soak(given.problem, given.kills, given.seed, given.forked, given.options or small, Path(scratch))
