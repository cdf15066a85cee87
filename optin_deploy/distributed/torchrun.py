"""A process of several that torchrun has started: which one it is, and how all end with one message when one fails."""

import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

import typer

from optin_deploy.errors import GateError, UserError

if TYPE_CHECKING:
    from torch.distributed import Store

    from optin_deploy.distributed.ranks import Ranks

# The others wait for the main process while it measures, perhaps for hours. That one is gone is told by its connection,
# which closes, and by torchrun's signal: no timeout is needed for it.
_TIMEOUT = timedelta(days=1)
# A process that has ended is seen to be gone when torchrun has taken note of it.
_NOTICED_SECONDS = 5.0
# How long a process waits for the main one, which has the same error, to tell it: torchrun ends all when one ends.
_TOLD_SECONDS = 60.0


class RankLostError(UserError):
    """Another process of the run has ended, or torchrun ends them all."""


class _TerminatedError(BaseException):
    """The signal by which torchrun ends a process."""


def launched_ranks() -> tuple[int, int]:
    """This process's number and how many there are, by what torchrun has set; 0 of 1 without it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1
    try:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        raise UserError(
            "TORCHELASTIC_RUN_ID is set, and RANK and WORLD_SIZE are no numbers: unset it, or start with torchrun"
        ) from None


def refuse_several(command: str) -> None:
    """Raise UserError when torchrun has started several processes of a command that has no use for them."""
    if launched_ranks()[1] > 1:
        raise UserError(f"{command} runs in one process: start it without torchrun, which is for prune-export")


def local_device() -> int:
    """The number of this process's GPU on its host."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def quiet_unless_main() -> Iterator[None]:
    """Let the main process tell the errors that all have, wrong options too.

    The others wait for it: torchrun ends all processes when it takes note that one has ended.
    """
    try:
        yield
    except Exception as error:
        shared = isinstance(error, UserError | GateError | typer.Abort) or hasattr(error, "exit_code")
        if isinstance(error, RankLostError) or launched_ranks()[0] == 0 or not shared:
            raise
        sleep(_TOLD_SECONDS)
        sys.exit(3 if isinstance(error, GateError) else 2)


@contextmanager
def joined(doing: Callable[[], str], *, cuda: bool) -> Iterator["Ranks"]:
    """The processes of this run, for as long as they work together.

    Args:
        doing: what this process is at, for the message.
        cuda: whether sums lie on GPUs.

    Raises:
        RankLostError: another process has ended; in one of those that are left, and the others end in silence.
    """
    from optin_deploy.distributed.ranks import ALONE, BrokenGroupError, Ranks

    rank, world = launched_ranks()
    if world == 1:
        yield ALONE
        return

    import torch.distributed as dist

    def terminated(*_: Any) -> None:
        raise _TerminatedError

    before = signal.signal(signal.SIGTERM, terminated)
    members: _Members | None = None
    try:
        members = _Members(_store(rank, world), rank, world)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        group = dist.PrefixStore("group", members.store)
        dist.init_process_group(backend, store=group, rank=rank, world_size=world, timeout=_TIMEOUT)
        yield Ranks(rank, world)
        signal.signal(signal.SIGTERM, before)
    except (BrokenGroupError, _TerminatedError) as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        what = members.told_by_one(doing()) if members else None
        if what is None:
            sys.exit(2)
        raise RankLostError(what) from error
    except BaseException:
        signal.signal(signal.SIGTERM, signal.SIG_IGN if rank == 0 else signal.SIG_DFL)
        if members and rank == 0:
            members.tell()
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _store(rank: int, world: int) -> "Store":
    from torch.distributed.rendezvous import rendezvous

    store, *_ = next(iter(rendezvous("env://", rank, world, timeout=_TIMEOUT)))
    return store


class _Members:
    """Who takes part, in the store that torchrun keeps: it outlives them."""

    def __init__(self, store: "Store", rank: int, world: int) -> None:
        self.store, self.rank, self.world = store, rank, world
        store.set(f"member{rank}", f"{socket.gethostname()} {os.getpid()}")

    def tell(self) -> None:
        """Let the others know that the error is being told."""
        self.store.set("told", "1")

    def told_by_one(self, doing: str) -> str | None:
        """What has happened; None where another process tells it."""
        until, gone = monotonic() + _NOTICED_SECONDS, self._gone()
        while not gone and monotonic() < until:
            sleep(0.05)
            gone = self._gone()
        if self.store.check(["told"]) or self.rank != min(set(range(self.world)) - set(gone)):
            return None
        self.tell()
        who = f"rank {gone[0]} of {self.world} ended" if gone else "torchrun ended the run"
        return f"{who} during '{doing}'; what was finished is kept, give the same command again"

    def _gone(self) -> list[int]:
        return [rank for rank in range(self.world) if rank != self.rank and not self._lives(rank)]

    def _lives(self, rank: int) -> bool:
        """False for one on this host that has ended; what is on others cannot be seen."""
        import psutil

        if not self.store.check([f"member{rank}"]):
            return True
        host, number = self.store.get(f"member{rank}").decode().rsplit(" ", 1)
        if host != socket.gethostname():
            return True
        try:
            return psutil.Process(int(number)).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False
