"""The linear layers and convolutions that can be refitted, and their counterparts in the dense network."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from optin_deploy.compensation.pair import CompensationPair
from optin_deploy.nn.plain_layers import computes_with_its_weights
from optin_deploy.nn.unfold import Conv, feature_dim
from optin_deploy.structure.groups import Group, Structure
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import features_of, query_gain


@dataclass(frozen=True)
class RefitLayer:
    """A linear layer or convolution of the pruned network, and its counterpart in the dense one.

    Attributes:
        module: its name in the pruned network.
        dense: its name in the dense network.
        group: the group whose projection it is, if any.
        outputs: factors of the dense layer's output features, 0 for the removed ones; None if all are 1.
        vanished: whether the group has no units left, so that only a bias remains.
    """

    module: str
    dense: str
    group: Group | None
    outputs: Tensor | None
    vanished: bool


def refit_layers_of(pair: CompensationPair) -> dict[str, RefitLayer]:
    """Return all layers that can be refitted, by the name of the module in the pruned network."""
    dense, pruned, structure, plan = pair.dense.module, pair.pruned, pair.structure, pair.plan
    layers: dict[str, RefitLayer] = {}
    modules, dense_modules = dict(pruned.named_modules()), dict(dense.named_modules())
    projections = {g.output for g in structure.groups}
    for group in structure.groups:
        kept = plan.units(group)
        # A width is removed with the last head.
        if group.kind == "width" or plan.removes(group.parent):
            continue
        name = group.output
        if not kept:
            name = next(n for n, kind in group.placeholders if kind.startswith("constant"))
        outputs = _kept_outputs(dense_modules[group.output], group.output, structure, plan)
        layers[name] = RefitLayer(name, group.output, group, outputs, not kept)
    weights = [id(p) for m in modules.values() for n, p in m.named_parameters(recurse=False) if n == "weight"]
    for name, module in modules.items():
        is_linear = isinstance(module, nn.Linear) or (isinstance(module, Conv) and module.groups == 1)
        if not is_linear or name in projections or name not in dense_modules or weights.count(id(module.weight)) > 1:
            continue
        # Its output is not linear in its input, or has other weights.
        if not computes_with_its_weights(module):
            continue
        gain = _kept_outputs(dense_modules[name], name, structure, plan)
        layers[name] = RefitLayer(name, name, None, gain, False)
    return layers


def _kept_outputs(dense: nn.Module, name: str, structure: Structure, plan: Plan) -> Tensor | None:
    """Return factors of the output features of ``name``: 0 for the removed ones; None if all are 1."""
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
