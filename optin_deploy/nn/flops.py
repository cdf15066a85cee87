"""FLOPs, counted by torch's own counter on a real input. One multiply-add is two FLOPs."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from optin_deploy.nn.freezing import freeze_parameters


class FlopCounts:
    """FLOPs of a module and its submodules in one forward pass for one sample of ``inputs`` (its first).

    >>> FlopCounts(nn.Sequential(nn.Linear(2, 3)), {"input": torch.ones(1, 2)}).of("0")
    12
    """

    def __init__(self, module: nn.Module, inputs: Mapping[str, Tensor]) -> None:
        sample = {name: value[:1] for name, value in inputs.items()}
        # The counter does not know all fused attention kernels, so plain attention is counted on every device.
        # Frozen, because the counter follows everything that could have a gradient.
        with (
            freeze_parameters(module),
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            module(**sample)
        self._counts: dict[str, dict[object, int]] = counter.get_flop_counts()
        self._prefix = type(module).__name__
        names: dict[int, list[str]] = {}
        for name, submodule in module.named_modules(remove_duplicate=False):
            names.setdefault(id(submodule), []).append(self._key(name))
        # The counter files a module with several names under the last one.
        for first, *others in names.values():
            counted = next((self._counts[name] for name in (first, *others) if name in self._counts), None)
            if others and counted is not None:
                self._counts[first] = counted

    @property
    def total(self) -> int:
        """FLOPs of the whole module."""
        return self.of("")

    def __contains__(self, name: str) -> bool:
        """Return whether the submodule ``name`` was called and computes something."""
        return self._key(name) in self._counts

    def of(self, name: str) -> int:
        """Return the FLOPs of the submodule ``name``; "" is the whole module."""
        return sum(self.by_operator(name).values())

    def by_operator(self, name: str) -> dict[object, int]:
        """Return the FLOPs of the submodule ``name`` by torch operator."""
        return self._counts.get(self._key(name), {})

    def _key(self, name: str) -> str:
        return f"{self._prefix}.{name}" if name else "Global"


def count_flops(module: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """Return the FLOPs of one forward pass for one sample of ``inputs`` (its first)."""
    return FlopCounts(module, inputs).total
