"""timm's ``Attention`` (fused query-key-value), wherever it stands."""

import timm.layers
from torch import nn

from optin_deploy.structure.groups import Group, LeftDense, Projections, Rows, Side, join
from optin_deploy.structure.registry import adapter


@adapter
def attention(name: str, module: nn.Module, parent_name: str, parent: nn.Module) -> Group | LeftDense | None:
    """Heads of ``timm.layers.Attention``: rows of ``qkv`` (and of the gate), columns of ``proj``."""
    if type(module) is not timm.layers.Attention:
        return None
    if not isinstance(module.norm, nn.Identity):
        return LeftDense(name, "a norm over all heads stands before the output projection (scale_norm)")
    qkv = join(name, "qkv")
    sides = [Side(qkv, "out"), Side(join(name, "proj"), "in")]
    if getattr(module, "gate", None) is not None:
        sides.append(Side(join(name, "gate"), "out"))
    return Group(
        name=name,
        kind="head",
        units=int(module.num_heads),  # type: ignore[arg-type]
        width=int(module.head_dim),  # type: ignore[arg-type]
        output=join(name, "proj"),
        sides=tuple(sides),
        owners=(name,),
        stand_ins=((name, "constant"),),
        attributes=((name, "num_heads"), (name, "attn_dim")),
        qkv=_fused(name, qkv) if _is_plain(module) else None,
    )


def _fused(name: str, qkv: str) -> Projections:
    queries, keys, values = (Rows(qkv, part, 3) for part in range(3))
    return Projections(queries, keys, values, scale=(name, "scale"))


def _is_plain(attention: nn.Module) -> bool:
    """Whether nothing but products stands between queries, keys, values and the output projection."""
    norms = [getattr(attention, n, None) for n in ("q_norm", "k_norm")]
    return all(isinstance(n, nn.Identity | None) for n in norms) and getattr(attention, "gate", None) is None
