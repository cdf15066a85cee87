"""Write float16 and bfloat16 into the graph of an exported program; `lowering` has the rules.

Inputs and outputs stay float32, so that files of different precisions are interchangeable.
"""

import torch

from exporters.lowering import lower_program
from exporters.precisions import Precision

PARITY_TOLERANCES: dict[Precision, float] = {
    "fp32": 1e-4,
    "tf32": 1e-2,
    "fp16": 1e-2,
    "bf16": 5e-2,
    "int8": 0.15,
    "fp8": 0.15,
}
"""Largest error against float32 torch, relative to max(1, largest output).

One operator is off by some 1e-3 with a mantissa of 10 bits (tf32, fp16) and by 8e-3 with 7 bits (bf16); errors add up
over a network's depth. 8-bit types round to some 1e-2 of a tensor's largest value.
"""

_DTYPES: dict[Precision, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}
# The first opset with convolutions in bfloat16.
_BF16_CONV_OPSET = 22


def in_precision(
    program: torch.export.ExportedProgram, precision: Precision, opset: int
) -> torch.export.ExportedProgram:
    """Return the float32 ``program`` in fp16 or bf16, and ``program`` itself for any other precision.

    Convolutions stay float32 where ``opset`` has none for bfloat16.

    Raises:
        ExportError: see `lowering.lower_program`.
    """
    if precision not in _DTYPES:
        return program
    convolutions = precision != "bf16" or opset >= _BF16_CONV_OPSET
    return lower_program(program, _DTYPES[precision], convolutions=convolutions)
