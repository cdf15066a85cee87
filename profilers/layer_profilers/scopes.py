"""Which module each node of an exported ONNX file was traced in, as torch's exporter writes it into the file."""

import ast
from pathlib import Path
from typing import Any

_SCOPES = "pkg.torch.onnx.name_scopes"
_NO_MODULE = "_empty_nn_module_stack"


def read_graph(path: Path) -> Any:
    """The graph of an ONNX file, without weights that stand in a file of their own."""
    import onnx

    return onnx.load(str(path), load_external_data=False).graph


def node_module(node: Any) -> str:
    """The path of the module that a node was traced in, "" where the file does not say."""
    return module_path(next((prop.value for prop in node.metadata_props if prop.key == _SCOPES), "[]"))


def module_path(scopes: str) -> str:
    """The innermost module of a node's scopes, a list written as text that ends with the operation's own name."""
    try:
        modules = [str(name) for name in ast.literal_eval(scopes)[:-1]]
    except (ValueError, SyntaxError, TypeError):
        return ""
    return modules[-1] if modules and not modules[-1].startswith(_NO_MODULE) else ""
