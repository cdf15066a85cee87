"""What of a network pruning leaves alone, why, and how many of the FLOPs it takes."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from optin_deploy.nn.flops import FlopCounts
from optin_deploy.nn.names import is_inside, join
from optin_deploy.nn.unfold import Conv
from optin_deploy.structure.adapters.conv_channels import COUPLED
from optin_deploy.structure.between_layers import obstacle
from optin_deploy.structure.groups import Structure
from optin_deploy.structure.results import Unpruned

# What no adapter has anything to say about is told where all that is like it takes this part of the FLOPs.
_TOLD_SHARE = 0.01
# Layers that are not pruned, and of whose FLOPs torch's counter may know nothing.
UNCOUNTED = nn.RNNBase | nn.RNNCellBase | nn.Bilinear
# Of so many kinds of modules, the largest, it is found out what stands between their convolutions; of so many each.
_EXPLAINED, _TRIED = 4, 3


@dataclass(frozen=True)
class _Found:
    module: str
    reason: str
    flops: int
    refused: bool


def unpruned(module: nn.Module, structure: Structure, inputs: Mapping[str, Tensor]) -> tuple[Unpruned, ...]:
    """What is outside all groups of ``structure``, the largest part of the FLOPs first.

    Modules that an adapter refused are told with their reason whatever they take; all others, by the outermost modules
    that hold no group, where modules of like names take 1 % of the FLOPs or more.
    """
    counts = FlopCounts(module, inputs)
    total = counts.total
    alike: dict[tuple[str, str], list[_Found]] = {}
    for found in _Walk(module, structure, counts).all():
        alike.setdefault((re.sub(r"(?<![^.])\d+(?![^.])", "*", found.module), found.reason), []).append(found)
    told = []
    for (pattern, reason), together in alike.items():
        share = sum(found.flops for found in together) / total if total else 0.0
        if share >= _TOLD_SHARE or any(found.refused for found in together):
            name = pattern if len(together) > 1 else together[0].module
            told.append((Unpruned(name, reason, share, len(together)), together[0]))
    told.sort(key=lambda each: -each[0].flops_share)
    explained = [_explained(module, inputs, each, found) for each, found in told[:_EXPLAINED]]
    return (*explained, *(each for each, _ in told[_EXPLAINED:]))


def _explained(module: nn.Module, inputs: Mapping[str, Tensor], told: Unpruned, found: _Found) -> Unpruned:
    """``told``, with what stands between convolutions where that is the reason."""
    if found.module not in dict(module.named_modules()) or (found.refused and COUPLED not in found.reason):
        return told
    inside = module.get_submodule(found.module)
    convolutions = [
        n for n, m in inside.named_modules() if isinstance(m, Conv) and m.groups == 1 and m.out_channels > 1
    ]
    for name in convolutions[:_TRIED]:
        reason = obstacle(module, inputs, join(found.module, name))
        if reason is not None:
            return replace(told, reason=f"{told.reason}: {reason}" if found.refused else reason)
    return told


def never_pruned(module: nn.Module) -> str:
    """What is said of one of `UNCOUNTED`."""
    kind = "bilinear" if isinstance(module, nn.Bilinear) else "recurrent"
    return f"{type(module).__name__}: {kind} layers are not pruned"


class _Walk:
    """From the root down to modules that a group owns, that an adapter refused, or that hold neither."""

    def __init__(self, module: nn.Module, structure: Structure, counts: FlopCounts) -> None:
        self.module, self.counts = module, counts
        self.cost_modules = {owner for group in structure.groups for owner in group.cost.modules}
        self.refused: dict[str, str] = {}
        for left in structure.left_dense:
            known = self.refused.get(left.module)
            self.refused[left.module] = left.reason if known in (None, left.reason) else f"{known}; {left.reason}"

    def all(self) -> Iterator[_Found]:
        found = list(self._below("", self.module))
        seen = {each.module for each in found}
        yield from found
        # Those inside what a group owns, like the norm between its projections.
        for name in self.refused.keys() - seen:
            yield _Found(name, self.refused[name], self._flops(name, self.module.get_submodule(name)), True)

    def _below(self, name: str, module: nn.Module) -> Iterator[_Found]:
        if name in self.cost_modules:
            return
        if name in self.refused:
            yield _Found(name, self.refused[name], self._flops(name, module) - self._owned(name, module), True)
            return
        if name and not any(is_inside(other, name) for other in (*self.cost_modules, *self.refused)):
            yield _Found(name, _unknown(module), self._flops(name, module), False)
            return
        own = self._flops(name, module)
        for child, submodule in module.named_children():
            inside = join(name, child)
            own -= self._flops(inside, submodule)
            yield from self._below(inside, submodule)
        yield _Found(name or "(the network itself)", "computed in its own forward, by no layer", max(own, 0), False)

    def _owned(self, name: str, module: nn.Module) -> int:
        """FLOPs of the groups inside."""
        if name in self.cost_modules:
            return self._flops(name, module)
        return sum(self._owned(f"{name}.{child}", submodule) for child, submodule in module.named_children())

    def _flops(self, name: str, module: nn.Module) -> int:
        """FLOPs of a module; of one that is never called itself, like a list, those of what it holds."""
        if name in self.counts:
            return self.counts.of(name)
        return sum(self._flops(join(name, child), submodule) for child, submodule in module.named_children())


def _unknown(module: nn.Module) -> str:
    kind = type(module).__name__
    if isinstance(module, UNCOUNTED):
        return never_pruned(module)
    own = [name for name, parameter in module.named_parameters(recurse=False) if parameter.dim() > 1]
    if own and not list(module.children()) and not type(module).__module__.startswith("torch.nn."):
        return f"a {kind}, which computes with parameters of its own ({', '.join(own)}) and not with layers"
    if not list(module.children()) or type(module).__module__.startswith("torch.nn."):
        return f"a {kind} in no prunable group"
    return f"a {kind}, which no adapter knows as a whole or in parts"
