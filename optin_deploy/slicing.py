"""Cutting units out of a network: smaller parameters, no masks, no hooks."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from optin_deploy.plan import Plan
from optin_deploy.structure.groups import Group, Side, StandIn, Structure


class Constant(nn.Module):
    """Stands in for a projection without inputs: gives its bias, of as many dimensions as the input.

    The axes before the last have size 1, which a residual stream broadcasts, or with ``whole`` the input's sizes.
    """

    def __init__(self, bias: Tensor, whole: bool) -> None:
        super().__init__()
        self.whole = whole
        self.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return self.bias.expand(*x.shape[:-1], -1) if self.whole else self.bias.reshape((1,) * (x.dim() - 1) + (-1,))


class ConstantTuple(Constant):
    """`Constant` for an attention that returns its output and its weights."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(hidden_states), None


class PassTuple(nn.Module):
    """Gives its first input back as an attention would: output and no weights."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return hidden_states, None


def sliced(module: nn.Module, structure: Structure, plan: Plan) -> nn.Module:
    """A copy of ``module`` that has only the units of ``plan``.

    It equals the masked ``module``. Raises UserError when the plan does not fit the structure.
    """
    plan.check(structure)
    small = copy.deepcopy(module)
    for name, kept in plan.kept.items():
        group = structure.group(name)
        if len(kept) == 0:
            _stand_in(small, group)
        elif len(kept) < group.units:
            _slice(small, group, torch.tensor(kept))
    return small


def features_of(units: Tensor, group: Group, parts: int = 1) -> Tensor:
    """Indices of the features that belong to ``units`` on a side with ``parts`` parts, in order."""
    within = (units[:, None] * group.width + torch.arange(group.width)).reshape(-1)
    return (torch.arange(parts)[:, None] * (group.units * group.width) + within).reshape(-1)


def _slice(module: nn.Module, group: Group, kept: Tensor) -> None:
    for side in group.sides:
        linear = module.get_submodule(side.module)
        assert isinstance(linear, nn.Linear)
        _slice_linear(linear, side, features_of(kept, group, side.parts))
    for name, attribute, per_unit in group.attributes:
        setattr(module.get_submodule(name), attribute, len(kept) * per_unit)


def _slice_linear(linear: nn.Linear, side: Side, features: Tensor) -> None:
    dim = 0 if side.axis == "out" else 1
    linear.weight = _selected(linear.get_parameter("weight"), dim, features)
    if side.axis == "in":
        linear.in_features = len(features)
        return
    linear.out_features = len(features)
    if linear.bias is not None:
        linear.bias = _selected(linear.get_parameter("bias"), 0, features)


def _selected(parameter: nn.Parameter, dim: int, index: Tensor) -> nn.Parameter:
    data = parameter.detach().index_select(dim, index.to(parameter.device)).contiguous()
    return nn.Parameter(data, requires_grad=parameter.requires_grad)


def _stand_in(module: nn.Module, group: Group) -> None:
    output = module.get_submodule(group.output)
    assert isinstance(output, nn.Linear)
    bias = output.bias
    if bias is None:
        bias = nn.Parameter(output.weight.new_zeros(output.out_features), requires_grad=output.weight.requires_grad)
    whole = group.residual is None
    kinds: dict[StandIn, nn.Module] = {
        "constant": Constant(bias, whole),
        "constant_tuple": ConstantTuple(bias, whole),
        "pass": nn.Identity(),
        "pass_tuple": PassTuple(),
    }
    for name, kind in group.stand_ins:
        module.set_submodule(name, kinds[kind])


def output_bias(module: nn.Module, group: Group) -> nn.Parameter | None:
    """The bias added behind the units of ``group``, also when no unit is left."""
    for name, kind in group.stand_ins:
        stand_in = module.get_submodule(name)
        if kind.startswith("constant") and isinstance(stand_in, Constant):
            return stand_in.bias
    return module.get_submodule(group.output).bias  # type: ignore[return-value]
