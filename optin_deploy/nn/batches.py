"""Batches of inputs: tensors by the argument names of a network's forward, the first axis the batch."""

from collections.abc import Mapping, Sequence

from torch import Tensor

Batch = Mapping[str, Tensor]
Batches = Sequence[Batch]


def batch_size(batch: Batch) -> int:
    """Return the number of samples of ``batch``."""
    return len(next(iter(batch.values())))
