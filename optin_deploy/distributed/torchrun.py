"""One of several processes that torchrun started: its number, and how all end with one message when one fails.

``torch.distributed.elastic``'s ``record`` cannot replace this: it records tracebacks of exceptions for torchrun's table
of failures, and no line of the table says what the run was doing, what is kept and how to continue.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from time import sleep
from typing import TYPE_CHECKING

import typer

from optin_deploy.errors import GateError, UserError

if TYPE_CHECKING:
    from torch.distributed import Store

    from optin_deploy.distributed.ranks import Ranks

# The others wait while the main process measures, perhaps for hours. They notice its end without a timeout: its
# connection closes, and torchrun sends a signal.
_TIMEOUT = timedelta(days=1)
# How long a process waits for the main one, which has the same error, to print it: torchrun ends all when one ends.
_PRINT_SECONDS = 60.0


class RankLostError(UserError):
    """Another process of the run has ended, or torchrun ends them all."""


class _TerminatedError(BaseException):
    """The signal by which torchrun ends a process."""


def launched_ranks() -> tuple[int, int]:
    """Return this process's number and the number of processes that torchrun started; 0 and 1 without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1
    try:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        raise UserError(
            "TORCHELASTIC_RUN_ID is set, and RANK and WORLD_SIZE are no numbers: unset it, or start with torchrun"
        ) from None


def refuse_several(command: str) -> None:
    """Raise UserError if torchrun started several processes of a command that cannot use them."""
    if launched_ranks()[1] > 1:
        raise UserError(f"{command} runs in one process: start it without torchrun, which is for prune-export")


def local_device() -> int:
    """Return the number of this process's GPU on its host."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def quiet_unless_main() -> Iterator[None]:
    """Let only the main process print the errors that all processes have, such as wrong options.

    The others wait for it, since torchrun ends all processes when one has ended.
    """
    try:
        yield
    except Exception as error:
        shared = isinstance(error, UserError | GateError | typer.Abort) or hasattr(error, "exit_code")
        if isinstance(error, RankLostError) or launched_ranks()[0] == 0 or not shared:
            raise
        sleep(_PRINT_SECONDS)
        sys.exit(3 if isinstance(error, GateError) else 2)


@contextmanager
def process_group(current_stage: Callable[[], str], *, cuda: bool) -> Iterator["Ranks"]:
    """Yield the processes of this run, connected while the context lasts.

    Args:
        current_stage: returns the stage that this process is at, for the message.
        cuda: whether the tensors to be added up are on GPUs.

    Raises:
        RankLostError: another process has ended. Only one process raises it, the others exit without a message.
    """
    from optin_deploy.distributed.ranks import SINGLE_PROCESS, BrokenGroupError, Ranks

    rank, world = launched_ranks()
    if world == 1:
        yield SINGLE_PROCESS
        return

    import torch.distributed as dist

    default_handler = signal.signal(signal.SIGTERM, _raise_terminated)
    store: Store | None = None
    try:
        store = _connect(rank, world)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        group_store = dist.PrefixStore("group", store)
        dist.init_process_group(backend, store=group_store, rank=rank, world_size=world, timeout=_TIMEOUT)
        yield Ranks(rank, world)
        signal.signal(signal.SIGTERM, default_handler)
    except (BrokenGroupError, _TerminatedError) as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if store is None or not _claim_message(store):
            sys.exit(2)
        raise RankLostError(
            f"a process of {world} ended during '{current_stage()}', torchrun's table says which and how; what was "
            "finished is kept, give the same command again"
        ) from error
    except BaseException:
        signal.signal(signal.SIGTERM, signal.SIG_IGN if rank == 0 else signal.SIG_DFL)
        if store is not None and rank == 0:
            _claim_message(store)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _raise_terminated(*_: object) -> None:
    raise _TerminatedError


def _connect(rank: int, world: int) -> "Store":
    """Return the store that torchrun keeps; it outlives the processes."""
    from torch.distributed.rendezvous import rendezvous

    store, *_ = next(iter(rendezvous("env://", rank, world, timeout=_TIMEOUT)))
    return store


def _claim_message(store: "Store") -> bool:
    """Return whether this process is the first that asks, and so the one that prints an error."""
    return store.add("messages", 1) == 1
