"""A list of tensors for many batches: some are kept in memory, the others in a temporary file."""

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO, TypeVar, cast, overload

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

# Bytes that one list keeps in memory.
IN_MEMORY = 2**26
# Tensors with less storage stay in memory: numbers, and expanded tensors that only have a shape.
_SMALL_BYTES = 2**10

T = TypeVar("T")


@dataclass(frozen=True)
class _Spilled:
    """A tensor in the file."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


@dataclass
class _Entry:
    """A value of the list: its leaves, the bytes of them in memory, and its place in the file, which is reused."""

    leaves: list[object] = field(default_factory=list)
    spec: TreeSpec | None = None
    bytes_in_memory: int = 0
    offset: int = 0
    capacity: int = 0


class _Storage:
    """The memory and the file of a list."""

    def __init__(self, limit: int) -> None:
        self._free = limit
        self._end = 0
        self._file: BinaryIO | None = None

    def store(self, entry: _Entry, value: object) -> None:
        """Replace the value of ``entry``."""
        self._free += entry.bytes_in_memory
        leaves, entry.spec = tree_flatten(value)
        size = sum(leaf.nbytes for leaf in leaves if _is_large(leaf))
        entry.bytes_in_memory = size if size <= self._free else 0
        self._free -= entry.bytes_in_memory
        if entry.bytes_in_memory < size:
            if size > entry.capacity:
                entry.offset, entry.capacity = self._end, size
                self._end += size
            leaves = self._spill(leaves, entry.offset)
        entry.leaves = leaves

    def load(self, entry: _Entry) -> object:
        """Return the value of ``entry``; tensors from the file are copies."""
        leaves = [self._read(leaf) if isinstance(leaf, _Spilled) else leaf for leaf in entry.leaves]
        return tree_unflatten(leaves, cast(TreeSpec, entry.spec))

    def _spill(self, leaves: list[object], offset: int) -> list[object]:
        if self._file is None:
            self._file = cast(BinaryIO, tempfile.TemporaryFile(prefix="optin-deploy-"))  # noqa: SIM115
        self._file.seek(offset)
        spilled: list[object] = []
        for leaf in leaves:
            if isinstance(leaf, Tensor) and _is_large(leaf):
                self._file.write(_bytes(leaf.detach().cpu().contiguous()))
                spilled.append(_Spilled(offset, leaf.shape, leaf.dtype, leaf.device))
                offset += leaf.nbytes
            else:
                spilled.append(leaf)
        # A full disk is an error here, not where the file is read.
        self._file.flush()
        return spilled

    def _read(self, spilled: _Spilled) -> Tensor:
        file = cast(BinaryIO, self._file)
        file.seek(spilled.offset)
        tensor = torch.empty(spilled.shape, dtype=spilled.dtype)
        if file.readinto(_bytes(tensor)) != tensor.nbytes:  # type: ignore[attr-defined]
            raise EOFError("the temporary file is cut short")
        return tensor.to(spilled.device)


class SpillList(Sequence[T]):
    """A list of tensors, or of dicts and tuples of tensors. Values that do not fit in memory are returned as copies.

    The file is in ``TMPDIR`` and has no name, so that it disappears with the process. A slice is a view. OSError if the
    disk is full.

    Args:
        values: the first values.
        in_memory: bytes that are kept in memory; `IN_MEMORY` when None.
    """

    def __init__(self, values: Iterable[T] = (), in_memory: int | None = None) -> None:
        self._storage = _Storage(IN_MEMORY if in_memory is None else in_memory)
        self._entries: list[_Entry] = []
        for value in values:
            self.append(value)

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> "SpillList[T]": ...

    def __getitem__(self, index: int | slice) -> "T | SpillList[T]":
        if isinstance(index, slice):
            view: SpillList[T] = SpillList()
            view._storage, view._entries = self._storage, self._entries[index]
            return view
        return cast(T, self._storage.load(self._entries[index]))

    def __setitem__(self, index: int, value: T) -> None:
        self._storage.store(self._entries[index], value)

    def append(self, value: T) -> None:
        """Add ``value`` at the end."""
        entry = _Entry()
        self._storage.store(entry, value)
        self._entries.append(entry)


def _is_large(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.untyped_storage().nbytes() > _SMALL_BYTES


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
