"""Results about a network's structure, as they are stored in ``report.json``; importing them needs no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Unpruned:
    """Modules that stay dense for one reason.

    Attributes:
        module: The name, with ``*`` for its numbers if there are several.
        reason: Why they stay dense.
        flops_share: Their share of the dense network's FLOPs, 0 to 1, without the groups inside them.
        count: How many there are.
    """

    module: str
    reason: str
    flops_share: float
    count: int = 1
