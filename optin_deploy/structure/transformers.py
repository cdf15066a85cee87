"""Attentions with separate query, key and value projections.

Modules are matched on what they hold, not on their class: transformers renames them between releases.
"""

from torch import nn

from optin_deploy.structure.groups import Group, LeftDense, Projections, Rows, Side, StandIn, child, join
from optin_deploy.structure.registry import adapter

_QKV_NAMES = (("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("q_lin", "k_lin", "v_lin"))
_OUTPUT_NAMES = ("o_proj", "out_proj", "out_lin")
_HEADS_NAMES = ("num_attention_heads", "num_heads", "n_heads")
_HEAD_WIDTH_NAMES = ("attention_head_size", "head_dim")
_ALL_HEADS_WIDTH_NAMES = ("all_head_size", "embed_dim", "dim")


def _is_library_module(module: nn.Module) -> bool:
    return type(module).__module__.startswith("transformers.")


def _linears(module: nn.Module, names: tuple[str, ...]) -> list[nn.Linear] | None:
    found = [child(module, n) for n in names]
    return [m for m in found if isinstance(m, nn.Linear)] if all(isinstance(m, nn.Linear) for m in found) else None


def _separate(name: str, names: tuple[str, ...]) -> Projections:
    queries, keys, values = (Rows(join(name, n)) for n in names)
    return Projections(queries, keys, values)


def _attribute(module: nn.Module, names: tuple[str, ...]) -> tuple[str, int] | None:
    for name in names:
        value = getattr(module, name, None)
        if isinstance(value, int):
            return name, value
    return None


@adapter
def attention(name: str, module: nn.Module, parent_name: str, parent: nn.Module) -> Group | LeftDense | None:
    """Heads of an encoder's self-attention: rows of query, key and value, columns of the output projection.

    The output projection is a child (``o_proj``) or, in BERT's way, ``output.dense`` beside the attention.
    """
    if not _is_library_module(module):
        return None
    names = next((names for names in _QKV_NAMES if _linears(module, names)), None)
    if names is None:
        return None
    heads = _attribute(module, _HEADS_NAMES)
    if heads is None:
        return LeftDense(name, "the number of heads is not an attribute of the module")
    features = [linear.out_features for linear in _linears(module, names) or []]
    if len(set(features)) > 1 or features[0] % heads[1]:
        return LeftDense(name, f"query, key and value have {features} features for {heads[1]} heads")
    width = features[0] // heads[1]

    inside = next((n for n in _OUTPUT_NAMES if isinstance(child(module, n), nn.Linear)), None)
    owners: tuple[str, ...]
    stand_ins: tuple[tuple[str, StandIn], ...]
    if inside:
        output, owners = join(name, inside), (name,)
        stand_ins = ((name, "constant_tuple"),)
    elif isinstance(child(parent, "output.dense"), nn.Linear):
        output, owners = join(parent_name, "output.dense"), (name, join(parent_name, "output.dense"))
        stand_ins = ((name, "pass_tuple"), (output, "constant"))
    else:
        return LeftDense(name, f"no output projection found (looked for {', '.join(_OUTPUT_NAMES)}, output.dense)")

    head_width, all_width = _attribute(module, _HEAD_WIDTH_NAMES), _attribute(module, _ALL_HEADS_WIDTH_NAMES)
    if head_width is None:
        return LeftDense(name, "the width of a head is not an attribute of the module")
    attributes = [(name, heads[0])]
    if all_width is not None and all_width[1] == features[0]:
        attributes.append((name, all_width[0]))
    # Without an attribute of its own, the softmax's scale would change with the width.
    scaled = isinstance(getattr(module, "scaling", None), float)
    # Parameters of its own, like embeddings of relative positions, would have to be narrowed with the heads.
    plain = {n.rpartition(".")[0] for n, _ in module.named_parameters()} <= {*names, *_OUTPUT_NAMES}
    return Group(
        name=name,
        kind="head",
        units=heads[1],
        width=width,
        output=output,
        sides=(*(Side(join(name, n), "out") for n in names), Side(output, "in")),
        owners=owners,
        stand_ins=stand_ins,
        attributes=tuple(attributes),
        qkv=_separate(name, names) if scaled and plain else None,
    )
