"""The meaning of a network's logits, and the answers that they stand for."""

from typing import Literal, get_args

from torch import Tensor

from optin_deploy.errors import UserError

# "classes": one of several classes (softmax). "binary": every number is a separate yes/no question (sigmoid), as in
# heads with one logit and multi-label heads. "regression": plain numbers.
HeadKind = Literal["classes", "binary", "regression"]


def class_axis(logits: Tensor) -> int:
    """Return the axis of the classes: 1 for maps ``(batch, classes, [depth,] height, width)``, else the last."""
    return 1 if logits.dim() >= 4 else -1


def is_single(logits: Tensor) -> bool:
    """Return whether there is one number for each sample, token or pixel. ``(batch,)`` has one for each sample."""
    return logits.dim() == 1 or logits.shape[class_axis(logits)] == 1


def head_of(logits: Tensor, said: str | None = None) -> HeadKind:
    """Return the meaning of ``logits``: ``said``, or without it "binary" for one class and "classes" for more.

    Raises:
        UserError: ``said`` is no `HeadKind`, or it is "classes" for one class.
    """
    if said is None:
        return "binary" if is_single(logits) else "classes"
    kind: HeadKind | None = next((known for known in get_args(HeadKind) if known == said), None)
    if kind is None:
        raise UserError(f"head={said!r}: give one of {', '.join(get_args(HeadKind))}")
    if kind == "classes" and is_single(logits):
        raise UserError(
            f"head='classes': logits of shape {tuple(logits.shape)} have one class, between which there is no choice; "
            "give head='binary' (a yes or no) or head='regression' (a plain number)"
        )
    return kind


def answers(kind: HeadKind, logits: Tensor) -> Tensor:
    """Return the answers of ``logits``: class numbers, yes or no, or the numbers themselves.

    Args:
        logits: ``(batch, classes)``, ``(batch, tokens, classes)`` or ``(batch, classes, height, width)``.

    Returns:
        int64 without the class axis for "classes", bool of the same shape for "binary", ``logits`` for "regression".
    """
    if kind == "classes":
        return logits.argmax(class_axis(logits))
    return logits > 0 if kind == "binary" else logits


def probabilities(kind: HeadKind, rows: Tensor) -> Tensor:
    """Return the probabilities of the classes, or of yes, for logits ``(rows, classes)``; plain numbers as they are."""
    if kind == "classes":
        return rows.softmax(1)
    return rows.sigmoid() if kind == "binary" else rows
