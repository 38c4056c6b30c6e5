"""Several processes on this machine, over gloo: every rank asserts, and a rank that fails fails the test."""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from nets import normal, problem
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

import hessfn as hf
from hessfn.core import tree
from hessfn.parallel.all_reduce import ShardedBatches, require_same
from hessfn.reporting.cli import main

pytestmark = pytest.mark.skipif(
    not dist.is_available() or "forkserver" not in multiprocessing.get_all_start_methods(),
    reason="needs torch.distributed and processes that are forked",
)
PATIENCE = timedelta(seconds=60)


def start(
    program: Callable[[int, int, Path], None], size: int, folder: Path, timeout: timedelta = PATIENCE
) -> list[Any]:
    """``program(rank, size, folder)`` in processes of a group; a server imports torch once for all of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "hessfn.reporting.cli", "torch._dynamo", "torch.distributed.fsdp"])
    processes = [context.Process(target=_rank, args=(program, rank, size, folder, timeout)) for rank in range(size)]
    for process in processes:
        process.start()
    return processes


def _rank(program: Callable[[int, int, Path], None], rank: int, size: int, folder: Path, timeout: timedelta) -> None:
    torch.set_num_threads(1)
    with (folder / f"{rank}.err").open("w") as out, contextlib.redirect_stderr(out):
        store = dist.FileStore(str(folder / "store"), size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
        try:
            program(rank, size, folder)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=out, flush=True)
            raise
        dist.destroy_process_group()


def run(program: Callable[[int, int, Path], None], size: int, folder: Path) -> None:
    processes = start(program, size, folder)
    for process in processes:
        process.join(120)
    said = {rank: (folder / f"{rank}.err").read_text() for rank in range(size)}
    assert [process.exitcode for process in processes] == [0] * size, said


def same_bits(x: Any) -> bool:
    """Whether all ranks hold the same bits."""
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, [leaf.numpy().tobytes() for leaf in tree.leaves(x)])
    return all(other == said[0] for other in said)


def raised(function: Callable[[], Any]) -> str:
    with pytest.raises((ValueError, RuntimeError)) as error:
        function()
    return f"{error.type.__name__}: {error.value}"


# Means over ranks.


def shards(x: Tensor, size: int) -> list[Tensor]:
    """Parts of unlike sizes, the last one empty."""
    cuts = [0, *(len(x) * (r + 1) * (r + 2) // ((size - 1) * size) for r in range(size - 1)), len(x)]
    return [x[a:b] for a, b in itertools.pairwise(cuts)]


def means(rank: int, size: int, folder: Path) -> None:
    loss, params, (inputs, targets), _ = problem("mlp")
    x, y = (shards(t, size)[rank] for t in (inputs, targets))
    assert (len(x) == 0) == (rank == size - 1)
    whole = hf.hvp(loss, params, (inputs, targets))
    matvec = hf.all_reduce(hf.hvp(loss, params, (x, y)), len(x))
    start = hf.gaussian(params, 1)[0]

    product = matvec(start)
    assert same_bits(product)
    assert tree.norm(tree.add(product, whole(start), -1.0)) < 1e-12 * tree.norm(product)
    value = hf.all_reduce(lambda p: loss(p, (x, y)), torch.tensor(len(x)))(params)
    torch.testing.assert_close(value, loss(params, (inputs, targets)), rtol=1e-13, atol=0)

    pairs, expected = (hf.eigsh(m, start) for m in (matvec, whole))
    assert same_bits(pairs)
    torch.testing.assert_close(pairs.values, expected.values, rtol=1e-10, atol=0)
    for batch_size in (1, 2):  # two products in one reduction
        trace = hf.hutchinson(matvec, hf.rademacher(params, 4), batch_size=batch_size)
        torch.testing.assert_close(trace.mean, hf.hutchinson(whole, hf.rademacher(params, 4)).mean, rtol=1e-12, atol=0)

    dealt = ShardedBatches(
        list(zip(inputs.split(2), targets.split(2), strict=True))
    )  # of 2, 2, 2: with 4 ranks one has none
    assert len(list(dealt)) == len(range(rank, 3, size))
    dealt_product = hf.mean_hvp(loss, params, dealt)(start)
    assert same_bits(dealt_product)
    assert tree.norm(tree.add(dealt_product, product, -1.0)) < 1e-12 * tree.norm(product)

    half = {"a": torch.full((3,), 2.0**-12, dtype=torch.bfloat16), "b": torch.full((2,), 1e30)}
    assert hf.all_reduce(lambda v: v, 1e9 * (rank + 1))(half)["b"].dtype == torch.float32
    assert torch.equal(hf.all_reduce(lambda v: v, 1e9 * (rank + 1))(half)["a"], half["a"])  # nothing overflows


def wrapped(rank: int, size: int, folder: Path) -> None:
    loss, params, batch, model = problem("mlp")
    parallel = nn.parallel.DistributedDataParallel(model)
    of_parallel, same = hf.functionalize(parallel, nn.CrossEntropyLoss())
    assert list(same) == list(params)
    assert torch.equal(of_parallel(params, batch), loss(params, batch))
    assert hf.activation_loss(parallel, nn.CrossEntropyLoss(), batch, "2")[1]["2"].shape == (6, 5)


def refusals(rank: int, size: int, folder: Path) -> None:
    def identity(v: Any) -> Any:
        return v

    v = {"w": torch.ones(3)}
    assert "the weight of rank 1 is -1.0" in raised(lambda: hf.all_reduce(identity, -1.0 if rank else 1.0)(v))
    assert "the weight of rank 0 is nan" in raised(lambda: hf.all_reduce(identity, 1.0 if rank else float("nan"))(v))
    assert "weights of all ranks are 0" in raised(lambda: hf.all_reduce(identity, 0.0)(v))
    message = raised(lambda: hf.all_reduce(lambda v: {"w": torch.ones(3 + rank)}, 1.0)(v))
    assert "the result of rank 1 is not like that of rank 0: leaf 'w' of shape (4,)" in message
    assert "the same vector" in raised(lambda: hf.all_reduce(identity, 1.0)(hf.gaussian(v, 1, seed=rank)[0]))
    assert "rank 1 has other weights" in raised(lambda: require_same(rank, "other weights", None))

    def failing_on_one(after: int) -> Callable[[Any], Any]:
        calls: list[int] = []

        def matvec(v: Any) -> Any:
            calls.append(1)
            if rank == 1 and len(calls) > after:
                raise OSError("no such batch")
            return v

        return matvec

    for after in (0, 2):
        matvec = hf.all_reduce(failing_on_one(after), 1.0)
        for _ in range(after):
            matvec(v)
        with pytest.raises(OSError if rank else RuntimeError, match="no such batch" if rank else "rank.* failed"):
            matvec(v)
    grown: list[int] = []
    changing = hf.all_reduce(lambda v: [torch.ones(3), *(torch.ones(1) for _ in grown)], 1.0)
    changing(v)
    grown.append(1)
    assert "this product is not like the first one" in raised(lambda: changing(v))


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_a_mean_over_ranks_is_that_of_all_data_with_the_same_bits_on_every_rank(size: int, tmp_path: Path) -> None:
    run(means, size, tmp_path)


@pytest.mark.slow
def test_a_data_parallel_model_is_unwrapped(tmp_path: Path) -> None:
    run(wrapped, 2, tmp_path)
    loss, params, batch, model = problem("mlp")
    of_parallel, same = hf.functionalize(nn.DataParallel(model), nn.CrossEntropyLoss())
    assert list(same) == list(params)
    assert torch.equal(of_parallel(params, batch), loss(params, batch))


def test_what_one_rank_does_wrong_all_ranks_refuse(tmp_path: Path) -> None:
    run(refusals, 2, tmp_path)


def test_without_a_process_group_there_is_a_clear_error() -> None:
    with pytest.raises(RuntimeError, match="not initialised: start the processes with torchrun"):
        hf.all_reduce(lambda v: v, 1.0)


# Ranks that die.


def killed(rank: int, size: int, folder: Path) -> None:
    matvec = hf.all_reduce(lambda v: 2 * v, 1.0)
    for count in range(10):
        if rank == 1 and count == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        matvec(torch.ones(3))


def late(rank: int, size: int, folder: Path) -> None:
    matvec = hf.all_reduce(lambda v: 2 * v, 1.0)
    matvec(torch.ones(3))
    if rank == 1:
        (folder / "gone").touch()
        time.sleep(60)
    matvec(torch.ones(3))


@pytest.mark.parametrize("program", [killed, late])
def test_a_rank_that_dies_or_hangs_makes_the_others_fail_in_time(
    program: Callable[[int, int, Path], None], tmp_path: Path
) -> None:
    alive, gone = start(program, 2, tmp_path, timeout=timedelta(seconds=3))
    deadline = time.monotonic() + 120
    while gone.is_alive() and not (tmp_path / "gone").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    alive.join(15)
    gone.kill()
    assert alive.exitcode == 1
    assert "rank 0 could not reach the others: one has died, hangs" in (tmp_path / "0.err").read_text()


# Reports.

PROBLEM = """
import torch

