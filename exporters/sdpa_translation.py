"""Translate scaled-dot-product attention for opsets that have no Attention operator.

torch's own translation transposes the keys by four reshapes with shapes computed at run time, scales both sides, and
searches every softmax for NaN. This one computes the same numbers by the four operators that runtimes look for when
they fuse attention.
"""

import math
from collections.abc import Callable

import onnx_ir as ir
import torch

SDPA = torch.ops.aten.scaled_dot_product_attention.default

# A masked score. It is finite, so that a row with everything masked has no NaN, and the lowest finite number of half
# precision, so that the graph stays valid when it is converted.
_MASKED = -65504.0


def translations(
    program: torch.export.ExportedProgram, opset: int
) -> dict[Callable[..., object], Callable[..., object]]:
    """Return the custom translation table for torch.onnx.export; empty where torch's own translation is better.

    That is so from opset 23 on, which has a fused Attention operator, and for causal or grouped-query attention.
    """
    if opset >= 23:
        return {}
    attentions = [node for node in program.graph.nodes if node.target == SDPA]
    plain = all(_is_plain(node) for node in attentions)
    return {SDPA: _attention} if attentions and plain else {}


def _is_plain(node: torch.fx.Node) -> bool:
    options = {argument.name: argument.default_value for argument in SDPA._schema.arguments[3:]}
    options.update(zip(options, node.args[3:], strict=False))
    options.update(node.kwargs)
    query = node.all_input_nodes[0].meta["val"]
    return not options["is_causal"] and not options["enable_gqa"] and isinstance(query.shape[-1], int)


def _attention(
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    attn_mask: ir.Value | None = None,
    *_: object,
    scale: float | None = None,
    **__: object,
) -> ir.Value:
    """Return softmax(scale · Q Kᵀ + mask) V on ``(..., tokens, head width)``.

    ``attn_mask`` is added, or boolean: False is masked. Dropout and the options of `_is_plain` are left out.
    """
    from onnxscript import opset20 as op

    dtype = query.dtype

    def number(value: float) -> ir.Value:
        return op.Constant(value=ir.tensor(value, dtype=dtype))

    axes = list(range(len(query.shape)))
    axes[-1], axes[-2] = axes[-2], axes[-1]
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    # The queries are scaled instead of the scores: unscaled scores can leave the range of half precision.
    scores = op.MatMul(op.Mul(query, number(factor)), op.Transpose(key, perm=axes))
    if attn_mask is not None:
        if attn_mask.dtype == ir.DataType.BOOL:
            attn_mask = op.Where(attn_mask, number(0.0), number(_MASKED))
        scores = op.Add(scores, attn_mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)
