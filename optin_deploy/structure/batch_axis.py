"""Groups whose batch axis is not the first: scoring and compensation stack batches along that axis and count rows."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from optin_deploy.nn.calls import Call, first_tensor
from optin_deploy.nn.hooks import forward_hooks
from optin_deploy.structure.groups import Group


def find_varying_shapes(calls: Sequence[Call], groups: Sequence[Group]) -> dict[str, str]:
    """Return the groups whose projection runs on inputs of different shapes: group name -> reason.

    Args:
        calls: The calls of a forward pass.
    """
    shapes: dict[str, set[torch.Size]] = {}
    for call in calls:
        if call.input is not None:
            shapes.setdefault(call.name, set()).add(call.input.shape)
    reason = "its output projection runs several times, on inputs of different shapes"
    return {g.name: reason for g in groups if len(shapes.get(g.output, ())) > 1}


@torch.no_grad()
def find_batch_not_first(
    module: nn.Module, inputs: Mapping[str, Tensor], groups: Sequence[Group], block_of: Mapping[str, str]
) -> dict[str, str]:
    """Return the groups whose samples are along another axis than the first: group name -> reason.

    The shapes in a forward pass of the whole batch are compared with those of its first sample.
    """
    size = next(iter(inputs.values())).shape[0]
    if size == 1 or not groups:
        return {}
    names = {g.output for g in groups} | {block_of[g.name] for g in groups}
    whole, one = (_shapes(module, names, {n: t[:count] for n, t in inputs.items()}) for count in (size, 1))
    odd = {
        n for n in names if any(s[0] != size * o[0] or s[1:] != o[1:] for s, o in zip(whole[n], one[n], strict=True))
    }
    reason = "has sequences first and samples second: set batch_first=True if the module has it"
    return {g.name: reason for g in groups if odd & {g.output, block_of[g.name]}}


def _shapes(module: nn.Module, names: set[str], inputs: Mapping[str, Tensor]) -> dict[str, list[torch.Size]]:
    """Return the shapes of the inputs and outputs of the named modules, run after run."""
    shapes: dict[str, list[torch.Size]] = {name: [] for name in names}

    def note(name: str, _: nn.Module, args: tuple[object, ...], output: object) -> None:
        tensors = (first_tensor(args), first_tensor(output))
        shapes[name] += [t.shape for t in tensors if t is not None and t.dim()]

    with forward_hooks(module, names, after=note):
        module(**inputs)
    return shapes
