"""The module in which each node of an ONNX file was traced, as torch's exporter writes it into the file."""

import ast
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

_SCOPES = "pkg.torch.onnx.name_scopes"
_NO_MODULE = "_empty_nn_module_stack"


def read_graph(path: Path) -> "GraphProto":
    """Read the graph of an ONNX file, without weights stored in other files."""
    import onnx

    return onnx.load(str(path), load_external_data=False).graph


def node_module(node: "NodeProto") -> str:
    """Return the path of the module in which a node was traced; "" if the file does not say."""
    return module_path(next((prop.value for prop in node.metadata_props if prop.key == _SCOPES), "[]"))


def module_path(scopes: str) -> str:
    """Return the innermost module of a node's scopes: a list as text, of which the operation's own name is the last."""
    try:
        modules = [str(name) for name in ast.literal_eval(scopes)[:-1]]
    except (ValueError, SyntaxError, TypeError):
        return ""
    return innermost_module(modules)


def innermost_module(modules: list[str]) -> str:
    """Return the last of nested modules; "" without a module, or for one that stands for none."""
    return modules[-1] if modules and not modules[-1].startswith(_NO_MODULE) else ""
