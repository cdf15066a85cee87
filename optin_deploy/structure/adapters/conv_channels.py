"""Channels between two convolutions, found by what happens in a forward pass, whatever the modules are called.

From a plain convolution on, of one to three axes, the channels are followed through norms, convolutions grouped within
them, squeeze-and-excitation and whatever has numbers for each channel to the next plain convolution. That nothing else
sees them is tried on the sample batch (``apart``). So the inner channels of residual blocks of any library are found,
bottlenecks and inverted ones included; the channels of the residual stream, which many modules share, stay. In a row of
convolutions outside all blocks, the second of a pair stands for a block of its own.
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

COUPLED = "its channels do not stay apart"
# They hardly mix small values, which a trial does not tell.
_MIXING = nn.LocalResponseNorm | nn.CrossMapLRN2d
# Of channels, in the names of attributes.
_COUNTED = ("features", "channels", "parameters", "dim", "planes", "width")


@dataclass(frozen=True)
class _Path:
    """Channels on their way: the modules that belong to them, and the tensor that holds them now.

    ``loose`` paths may lead through functions between layers that change the size, and into norms behind functions.
    Those of convolutions that are ``known`` otherwise lead through batch norms and convolutions only.
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
        """Whether ``call`` is given what may be these channels."""
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
        """Behind a module with numbers for each channel, or for ``width`` of them together."""
        behind = replace(self.after(call, (), "pass", width), loose=True)
        entries = tuple(TensorAxis(f"{call.name}.{n}", d, ()) for n, d in _places(call.module, self.channels))
        attributes = tuple((call.name, n) for n in _counts(call.module, self.channels))
        return replace(
            behind,
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
    """Groups of the channels between two convolutions, each with its block, and those in blocks of which the channels
    do not stay apart.

    Args:
        calls: of the trial forward of ``module`` on ``inputs``.
        taken: names of modules that these groups keep out of, with all that is inside them.
        known: names of convolutions that are known otherwise: followed through batch norms and convolutions only.
        loose: whether pictures may also change their size between two convolutions.
    """
    found = list(_candidates(module, calls, taken, known, loose))
    spans = [ChannelSpan(g.name, g.mask_at or g.output, g.units) for g, _ in found]
    bad = coupled_spans(module, inputs, calls, spans)
    groups: dict[str, tuple[Group, str]] = {}
    behind: dict[str, Group] = {}
    for group, block in found:
        inner = behind.get(group.name)
        in_row = group.output == block
        # Two groups may meet in a convolution, but not three in a row, and outside of blocks none.
        if group.name in bad or group.output in behind or (inner is not None and (in_row or inner.parent is not None)):
            continue
        if inner is not None:
            if any(i.parent is None and i.output == inner.name for i, _ in groups.values()):
                continue
            # Of the convolution between them no channel is left.
            group = replace(group, placeholders=(*inner.placeholders[:-1], *group.placeholders))
            inner = replace(inner, parent=group.name, placeholders=())
            groups[inner.name] = (inner, block)
            behind[group.name] = inner
        groups[group.name] = (group, block)
        behind[group.output] = group
    mixed = [
        (g, block) for g, block in found if g.name in bad and block != g.output and not {g.name, g.output} & {*behind}
    ]
    return list(groups.values()), mixed


def _candidates(
    module: nn.Module, calls: Sequence[Call], taken: Collection[str], known: Collection[str], loose: bool
) -> Iterator[tuple[Group, str]]:
    times = Counter(call.name for call in calls)
    own = [
        call
        for call in calls
        if _has_own(call.module) and times[call.name] == 1 and not any(is_inside(call.name, t) for t in taken)
    ]
    for number, first in enumerate(own):
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
        group = _followed(path, own[number + 1 :], calls) if path.channels > 1 else None
        block = _block(module, group, calls) if group is not None else None
        if group is not None and block is not None:
            yield group, block


def _followed(path: _Path, rest: Sequence[Call], calls: Sequence[Call]) -> Group | None:
    """The group of the channels that begin with ``path``, if ``rest`` leads to a plain convolution that takes them."""
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
        layer, given = call.module, call.input
        assert given is not None
        if isinstance(layer, _MIXING):
            return None
        direct = same_tensor(given, path.now)
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
    """Whether a module looks like one that has its numbers for each channel, or for all alike, and gives no others
    channels than it takes."""
    if call.input is None or call.output is None or call.input.shape != call.output.shape or call.input.dim() < 3:
        return False
    if isinstance(call.module, nn.Linear | Conv) or any(_has_own(child) for child in call.module.children()):
        return False
    tensors = [*call.module.parameters(recurse=False), *call.module.buffers(recurse=False)]
    places = dict(_places(call.module, call.input.shape[1]))
    return len(places) == sum(t.numel() > 1 for t in tensors)


def _places(module: nn.Module, channels: int) -> Iterator[tuple[str, int]]:
    """Parameters and buffers with one number for each channel, and along which dimension."""
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        if tensor.numel() == channels > 1 and channels in tensor.shape:
            yield name, list(tensor.shape).index(channels)


def _counts(module: nn.Module, channels: int) -> Iterator[str]:
    """Attributes that say how many channels, or groups of them, there are."""
    for name, value in vars(module).items():
        if type(value) is int and value == channels and any(part in name for part in _COUNTED):
            yield name
    if isinstance(module, nn.GroupNorm):
        yield "num_groups"


def _gate(path: _Path, call: Call, rest: Sequence[Call], calls: Sequence[Call]) -> tuple[_Path, set[str]] | None:
    """The path behind squeeze-and-excitation, and the modules in it, where ``call`` is its first layer with weights.

    It is a module that takes the channels and gives them back, each times a factor; its first layer takes what is left
    of them when they are pooled, its last one gives the factors.
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
        behind = path.after(around, sides, "pass")
        return replace(behind, gate=name), {c.name for c in inside}
    return None


def _is_pooled(x: Tensor | None, channels: int) -> bool:
    return x is not None and x.dim() >= 2 and x.shape[1:].numel() == x.shape[1] == channels


def _is_of_pixels(path: _Path, second: nn.Module) -> bool:
    """Whether these are single pixels with nothing between, as within squeeze-and-excitation: they cost nothing."""
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
    """The block of a group: what runs as one around both its ends, or in a row of convolutions its output.

    None where its ends lie in blocks that hold more: what runs between blocks is the residual stream.
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
    # What gives no tensor, or one behind others, has no output that could be compared.
    runs = name and any(call.name == name and call.output is not None for call in calls)
    if runs and not isinstance(module.get_submodule(name), nn.Sequential):
        return name
    return group.output if group.mask_at is None else None


def _has_own(module: nn.Module) -> bool:
    """Whether a module has parameters or buffers of its own, or does something to channels without them."""
    if isinstance(module, nn.GroupNorm | nn.modules.instancenorm._InstanceNorm | _MIXING):
        return True
    return any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))


def is_plain(layer: nn.Module) -> bool:
    """Whether it is a convolution, plain or transposed, of all channels together, that computes as torch's do."""
    return isinstance(layer, Conv) and layer.groups == 1 and not has_own_forward(layer)


def _dims(layer: nn.Module) -> int:
    """Dimensions of what a convolution gives."""
    return layer.get_parameter("weight").dim()
