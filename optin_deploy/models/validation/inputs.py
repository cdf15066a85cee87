"""Check the inputs of a module: tensors by name, with the batch as first axis."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from optin_deploy.errors import UserError
from optin_deploy.nn.batches import dtype_name
from optin_deploy.nn.copies import class_name_of, error_line

# The most values of all sample inputs together, also in a checkpoint.
MOST_VALUES = 1 << 27
# Types that a checkpoint can record.
_INPUT_TYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


def plain_inputs(module: nn.Module, inputs: object) -> dict[str, Tensor]:
    """Return the sample inputs without graphs; UserError unless they are tensors by name with the batch first."""
    if not isinstance(inputs, Mapping) or not inputs:
        raise UserError(f"inputs are a mapping of forward's argument names to tensors, not {_described(inputs)}")
    for name, value in inputs.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise UserError(f"input {name!r} has no name that an argument can have: give forward's argument names")
        reason = _unfit_input(value)
        if reason is not None:
            raise UserError(f"input {name} {reason}")
    sizes = {name: len(tensor) for name, tensor in inputs.items()}
    if len(set(sizes.values())) > 1:
        shapes = ", ".join(f"{name} {tuple(inputs[name].shape)}" for name in sizes)
        raise UserError(
            f"the inputs have first axes of different sizes ({shapes}), and each must be the batch: store values that "
            "all samples share in the module, or expand them"
        )
    if not min(sizes.values()):
        raise UserError(f"the sample inputs hold no sample ({', '.join(sizes)})")
    values = sum(tensor.numel() for tensor in inputs.values())
    if values > MOST_VALUES:
        raise UserError(f"the sample inputs hold {values} values, {MOST_VALUES} at most: two samples are enough")
    device = next((parameter.device for parameter in module.parameters()), None)
    elsewhere = next((name for name, tensor in inputs.items() if tensor.device != (device or tensor.device)), None)
    if elsewhere is not None:
        raise UserError(f"input {elsewhere} is on {inputs[elsewhere].device}, the module on {device}: move one of them")
    return {name: _plain(tensor) for name, tensor in inputs.items()}


def _unfit_input(value: object) -> str | None:
    if not isinstance(value, Tensor):
        return f"is {_described(value)}, not a tensor: leave it out, or set it in a module around yours"
    if is_traceable_wrapper_subclass(value) or value.is_nested or value.layout != torch.strided:
        return "is no dense tensor"
    if value.dtype not in _INPUT_TYPES:
        return f"is {dtype_name(value.dtype)}: give floating-point numbers, integers or truth values"
    if value.is_meta:
        return "is on the meta device, without values"
    if value.dim() == 0:
        return "has no batch axis: store values that all samples share in the module, or give one value per sample"
    return None


def _described(value: object) -> str:
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)[:60]
    return f"a {type(value).__name__}"


def _plain(tensor: Tensor) -> Tensor:
    """Return the tensor without a graph, subclass or inference mode."""
    if tensor.is_inference():
        tensor = tensor.clone()
    if type(tensor) is not Tensor:
        tensor = tensor.as_subclass(Tensor)
    return tensor.detach() if tensor.requires_grad else tensor


def check_batches(module: nn.Module, inputs: Mapping[str, Tensor], batches: object) -> None:
    """Raise UserError unless a user's ``batches`` are a list of batches like the sample ``inputs``.

    The first sample is run through ``module``.
    """
    if not isinstance(batches, Sequence) or isinstance(batches, str):
        raise UserError(f"batches are a list of mappings of input names to tensors, not {_described(batches)}")
    for index, batch in enumerate(batches):
        reason = _batch_error(batch, inputs)
        if reason is not None:
            raise UserError(f"batch {index} {reason}")
    if not len(batches):
        return
    sample = {name: tensor[:1].clone() for name, tensor in batches[0].items()}
    try:
        with torch.no_grad():
            module(**sample)
    except Exception as error:  # a user's module may raise errors of any type
        first = ", ".join(f"{name} {tuple(t.shape)} {dtype_name(t.dtype)}" for name, t in sample.items())
        wanted = ", ".join(f"{name} {tuple(t[:1].shape)} {dtype_name(t.dtype)}" for name, t in inputs.items())
        raise UserError(
            f"{class_name_of(module)} fails on the first sample of batch 0, {first}; its sample input is {wanted} "
            f"({error_line(error)})"
        ) from error


def _batch_error(batch: object, inputs: Mapping[str, Tensor]) -> str | None:
    if not isinstance(batch, Mapping):
        return f"is {_described(batch)}: a mapping of input names to tensors is needed"
    if set(batch) != set(inputs):
        return f"has the inputs {', '.join(map(str, batch))}; the network takes {', '.join(inputs)}"
    for name, value in batch.items():
        reason = _unfit_input(value)
        if reason is not None:
            return f"cannot be used: input {name} {reason}"
    sizes = {name: len(tensor) for name, tensor in batch.items()}
    if len(set(sizes.values())) > 1 or not min(sizes.values()):
        return f"does not have as many samples in each input: {', '.join(f'{n} {size}' for n, size in sizes.items())}"
    return None
