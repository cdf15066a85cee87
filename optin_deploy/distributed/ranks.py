"""Calibration batches that several processes share: each works on a shard, and sums are added up.

Functions take their batches as a sequence. A `Shared` sequence also names the processes ("ranks"). Any other sequence
belongs to this process alone, and nothing here communicates then.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar, overload

import torch
import torch.distributed as dist
from torch import Tensor

from optin_deploy.errors import UserError

Batch = Mapping[str, Tensor]
T = TypeVar("T")


class BrokenGroupError(Exception):
    """Another process has ended or cannot be reached."""


@dataclass(frozen=True)
class Ranks:
    """The processes that share the work, and the number of this one.

    With more than one process, they are torch's default process group. All of them must call the methods that
    communicate, in the same order.
    """

    rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that writes, prints and measures."""
        return self.rank == 0

    def shard(self, count: int) -> range:
        """Return the indices of this process among ``count`` pieces of equal work: neighbours, from few batches."""
        return range(self.rank * count // self.world, (self.rank + 1) * count // self.world)

    def balanced_shard(self, costs: Sequence[float]) -> list[int]:
        """Return the indices of this process among pieces of work of different ``costs``.

        The most expensive piece goes first, each to the process with the least work so far.
        """
        loads, indices = [0.0] * self.world, []
        for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
            rank = min(range(self.world), key=lambda r: (loads[r], r))
            loads[rank] += costs[index]
            indices += [index] if rank == self.rank else []
        return sorted(indices)

    def all_reduce(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the sums over all processes, in float64. All must have the same names in the same order."""
        if self.world == 1:
            return dict(tensors)
        sums = {name: tensor.detach().double().contiguous().clone() for name, tensor in tensors.items()}
        for tensor in sums.values():
            _communicate(partial(dist.all_reduce, tensor))
        return sums

    def broadcast(self, make: Callable[[], Tensor], like: Tensor) -> Tensor:
        """Return in all processes the tensor that ``make`` returns in the main one, of the shape and type of ``like``.

        Only the main process calls ``make``.
        """
        if self.world == 1:
            return make()
        tensor = make().contiguous() if self.main else torch.empty_like(like).contiguous()
        _communicate(partial(dist.broadcast, tensor, 0))
        return tensor

    def broadcast_object(self, make: Callable[[], T]) -> T:
        """Return in all processes what ``make`` returns in the main one, or raise its UserError in all.

        Only the main process calls ``make``.
        """
        if self.world == 1:
            return make()
        outcomes: list[T | UserError] = [_attempt(make) if self.main else UserError()]
        _communicate(partial(dist.broadcast_object_list, outcomes, 0))
        return _value_of(outcomes[0])

    def on_main(self, make: Callable[[], T]) -> T | None:
        """Call ``make`` in the main process only; all raise its UserError. The other processes return None."""
        values: list[T] = []
        self.broadcast_object(lambda: values.append(make()))
        return next(iter(values), None)

    def check_consistent(self, make: Callable[[], T], key: Callable[[T], str]) -> T:
        """Call ``make`` in every process and return its result.

        Raises:
            UserError: the first of any process, in all of them; or ``key`` of the results differs between processes.
        """
        if self.world == 1:
            return make()
        outcome = _attempt(make)
        keys: list[str | UserError] = [""] * self.world
        own_key = outcome if isinstance(outcome, UserError) else key(outcome)
        _communicate(partial(dist.all_gather_object, keys, own_key))
        for rank, error in enumerate(keys):
            if isinstance(error, UserError):
                raise UserError(str(error) if rank == 0 else f"rank {rank}: {error}")
        for rank, other in enumerate(keys):
            if other != keys[0]:
                raise UserError(f"rank {rank} has other weights, calibration data, options or versions than rank 0")
        return _value_of(outcome)


SINGLE_PROCESS = Ranks()


@dataclass(frozen=True)
class Shared(Sequence[Batch]):
    """Batches that ``ranks`` share."""

    batches: Sequence[Batch]
    ranks: Ranks

    def __len__(self) -> int:
        return len(self.batches)

    @overload
    def __getitem__(self, index: int) -> Batch: ...

    @overload
    def __getitem__(self, index: slice) -> "Shared": ...

    def __getitem__(self, index: int | slice) -> "Batch | Shared":
        if isinstance(index, slice):
            return replace(self, batches=self.batches[index])
        return self.batches[index]

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def ranks_of(batches: Sequence[Batch]) -> Ranks:
    """Return the processes that share ``batches``; `SINGLE_PROCESS` unless they are `Shared`."""
    return batches.ranks if isinstance(batches, Shared) else SINGLE_PROCESS


def own_indices(batches: Sequence[Batch]) -> range:
    """Return the indices of the batches that belong to this process."""
    return ranks_of(batches).shard(len(batches))


def shared_like(batches: Sequence[Batch], others: Sequence[Batch]) -> Sequence[Batch]:
    """Return ``others``, shared by the processes that share ``batches``."""
    return Shared(others, batches.ranks) if isinstance(batches, Shared) else others


def _attempt(make: Callable[[], T]) -> T | UserError:
    try:
        return make()
    except UserError as error:
        # Subclasses may take other arguments, which a copy in another process would lack.
        return UserError(str(error))


def _value_of(outcome: T | UserError) -> T:
    if isinstance(outcome, UserError):
        raise outcome
    return outcome


def _communicate(collective: Callable[[], object]) -> None:
    try:
        collective()
    except RuntimeError as error:
        raise BrokenGroupError(str(error)) from error
