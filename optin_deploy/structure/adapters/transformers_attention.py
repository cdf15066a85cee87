"""Attentions with separate or fused query, key and value projections, and deformable ones.

Modules are matched by their attributes, not by class, because transformers renames classes between releases.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from optin_deploy.nn.names import child, join
from optin_deploy.structure.adapters import position_bias
from optin_deploy.structure.adapters.registry import adapter
from optin_deploy.structure.groups import (
    CostModules,
    Group,
    LayerAxis,
    LeftDense,
    OutputSlice,
    Placeholder,
    Projections,
    TensorAxis,
)

_SEPARATE_NAMES = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
    ("q", "k", "v"),
)
_FUSED_NAMES = ("qkv", "Wqkv", "qkv_proj", "c_attn")
_OUTPUT_NAMES = ("o_proj", "out_proj", "out_lin", "o", "Wo", "c_proj", "dense")
_HEADS_NAMES = ("num_attention_heads", "num_heads", "n_heads", "num_key_value_heads")
_HEAD_WIDTH_NAMES = ("attention_head_size", "head_dim", "key_value_proj_dim")
_ALL_HEADS_WIDTH_NAMES = ("all_head_size", "embed_dim", "dim", "inner_dim", "split_size")
_SCALE_NAMES = ("scaling", "scale")
# A table of position biases next to the attention.
_BIAS_NAME = "relative_position_bias"


@dataclass(frozen=True)
class _Heads:
    """How many query heads and key-value heads an attention has, and the width of one."""

    queries: int
    keys: int
    width: int

    @property
    def shared(self) -> int:
        """Query heads for one key-value head. They are removed together."""
        return self.queries // self.keys


def _is_library_module(module: nn.Module) -> bool:
    return any(cls.__module__.startswith("transformers.") for cls in type(module).__mro__)


@adapter
def attention(name: str, module: nn.Module, parent_name: str, parent: nn.Module) -> Group | LeftDense | None:
    """Heads of an attention with query, key and value apart or fused; those that share a key leave together.

    The output projection is a child (``o_proj``) or, as in BERT, ``output.dense`` next to the attention.
    """
    if not _is_library_module(module):
        return None
    inputs = _input_projections(module)
    if inputs is None:
        return None
    output = _output_projection(module, parent)
    if output is None:
        return LeftDense(name, f"no output projection found (looked for {', '.join(_OUTPUT_NAMES)}, output.dense)")
    inside, projection = output
    heads = _heads(module, inputs, projection.in_features)
    if isinstance(heads, str):
        return LeftDense(name, heads)
    known = (*inputs, inside) if inside else inputs
    sides, entries = _of_heads(name, module, known, heads)
    if table := child(parent, _BIAS_NAME):
        entries += _of_heads(join(parent_name, _BIAS_NAME), table, (), heads)[1]
    biased = position_bias.takes_position_bias(module)
    output_name = join(name, inside) if inside else join(parent_name, "output.dense")
    following = (*_input_sides(name, inputs, heads), *sides)
    counted = {*(side.module for side in following), output_name}
    excluded = tuple(n for n in _maps(name, module) if n not in counted)
    placeholders: tuple[tuple[str, Placeholder], ...] = ((name, "constant_tuple"),)
    if not inside:
        placeholders = ((name, "pass_tuple"), (output_name, "constant"))
    if biased or excluded:
        # The attention is needed without heads: for the bias that it passes on, or for modules that stay.
        placeholders = ()
    return Group(
        name=name,
        kind="head",
        units=heads.keys,
        width=heads.shared * heads.width,
        output=output_name,
        sides=(*following, LayerAxis(output_name, "in")),
        cost=CostModules((name,) if inside else (name, output_name), excluded=excluded),
        placeholders=placeholders,
        attributes=tuple((name, n) for n in _proportional(module, heads)),
        qkv=_projections(name, inputs) if heads.shared == 1 and _can_get_narrower(module) else None,
        # All layers share the table of position biases, and the layer that has it computes the bias for all.
        entries=() if biased else entries,
        resizable=position_bias.resizable_class(type(module)) if biased else None,
    )


def _input_projections(module: nn.Module) -> tuple[str, ...] | None:
    """Return the names of the query, key and value projections, or of the fused one."""
    for names in (*_SEPARATE_NAMES, *((fused,) for fused in _FUSED_NAMES)):
        if all(isinstance(child(module, n), nn.Linear) for n in names):
            return names
    return None


def _output_projection(module: nn.Module, parent: nn.Module) -> tuple[str, nn.Linear] | None:
    """Return the output projection and its name, which is empty if it is not a child of the attention."""
    for name in _OUTPUT_NAMES:
        if isinstance(inside := child(module, name), nn.Linear):
            return name, inside
    outside = child(parent, "output.dense")
    return ("", outside) if isinstance(outside, nn.Linear) else None


def _heads(module: nn.Module, inputs: Sequence[str], inner: int) -> _Heads | str:
    """Return the heads of an attention whose output projection takes ``inner`` features, or why they are not clear."""
    features = [int(module.get_submodule(n).out_features) for n in inputs]  # type: ignore[arg-type]
    if len(features) == 1:
        features = [inner, *[(features[0] - inner) // 2] * 2]
    number, width = _integer(module, _HEADS_NAMES[:-1]), _integer(module, _HEAD_WIDTH_NAMES)
    if number is None and width is None:
        return "neither the number of its heads nor the width of one is an attribute of the module"
    width = width or features[0] // (number or 1)
    queries, keys, values = features
    fits = (
        min(features) >= width > 0 and queries == inner and keys == values and not queries % keys and not keys % width
    )
    if not fits or (number or queries // width) * width != queries:
        return f"query, key and value have {features} features for {number or 'some'} heads of {width}"
    return _Heads(queries // width, keys // width, width)


def _integer(module: nn.Module, names: Sequence[str]) -> int | None:
    values = (getattr(module, n, None) for n in names)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool)), None)


def _input_sides(name: str, inputs: Sequence[str], heads: _Heads) -> Iterator[LayerAxis]:
    widths = (heads.shared * heads.width, heads.width, heads.width)
    if heads.shared == 1:
        yield from (LayerAxis(join(name, n), "out") for n in inputs)
    elif len(inputs) == 1:
        yield LayerAxis(join(name, inputs[0]), "out", widths)
    else:
        yield from (LayerAxis(join(name, n), "out", (w,)) for n, w in zip(inputs, widths, strict=True))


def _of_heads(
    name: str, module: nn.Module, known: Sequence[str], heads: _Heads
) -> tuple[tuple[LayerAxis, ...], tuple[TensorAxis, ...]]:
    """Return other layers and tensors with entries for each head: projections and tables of positions, temperatures."""
    sides, entries = [], []
    for inner, layer in module.named_modules():
        if inner in known:
            continue
        if isinstance(layer, nn.Linear):
            if layer.out_features in (heads.queries, heads.queries * heads.width):
                width = layer.out_features // heads.keys
                sides.append(LayerAxis(join(name, inner), "out", (width,)))
            continue
        for parameter_name, parameter in layer.named_parameters(recurse=False):
            shape = tuple(parameter.shape)
            if shape[1:] in ((heads.queries,), (1, 1)) and heads.queries in (shape[0], shape[-1]):
                dim = 0 if len(shape) == 3 else 1
                entries.append(TensorAxis(join(name, inner, parameter_name), dim, (heads.shared,)))
    return tuple(sides), tuple(entries)


def _proportional(module: nn.Module, heads: _Heads) -> Iterator[str]:
    """Yield the attributes proportional to the heads."""
    for names, values in (
        (_HEADS_NAMES, (heads.queries, heads.keys)),
        (_ALL_HEADS_WIDTH_NAMES, (heads.queries * heads.width,)),
    ):
        yield from (n for n in names if _integer(module, (n,)) in values)


def _maps(name: str, module: nn.Module) -> Iterator[str]:
    """Yield the names of all linear layers and convolutions of a module."""
    for inner, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
            yield join(name, inner)


def _can_get_narrower(module: nn.Module) -> bool:
    """Return whether the width of a head and the softmax's scale are attributes that can change separately."""
    scaled = any(isinstance(getattr(module, n, None), float) for n in _SCALE_NAMES)
    return scaled and _integer(module, _HEAD_WIDTH_NAMES) is not None


