"""Batches of inputs: tensors by the argument names of a network's forward, the first axis the batch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Batch = Mapping[str, Tensor]
Batches = Sequence[Batch]
# Tensors in nested tuples, lists, mappings and dataclasses.
PyTree = Any
# A function of torch, as modes of torch functions see it.
TorchFunction = Callable[..., PyTree]


def batch_size(batch: Batch) -> int:
    """Return the number of samples of ``batch``."""
    return len(next(iter(batch.values())))


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of ``dtype`` without "torch.", for messages and files."""
    return str(dtype).removeprefix("torch.")
