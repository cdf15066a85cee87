"""How scaled-dot-product attention is written in opsets that have no Attention operator.

torch's own translation transposes the keys through four reshapes whose shapes are computed at run time, scales both
sides, and searches every layer's softmax for NaN. This one is the four operators that runtimes look for when they
fuse attention, at the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

SDPA = torch.ops.aten.scaled_dot_product_attention.default

_MASKED = -65504.0
"""What a masked score becomes. Finite, so that a row with everything masked gives no NaN, and the lowest finite
number of half precision, so that the graph stays valid when it is converted."""


def translations(program: torch.export.ExportedProgram, opset: int) -> dict[Callable[..., Any], Callable[..., Any]]:
    """The custom translation table for torch.onnx.export; empty when torch's own translation serves better.

    That is from opset 23 on, which has a fused Attention operator, and for causal or grouped-query attention.
    """
    if opset >= 23:
        return {}
    attentions = [node for node in program.graph.nodes if node.target == SDPA]
    plain = all(_plain(node) for node in attentions)
    return {SDPA: _attention} if attentions and plain else {}


def _plain(node: torch.fx.Node) -> bool:
    options = {argument.name: argument.default_value for argument in SDPA._schema.arguments[3:]}
    options.update(zip(options, node.args[3:], strict=False))
    options.update(node.kwargs)
    query: Any = node.args[0]
    return not options["is_causal"] and not options["enable_gqa"] and isinstance(query.meta["val"].shape[-1], int)


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """softmax(scale · Q Kᵀ + mask) V on [..., tokens, head width]; `attn_mask` is added, or boolean: False = masked."""
    import onnx_ir as ir
    from onnxscript import opset20 as op

    dtype = query.dtype

    def number(value: float) -> Any:
        return op.Constant(value=ir.tensor(value, dtype=dtype))

    axes = list(range(len(query.shape)))
    axes[-1], axes[-2] = axes[-2], axes[-1]
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    # The queries are scaled and not the scores: unscaled scores can leave the range of half precision.
    scores = op.MatMul(op.Mul(query, number(factor)), op.Transpose(key, perm=axes))
    if attn_mask is not None:
        if attn_mask.dtype == ir.DataType.BOOL:
            attn_mask = op.Where(attn_mask, number(0.0), number(_MASKED))
        scores = op.Add(scores, attn_mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)
