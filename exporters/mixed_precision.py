"""Precision, written into the graph: here float16 and bfloat16 (see `lowering`).

Inputs and outputs stay float32, so that a file of one precision can take the place of another's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from exporters.lowering import lowered
from exporters.precisions import Precision

PARITY_TOLERANCES: dict[Precision, float] = {
    "fp32": 1e-4,
    "tf32": 1e-2,
    "fp16": 1e-2,
    "bf16": 5e-2,
    "int8": 0.15,
    "fp8": 0.15,
}
"""Largest error against float32 torch, relative to max(1, largest output): 10, 10 and 7 bits of mantissa are some
1e-3 and 8e-3 in one operator, and add up over a network's depth; 8 bits round to some 1e-2 of a tensor's largest."""

_DTYPES: dict[Precision, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}
# From this opset on convolutions may be bfloat16.
_BF16_CONV_OPSET = 22


def in_precision(
    program: torch.export.ExportedProgram, precision: Precision, opset: int
) -> torch.export.ExportedProgram:
    """``program``, of float32 and as `trace` made it, computing in fp16 or bf16; itself for any other ``precision``.

    Convolutions stay in float32 where ``opset`` has none for bfloat16. Raises ExportError, see `lowering.lowered`.
    """
    if precision not in _DTYPES:
        return program
    convolutions = precision != "bf16" or opset >= _BF16_CONV_OPSET
    return lowered(program, _DTYPES[precision], convolutions=convolutions)


@contextmanager
def runnable_on_cpu(path: Path, precision: Precision) -> Iterator[Path]:
    """The file that ONNX Runtime's CPU provider runs in place of ``path``: itself, or for bfloat16, which it has no
    operators for, a temporary one that emulates it."""
    if precision != "bf16":
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="optin-bf16-") as folder:
        emulated = Path(folder, path.name)
        emulate_bfloat16(path, emulated)
        yield emulated


def emulate_bfloat16(path: Path, target: Path) -> None:
    """Write a file that runs where there are no bfloat16 kernels: every operator computes in float32, and what it gives
    is rounded to bfloat16, as bfloat16 kernels that accumulate in float32 do."""
    import onnx_ir as ir

    model = ir.load(path)
    for node in list(model.graph.all_nodes()):
        if node.op_type == "Cast":
            continue
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype == ir.DataType.BFLOAT16:
                node.replace_input_with(index, _cast(ir, value, ir.DataType.FLOAT, before=node))
        for output in node.outputs:
            if output.dtype == ir.DataType.BFLOAT16:
                _round(ir, node, output)
    ir.save(model, target)


def _cast(ir: Any, value: Any, dtype: Any, *, before: Any) -> Any:
    cast = ir.node("Cast", [value], attributes={"to": int(dtype)})
    cast.outputs[0].dtype, cast.outputs[0].shape = dtype, value.shape
    before.graph.insert_before(before, cast)
    return cast.outputs[0]


def _round(ir: Any, node: Any, output: Any) -> None:
    """Let all that take ``output`` take it rounded; the node itself gives float32."""
    uses = list(output.uses())
    output.dtype = ir.DataType.FLOAT
    cast = ir.node("Cast", [output], attributes={"to": int(ir.DataType.BFLOAT16)})
    cast.outputs[0].dtype, cast.outputs[0].shape = ir.DataType.BFLOAT16, output.shape
    node.graph.insert_after(node, cast)
    for user, index in uses:
        user.replace_input_with(index, cast.outputs[0])
