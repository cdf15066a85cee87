"""The linear maps of a network, linear layers and convolutions: which there are, and what they stand for in another."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from optin_deploy.nn.plain_layers import computes_with_its_weights
from optin_deploy.nn.unfold import Conv, feature_dim
from optin_deploy.structure.groups import Group, Structure
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import features_of, query_gain


@dataclass(frozen=True)
class LinearMap:
    """A linear map: the module that runs in the pruned network, and what it stands for in the dense one.

    ``group`` is the one whose units it stands behind, if any. ``outputs`` are factors of the dense map's output
    features, 0 for those removed, None for all ones. A map that has ``vanished``, whose group has no units left, is
    only a bias.
    """

    module: str
    dense: str
    group: Group | None
    outputs: Tensor | None
    vanished: bool


def linear_maps(dense: nn.Module, pruned: nn.Module, structure: Structure, plan: Plan) -> dict[str, LinearMap]:
    """All maps that can be refitted, by the name of the module in the pruned network."""
    maps: dict[str, LinearMap] = {}
    modules, dense_modules = dict(pruned.named_modules()), dict(dense.named_modules())
    behind = {g.output for g in structure.groups}
    for group in structure.groups:
        kept = plan.units(group)
        # With the last unit of its outer group, an inner one is gone.
        if group.kind == "width" or plan.removes(group.parent):
            continue
        name = group.output
        if not kept:
            name = next(n for n, kind in group.placeholders if kind.startswith("constant"))
        outputs = _kept_outputs(dense_modules[group.output], group.output, structure, plan)
        maps[name] = LinearMap(name, group.output, group, outputs, not kept)
    weights = [id(p) for m in modules.values() for n, p in m.named_parameters(recurse=False) if n == "weight"]
    for name, module in modules.items():
        is_map = isinstance(module, nn.Linear) or (isinstance(module, Conv) and module.groups == 1)
        if not is_map or name in behind or name not in dense_modules or weights.count(id(module.weight)) > 1:
            continue
        # What it gives is no linear function of what it takes, or of other weights.
        if not computes_with_its_weights(module):
            continue
        gain = _kept_outputs(dense_modules[name], name, structure, plan)
        maps[name] = LinearMap(name, name, None, gain, False)
    return maps


def _kept_outputs(dense: nn.Module, name: str, structure: Structure, plan: Plan) -> Tensor | None:
    """Factors of the features that ``name`` gives: 0 for those removed, None where all stay as they are."""
    features = dense.get_parameter("weight").shape[feature_dim(dense, "out")]
    factors = torch.ones(features)
    for group in structure.groups:
        kept = plan.units(group)
        if len(kept) == group.units:
            continue
        for side in group.sides:
            if side.module == name and side.axis == "out":
                stay = torch.zeros(features)
                units = torch.tensor(kept, dtype=torch.long)
                stay[features_of(units, group, features, side.widths)] = 1.0
                factors *= stay
        if group.kind == "width" and group.qkv is not None and group.qkv.queries.module == name:
            factors[group.qkv.queries.of(features)] *= query_gain(group, len(kept))
    return None if bool((factors == 1).all()) else factors
