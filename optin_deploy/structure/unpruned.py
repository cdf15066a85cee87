"""The modules that stay dense, why, and their share of the FLOPs."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from optin_deploy.nn.flops import FlopCounts
from optin_deploy.nn.names import is_inside, join
from optin_deploy.nn.unfold import Conv
from optin_deploy.structure.adapters.conv_channels import COUPLED
from optin_deploy.structure.between_layers import find_obstacle
from optin_deploy.structure.groups import Structure
from optin_deploy.structure.results import Unpruned

# Modules unknown to every adapter are reported if modules of the same name pattern use this share of the FLOPs.
_LEAST_SHARE = 0.01
# Layers that are not pruned, and that torch's FLOP counter may not know.
UNCOUNTED = nn.RNNBase | nn.RNNCellBase | nn.Bilinear
# For the largest kinds of modules, the operation between convolutions is searched in a few of each kind.
_EXPLAINED, _TRIED = 4, 3


@dataclass(frozen=True)
class _Candidate:
    module: str
    reason: str
    flops: int
    refused: bool


def find_unpruned(module: nn.Module, structure: Structure, inputs: Mapping[str, Tensor]) -> tuple[Unpruned, ...]:
    """Return the modules outside all groups of ``structure``, the largest share of the FLOPs first.

    Modules that an adapter refused are always listed with their reason. Of the others, the outermost modules without a
    group are listed if modules of the same name pattern use at least 1 % of the FLOPs.
    """
    counts = FlopCounts(module, inputs)
    total = counts.total
    alike: dict[tuple[str, str], list[_Candidate]] = {}
    for candidate in _Walk(module, structure, counts).all():
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", candidate.module)
        alike.setdefault((pattern, candidate.reason), []).append(candidate)
    listed = []
    for (pattern, reason), together in alike.items():
        share = sum(candidate.flops for candidate in together) / total if total else 0.0
        if share >= _LEAST_SHARE or any(candidate.refused for candidate in together):
            name = pattern if len(together) > 1 else together[0].module
            listed.append((Unpruned(name, reason, share, len(together)), together[0]))
    listed.sort(key=lambda pair: -pair[0].flops_share)
    explained = [_explain(module, inputs, entry, example) for entry, example in listed[:_EXPLAINED]]
    return (*explained, *(entry for entry, _ in listed[_EXPLAINED:]))


def _explain(module: nn.Module, inputs: Mapping[str, Tensor], entry: Unpruned, example: _Candidate) -> Unpruned:
    """Return ``entry`` with the operation between convolutions that is the reason, if there is one."""
    if example.module not in dict(module.named_modules()) or (example.refused and COUPLED not in example.reason):
        return entry
    inside = module.get_submodule(example.module)
    convolutions = [
        n for n, m in inside.named_modules() if isinstance(m, Conv) and m.groups == 1 and m.out_channels > 1
    ]
    for name in convolutions[:_TRIED]:
        reason = find_obstacle(module, inputs, join(example.module, name))
        if reason is not None:
            return replace(entry, reason=f"{entry.reason}: {reason}" if example.refused else reason)
    return entry


def never_pruned(module: nn.Module) -> str:
    """Return the reason why a module of a class in `UNCOUNTED` stays dense."""
    kind = "bilinear" if isinstance(module, nn.Bilinear) else "recurrent"
    return f"{type(module).__name__}: {kind} layers are not pruned"


class _Walk:
    """Walks from the root down to modules that a group owns, that an adapter refused, or that contain neither."""

    def __init__(self, module: nn.Module, structure: Structure, counts: FlopCounts) -> None:
        self.module, self.counts = module, counts
        self.cost_modules = {owner for group in structure.groups for owner in group.cost.modules}
        self.refused: dict[str, str] = {}
        for left in structure.left_dense:
            known = self.refused.get(left.module)
            self.refused[left.module] = left.reason if known in (None, left.reason) else f"{known}; {left.reason}"

    def all(self) -> Iterator[_Candidate]:
        candidates = list(self._below("", self.module))
        seen = {candidate.module for candidate in candidates}
        yield from candidates
        # Refused modules inside a module that a group owns, like the norm between its projections.
        for name in self.refused.keys() - seen:
            yield _Candidate(name, self.refused[name], self._flops(name, self.module.get_submodule(name)), True)

    def _below(self, name: str, module: nn.Module) -> Iterator[_Candidate]:
        if name in self.cost_modules:
            return
        if name in self.refused:
            yield _Candidate(name, self.refused[name], self._flops(name, module) - self._owned(name, module), True)
            return
        if name and not any(is_inside(other, name) for other in (*self.cost_modules, *self.refused)):
            yield _Candidate(name, _unknown(module), self._flops(name, module), False)
            return
        rest = self._flops(name, module)
        for child, submodule in module.named_children():
            inside = join(name, child)
            rest -= self._flops(inside, submodule)
            yield from self._below(inside, submodule)
        reason = "computed in its own forward, by no layer"
        yield _Candidate(name or "(the network itself)", reason, max(rest, 0), False)

    def _owned(self, name: str, module: nn.Module) -> int:
        """Return the FLOPs of the groups inside."""
        if name in self.cost_modules:
            return self._flops(name, module)
        return sum(self._owned(f"{name}.{child}", submodule) for child, submodule in module.named_children())

    def _flops(self, name: str, module: nn.Module) -> int:
        """Return the FLOPs of a module; of one that is never called itself, like a list, those of its children."""
        if name in self.counts:
            return self.counts.of(name)
        return sum(self._flops(join(name, child), submodule) for child, submodule in module.named_children())


def _unknown(module: nn.Module) -> str:
    kind = type(module).__name__
    if isinstance(module, UNCOUNTED):
        return never_pruned(module)
    parameters = [name for name, parameter in module.named_parameters(recurse=False) if parameter.dim() > 1]
    if parameters and not list(module.children()) and not type(module).__module__.startswith("torch.nn."):
        return f"a {kind}, which computes with parameters of its own ({', '.join(parameters)}) and not with layers"
    if not list(module.children()) or type(module).__module__.startswith("torch.nn."):
        return f"a {kind} in no prunable group"
    return f"a {kind}, which no adapter knows as a whole or in parts"
