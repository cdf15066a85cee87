"""Where the residual stream runs, found by what happens in a forward pass and not by names.

Compensation needs to know to which stream a projection's output is added. In a pre-norm block that is the input of the
norm before the sublayer, in a post-norm block the input of the sublayer itself; in a CNN it is the input of the block,
or what its shortcut gives. LayerScale or a batch norm may stand between. Here the pair of tensors that differ by just
that output is looked for; a ReLU may follow the addition.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optin_deploy.nn.hooks import forward_hooks
from optin_deploy.structure.groups import Group, Stream

# How far `after - before` may be from the (scaled) output, relative to it, for the two to be the residual stream.
_RELATIVE_TOLERANCE = 1e-3
# Values of a tensor that are compared first.
_PROBED = 2_048
# How far a tensor may move, relative to its norm, to count as the same in two forward passes.
_SAME_TOLERANCE = 1e-4
# Of batch norms that do not say.
_EPS = 1e-5


@dataclass(frozen=True)
class Call:
    """One module's call in a forward pass.

    ``given`` and ``returned`` are its first tensor input and output as they were then; ``changed`` tells that the
    network changed the output in place later.
    """

    name: str
    module: nn.Module
    given: Tensor | None
    returned: Tensor | None
    changed: bool


def first_tensor(value: Any) -> Tensor | None:
    """``value`` itself or its first element or entry if that is a tensor, else None."""
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, tuple | list) and value:
        value = value[0]
    return value if isinstance(value, Tensor) else None


def same_tensor(a: Tensor, b: Tensor) -> bool:
    """Whether two forward passes give the same there, as far as floating point can tell."""
    # Put so that NaN passes: that a network gives none is not for the structure to check.
    return a.shape == b.shape and not bool((a - b).norm() > _SAME_TOLERANCE * b.norm())


class _Copies:
    """Copies of tensors as they are now, one copy for each state of each tensor."""

    def __init__(self) -> None:
        # The tensors are held, so that no other one gets the id of one seen before.
        self.seen: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def of(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is None or tensor.is_inference():
            return tensor if tensor is None else tensor.clone()
        key = (id(tensor), tensor._version)
        if key not in self.seen:
            self.seen[key] = (tensor, tensor.detach().clone())
        return self.seen[key][1]


def trial_forward(module: nn.Module, inputs: Mapping[str, Tensor]) -> list[Call]:
    """Run ``module`` once; every submodule's call, in the order in which the calls end."""
    copies = _Copies()
    given: dict[str, list[Tensor | None]] = {name: [] for name, _ in module.named_modules()}
    ended: list[tuple[Call, Tensor | None, int]] = []

    def before(name: str, _: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        given[name].append(copies.of(first_tensor(args if args else list(kwargs.values()))))

    def after(name: str, submodule: nn.Module, _: object, output: object) -> None:
        returned = first_tensor(output)
        call = Call(name, submodule, given[name].pop(), copies.of(returned), False)
        ended.append((call, returned, _version(returned)))

    with forward_hooks(module, filter(None, given), before=before, after=after), torch.no_grad():
        module(**inputs)
    return [replace(call, changed=_version(returned) != version) for call, returned, version in ended]


def _version(tensor: Tensor | None) -> int:
    """Grows with every change in place."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def residual_stream(calls: Sequence[Call], block: str, projection: str, axis: int = -1) -> Stream:
    """The `Stream` that one output projection in ``block`` is added to.

    Neither ``residual`` nor ``shortcut`` is set when something else than a batch norm and LayerScale stands between
    projection and addition.

    Args:
        axis: that of the projection's output that holds its features.
    """
    end = next(i for i, call in enumerate(calls) if call.name == projection)
    inside = [i for i, call in enumerate(calls) if call.name == block or call.name.startswith(block + ".")]
    last, norm, scale = calls[end], None, None
    for call in (calls[i] for i in inside if i > end):
        if norm is None and scale is None and (normed := _normed(call, last.returned, axis)) is not None:
            last, norm = replace(call, returned=normed), call.name
        elif scale is None and (parameter := _layer_scale(call, last.returned, axis)):
            last, scale = call, f"{call.name}.{parameter}"
    # A module that encloses the projection ends after it but was given its input before.
    # Outer modules come first: they still stand where a whole sublayer is replaced.
    before = [calls[i] for i in inside if i < end or projection.startswith(calls[i].name + ".")]
    before.sort(key=lambda call: call.name.count("."))
    # A shortcut may run before the projection or after it.
    own = (projection, norm, last.name)
    others = [calls[i] for i in inside if calls[i].name not in own]
    # What is made of the output is no shortcut beside it.
    made = _made_of(last.returned, [calls[i] for i in inside if i > end])
    others = [call for call in others if call.name not in made]
    others = [call for call in others if not projection.startswith(call.name + ".")]
    others.sort(key=lambda call: call.name.count("."))
    after = [t for i in inside if i > end for t in (calls[i].given, calls[i].returned)]
    scales: list[tuple[str | None, Tensor | None]] = [(scale, None)]
    if scale is None and last.returned is not None:
        scales += _parameters_around(before, projection, last.returned, axis)
    for name, gamma in scales:
        update = last.returned if gamma is None or last.returned is None else last.returned * gamma
        residual = _stream([(call.name, call.given) for call in before], update, after)
        if residual is not None:
            return Stream(residual, None, norm, name, last.changed)
        shortcut = _stream([(call.name, call.returned) for call in others], update, after)
        if shortcut is not None:
            return Stream(None, shortcut, norm, name, last.changed)
    return Stream(None, None, norm, scale, last.changed)


def _made_of(tensor: Tensor | None, calls: Sequence[Call]) -> set[str]:
    """Names of those of ``calls``, in order, that take ``tensor`` or what another such call gives."""
    names: set[str] = set()
    given: dict[int, Tensor] = {} if tensor is None else {id(tensor): tensor}
    for call in calls:
        taken = call.given
        if taken is not None and (id(taken) in given or any(torch.equal(taken, t) for t in given.values())):
            names.add(call.name)
            given |= {} if call.returned is None else {id(call.returned): call.returned}
    return names


def _parameters_around(
    calls: Sequence[Call], projection: str, update: Tensor, axis: int
) -> list[tuple[str | None, Tensor | None]]:
    """Parameters that modules around the projection may multiply its output by: name, and how it is multiplied."""
    around = {call.name: call.module for call in calls if projection.startswith(call.name + ".")}
    return [
        (f"{name}.{parameter}", _along(gamma.detach(), update, axis))
        for name, module in around.items()
        for parameter, gamma in module.named_parameters(recurse=False)
        if gamma.numel() == update.shape[axis]
    ]


def _along(gamma: Tensor, update: Tensor, axis: int) -> Tensor:
    shape = [1] * update.dim()
    shape[axis] = -1
    return gamma.reshape(shape)


def _stream(
    before: Sequence[tuple[str, Tensor | None]], update: Tensor | None, after: Sequence[Tensor | None]
) -> str | None:
    """The name of that one of ``before`` that gives one of ``after`` when ``update`` is added, of equals the first."""
    # A norm initialised to zero hides what it is added to.
    if update is None or not update.any():
        return None
    best, best_error = None, _RELATIVE_TOLERANCE
    # Modules that do nothing give the tensors that they take.
    streams = {id(t): (name, t) for name, t in reversed(before) if t is not None and t.shape == update.shape}
    later = {id(t): t for t in after if t is not None and t.shape == update.shape}
    some = slice(None, None, max(1, update.numel() // _PROBED))
    probes = {key: t.flatten()[some] for key, t in later.items()}
    for name, stream in reversed(streams.values()):
        added = (stream + update).flatten()[some]
        for key, probe in probes.items():
            # Most pairs have nothing to do with each other, which few of their values tell.
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


def _normed(call: Call, update: Tensor | None, axis: int) -> Tensor | None:
    """What ``call`` makes of ``update``, if it is a batch norm that takes it and an affine function of each channel.

    Tokens ``(batch, tokens, C)`` may be given to the norm as one batch of them all.
    """
    if update is None or call.given is None or call.returned is None or not is_batch_norm(call.module):
        return None
    if call.given.shape not in (update.shape, update.flatten(0, -2).shape):
        return None
    if not torch.equal(call.given.reshape(update.shape), update) or call.returned.numel() != update.numel():
        return None
    factor, shift = (_along(t, update, 1 if axis == 1 or update.dim() == 4 else -1) for t in _norm_affine(call.module))
    returned = call.returned.reshape(update.shape)
    return returned if torch.allclose(returned, update * factor + shift, rtol=1e-4, atol=1e-5) else None


def _layer_scale(call: Call, update: Tensor | None, axis: int) -> str | None:
    """Name of the one parameter by which ``call`` multiplies ``update`` channel by channel, or None."""
    if update is None or call.given is None or call.returned is None or call.given.shape != update.shape:
        return None
    parameters = list(call.module.named_parameters(recurse=False))
    if len(parameters) != 1 or parameters[0][1].numel() != update.shape[axis] or not torch.equal(call.given, update):
        return None
    name, gamma = parameters[0]
    scaled = update * _along(gamma.detach(), update, axis)
    return name if scaled.shape == call.returned.shape and torch.allclose(call.returned, scaled, rtol=1e-4) else None


def stream_scale(module: nn.Module, group: Group) -> Tensor | None:
    """What the output of ``group.output`` is multiplied by on its way to the stream: ``(features,)``, None if nothing.

    A batch norm in eval mode gives weight / √(running variance + eps), LayerScale its parameter.
    """
    factor = None
    if group.stream.norm is not None:
        factor = _norm_affine(module.get_submodule(group.stream.norm))[0]
    if group.stream.scale is not None:
        gamma = module.get_parameter(group.stream.scale).reshape(-1)
        factor = gamma if factor is None else factor * gamma
    return factor


def stream_shift(module: nn.Module, group: Group) -> Tensor | None:
    """What is added to the output of ``group.output``, after `stream_scale`, on its way to the stream: ``(features,)``.

    None without a batch norm. The update of the stream is ``scale * output + shift``.
    """
    if group.stream.norm is None:
        return None
    shift = _norm_affine(module.get_submodule(group.stream.norm))[1]
    return shift * module.get_parameter(group.stream.scale).reshape(-1) if group.stream.scale is not None else shift


def is_batch_norm(norm: nn.Module) -> bool:
    """Whether ``norm`` has running statistics: also libraries' own, with an activation or frozen."""
    return all(isinstance(getattr(norm, name, None), Tensor) for name in ("running_mean", "running_var"))


def _norm_affine(norm: Any) -> tuple[Tensor, Tensor]:
    """What a batch norm multiplies each channel by, and what it adds, both ``(channels,)``."""
    factor = (norm.running_var + getattr(norm, "eps", _EPS)).rsqrt()
    factor = factor if norm.weight is None else factor * norm.weight
    shift = -norm.running_mean * factor
    return factor, shift if norm.bias is None else shift + norm.bias
