"""Tensors that are kept for many batches: some in memory, the others in a temporary file, so that memory is bounded."""

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar, cast, overload

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

# Bytes that one shelf keeps in memory, where its tensors lie anyway.
IN_MEMORY = 2**26
# Tensors of less storage stay in memory: numbers, and what only tells a shape.
_SMALL = 2**10

T = TypeVar("T")


@dataclass(frozen=True)
class _Stored:
    """Where a tensor is in the file, and what it was."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class _Entry:
    """A value taken apart; ``resident`` are the bytes that it takes in memory."""

    leaves: list[Any]
    spec: TreeSpec
    resident: int


class Shelf(Sequence[T]):
    """A list of values made of tensors (dicts, tuples of them). What does not fit in memory comes back as a copy.

    The file has no name and is gone with the process, however that ends; it lies where ``TMPDIR`` says. OSError where
    that is full.
    """

    def __init__(self, values: Iterable[T] = (), in_memory: int | None = None) -> None:
        self._limit = IN_MEMORY if in_memory is None else in_memory
        self._entries: list[_Entry] = []
        # Where each entry may write, and how much: an entry that is set again uses its place again.
        self._places: list[tuple[int, int]] = []
        self._resident = self._end = 0
        self._file: BinaryIO | None = None
        for value in values:
            self.append(value)

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> "_Part[T]": ...

    def __getitem__(self, index: int | slice) -> "T | _Part[T]":
        if isinstance(index, slice):
            return _Part(self, range(len(self))[index])
        entry = self._entries[index]
        leaves = [self._read(leaf) if isinstance(leaf, _Stored) else leaf for leaf in entry.leaves]
        return cast(T, tree_unflatten(leaves, entry.spec))

    def __setitem__(self, index: int, value: T) -> None:
        self._resident -= self._entries[index].resident
        self._entries[index] = self._entry(index, value)

    def append(self, value: T) -> None:
        """Put ``value`` behind the others."""
        self._places.append((0, 0))
        self._entries.append(self._entry(len(self._entries), value))

    def _entry(self, index: int, value: T) -> _Entry:
        leaves, spec = tree_flatten(value)
        large = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.untyped_storage().nbytes() > _SMALL]
        size = sum(leaf.nbytes for leaf in large)
        if self._resident + size <= self._limit:
            self._resident += size
            return _Entry(leaves, spec, size)
        offset = self._place(index, size)
        stored: list[Any] = []
        for leaf in leaves:
            if any(leaf is each for each in large):
                self._write(offset, leaf)
                stored.append(_Stored(offset, leaf.shape, leaf.dtype, leaf.device))
                offset += leaf.nbytes
            else:
                stored.append(leaf)
        return _Entry(stored, spec, 0)

    def _place(self, index: int, size: int) -> int:
        if size > self._places[index][1]:
            self._places[index] = self._end, size
            self._end += size
        return self._places[index][0]

    def _write(self, offset: int, tensor: Tensor) -> None:
        if self._file is None:
            self._file = cast(BinaryIO, tempfile.TemporaryFile(prefix="optin-deploy-", buffering=0))  # noqa: SIM115
        self._file.seek(offset)
        data = _bytes(tensor.detach().cpu().contiguous())
        while data:
            data = data[self._file.write(data) :]

    def _read(self, stored: _Stored) -> Tensor:
        assert self._file is not None
        self._file.seek(stored.offset)
        tensor = torch.empty(stored.shape, dtype=stored.dtype)
        data = _bytes(tensor)
        while data:
            count = self._file.readinto(data)  # type: ignore[attr-defined]
            if not count:
                raise EOFError("the temporary file is cut short")
            data = data[count:]
        return tensor.to(stored.device)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(cast(Any, tensor.reshape(-1).view(torch.uint8).numpy()))


@dataclass(frozen=True)
class _Part(Sequence[T]):
    """Some values of a shelf."""

    shelf: Shelf[T]
    indices: range

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> "_Part[T]": ...

    def __getitem__(self, index: int | slice) -> "T | _Part[T]":
        if isinstance(index, slice):
            return _Part(self.shelf, self.indices[index])
        return self.shelf[self.indices[index]]
