"""The width of heads: groups whose units are the dimensions of an attention's queries, keys and values.

A plain attention computes the same in any basis of a head's queries, keys and values. With norms of queries and keys,
rotary positions or gates it does not, so each attention is tried.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from optin_deploy.nn.copies import copy_module
from optin_deploy.nn.names import join
from optin_deploy.structure.groups import Group, projections

# The largest change of the outputs, relative to their norm, under a change of basis.
_RELATIVE_TOLERANCE = 1e-3
# Names of the attributes that hold the width of a head.
_WIDTH_NAMES = ("head_dim", "attention_head_size", "key_value_proj_dim")


def width_group(module: nn.Module, heads: Group) -> Group | None:
    """Return the group of the width of ``heads``, None if their adapter gives no projections."""
    if heads.qkv is None:
        return None
    attention = heads.name
    attributes = [(attention, n) for n in _WIDTH_NAMES if hasattr(module.get_submodule(attention), n)]
    attributes += [a for a in heads.attributes if _value(module, a) == heads.units * heads.width]
    return Group(
        name=join(heads.name, "width"),
        kind="width",
        units=heads.width,
        width=1,
        output=heads.output,
        sides=heads.sides,
        cost=heads.cost,
        placeholders=(),
        attributes=tuple(attributes),
        qkv=heads.qkv,
        parent=heads.name,
    )


def _value(module: nn.Module, attribute: tuple[str, str]) -> object:
    return getattr(module.get_submodule(attribute[0]), attribute[1])


@torch.no_grad()
def find_narrowable(module: nn.Module, inputs: Mapping[str, Tensor], groups: Sequence[Group]) -> list[Group]:
    """Return the groups of widths whose heads work in another basis. All are tried at once, then one by one."""
    if not groups or _unchanged(module, inputs, groups):
        return list(groups)
    return [group for group in groups if len(groups) > 1 and _unchanged(module, inputs, [group])]


def _unchanged(module: nn.Module, inputs: Mapping[str, Tensor], groups: Sequence[Group]) -> bool:
    other = copy_module(module)
    generator = torch.Generator().manual_seed(0)
    for group in groups:
        heads = other.get_submodule(group.output).get_parameter("weight").shape[1] // group.units
        bases = torch.randn(2, heads, group.units, group.units, generator=generator, dtype=torch.float64)
        queries, values = torch.linalg.qr(bases).Q
        # Not orthogonal, because a norm of queries and keys does not change under a rotation.
        stretch = torch.linspace(0.7, 1.4, group.units, dtype=queries.dtype)
        change_basis(other, group, queries * stretch, queries / stretch, values)
    before, after = _tensors(module(**inputs)), _tensors(other(**inputs))
    return all(
        float((a - b).norm()) <= _RELATIVE_TOLERANCE * float(a.norm()) for a, b in zip(before, after, strict=True)
    )


def _tensors(output: object) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = tuple(output.values())
    return [t for part in output for t in _tensors(part)] if isinstance(output, tuple | list) else []


@torch.no_grad()
def change_basis(module: nn.Module, group: Group, queries: Tensor, keys: Tensor, values: Tensor) -> None:
    """Change the basis of the heads of a group of widths, in place: q → q A, k → k B, v → v P.

    The network computes the same if A Bᵀ = 1 and P is orthogonal.

    Args:
        queries, keys, values: A, B and P, ``(heads, width, width)``.
    """
    qkv = projections(group)
    for rows, basis in ((qkv.queries, queries), (qkv.keys, keys), (qkv.values, values)):
        layer = module.get_submodule(rows.module)
        for parameter in (layer.get_parameter("weight"), layer.bias):
            if isinstance(parameter, Tensor):
                part = parameter[rows.of(len(parameter))]
                part.copy_(_rotated(part, basis))
    projection = module.get_submodule(group.output).get_parameter("weight")
    projection.copy_(_rotated(projection.T, values).T)


def _rotated(rows: Tensor, basis: Tensor) -> Tensor:
    """Return ``rows`` ``(heads · width, …)`` in the new basis of each head."""
    heads, width, _ = basis.shape
    by_head = rows.reshape(heads, width, -1).to(basis.dtype)
    return (basis.to(rows.device).transpose(1, 2) @ by_head).reshape(rows.shape)
