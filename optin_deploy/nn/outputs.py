"""The outputs of a module: its tensors by name, and why some of them cannot be outputs of a file."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import TypeGuard

import torch
from torch import Tensor

from optin_deploy.errors import UserError
from optin_deploy.nn.batches import PyTree

# Deeper than any network nests its outputs. A list that contains itself has no end.
_MOST_LEVELS = 32
# Types without arrays in ONNX Runtime.
_WITHOUT_ARRAYS = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


def named_outputs(output: object) -> dict[str, Tensor]:
    """Return the tensors of a module's output by name, in order. Only dense real tensors are included.

    A single tensor is named ``output``. Tuples and lists number their items (``output_0``), mappings and dataclasses
    name them by keys and fields. Names of nested items are joined, as in ``hidden_states_2``.

    Raises:
        UserError: The output is none of these.
    """
    return {name: value for name, value in all_outputs(output).items() if _is_plain(value)}


def all_outputs(output: object) -> dict[str, PyTree]:
    """Return all outputs by name, also sparse and complex tensors, None, numbers and objects."""
    if isinstance(output, Tensor):
        return {"output": output}
    root = ("output",) if isinstance(output, tuple | list) else ()
    parts = _parts(output)
    if parts is None:
        raise UserError(
            f"the network gives a {type(output).__name__}; a tensor, a tuple or a mapping of tensors is needed"
        )
    leaves = [leaf for key, value in parts for leaf in _leaves(value, (*root, key), 1)]
    # Items that are not nested keep their names, whatever comes before them.
    names: dict[int, str] = {}
    for nested in (False, True):
        for index, (path, _) in enumerate(leaves):
            if (len(path) > len(root) + 1) is nested:
                names[index] = unused_name("_".join(path), names.values())
    return {names[index]: value for index, (_, value) in enumerate(leaves)}


def unused_name(name: str, taken: Collection[str]) -> str:
    """Return ``name``, or if it is taken, with the first number from 2 that makes it unique."""
    candidate, number = name, 2
    while candidate in taken:
        candidate, number = f"{name}_{number}", number + 1
    return candidate


def _leaves(value: object, path: tuple[str, ...], level: int) -> Iterator[tuple[tuple[str, ...], object]]:
    parts = None if isinstance(value, Tensor) else _parts(value)
    if parts is None:
        yield path, value
        return
    if level == _MOST_LEVELS:
        raise UserError(f"the network nests its outputs deeper than {_MOST_LEVELS} levels, in {'_'.join(path[:3])}")
    for key, part in parts:
        yield from _leaves(part, (*path, key), level + 1)


def _parts(value: object) -> list[tuple[str, object]] | None:
    """Return the items of a container by key, None if ``value`` is no container."""
    if isinstance(value, Mapping):
        return [(str(key), part) for key, part in value.items()]
    if isinstance(value, tuple | list):
        return [(str(index), part) for index, part in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return None


def _is_plain(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and _odd_kind(value) is None


def _odd_kind(tensor: Tensor) -> str | None:
    if tensor.is_nested or tensor.layout != torch.strided:
        return "is a sparse or nested tensor"
    if tensor.is_quantized:
        return "is a quantized tensor"
    return "holds complex numbers (torch.view_as_real makes real ones)" if tensor.is_complex() else None


def unfit_reason(value: object, alone: object, size: int) -> str | None:
    """Return why an output of a module cannot be an output of a file, None if it can.

    Args:
        value: The output for a batch of ``size`` samples.
        alone: The output for its first sample alone, None if there is none.
    """
    if not isinstance(value, Tensor):
        return f"is {value!r}" if value is None or isinstance(value, bool | int | float) else _typed(value)
    odd = _odd_kind(value)
    if odd is not None:
        return odd
    if value.dtype in _WITHOUT_ARRAYS:
        return (
            f"is {str(value.dtype).removeprefix('torch.')}, which ONNX Runtime gives no arrays of (.float() mends it)"
        )
    if value.dim() == 0:
        return "is one number for the whole batch"
    if not isinstance(alone, Tensor):
        return "is not returned for every batch"
    if value.shape[0] != size or alone.shape[:1] != (1,) or alone.shape[1:] != value.shape[1:]:
        shapes = f"{tuple(value.shape)} for {size} samples and {tuple(alone.shape)} for one"
        return f"does not have the batch, and that alone, as its first axis ({shapes})"
    return "is empty" if value.numel() == 0 else None


def _typed(value: object) -> str:
    return f"is of type {type(value).__name__}"
