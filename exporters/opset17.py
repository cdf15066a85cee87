"""An ONNX model of opset 18, which is the least that torch's exporter writes, in opset 17."""

from __future__ import annotations

from typing import Any

from exporters.errors import ExportError

_NEW_OF_RESIZE = {"antialias", "axes", "keep_aspect_ratio_policy"}


def to_opset_17(model: Any) -> None:
    """Change an onnx_ir model in place; ExportError names an operator that opset 17 cannot express."""
    for node in list(model.graph.all_nodes()):
        if node.domain in ("", "ai.onnx") and _changed_in_18(node.op_type):
            _convert(model, node)
        node.version = None
    for name in ("", "ai.onnx"):
        if name in model.opset_imports:
            model.opset_imports[name] = 17


def _changed_in_18(kind: str) -> bool:
    from onnx import defs

    return defs.has(kind, 18, "") and defs.get_schema(kind, 18, "").since_version == 18


def _convert(model: Any, node: Any) -> None:
    kind = node.op_type
    if kind.startswith("Reduce") and _axes_to_attribute(model, node):
        return
    if kind == "Split" and _split_as_one_before(node):
        return
    if kind == "Pad" and len(node.inputs) < 4:
        return
    if kind == "Resize" and not _NEW_OF_RESIZE & _set_attributes(node):
        for name in _NEW_OF_RESIZE & set(node.attributes):
            del node.attributes[name]
        return
    if kind in ("ScatterElements", "ScatterND") and _text(node, "reduction") in ("", "none", "add", "mul"):
        return
    raise ExportError(f"opset 17 cannot express {kind} as this network has it: take --opset 18 or more")


def _axes_to_attribute(model: Any, node: Any) -> bool:
    import onnx_ir as ir

    if len(node.inputs) < 2 or node.inputs[1] is None:
        if _number(node, "noop_with_empty_axes"):
            return False
    else:
        axes = ir.convenience.get_const_tensor(node.inputs[1])
        if axes is None:
            return False
        node.attributes["axes"] = ir.AttrInt64s("axes", [int(axis) for axis in axes.numpy().reshape(-1)])
        node.resize_inputs(1)
    node.attributes.pop("noop_with_empty_axes", None)
    return True


def _split_as_one_before(node: Any) -> bool:
    """Without sizes, opset 17 splits into equal parts only."""
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        return True
    axis, shape = _number(node, "axis"), node.inputs[0].shape
    size = None if shape is None else shape[axis]
    node.attributes.pop("num_outputs", None)
    return isinstance(size, int) and size % len(node.outputs) == 0


def _set_attributes(node: Any) -> set[str]:
    """Of those that are given, the ones that are not what they are by default."""
    return {name for name, attribute in node.attributes.items() if attribute.value not in (0, "stretch")}


def _number(node: Any, name: str) -> int:
    return node.attributes[name].as_int() if name in node.attributes else 0


def _text(node: Any, name: str) -> str:
    return node.attributes[name].as_string() if name in node.attributes else ""
