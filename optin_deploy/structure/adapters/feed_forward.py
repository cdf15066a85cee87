"""Feed-forward networks: neurons between linear maps that one module holds, whatever the library and the names.

Linear maps are linear layers and 1×1 convolutions. One or two of them (the second is a gate) take the module's input,
and one takes the neurons. Depthwise convolutions, batch norms and one norm over all neurons may come between. A map may
be inside a module of its own, alone or with a norm. Whether the forward pass runs them this way is verified later (see
``verify``).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from optin_deploy.nn.names import join
from optin_deploy.structure.adapters.registry import general_adapter
from optin_deploy.structure.groups import CostModules, Group, LayerAxis, LeftDense, Placeholder
from optin_deploy.structure.partial_norms import can_shrink

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
_MOST_MAPS = 3
_BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d


@dataclass(frozen=True)
class _Part:
    """A submodule with parameters: its name inside the feed-forward network, and the direct child that contains it."""

    name: str
    child: str
    module: nn.Module


@dataclass(frozen=True)
class _Maps:
    """The maps into the neurons, the map out of them, and the modules between with a feature for each neuron."""

    ups: tuple[_Part, ...]
    between: tuple[_Part, ...]
    down: _Part


@general_adapter
def feed_forward(name: str, module: nn.Module, parent_name: str, parent: nn.Module) -> Group | LeftDense | None:
    """Neurons between linear layers or 1×1 convolutions in one module, gated or not, also with depthwise ones there."""
    if any(isinstance(getattr(module, heads, None), int) for heads in _HEADS):
        return None
    parts = list(_parts(module))
    maps = _feed_forward_maps(parts)
    if maps is None or _is_gate(module, maps):
        return None
    neurons = map_sizes(maps.down.module)[0]
    others = [p for p in _between(parts, maps) if p not in maps.between and not _has_scalars(p.module)]
    mixing = [p for p in others if all(t.numel() == neurons for t in p.module.parameters())]
    if len(mixing) < len(others):
        return None
    if len(mixing) > 1 or (mixing and not can_shrink(mixing[0].module)):
        return LeftDense(name, f"{mixing[0].name} mixes all neurons before {maps.down.name}")
    belonging = (*maps.ups, *maps.between, *mixing, maps.down)
    others_inside = [p.module for p in parts if p not in belonging]
    alone = all(_is_norm(m) or _has_scalars(m) for m in others_inside) and not list(module.parameters(recurse=False))
    output = join(name, maps.down.name)
    inner = [_place(p, parts, belonging) for p in maps.ups]
    inner += [p.name for p in (*maps.between, *mixing) if p.child not in inner]
    places = [join(name, place) for place in inner]
    passes: list[tuple[str, Placeholder]] = [(place, "pass") for place in places]
    return Group(
        name=name if alone else places[0],
        kind="neuron",
        units=neurons,
        width=1,
        output=output,
        sides=(*(LayerAxis(join(name, p.name), "out") for p in (*maps.ups, *maps.between)), LayerAxis(output, "in")),
        cost=CostModules((name,) if alone else (*places, output)),
        placeholders=(*passes, (output, "constant")),
        axis=1 if isinstance(maps.down.module, nn.Conv2d) else -1,
        norm_over_units=join(name, mixing[0].name) if mixing else None,
    )


def _parts(module: nn.Module) -> Iterator[_Part]:
    """Yield the submodules with parameters, in the order of registration.

    A child with more than a map and its norm is one part.
    """
    for child_name, child in module.named_children():
        inside = [(n, m) for n, m in child.named_modules() if any(True for _ in m.parameters(recurse=False))]
        if sum(is_map(m) for _, m in inside) > 1 or any(_holds_others(m) for _, m in inside):
            inside = [("", child)]
        yield from (_Part(join(child_name, n), child_name, m) for n, m in inside)


def _holds_others(module: nn.Module) -> bool:
    """Return whether modules inside ``module`` have parameters."""
    return any(True for child in module.children() for _ in child.parameters())


def is_map(layer: nn.Module) -> bool:
    """Return whether ``layer`` is a linear layer or a 1×1 convolution."""
    if isinstance(layer, nn.Linear):
        return True
    return isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) == layer.stride and layer.groups == 1


def _is_depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels == layer.out_channels


def _is_norm(layer: nn.Module) -> bool:
    return "norm" in type(layer).__name__.lower()


def map_sizes(layer: nn.Module) -> tuple[int, int]:
    """Return the numbers of input and output features of a map."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    assert isinstance(layer, nn.Conv2d)
    return layer.in_channels, layer.out_channels


def _feed_forward_maps(parts: Sequence[_Part]) -> _Maps | None:
    """Return the maps by their sizes, with the last one that fits as the map out of the neurons; None if none fits."""
    maps = [p for p in parts if is_map(p.module)]
    if not 2 <= len(maps) <= _MOST_MAPS:
        return None
    for down in reversed(maps[1:]):
        ups = tuple(p for p in maps if p is not down)
        sizes = {map_sizes(p.module) for p in ups}
        (inputs, neurons_and_gates), (neurons, outputs) = next(iter(sizes)), map_sizes(down.module)
        # One map may return neurons followed by their gates.
        gated = len(ups) == 1 and neurons_and_gates == 2 * neurons
        if len(sizes) == 1 and outputs == inputs and (neurons_and_gates == neurons or gated):
            maps_only, features = _Maps(ups, (), down), (neurons, neurons_and_gates)
            between = [p for p in _between(parts, maps_only) if _is_elementwise(p.module, features)]
            return _Maps(ups, tuple(between), down)
    return None


def _between(parts: Sequence[_Part], maps: _Maps) -> list[_Part]:
    """Return the other parts registered between the maps."""
    known = (*maps.ups, maps.down)
    positions = sorted(parts.index(p) for p in known)
    return [p for p in parts[positions[0] : positions[-1]] if p not in known]


def _has_scalars(layer: nn.Module) -> bool:
    """Return whether ``layer`` only has numbers for all features together, like an activation."""
    return all(t.numel() == 1 for t in layer.parameters())


def _is_elementwise(layer: nn.Module, features: tuple[int, int]) -> bool:
    """Return whether ``layer`` computes each of ``features`` independently."""
    if isinstance(layer, _BatchNorm):
        return layer.num_features in features
    return isinstance(layer, nn.Conv2d) and _is_depthwise(layer) and layer.out_channels in features


def _is_gate(module: nn.Module, maps: _Maps) -> bool:
    """Return whether the module returns factors for its input, like squeeze-and-excitation."""
    gated = len(maps.ups) > 1 or map_sizes(maps.ups[0].module)[1] > map_sizes(maps.down.module)[0]
    sigmoid = any("sigmoid" in type(m).__name__.lower() for m in module.children())
    return sigmoid and not gated and isinstance(maps.down.module, nn.Conv2d)


def _place(part: _Part, parts: Sequence[_Part], belonging: Sequence[_Part]) -> str:
    """Return the module that becomes the identity without neurons: the child if it has no other parts, else the map."""
    siblings = [p for p in parts if p.child == part.child]
    return part.child if all(p in belonging for p in siblings) and belonging[-1] not in siblings else part.name