def _projections(name: str, inputs: Sequence[str]) -> Projections:
    if len(inputs) == 1:
        queries, keys, values = (OutputSlice(join(name, inputs[0]), part, 3) for part in range(3))
    else:
        queries, keys, values = (OutputSlice(join(name, n)) for n in inputs)
    return Projections(queries, keys, values)


@adapter
def deformable_attention(name: str, module: nn.Module, parent_name: str, parent: nn.Module) -> Group | LeftDense | None:
    """Heads of a deformable attention: rows of its offsets, weights and values, columns of the output projection."""
    names = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
    layers = [layer for n in names if isinstance(layer := child(module, n), nn.Linear)]
    heads = _integer(module, _HEADS_NAMES)
    if len(layers) < len(names):
        return None
    features = [layer.out_features for layer in layers[:-1]]
    if not heads or any(n % heads for n in features):
        return LeftDense(name, f"a deformable attention of {heads} heads whose projections have {features} features")
    attributes = [n for n in (*_HEADS_NAMES, "d_model") if _integer(module, (n,)) in (heads, features[2])]
    output = join(name, names[3])
    return Group(
        name=name,
        kind="head",
        units=heads,
        width=features[2] // heads,
        output=output,
        sides=(
            *(LayerAxis(join(name, n), "out", (f // heads,)) for n, f in zip(names[:3], features, strict=True)),
            LayerAxis(output, "in"),
        ),
        cost=CostModules((name,)),
        placeholders=((name, "constant_tuple"),),
        attributes=tuple((name, n) for n in attributes),
    )
