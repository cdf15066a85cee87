"""What the numbers of a network's logits mean, and the answers that they give."""

from typing import Literal

from torch import Tensor

# "classes": one of several classes (softmax). "binary": every number is a yes/no question of its own (sigmoid), as in
# heads of one logit and multi-label heads. "regression": plain numbers.
HeadKind = Literal["classes", "binary", "regression"]


def class_axis(logits: Tensor) -> int:
    """The axis of the classes: the second of a map ``(batch, classes, height, width)``, else the last."""
    return 1 if logits.dim() == 4 else -1


def answers(kind: HeadKind, logits: Tensor) -> Tensor:
    """The answers that ``logits`` give: class numbers (the class axis goes), yes or no, or the numbers themselves.

    Args:
        logits: ``(batch, classes)``, ``(batch, tokens, classes)`` or ``(batch, classes, height, width)``.

    Returns:
        int64 without the class axis for "classes", bool of the same shape for "binary", ``logits`` for "regression".
    """
    if kind == "classes":
        return logits.argmax(class_axis(logits))
    return logits > 0 if kind == "binary" else logits
