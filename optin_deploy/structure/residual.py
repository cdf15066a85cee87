"""The residual stream that each projection's output is added to, found from the tensors of a forward pass.

Compensation needs to know this stream. In a pre-norm block it is the input of the norm before the sublayer, in a
post-norm block the input of the sublayer; in a CNN it is the input of the block or the output of its shortcut. A batch
norm or LayerScale may come between projection and addition, and a ReLU may follow the addition. Two tensors that differ
by the projection's output show where the stream is; names of modules do not matter.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optin_deploy.nn.calls import Call
from optin_deploy.nn.names import contains, is_inside
from optin_deploy.structure.groups import Group, Stream

# How far `after - before` may be from the (scaled) output, relative to it, for the two to be the residual stream.
_RELATIVE_TOLERANCE = 1e-3
# Values of a tensor that are compared first.
_PROBED = 2_048
# The eps of batch norms without such an attribute.
_EPS = 1e-5


def residual_stream(calls: Sequence[Call], block: str, projection: str, axis: int = -1) -> Stream:
    """Return the `Stream` that the output of ``projection`` is added to inside ``block``.

    Neither ``residual`` nor ``shortcut`` is set if anything other than a batch norm and LayerScale comes between
    projection and addition.

    Args:
        calls: The calls of a forward pass.
        axis: The axis of the projection's output that holds its features.
    """
    end = next(i for i, call in enumerate(calls) if call.name == projection)
    earlier, later = (
        [call for call in part if is_inside(call.name, block)] for part in (calls[:end], calls[end + 1 :])
    )
    last, norm, scale = _follow_output(calls[end], later, axis)
    # A module that encloses the projection ends after it, but its input came before.
    inputs = _outermost_first([*earlier, *(call for call in later if contains(call.name, projection))])
    shortcuts = _shortcuts(earlier, later, projection, last, norm)
    sums = [tensor for call in later for tensor in (call.input, call.output)]
    for name, update in _scaled_updates(last, scale, inputs, projection, axis):
        residual = _find_stream([(call.name, call.input) for call in inputs], update, sums)
        if residual is not None:
            return Stream(residual, None, norm, name, last.changed)
        shortcut = _find_stream([(call.name, call.output) for call in shortcuts], update, sums)
        if shortcut is not None:
            return Stream(None, shortcut, norm, name, last.changed)
    return Stream(None, None, norm, scale, last.changed)


def _follow_output(projection: Call, later: Sequence[Call], axis: int) -> tuple[Call, str | None, str | None]:
    """Return the last call that only normalises or scales the projection's output.

    The batch norm and the LayerScale parameter on the way are returned with it.
    """
    last, norm, scale = projection, None, None
    for call in later:
        if norm is None and scale is None and (normed := _normalise(call, last.output, axis)) is not None:
            last, norm = replace(call, output=normed), call.name
        elif scale is None and (parameter := _layer_scale(call, last.output, axis)):
            last, scale = call, f"{call.name}.{parameter}"
    return last, norm, scale


def _outermost_first(calls: Sequence[Call]) -> list[Call]:
    """Return the calls with outer modules first: they stay where a placeholder replaces a whole sublayer."""
    return sorted(calls, key=lambda call: call.name.count("."))


def _shortcuts(
    earlier: Sequence[Call], later: Sequence[Call], projection: str, last: Call, norm: str | None
) -> list[Call]:
    """Return the calls whose outputs may be a shortcut.

    They may run before or after the projection, but not on its output.
    """
    excluded = {projection, norm, last.name} | _made_of(last.output, later)
    calls = [c for c in (*earlier, *later) if c.name not in excluded and not contains(c.name, projection)]
    return _outermost_first(calls)


def _made_of(tensor: Tensor | None, calls: Sequence[Call]) -> set[str]:
    """Return the names of those of ``calls``, in order, whose input is ``tensor`` or the output of another of them."""
    names: set[str] = set()
    sources: dict[int, Tensor] = {} if tensor is None else {id(tensor): tensor}
    for call in calls:
        taken = call.input
        if taken is not None and (id(taken) in sources or any(torch.equal(taken, t) for t in sources.values())):
            names.add(call.name)
            sources |= {} if call.output is None else {id(call.output): call.output}
    return names


def _scaled_updates(
    last: Call, scale: str | None, calls: Sequence[Call], projection: str, axis: int
) -> Iterator[tuple[str | None, Tensor | None]]:
    """Yield the forms in which the update may be added to the stream.

    It is added as it is, or times a parameter of a module around the projection, whose name is yielded with it.
    """
    yield scale, last.output
    if scale is not None or last.output is None:
        return
    around = {call.name: call.module for call in calls if contains(call.name, projection)}
    for name, module in around.items():
        for parameter, gamma in module.named_parameters(recurse=False):
            if gamma.numel() == last.output.shape[axis]:
                yield f"{name}.{parameter}", last.output * _along(gamma.detach(), last.output, axis)


def _along(gamma: Tensor, update: Tensor, axis: int) -> Tensor:
    shape = [1] * update.dim()
    shape[axis] = -1
    return gamma.reshape(shape)


def _find_stream(
    candidates: Sequence[tuple[str, Tensor | None]], update: Tensor | None, sums: Sequence[Tensor | None]
) -> str | None:
    """Return the name of the candidate that becomes one of ``sums`` when ``update`` is added; the first of equals."""
    # A norm initialised to zero hides the stream.
    if update is None or not update.any():
        return None
    best, best_error = None, _RELATIVE_TOLERANCE
    # Modules that do nothing return the tensors that they take.
    streams = {id(t): (name, t) for name, t in reversed(candidates) if t is not None and t.shape == update.shape}
    later = {id(t): t for t in sums if t is not None and t.shape == update.shape}
    some = slice(None, None, max(1, update.numel() // _PROBED))
    probes = {key: t.flatten()[some] for key, t in later.items()}
    for name, stream in reversed(streams.values()):
        added = (stream + update).flatten()[some]
        for key, probe in probes.items():
            # A few values are enough to exclude most pairs.
            if min(float((probe - added).norm()), float((probe - F.relu(added)).norm())) > float(probe.norm()):
                continue
            error = _relative_error(stream, update, later[key])
            if error < best_error:
                best, best_error = name, error
    return best


def _relative_error(stream: Tensor, update: Tensor, later: Tensor) -> float:
    added = stream + update
    if bool((later >= 0).all()):
        added = F.relu(added)
    return float((later - added).norm() / update.norm().clamp_min(1e-6 * float(later.norm())))


def _normalise(call: Call, update: Tensor | None, axis: int) -> Tensor | None:
    """Return the output of ``call`` if it is a batch norm of ``update`` and affine in each channel, else None.

    The norm may take tokens ``(batch, tokens, C)`` as one batch.
    """
    if update is None or call.input is None or call.output is None or not is_batch_norm(call.module):
        return None
    if call.input.shape not in (update.shape, update.flatten(0, -2).shape):
        return None
    if not torch.equal(call.input.reshape(update.shape), update) or call.output.numel() != update.numel():
        return None
    factor, shift = (_along(t, update, 1 if axis == 1 or update.dim() == 4 else -1) for t in _norm_affine(call.module))
    output = call.output.reshape(update.shape)
    return output if torch.allclose(output, update * factor + shift, rtol=1e-4, atol=1e-5) else None


def _layer_scale(call: Call, update: Tensor | None, axis: int) -> str | None:
    """Return the name of the one parameter by which ``call`` multiplies ``update`` channel by channel, or None."""
    if update is None or call.input is None or call.output is None or call.input.shape != update.shape:
        return None
    parameters = list(call.module.named_parameters(recurse=False))
    if len(parameters) != 1 or parameters[0][1].numel() != update.shape[axis] or not torch.equal(call.input, update):
        return None
    name, gamma = parameters[0]
    scaled = update * _along(gamma.detach(), update, axis)
    return name if scaled.shape == call.output.shape and torch.allclose(call.output, scaled, rtol=1e-4) else None


def stream_scale(module: nn.Module, group: Group) -> Tensor | None:
    """Return the factors ``(features,)`` of the output of ``group.output`` on its way to the stream, None if all are 1.

    A batch norm in eval mode contributes weight / √(running variance + eps), LayerScale its parameter.
    """
    factor = None
    if group.stream.norm is not None:
        factor = _norm_affine(module.get_submodule(group.stream.norm))[0]
    if group.stream.scale is not None:
        gamma = module.get_parameter(group.stream.scale).reshape(-1)
        factor = gamma if factor is None else factor * gamma
    return factor


def stream_shift(module: nn.Module, group: Group) -> Tensor | None:
    """Return the shift ``(features,)`` of a batch norm between output and stream, None without one.

    The update of the stream is ``stream_scale * output + stream_shift``.
    """
    if group.stream.norm is None:
        return None
    shift = _norm_affine(module.get_submodule(group.stream.norm))[1]
    return shift * module.get_parameter(group.stream.scale).reshape(-1) if group.stream.scale is not None else shift


def is_batch_norm(norm: nn.Module) -> bool:
    """Return whether ``norm`` has running statistics, as libraries' own batch norms also have."""
    return all(isinstance(getattr(norm, name, None), Tensor) for name in ("running_mean", "running_var"))


def _norm_affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Return the factor and the shift of each channel, both ``(channels,)``, of a batch norm in eval mode."""
    factor = (norm.running_var + getattr(norm, "eps", _EPS)).rsqrt()
    factor = factor if norm.weight is None else factor * norm.weight
    shift = -norm.running_mean * factor
    return factor, shift if norm.bias is None else shift + norm.bias