def small():
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(15, 4, generator=generator), torch.randint(3, (15,), generator=generator)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 3))
    for i, p in enumerate(model.parameters()):
        torch.nn.init.normal_(p, generator=generator)
    return model.eval(), torch.nn.CrossEntropyLoss(), list(zip(inputs.split(5), targets.split(5)))
"""


@pytest.mark.slow
def test_torchrun_gives_the_report_of_one_process_and_one_progress_bar(tmp_path: Path) -> None:
    (tmp_path / "small.py").write_text(PROBLEM)
    options = "--dtype float64 -k 1 --num-probes 3 --num-runs 1 --num-steps 4 --num-activation-probes 2"
    report = ["report", f"{tmp_path / 'small.py'}:small", *options.split(), "--out"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    several = subprocess.run(
        [*torchrun, "-m", "hessfn", *report, str(tmp_path / "two")], capture_output=True, text=True, timeout=120
    )
    assert several.returncode == 0, several.stderr
    assert several.stdout.count("report: ") == 1
    assert len(re.findall(r"^landscape: .*\(100%\)", several.stderr, re.MULTILINE)) == 1
    assert main([*report, str(tmp_path / "one")]) == 0
    one, two = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two"))
    for result in (one, two):
        del result["settings"]["command"], result["converged"]
        del result["date"], result["cost"], result["samples"]["data"]  # of the moment, and of this process's batches
        # Groups of the data are numbered by rank: they are the same ones, and halves of them are others.
        groups = result["samples"]["batches"]
        order = sorted(range(len(groups["losses"])), key=groups["losses"].__getitem__)
        rows = [result["samples"]["batch_weights"], groups["losses"], groups["trace"]]
        for values in rows + groups["eigenvalues"] + list(groups["layers"].values()):
            values[:] = [values[i] for i in order]
        del result["sharpness"]["lower"], result["sharpness"]["upper"]
    assert list(numbers(two)) == pytest.approx(list(numbers(one)), rel=1e-6, abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_of_torchrun_is_named_and_no_folder_is_left(victim: int, tmp_path: Path) -> None:
    # The first process is ready two seconds before the second, which is to clear up if the first is killed at once.
    late = f"import os, time\nopen({str(tmp_path)!r} + '/pid' + os.environ['RANK'], 'w').write(str(os.getpid()))\n"
    late += "time.sleep(2 * int(os.environ['RANK']))\n"
    (tmp_path / "small.py").write_text(late + PROBLEM)
    out = tmp_path / "out"
    report = ["report", f"{tmp_path / 'small.py'}:small", "--num-probes", "1000000", "--out", str(out)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with subprocess.Popen([*torchrun, "-m", "hessfn", *report], stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 90
        while not (out / ".unfinished" / "lock").exists() and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.05)
        pid = int((tmp_path / f"pid{victim}").read_text())
        os.kill(pid, signal.SIGKILL)
        assert process.stderr is not None
        said = process.stderr.read().replace("\r", "\n")
    lines = [line for line in said.splitlines() if "hessfn: " in line]
    assert len(lines) == 1, said
    assert f"rank {1 - victim}: " in lines[0]
    assert f"rank {victim} (process {pid}) has died: it was killed" in lines[0]
    assert not out.exists() or list(out.iterdir()) == []


def numbers(x: Any) -> Iterator[Any]:
    """The leaves of what JSON holds, those that are no numbers included."""
    for part in x.values() if isinstance(x, dict) else x if isinstance(x, list) else ():
        yield from numbers(part)
    if not isinstance(x, dict | list):
        yield x if isinstance(x, float) else hash(str(x))


# Sharded parameters.


def trees_of_parts(rank: int, size: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (size,))
    whole = {"w": normal(3, 4, seed=0), "b": normal(3, seed=1), "c": normal(4, seed=2)}
    placements = {"w": Shard(0), "b": Replicate(), "c": Shard(0)}  # 3 rows on 2 ranks
    parts = {name: distribute_tensor(x, mesh, [placements[name]]) for name, x in whole.items()}

    assert tree.dot(parts, parts) == pytest.approx(float(tree.dot(whole, whole)), rel=1e-14)
    assert tree.norm(parts) == pytest.approx(float(tree.norm(whole)), rel=1e-14)
    flat, unravel = tree.ravel(parts)
    assert torch.equal(flat, tree.ravel(whole)[0])
    stack = unravel(torch.stack([flat, 2 * flat]))
    assert stack["w"].placements == (Shard(1),)
    assert torch.equal(tree.ravel(tree.map(lambda x: x[1], stack))[0], 2 * flat)
    for draw in (hf.rademacher, hf.gaussian):
        probe = draw(parts, 3)[2]
        assert probe["w"].placements == (Shard(0),)
        assert torch.equal(tree.ravel(probe)[0], tree.ravel(draw(whole, 3)[2])[0])

    x = normal(5, 4, seed=3)
    everywhere = distribute_tensor(x, mesh, [Replicate()])

    def loss(p: Any, x: Any) -> Any:
        return (torch.tanh(x @ p["w"].T + p["b"]).square().sum(1) * (x @ p["c"])).mean()

    def gathered(p: Any, x: Tensor) -> Tensor:
        return loss({name: leaf.full_tensor(grad_placements=[Partial()]) for name, leaf in p.items()}, x) / size

    expected = hf.hvp(loss, whole, x)
    for function, data, mode in (
        (loss, everywhere, "reverse"),
        (loss, everywhere, "double_backward"),
        (gathered, x, "double_backward"),
    ):
        matvec = hf.hvp(function, parts, data, mode=mode)
        assert torch.allclose(tree.ravel(matvec(parts))[0], tree.ravel(expected(whole))[0], rtol=1e-12, atol=1e-14)
    hf.check_matvec(matvec, parts)
    assert "batch_size=2 is not for DTensors" in raised(lambda: hf.slq(matvec, hf.gaussian(parts, 2), 3, batch_size=2))
    same_results(matvec, parts, expected, whole, 1e-9)
    pairs = hf.eigsh(matvec, hf.gaussian(parts, 1)[0], k=2, rtol=1e-6)
    again = hf.eigsh(matvec, hf.gaussian(parts, 1)[0], k=2, rtol=1e-6, warm_start=pairs.vectors)
    torch.testing.assert_close(again.values, pairs.values, rtol=1e-9, atol=0)
    left = hf.deflate(matvec, pairs.vectors)(tree.map(lambda x: x[0], pairs.vectors))
    assert tree.norm(left) < 1e-6 * pairs.values[0].abs()


def same_results(matvec: Any, parts: Any, expected: Any, whole: Any, rtol: float) -> None:
    """Eigenpairs, traces and quadratures are those of the unsharded matrix."""
    pairs, reference = (hf.eigsh(m, hf.gaussian(p, 1)[0]) for m, p in ((matvec, parts), (expected, whole)))
    torch.testing.assert_close(pairs.values, reference.values, rtol=rtol, atol=0)
    assert pairs.vectors["w" if "w" in parts else "0.weight"].placements == (Shard(1),)
    trace, reference = (hf.hutchinson(m, hf.rademacher(p, 2)) for m, p in ((matvec, parts), (expected, whole)))
    torch.testing.assert_close(trace.mean, reference.mean, rtol=rtol, atol=0)
    rule, reference = (hf.slq(m, hf.gaussian(p, 1), 3) for m, p in ((matvec, parts), (expected, whole)))
    torch.testing.assert_close(rule.nodes, reference.nodes, rtol=rtol, atol=rtol * float(reference.nodes.abs().max()))


def fully_sharded(rank: int, size: int, folder: Path) -> None:
    loss, params, (x, y), model = problem("layer_norm")
    expected = hf.hvp(loss, params, (x, y))
    for layer in (model[0], model[3]):
        fully_shard(layer)
    fully_shard(model)
    state = [p.full_tensor().clone() for p in model.parameters()]
    mine = (x[:2], y[:2]) if rank == 0 else (x[2:], y[2:])  # of unlike sizes
    of_parts, parts = hf.functionalize(model, nn.CrossEntropyLoss())
    torch.testing.assert_close(of_parts(parts, mine), loss(params, (x, y)), rtol=1e-14, atol=0)

    way = hf.find_mode(of_parts, parts, mine)
    assert way.mode == "double_backward", way
    v = hf.gaussian(parts, 1)[0]
    product = tree.ravel(expected(hf.gaussian(params, 1)[0]))[0]
    same_results(hf.hvp(of_parts, parts, mine), parts, expected, params, 1e-9)
    for mode, error in (("auto", 1e-12), ("difference", 1e-9)):
        matvec = hf.hvp(of_parts, parts, mine, mode=mode)
        assert tree.norm(tree.ravel(matvec(v))[0] - product) < error * tree.norm(product)
    some, chosen = hf.functionalize(model, nn.CrossEntropyLoss(), params="0.*")
    part = hf.hvp(some, chosen, mine)(hf.gaussian(chosen, 1)[0])
    few = hf.functionalize(problem("layer_norm")[3], nn.CrossEntropyLoss(), params="0.*")
    wanted = tree.ravel(hf.hvp(*few, (x, y))(hf.gaussian(few[1], 1)[0]))[0]
    assert tree.norm(tree.ravel(part)[0] - wanted) < 1e-12 * tree.norm(wanted)

    assert all(torch.equal(p.full_tensor(), before) for p, before in zip(model.parameters(), state, strict=True))
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        moved = of_parts(tree.scale(2.0, parts), mine)
        torch.testing.assert_close(moved, loss(tree.scale(2.0, params), (x, y)), rtol=1e-14, atol=0)
        torch.testing.assert_close(of_parts(parts, mine), loss(params, (x, y)), rtol=1e-14, atol=0)


def with_mixed_precision(rank: int, size: int, folder: Path) -> None:
    """Without its hooks the model is another function, so that there are only differences."""
    model = problem("layer_norm")[3].float()
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32))
    loss, params = hf.functionalize(model, nn.CrossEntropyLoss())
    batch = normal(4, 4, seed=rank).float(), torch.tensor([0, 1, 2, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of differences in bfloat16, which are coarse
        found = hf.find_mode(loss, params, batch)
    assert found.mode == "difference"
    assert "another function without the hooks of fully_shard" in found.reason


@pytest.mark.slow
def test_a_model_of_mixed_precision_has_differences(tmp_path: Path) -> None:
    run(with_mixed_precision, 2, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("program", [trees_of_parts, fully_sharded])
def test_results_on_sharded_parameters_are_those_on_whole_ones(
    program: Callable[[int, int, Path], None], tmp_path: Path
) -> None:
    run(program, 2, tmp_path)
