"""Channels between two convolutions, found from a forward pass and not from names.

The channels are followed from a plain convolution of one to three axes through norms, grouped convolutions,
squeeze-and-excitation and modules with numbers for each channel, to the next plain convolution. A trial on the sample
batch shows that nothing else uses them (``channel_independence``). This finds the inner channels of residual blocks of
any library, also of bottlenecks and inverted ones. The channels of the residual stream, which many modules share, stay.
In a row of convolutions outside all blocks, the second of a pair is a block of its own.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd

from torch import Tensor, nn

from optin_deploy.nn.calls import Call, same_tensor
from optin_deploy.nn.names import contains, is_inside
from optin_deploy.nn.plain_layers import has_own_forward
from optin_deploy.nn.unfold import Conv
from optin_deploy.structure.channel_independence import ChannelSpan, coupled_spans
from optin_deploy.structure.groups import CostModules, Group, LayerAxis, Placeholder, TensorAxis
from optin_deploy.structure.residual import is_batch_norm

COUPLED = "its channels depend on each other"
# They hardly mix small values, so a trial does not show it.
_MIXING = nn.LocalResponseNorm | nn.CrossMapLRN2d
# Parts of the names of attributes that count channels.
_COUNTED = ("features", "channels", "parameters", "dim", "planes", "width")


@dataclass(frozen=True)
class _Path:
    """A path of channels: the modules that belong to them, and the tensor ``now`` that holds them.

    ``loose`` paths may pass functions between layers that change the size, and enter norms after functions. Paths from
    convolutions that are ``known`` to another group only pass batch norms and convolutions.
    """

    first: Call
    now: Tensor
    loose: bool
    known: bool
    width: int = 1
    sides: tuple[LayerAxis, ...] = ()
    entries: tuple[TensorAxis, ...] = ()
    attributes: tuple[tuple[str, str], ...] = ()
    cost_modules: tuple[str, ...] = ()
    placeholders: tuple[tuple[str, Placeholder], ...] = ()
    gate: str | None = None

    @property
    def channels(self) -> int:
        return self.now.shape[1]

    def fits(self, call: Call) -> bool:
        """Return whether the input of ``call`` may be these channels."""
        if call.input is None or call.input.dim() != self.now.dim():
            return False
        return call.input.shape == self.now.shape or (self.loose and call.input.shape[:2] == self.now.shape[:2])

    def after(self, call: Call, sides: tuple[LayerAxis, ...], placeholder: Placeholder, width: int = 1) -> "_Path":
        assert call.output is not None
        width = self.width * width // gcd(self.width, width)
        placeholders = (*self.placeholders, (call.name, placeholder))
        owners = dict.fromkeys((*self.cost_modules, *(side.module for side in sides)))
        return replace(
            self,
            now=call.output,
            width=width,
            sides=(*self.sides, *sides),
            cost_modules=tuple(owners),
            placeholders=placeholders,
        )

    def along(self, call: Call, width: int = 1) -> "_Path":
        """Return the path after a module with numbers for each channel, or for ``width`` channels together."""
        path = replace(self.after(call, (), "pass", width), loose=True)
        entries = tuple(TensorAxis(f"{call.name}.{n}", d, ()) for n, d in _channel_tensors(call.module, self.channels))
        attributes = tuple((call.name, n) for n in _counts(call.module, self.channels))
        return replace(
            path,
            entries=(*self.entries, *entries),
            attributes=(*self.attributes, *attributes),
            cost_modules=(*self.cost_modules, call.name) if entries or attributes else self.cost_modules,
        )


def channel_groups(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    calls: Sequence[Call],
    taken: Collection[str],
    *,
    known: Collection[str] = (),
    loose: bool = False,
) -> tuple[list[tuple[Group, str]], list[tuple[Group, str]]]:
    """Return the groups of channels between two convolutions with their blocks, and those with coupled channels.

    Args:
        calls: The calls of a forward pass of ``module`` on ``inputs``.
        taken: Names of modules that the groups must not touch, nor anything inside them.
        known: Names of convolutions of other groups: followed through batch norms and convolutions only.
        loose: Whether maps may also change their size between two convolutions.
    """
    candidates = list(_candidates(module, calls, taken, known, loose))
    spans = [ChannelSpan(g.name, g.mask_at or g.output, g.units) for g, _ in candidates]
    coupled = coupled_spans(module, inputs, calls, spans)
    groups: dict[str, tuple[Group, str]] = {}
    ending_at: dict[str, Group] = {}
    for group, block in candidates:
        inner = ending_at.get(group.name)
        in_row = group.output == block
        # Two groups may share a convolution, but not three in a row, and none outside of blocks.
        if (
            group.name in coupled
            or group.output in ending_at
            or (inner is not None and (in_row or inner.parent is not None))
        ):
            continue
        if inner is not None:
            if any(i.parent is None and i.output == inner.name for i, _ in groups.values()):
                continue
            # Without units of the outer group, the convolution between them has no channels.
            group = replace(group, placeholders=(*inner.placeholders[:-1], *group.placeholders))
            inner = replace(inner, parent=group.name, placeholders=())
            groups[inner.name] = (inner, block)
            ending_at[group.name] = inner
        groups[group.name] = (group, block)
        ending_at[group.output] = group
    mixed = [
        (g, block)
        for g, block in candidates
        if g.name in coupled and block != g.output and not {g.name, g.output} & {*ending_at}
    ]
    return list(groups.values()), mixed


def _candidates(
    module: nn.Module, calls: Sequence[Call], taken: Collection[str], known: Collection[str], loose: bool
) -> Iterator[tuple[Group, str]]:
    times = Counter(call.name for call in calls)
    layers = [
        call
        for call in calls
        if _changes_channels(call.module) and times[call.name] == 1 and not any(is_inside(call.name, t) for t in taken)
    ]
    for number, first in enumerate(layers):
        if not is_plain(first.module) or first.output is None or first.output.dim() != _dims(first.module):
            continue
        side = LayerAxis(first.name, "out")
        placeholders: tuple[tuple[str, Placeholder], ...] = ((first.name, "no_channels"),)
        path = _Path(
            first,
            first.output,
            loose=loose or first.output.dim() != 4,
            known=first.name in known,
            sides=(side,),
            cost_modules=(first.name,),
            placeholders=placeholders,
        )
        group = _follow(path, layers[number + 1 :], calls) if path.channels > 1 else None
        block = _block(module, group, calls) if group is not None else None
        if group is not None and block is not None:
            yield group, block


def _follow(path: _Path, rest: Sequence[Call], calls: Sequence[Call]) -> Group | None:
    """Return the group of the channels of ``path`` if ``rest`` leads to a plain convolution that takes them."""
    skip: set[str] = set()
    for call in rest:
        if call.name in skip:
            continue
        gate = None if path.gate else _gate(path, call, rest, calls)
        if gate is not None:
            path, inside = gate
            skip |= inside
            continue
        if call.output is None or not path.fits(call):
            return None
        layer, x = call.module, call.input
        assert x is not None
        if isinstance(layer, _MIXING):
            return None
        direct = same_tensor(x, path.now)
        if path.gate is not None and not direct:
            return None
        if is_batch_norm(layer):
            if not (direct or path.loose):
                return None
            path = path.after(call, (LayerAxis(call.name, "out"),), "pass")
        elif isinstance(layer, Conv) and is_plain(layer):
            return _group(path, call) if not _is_of_pixels(path, layer) else None
        elif isinstance(layer, Conv) and layer.groups > 1 and layer.in_channels == layer.out_channels:
            if has_own_forward(layer):
                return None
            path = path.after(call, (LayerAxis(call.name, "out"),), "no_channels", layer.out_channels // layer.groups)
        elif path.known:
            return None
        elif isinstance(layer, nn.GroupNorm):
            path = path.along(call, layer.num_channels // layer.num_groups)
        elif is_for_each_channel(call):
            path = path.along(call)
        else:
            return None
    return None


def is_for_each_channel(call: Call) -> bool:
    """Return whether a module keeps the channels and has only numbers for each channel, or one number for all."""
    if call.input is None or call.output is None or call.input.shape != call.output.shape or call.input.dim() < 3:
        return False
    if isinstance(call.module, nn.Linear | Conv) or any(_changes_channels(child) for child in call.module.children()):
        return False
    tensors = [*call.module.parameters(recurse=False), *call.module.buffers(recurse=False)]
    per_channel = dict(_channel_tensors(call.module, call.input.shape[1]))
    return len(per_channel) == sum(t.numel() > 1 for t in tensors)


def _channel_tensors(module: nn.Module, channels: int) -> Iterator[tuple[str, int]]:
    """Yield the parameters and buffers with one number for each channel, and the dimension of the channels."""
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        if tensor.numel() == channels > 1 and channels in tensor.shape:
            yield name, list(tensor.shape).index(channels)


def _counts(module: nn.Module, channels: int) -> Iterator[str]:
    """Yield the attributes that store the number of channels, or of groups of channels."""
    for name, value in vars(module).items():
        if type(value) is int and value == channels and any(part in name for part in _COUNTED):
            yield name
    if isinstance(module, nn.GroupNorm):
        yield "num_groups"


def _gate(path: _Path, call: Call, rest: Sequence[Call], calls: Sequence[Call]) -> tuple[_Path, set[str]] | None:
    """Return the path after squeeze-and-excitation whose first layer is ``call``, and the modules inside it, or None.

    Squeeze-and-excitation multiplies each channel by a factor. Its first layer takes the pooled channels, its last one
    returns the factors.
    """
    parts = call.name.split(".")
    for length in range(1, len(parts)):
        name = ".".join(parts[:length])
        around = next((c for c in calls if c.name == name), None)
        if around is None or contains(name, path.first.name) or around.input is None or around.output is None:
            continue
        if not around.input.shape == path.now.shape == around.output.shape:
            continue
        inside = [c for c in rest if contains(name, c.name)]
        squeeze, excite = inside[0], inside[-1]
        if not all(isinstance(c.module, nn.Linear) or is_plain(c.module) for c in inside):
            continue
        if not _is_pooled(squeeze.input, path.channels) or not _is_pooled(excite.output, path.channels):
            continue
        sides = (LayerAxis(squeeze.name, "in"), LayerAxis(excite.name, "out"))
        excited = path.after(around, sides, "pass")
        return replace(excited, gate=name), {c.name for c in inside}
    return None


def _is_pooled(x: Tensor | None, channels: int) -> bool:
    return x is not None and x.dim() >= 2 and x.shape[1:].numel() == x.shape[1] == channels


def _is_of_pixels(path: _Path, second: nn.Module) -> bool:
    """Return whether the maps are single pixels, as inside squeeze-and-excitation. Such layers cost nothing."""
    kernels = (layer.get_parameter("weight").shape[2:].numel() for layer in (path.first.module, second))
    return len(path.sides) == 1 and path.now.shape[2:].numel() == 1 and all(size == 1 for size in kernels)


def _group(path: _Path, second: Call) -> Group | None:
    if path.channels % path.width or path.channels == path.width:
        return None
    sides = (*path.sides, LayerAxis(second.name, "in"))
    return Group(
        name=path.first.name,
        kind="channel",
        units=path.channels // path.width,
        width=path.width,
        output=second.name,
        sides=sides,
        entries=path.entries,
        attributes=path.attributes,
        cost=CostModules((*path.cost_modules, second.name)),
        placeholders=(*path.placeholders, (second.name, "constant")),
        axis=1,
        mask_at=path.gate,
    )


def _block(module: nn.Module, group: Group, calls: Sequence[Call]) -> str | None:
    """Return the block of a group: the module around both its ends, or in a row of convolutions its output.

    None if its ends are in different blocks: channels between blocks are the residual stream.
    """
    ends = [group.name.split("."), group.output.split(".")]
    dims = _dims(module.get_submodule(group.name))
    shared = next(i for i, pair in enumerate(zip(*ends, strict=False)) if pair[0] != pair[1])
    for end in ends:
        layers = module.get_submodule(".".join(end[: shared + 1])).modules()
        if sum(is_plain(layer) and _dims(layer) == dims for layer in layers) > 1:
            return None
    around = ends[0][:shared]
    for length in range(shared, 0, -1):
        if isinstance(module.get_submodule(".".join(around[: length - 1])), nn.ModuleList | nn.Sequential):
            return ".".join(around[:length])
    name = ".".join(around)
    # A module whose first output is no tensor cannot be compared.
    runs = name and any(call.name == name and call.output is not None for call in calls)
    if runs and not isinstance(module.get_submodule(name), nn.Sequential):
        return name
    return group.output if group.mask_at is None else None


def _changes_channels(module: nn.Module) -> bool:
    """Return whether a module has parameters or buffers of its own, or changes channels without them."""
    if isinstance(module, nn.GroupNorm | nn.modules.instancenorm._InstanceNorm | _MIXING):
        return True
    return any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))


def is_plain(layer: nn.Module) -> bool:
    """Return whether ``layer`` is an ungrouped convolution, plain or transposed, with torch's own forward."""
    return isinstance(layer, Conv) and layer.groups == 1 and not has_own_forward(layer)


def _dims(layer: nn.Module) -> int:
    """Return the number of dimensions of a convolution's output."""
    return layer.get_parameter("weight").dim()
