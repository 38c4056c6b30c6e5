"""The group of the processes that ``torchrun`` has started, and who of them is missing when one fails."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from hessfn.core.errors import RankError
from hessfn.core.notes import add_note
from hessfn.parallel.all_reduce import Group

_PATIENCE = 3.0  # seconds for the others to say that they end, too; torchrun kills after 30
_INTERRUPTED = "it was interrupted"


@contextlib.contextmanager
def launched(timeout: float) -> Iterator[Group]:
    """The group of the processes that ``torchrun`` started, or None where it did not start this one.

    A process that waits ``timeout`` seconds for another raises ``RankError``. That error, or the interrupt by which
    torchrun ends those who are left, has a note that says which ranks have died or failed.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield None
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    roll = _Roll()
    try:
        yield dist.group.WORLD
    except (RankError, KeyboardInterrupt) as error:
        roll.leave("" if isinstance(error, RankError) else _INTERRUPTED)
        try:
            found = roll.missing(isinstance(error, RankError))
        except KeyboardInterrupt:  # torchrun has seen it, too, and ends those who are left: once
            found = roll.missing(isinstance(error, RankError))
        for note in found:
            add_note(error, note)
        raise
    except BaseException as error:
        roll.leave(f"{type(error).__name__}: {error}")
        raise
    finally:
        with contextlib.suppress(RuntimeError):  # where others have died, there is no group to be left in order
            dist.destroy_process_group()


class _Roll:
    """Who is there, and who has said that it ends. All is in the store through which torchrun's processes meet."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        patience = timedelta(seconds=_PATIENCE)
        store = dist.TCPStore(*place, is_master=False, wait_for_workers=False, timeout=patience)
        run = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '')}"
        self.store = dist.PrefixStore(f"hessfn-{run}", store)
        self.store.set(f"process-{self.rank}", f"{os.getpid()} {socket.gethostname()}")

    def leave(self, why: str) -> None:
        with contextlib.suppress(RuntimeError):
            self.store.set(f"end-{self.rank}", why or " ")

    def missing(self, interrupted: bool) -> list[str]:
        """A sentence for each other rank that has failed by itself, or was ``interrupted``, or does not say."""
        try:
            silent = self._silent()
            found = [self._what_became_of(rank) for rank in silent]
            ended = [rank for rank in range(self.size) if rank not in silent]
            reasons = {rank: self.store.get(f"end-{rank}").decode().strip() for rank in ended}
        except RuntimeError:
            return ["the process that the others meet at (torchrun, or rank 0) has died"]
        told = {rank: reason for rank, reason in reasons.items() if reason and (interrupted or reason != _INTERRUPTED)}
        return found + [f"rank {rank} failed: {reason}" for rank, reason in told.items() if rank != self.rank]

    def _silent(self) -> list[int]:
        """The ranks that do not say in time that they end."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            silent = [rank for rank in range(self.size) if not self.store.check([f"end-{rank}"])]
            if not silent or time.monotonic() > deadline:
                return silent
            time.sleep(0.05)

    def _what_became_of(self, rank: int) -> str:
        process, host = self.store.get(f"process-{rank}").decode().split(" ", 1)
        if host != socket.gethostname():
            return f"rank {rank} (on {host}) does not answer: it has died or hangs"
        if _is_alive(int(process)):
            return f"rank {rank} (process {process}) does not answer: it hangs or still computes"
        return f"rank {rank} (process {process}) has died: it was killed, as by a lack of memory, or has crashed"


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError:
        return False
    try:  # one that has ended has a number until its parent has seen it
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return True
    return state not in "ZX"
