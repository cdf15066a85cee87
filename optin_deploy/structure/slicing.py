"""Slice units out of a network: smaller parameters, no masks, no hooks."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from optin_deploy.nn.copies import copy_module
from optin_deploy.nn.unfold import Conv, feature_dim
from optin_deploy.structure.groups import Group, LayerAxis, Placeholder, Structure, TensorAxis, projections
from optin_deploy.structure.partial_norms import shrink_norm
from optin_deploy.structure.placeholders import Constant, ConstantMap, ConstantTuple, NoChannels, PassTuple
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.residual import is_batch_norm


@runtime_checkable
class KeepsUnits(Protocol):
    """A resizable module that has to know which of its units are left."""

    def keep_units(self, units: Tensor) -> None:
        """Keep these of the present units."""


def slice_network(module: nn.Module, structure: Structure, plan: Plan) -> nn.Module:
    """Return a copy of ``module`` that has only the units of ``plan``. It computes the same as the masked ``module``.

    Raises:
        UserError: The plan does not fit the structure.
    """
    plan.check(structure)
    small = copy_module(module)
    # Heads are removed before the others get narrower.
    for group in structure.groups:
        kept = plan.units(group)
        if len(kept) == group.units or plan.removes(group.parent):
            continue
        if len(kept) == 0:
            _put_placeholders(small, group)
        else:
            _slice(small, group, torch.tensor(kept))
    return small


def features_of(units: Tensor, group: Group, features: int, widths: Sequence[int] = ()) -> Tensor:
    """Return the indices of those of ``features`` that belong to ``units``, in order; ``widths`` as for `LayerAxis`."""
    indices, start = [], 0
    for width in widths or (group.width,) * (features // (group.units * group.width)):
        indices.append(start + (units[:, None] * width + torch.arange(width)).reshape(-1))
        start += group.units * width
    return torch.cat(indices)


def query_gain(group: Group, kept: int) -> float:
    """Return the factor of the queries when ``kept`` dimensions are left, if the softmax's scale follows the width."""
    return (kept / group.units) ** 0.5 if group.qkv is not None and group.qkv.scale is not None else 1.0


def _slice(module: nn.Module, group: Group, kept: Tensor) -> None:
    if group.kind == "width":
        _rescale_queries(module, group, len(kept))
    if group.resizable is not None:
        resized = change_class(module.get_submodule(group.name), group.resizable)
        if isinstance(resized, KeepsUnits):
            resized.keep_units(kept)
        replace_submodule(module, group.name, resized)
    for side in group.sides:
        layer = module.get_submodule(side.module)
        features = features_of(kept, group, layer_size(layer, side), side.widths)
        if is_batch_norm(layer):
            _slice_norm(layer, features)
        else:
            _slice_layer(layer, side, features)
    if group.norm_over_units is not None:
        features = features_of(kept, group, group.units * group.width)
        replace_submodule(
            module,
            group.norm_over_units,
            shrink_norm(module.get_submodule(group.norm_over_units), features, group.axis),
        )
    for entries in group.entries:
        _slice_entries(module, entries, group, kept)
    for name, attribute in group.attributes:
        owner = module.get_submodule(name)
        setattr(owner, attribute, _scaled(getattr(owner, attribute), len(kept), group.units))


def _scaled(value: int | tuple[int, ...], kept: int, units: int) -> int | tuple[int, ...]:
    """Return an attribute's value for ``kept`` of ``units`` units; of a shape, the last axis of that size shrinks."""
    if isinstance(value, int):
        return value * kept // units
    axis = len(value) - 1 - value[::-1].index(units)
    return (*value[:axis], kept, *value[axis + 1 :])


