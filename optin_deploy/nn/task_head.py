"""What the numbers of a network's logits mean, and the answers that they give."""

from typing import Literal, get_args

from torch import Tensor

from optin_deploy.errors import UserError

# "classes": one of several classes (softmax). "binary": every number is a yes/no question of its own (sigmoid), as in
# heads of one logit and multi-label heads. "regression": plain numbers.
HeadKind = Literal["classes", "binary", "regression"]


def class_axis(logits: Tensor) -> int:
    """The axis of the classes: the second of a map ``(batch, classes, [depth,] height, width)``, else the last."""
    return 1 if logits.dim() >= 4 else -1


def is_single(logits: Tensor) -> bool:
    """Whether there is one number for each sample, token or pixel; ``(batch,)`` is one for each sample."""
    return logits.dim() == 1 or logits.shape[class_axis(logits)] == 1


def head_of(logits: Tensor, said: str | None = None) -> HeadKind:
    """What ``logits`` mean: what is ``said``; else "binary" where there is one class, whose softmax would be constant.

    Raises:
        UserError: ``said`` is no `HeadKind`, or one number is said to choose between classes.
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
    """The answers that ``logits`` give: class numbers (the class axis goes), yes or no, or the numbers themselves.

    Args:
        logits: ``(batch, classes)``, ``(batch, tokens, classes)`` or ``(batch, classes, height, width)``.

    Returns:
        int64 without the class axis for "classes", bool of the same shape for "binary", ``logits`` for "regression".
    """
    if kind == "classes":
        return logits.argmax(class_axis(logits))
    return logits > 0 if kind == "binary" else logits


def probabilities(kind: HeadKind, rows: Tensor) -> Tensor:
    """Of the classes, or of every yes, for logits ``(rows, classes)``; plain numbers as they are."""
    if kind == "classes":
        return rows.softmax(1)
    return rows.sigmoid() if kind == "binary" else rows
