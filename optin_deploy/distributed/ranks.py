"""Calibration batches that several processes work through together: each takes a share, and sums are added up.

Functions take their batches as a sequence. A `Shared` one names the processes ("ranks") beside; any other belongs to
this process alone, and nothing here does anything.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor

from optin_deploy.errors import UserError

Batch = Mapping[str, Tensor]


class BrokenGroupError(Exception):
    """Another process is gone, or cannot be reached."""


@dataclass(frozen=True)
class Ranks:
    """The processes that share the work, and which of them this one is. With more than one, torch's default process
    group is theirs, and all must call the methods that exchange something, in the same order."""

    rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that writes, prints and measures."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of ``count`` pieces of equal work are this process's: neighbours, so that they are of few batches."""
        return range(self.rank * count // self.world, (self.rank + 1) * count // self.world)

    def weighed(self, costs: Sequence[float]) -> list[int]:
        """Which pieces of work of such ``costs`` are this process's: the dearest first, to who has least so far."""
        loads, own = [0.0] * self.world, []
        for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
            rank = min(range(self.world), key=lambda r: (loads[r], r))
            loads[rank] += costs[index]
            own += [index] if rank == self.rank else []
        return sorted(own)

    def total(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sums over all processes, in float64, of tensors that all have by the same names in the same order."""
        if self.world == 1:
            return dict(tensors)
        sums = {name: tensor.detach().double().contiguous().clone() for name, tensor in tensors.items()}
        for tensor in sums.values():
            _exchange(partial(dist.all_reduce, tensor))
        return sums

    def given(self, make: Callable[[], Tensor], like: Tensor) -> Tensor:
        """What ``make`` gives the main process, for all; of the shape and precision of ``like``."""
        if self.world == 1:
            return make()
        made = make().contiguous() if self.main else torch.empty_like(like).contiguous()
        _exchange(lambda: dist.broadcast(made, 0))
        return made

    def told(self, make: Callable[[], Any]) -> Any:
        """What ``make`` gives the main process, a value for JSON, for all; its UserError is raised by all."""
        if self.world == 1:
            return make()
        return self._from_main(_outcome(make) if self.main else "")

    def agreed(self, make: Callable[[], str]) -> str:
        """What ``make`` gives, the same in all processes; the first UserError of any is raised by all."""
        if self.world == 1:
            return make()
        found = [json.loads(text) for text in self._gathered(_outcome(make))]
        for rank, each in enumerate(found):
            if "error" in each:
                raise UserError(each["error"] if rank == 0 else f"rank {rank}: {each['error']}")
        for rank, each in enumerate(found):
            if each != found[0]:
                raise UserError(f"rank {rank} has other weights, calibration data, options or versions than rank 0")
        return str(found[0]["value"])

    def _from_main(self, text: str) -> Any:
        size = torch.tensor([len(text.encode())])
        _exchange(lambda: dist.broadcast(size, 0))
        data = _bytes(text) if self.main else torch.empty(int(size), dtype=torch.uint8)
        _exchange(lambda: dist.broadcast(data, 0))
        found = json.loads(_text(data))
        if "error" in found:
            raise UserError(found["error"])
        return found["value"]

    def _gathered(self, text: str) -> list[str]:
        own = _bytes(text)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        _exchange(lambda: dist.all_gather(sizes, torch.tensor([len(own)])))
        longest = int(max(sizes))
        all_data = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.world)]
        padded = torch.nn.functional.pad(own, (0, longest - len(own)))
        _exchange(lambda: dist.all_gather(all_data, padded))
        return [_text(data[: int(size)]) for data, size in zip(all_data, sizes, strict=True)]


ALONE = Ranks()


@dataclass(frozen=True)
class Shared(Sequence[Batch]):
    """Batches that ``ranks`` work through together."""

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
    """The processes that share ``batches``: this one `ALONE` where nothing else is said."""
    return batches.ranks if isinstance(batches, Shared) else ALONE


def own_indices(batches: Sequence[Batch]) -> range:
    """Which batches are this process's."""
    return ranks_of(batches).share(len(batches))


def shared_like(batches: Sequence[Batch], others: Sequence[Batch]) -> Sequence[Batch]:
    """``others``, shared by those that share ``batches``."""
    return Shared(others, batches.ranks) if isinstance(batches, Shared) else others


def _outcome(make: Callable[[], Any]) -> str:
    try:
        return json.dumps({"value": make()})
    except UserError as error:
        return json.dumps({"error": str(error)})


def _exchange(collective: Callable[[], Any]) -> None:
    try:
        collective()
    except RuntimeError as error:
        raise BrokenGroupError(str(error)) from error


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _text(data: Tensor) -> str:
    return data.numpy().tobytes().decode()