def change_class(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """Return ``module``, with its attributes, as an instance of ``cls``, a subclass with another forward."""
    assert issubclass(cls, type(module))
    changed = cls.__new__(cls)
    changed.__dict__.update(module.__dict__)
    return changed


def replace_submodule(module: nn.Module, name: str, new: nn.Module) -> None:
    """Replace the submodule ``name`` by ``new``, under all its names."""
    old = module.get_submodule(name)
    for parent in list(module.modules()):
        for child, held in list(parent._modules.items()):
            if held is old:
                parent._modules[child] = new


def layer_size(layer: nn.Module, side: LayerAxis) -> int:
    """Return how many features or channels a layer has on a side."""
    if is_batch_norm(layer):
        return len(layer.get_buffer("running_mean"))
    return layer.get_parameter("weight").shape[feature_dim(layer, side.axis)]


@torch.no_grad()
def _rescale_queries(module: nn.Module, group: Group, kept: int) -> None:
    qkv = projections(group)
    if qkv.scale is None:
        return
    gain = query_gain(group, kept)
    layer = module.get_submodule(qkv.queries.module)
    for parameter in (layer.get_parameter("weight"), layer.bias):
        if isinstance(parameter, Tensor):
            parameter[qkv.queries.of(len(parameter))] *= gain
    owner, attribute = module.get_submodule(qkv.scale[0]), qkv.scale[1]
    setattr(owner, attribute, getattr(owner, attribute) / gain)


def _slice_layer(layer: nn.Module, side: LayerAxis, features: Tensor) -> None:
    """Keep only these outputs or inputs of a linear layer or a convolution."""
    assert isinstance(layer, nn.Linear | Conv)
    before = layer_size(layer, side)
    layer.weight = _selected(layer.get_parameter("weight"), feature_dim(layer, side.axis), features)
    unit = "features" if isinstance(layer, nn.Linear) else "channels"
    setattr(layer, f"{side.axis}_{unit}", len(features))
    if isinstance(layer, Conv) and layer.groups > 1:
        layer.groups = layer.groups * len(features) // before
        layer.in_channels = layer.in_channels * len(features) // before
    if side.axis == "out" and layer.bias is not None:
        layer.bias = _selected(layer.get_parameter("bias"), 0, features)


def _slice_entries(module: nn.Module, entries: TensorAxis, group: Group, kept: Tensor) -> None:
    owner, _, name = entries.tensor.rpartition(".")
    holder = module.get_submodule(owner)
    tensor = getattr(holder, name)
    index = features_of(kept, group, tensor.shape[entries.dim], entries.widths)
    if isinstance(tensor, nn.Parameter):
        setattr(holder, name, _selected(tensor, entries.dim, index))
        # Values that the module has cached of the parameter are wrong now. Modules drop them when the mode
        # changes, some only when training begins.
        training = holder.training
        holder.train(True)
        holder.train(training)
    else:
        setattr(holder, name, tensor.index_select(entries.dim, index.to(tensor.device)).contiguous())


def _slice_norm(norm: nn.Module, features: Tensor) -> None:
    if hasattr(norm, "num_features"):
        norm.num_features = len(features)  # type: ignore[assignment]
    for name, parameter in list(norm.named_parameters(recurse=False)):
        setattr(norm, name, _selected(parameter, 0, features))
    for name, buffer in list(norm.named_buffers(recurse=False)):
        if buffer.dim():
            setattr(norm, name, buffer.index_select(0, features.to(buffer.device)).contiguous())


def _selected(parameter: nn.Parameter, dim: int, index: Tensor) -> nn.Parameter:
    data = parameter.detach().index_select(dim, index.to(parameter.device)).contiguous()
    return nn.Parameter(data, requires_grad=parameter.requires_grad)


def _put_placeholders(module: nn.Module, group: Group) -> None:
    output = module.get_submodule(group.output)
    whole = group.stream.in_place or not group.stream.known
    for name, kind in group.placeholders:
        replace_submodule(module, name, _replacement(kind, module.get_submodule(name), output, whole))


def _replacement(kind: Placeholder, replaced: nn.Module, output: nn.Module, whole: bool) -> nn.Module:
    """Return the replacement of ``replaced`` when the projection ``output`` has no inputs left."""
    if kind == "no_channels":
        assert isinstance(replaced, Conv)
        return NoChannels(replaced)
    if kind in ("pass", "pass_tuple"):
        return nn.Identity() if kind == "pass" else PassTuple()
    assert isinstance(output, nn.Linear | Conv)
    bias = output.bias
    if bias is None:
        features = output.weight.shape[feature_dim(output, "out")]
        bias = nn.Parameter(output.weight.new_zeros(features), requires_grad=output.weight.requires_grad)
    if isinstance(output, Conv):
        return ConstantMap(output, bias, whole)
    return ConstantTuple(bias, whole) if kind == "constant_tuple" else Constant(bias, whole)


def output_bias(module: nn.Module, group: Group) -> nn.Parameter | None:
    """Return the bias of the projection of ``group``, also when no unit is left."""
    for name, kind in group.placeholders:
        placeholder = module.get_submodule(name)
        if kind.startswith("constant") and isinstance(placeholder, Constant):
            return placeholder.bias
    return module.get_submodule(group.output).bias  # type: ignore[return-value]
