"""Convert an ONNX model from opset 18, the lowest that torch's exporter writes, to opset 17."""

import onnx_ir as ir
from onnx import defs

from exporters.errors import ExportError

_NEW_OF_RESIZE = {"antialias", "axes", "keep_aspect_ratio_policy"}


def to_opset_17(model: ir.Model) -> None:
    """Change an onnx_ir model in place; ExportError names an operator that opset 17 cannot express."""
    for node in list(model.graph.all_nodes()):
        if node.domain in ("", "ai.onnx") and _changed_in_18(node.op_type):
            _convert(node)
        node.version = None
    for name in ("", "ai.onnx"):
        if name in model.opset_imports:
            model.opset_imports[name] = 17


def _changed_in_18(kind: str) -> bool:
    return defs.has(kind, 18, "") and defs.get_schema(kind, 18, "").since_version == 18


def _convert(node: ir.Node) -> None:
    kind = node.op_type
    if kind.startswith("Reduce") and _move_axes_to_attribute(node):
        return
    if kind == "Split" and _drop_split_count(node):
        return
    if kind == "Pad" and len(node.inputs) < 4:
        return
    if kind == "Resize" and not _NEW_OF_RESIZE & _set_attributes(node):
        for name in _NEW_OF_RESIZE & set(node.attributes):
            del node.attributes[name]
        return
    reduction = node.attributes.get_string("reduction", "none")
    if kind in ("ScatterElements", "ScatterND") and reduction in ("", "none", "add", "mul"):
        return
    raise ExportError(f"opset 17 cannot express the {kind} operator of this network: take --opset 18 or later")


def _move_axes_to_attribute(node: ir.Node) -> bool:
    """Make the axes an attribute; return whether opset 17 has this reduction."""
    if len(node.inputs) < 2 or node.inputs[1] is None:
        if node.attributes.get_int("noop_with_empty_axes", 0):
            return False
    else:
        axes = ir.convenience.get_const_tensor(node.inputs[1])
        if axes is None:
            return False
        node.attributes["axes"] = ir.AttrInt64s("axes", [int(axis) for axis in axes.numpy().reshape(-1)])
        node.resize_inputs(1)
    node.attributes.pop("noop_with_empty_axes", None)
    return True


def _drop_split_count(node: ir.Node) -> bool:
    """Drop the number of parts; return whether opset 17 has this split: without sizes its parts are equal."""
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        return True
    axis, shape = node.attributes.get_int("axis", 0), node.inputs[0].shape
    size = None if shape is None else shape[axis]
    node.attributes.pop("num_outputs", None)
    return isinstance(size, int) and size % len(node.outputs) == 0


def _set_attributes(node: ir.Node) -> set[str]:
    """Return the names of attributes that differ from their default."""
    return {name for name, attribute in node.attributes.items() if attribute.value not in (0, "stretch")}
