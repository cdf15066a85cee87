"""Calibration samples from files of tensors (``.npz``, ``.safetensors``)."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from optin_deploy.errors import UserError, one_line
from optin_deploy.network import Network
from optin_deploy.nn.batches import Batch, dtype_name
from optin_deploy.utils.paths import require_regular

# Types that can be converted to an input's own type: no 8-bit floats, no complex numbers.
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
_READ = (torch.float16, torch.bfloat16, torch.float32, torch.float64, *_INTEGERS, torch.bool)


def read_tensors(network: Network, path: Path) -> dict[str, Tensor]:
    """Return the network's inputs by name, ``(samples, …)``; UserError if the file cannot be read or does not fit."""
    try:
        if path.suffix.lower() == ".npz":
            # np.load would also read a pickle or a single array with this suffix.
            with require_regular(path).open("rb") as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as arrays:
                tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        else:
            tensors = load_file(require_regular(path))
    except Exception as error:  # zip files, numpy's headers and safetensors each have their own error types
        raise UserError(f"calibration tensors {path} cannot be read: {one_line(error)}") from error
    _check_tensors(network, path, tensors)
    return {name: tensors[name].to(sample.dtype) for name, sample in network.inputs.items()}


def row_selector(tensors: Batch) -> Callable[[Sequence[int]], Batch]:
    """Return a function from row numbers to the batch of these rows of ``tensors``."""
    return lambda rows: {name: tensor[list(rows)] for name, tensor in tensors.items()}


def _check_tensors(network: Network, path: Path, tensors: Mapping[str, Tensor]) -> None:
    rows = {len(t) if t.dim() else 0 for t in tensors.values()}
    for name, sample in network.inputs.items():
        if name not in tensors:
            raise UserError(f"{path} has no tensor {name!r}; it has {', '.join(tensors) or 'none'}")
        shape, first = tuple(tensors[name].shape), 2 if name in network.sequence_inputs else 1
        if len(shape) != sample.dim() or shape[first:] != tuple(sample.shape[first:]):
            wanted = ", ".join(["samples", "sequence"][:first] + [str(n) for n in sample.shape[first:]])
            raise UserError(f"{path}: {name} has shape {shape}, the network takes ({wanted})")
        if 0 in shape[1:]:
            raise UserError(f"{path}: {name} has shape {shape}: give sequences of at least one token")
        if tensors[name].dtype not in _READ:
            supported = ", ".join(dtype_name(dtype) for dtype in _READ)
            raise UserError(f"{path}: {name} holds {dtype_name(tensors[name].dtype)}; convert it to one of {supported}")
        if tensors[name].is_floating_point() and not sample.is_floating_point():
            raise UserError(f"{path}: {name} holds {tensors[name].dtype}, the network takes integers")
        if not torch.isfinite(tensors[name]).all():
            raise UserError(f"{path}: {name} holds NaN or infinity")
    _check_mask(network, path, tensors)
    lengths = {name: tensors[name].shape[1] for name in network.sequence_inputs}
    if len(set(lengths.values())) > 1:
        raise UserError(f"{path}: the sequences have different lengths: {lengths}")
    if len(rows) != 1 or not min(rows):
        raise UserError(
            f"{path}: tensors need one first axis of samples, at least one long; found lengths {sorted(rows)}"
        )


def _check_mask(network: Network, path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError if a sample is only padding: its outputs, and all sums over samples, would be NaN."""
    if network.token_mask is None:
        return
    padding = (tensors[network.token_mask] == 0).flatten(1).all(1).nonzero().flatten().tolist()
    if padding:
        raise UserError(
            f"{path}: {network.token_mask} is 0 everywhere in {len(padding)} of its samples, the first of them number "
            f"{padding[0]} from 0: remove them"
        )
