"""Emulate bfloat16 in ONNX files, for runtimes that have no bfloat16 operators."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

from exporters.onnx_graph import cast_input, cast_output
from exporters.precisions import Precision


@contextmanager
def runnable_on_cpu(path: Path, precision: Precision) -> Iterator[Path]:
    """Yield the file that ONNX Runtime's CPU provider runs in place of ``path``.

    This is the file itself. The provider has no operators for bfloat16: then it is a temporary file that emulates them.
    """
    if precision != "bf16":
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="optin-bf16-") as folder:
        emulated = Path(folder, path.name)
        emulate_bfloat16(path, emulated)
        yield emulated


def emulate_bfloat16(path: Path, target: Path) -> None:
    """Write a file whose operators compute in float32 and round their results to bfloat16.

    Kernels that compute in bfloat16 and accumulate in float32 do the same.
    """
    model = ir.load(path)
    for node in list(model.graph.all_nodes()):
        if node.op_type == "Cast":
            continue
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype == ir.DataType.BFLOAT16:
                cast_input(node, index, ir.DataType.FLOAT)
        for output in node.outputs:
            if output.dtype == ir.DataType.BFLOAT16:
                cast_output(node, output, ir.DataType.BFLOAT16)
    ir.save(model, target)
