"""Results about a network's structure, as they are stored in ``report.json``; importing them needs no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Unpruned:
    """Modules that stay dense for one reason.

    Attributes:
        module: the name, with ``*`` in place of the numbers in it where there are several.
        reason: why they stay dense.
        flops_share: their share of the dense network's FLOPs, 0 to 1, without the groups inside them.
        count: how many there are.
    """

    module: str
    reason: str
    flops_share: float
    count: int = 1
