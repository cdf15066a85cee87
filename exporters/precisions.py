"""Names of precisions, without torch, which takes seconds to load."""

from typing import Literal, TypeGuard

Precision = Literal["fp32", "tf32", "fp16", "bf16", "int8", "fp8"]
"""A tf32 file is a float32 file that GPUs may compute in TensorFloat-32."""
Quantized = Literal["int8", "fp8"]


def is_quantized(precision: Precision) -> TypeGuard[Quantized]:
    """Return whether a file of ``precision`` needs calibration."""
    return precision in ("int8", "fp8")
