"""FLOPs, counted by torch's own counter on a real input. One multiply-add is two FLOPs."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from optin_deploy.nn.freezing import frozen


def count_flops(module: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """FLOPs of one forward pass for one sample of ``inputs`` (its first)."""
    return sum(flops_by_module(module, inputs).get("Global", {}).values())


def flops_by_module(module: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, dict[object, int]]:
    """FLOPs by kind of operator: of every submodule under ``CLASS.name``, with CLASS the module's, and all "Global"."""
    sample = {name: value[:1] for name, value in inputs.items()}
    # The plain attention is counted on every device alike; fused kernels are not all known to the counter.
    # Frozen, because the counter follows everything that could have a gradient.
    with frozen(module), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(**sample)
    counts = counter.get_flop_counts()
    names: dict[int, list[str]] = {}
    for name, submodule in module.named_modules(remove_duplicate=False):
        names.setdefault(id(submodule), []).append(f"{type(module).__name__}.{name}")
    # Of the names of one module, the counter takes the last.
    for first, *others in names.values():
        counted = next((counts[name] for name in (first, *others) if name in counts), None)
        if others and counted is not None:
            counts[first] = counted
    return counts
