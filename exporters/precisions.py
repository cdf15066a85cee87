"""Names of precisions, for those that read options: without torch, which takes seconds to load."""

from typing import Literal, TypeGuard

Precision = Literal["fp32", "tf32", "fp16", "bf16", "int8", "fp8"]
"""tf32 is a file in float32 that GPUs may compute in TensorFloat-32; int8 and fp8 are in `exporters.quantization`."""
Quantized = Literal["int8", "fp8"]


def is_quantized(precision: Precision) -> TypeGuard[Quantized]:
    """Whether a file of ``precision`` is made by calibration."""
    return precision in ("int8", "fp8")
