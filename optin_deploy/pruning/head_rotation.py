"""Heads in the basis of their principal components, so that they can get narrower by losing their last dimensions.

An attention computes the same in any basis of a head's queries and keys, and of its values. With Q, K and O the second
moments of queries, of keys (centred over the tokens of each sample: softmax does not see what all keys have in common)
and of what the head gives (centred), over calibration data:

- queries and keys: with U S Vᵀ the singular value decomposition of Q^½ K^½, the basis Q^-½ U S^½ for queries and its
  inverse's transpose for keys; its first r dimensions give the best approximation of rank r of q·k over all pairs;
- values: with U S Vᵀ that of O^½ Wᵀ, W the head's columns of the output projection, the first r columns of O^-½ U span
  the values that give the best approximation of rank r of the head's contribution; their QR decomposition is an
  orthogonal basis with the same spans.

The closed form is that of low-rank approximation in a data metric (Eckart & Young); compare the attention part of CORP,
arXiv 2602.05243.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from optin_deploy.distributed.ranks import Ranks, own_indices, ranks_of
from optin_deploy.network import Network
from optin_deploy.nn.copies import copy_module
from optin_deploy.nn.hooks import Hook, forward_hooks
from optin_deploy.structure.groups import Group, OutputSlice, Structure, projections
from optin_deploy.structure.head_width import change_basis

# Added to the diagonal of second moments, relative to its mean: directions that do not occur must be invertible.
_DAMPING = 1e-4

Batch = Mapping[str, Tensor]


@dataclass
class _Sums:
    """Second moments ``(heads, width, width)`` of one attention, in float64, and the sum of what its heads give."""

    queries: Tensor = field(default_factory=lambda: torch.zeros(()))
    keys: Tensor = field(default_factory=lambda: torch.zeros(()))
    given: Tensor = field(default_factory=lambda: torch.zeros(()))
    total: Tensor = field(default_factory=lambda: torch.zeros(()))
    count: int = 0

    def over(self, ranks: Ranks) -> "_Sums":
        """The sum over all processes."""
        own = {"q": self.queries, "k": self.keys, "given": self.given, "total": self.total}
        found = ranks.all_reduce({**own, "count": torch.tensor(self.count)})
        return _Sums(found["q"], found["k"], found["given"], found["total"], int(found["count"]))


@torch.no_grad()
def in_principal_bases(network: Network, structure: Structure, batches: Sequence[Batch]) -> Network:
    """The same network in other bases of its heads; with nothing to get narrower, ``network`` itself.

    Args:
        batches: calibration inputs on the network's device.
    """
    groups = [g for g in structure.groups if g.kind == "width"]
    if not groups:
        return network
    module = _copied(network.module, groups)
    sums = _moments(network, groups, batches)
    for group in groups:
        weight = module.get_submodule(group.output).get_parameter("weight")
        queries, keys = query_key_bases(sums[group.name].queries, sums[group.name].keys)
        found = sums[group.name]
        mean = found.total / found.count
        spread = found.given / found.count - torch.einsum("hi,hj->hij", mean, mean)
        heads = weight.T.double().reshape(-1, group.units, len(weight))
        change_basis(module, group, queries, keys, value_bases(spread, heads))
    return network.with_module(module)


def _copied(module: nn.Module, groups: Sequence[Group]) -> nn.Module:
    """A copy whose parameters and buffers are those of ``module`` where no basis changes: weights take memory."""
    qkv = [rows for g in groups if g.qkv for rows in (g.qkv.queries, g.qkv.keys, g.qkv.values)]
    changed = {*(g.output for g in groups), *(rows.module for rows in qkv)}
    apart = {id(t) for name in changed for t in module.get_submodule(name).state_dict(keep_vars=True).values()}
    every = (*module.parameters(), *module.buffers())
    return copy_module(module, {id(t): t for t in every if id(t) not in apart})


def _moments(network: Network, groups: Sequence[Group], batches: Sequence[Batch]) -> dict[str, _Sums]:
    sums: dict[str, _Sums] = {}
    for index in own_indices(batches):
        batch = batches[index]
        valid = network.valid_tokens(batch)
        with ExitStack() as stack:
            for group in groups:
                found = sums.setdefault(group.name, _Sums())
                for name, hook in _hooks(group, found, valid):
                    stack.enter_context(forward_hooks(network.module, [name], after=hook))
            network.forward(batch)
    return {name: found.over(ranks_of(batches)) for name, found in sums.items()}


def _hooks(group: Group, found: _Sums, valid: Tensor | None) -> list[tuple[str, Hook]]:
    """Module names, and hooks that add to the sums what passes there: it is not kept."""
    rows, key_rows = _rows(group)

    def queries(_: str, __: nn.Module, ___: object, output: Tensor) -> None:
        found.queries = found.queries + _second(_heads(rows, output, group.units, _fitting(valid, output)))

    def keys(_: str, __: nn.Module, ___: object, output: Tensor) -> None:
        mask = _fitting(valid, output)
        each = _heads(key_rows, output, group.units, mask)
        count = each.new_tensor(each.shape[1]) if mask is None else mask.sum(1).reshape(-1, 1, 1, 1)
        each = each - each.sum(1, keepdim=True) / count
        found.keys = found.keys + _second(each if mask is None else each * mask[:, :, None, None])

    def given(_: str, __: nn.Module, args: tuple[Tensor, ...], ___: object) -> None:
        mask = _fitting(valid, args[0])
        each = _heads(OutputSlice(group.output), args[0], group.units, mask)
        found.given = found.given + _second(each)
        found.total = found.total + each.sum((0, 1)).double()
        found.count += each.shape[:2].numel() if mask is None else int(mask.sum())

    return [(rows.module, queries), (key_rows.module, keys), (group.output, given)]


def _rows(group: Group) -> tuple[OutputSlice, OutputSlice]:
    qkv = projections(group)
    return qkv.queries, qkv.keys


def _fitting(valid: Tensor | None, features: Tensor) -> Tensor | None:
    """``valid`` where it has an entry for each token of ``features``; beside texts there may be others."""
    return valid if valid is not None and valid.shape == features.flatten(1, -2).shape[:2] else None


def _heads(rows: OutputSlice, features: Tensor, width: int, valid: Tensor | None) -> Tensor:
    """``(batch, tokens, heads, width)``, zero at padding."""
    part = features[..., rows.of(features.shape[-1])].flatten(1, -2)
    part = part.reshape(*part.shape[:2], -1, width)
    return part if valid is None else part * valid[:, :, None, None]


def _second(heads: Tensor) -> Tensor:
    return torch.einsum("bnhi,bnhj->hij", heads, heads).double()


def query_key_bases(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Bases A of queries and B of keys, A Bᵀ = 1, the dimension that matters most first.

    Args:
        queries, keys: second moments ``(heads, width, width)``.
    """
    root, inverse = _roots(queries)
    key_root, _ = _roots(keys)
    left, strength, _ = torch.linalg.svd(root @ key_root)
    scaled = strength.clamp_min(1e-12 * strength[:, :1]).sqrt()
    basis = inverse @ left * scaled[:, None, :]
    return basis, torch.linalg.inv(basis).transpose(1, 2)


def value_bases(given: Tensor, heads: Tensor) -> Tensor:
    """Orthogonal bases of values, the dimension that matters most first.

    Args:
        given: covariance of what the heads give, ``(heads, width, width)``.
        heads: their rows of the output projection's weights transposed, ``(heads, width, outputs)``.
    """
    root, inverse = _roots(given)
    # With fewer outputs than dimensions, outputs of zeros complete the basis.
    heads = nn.functional.pad(heads, (0, max(0, heads.shape[1] - heads.shape[2])))
    left, _, _ = torch.linalg.svd(root @ heads, full_matrices=False)
    return torch.linalg.qr(inverse @ left).Q


def _roots(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric root of each (damped) matrix, and its inverse."""
    scale = moments.diagonal(dim1=1, dim2=2).mean(1)
    # What does not move at all has no scale of its own.
    scale = torch.where(scale > 1e-30, scale, 1.0)
    values, vectors = torch.linalg.eigh(moments / scale[:, None, None])
    values = values.clamp_min(0.0) + _DAMPING
    root = vectors * values.sqrt()[:, None, :] @ vectors.transpose(1, 2)
    inverse = vectors * values.rsqrt()[:, None, :] @ vectors.transpose(1, 2)
    return root * scale.sqrt()[:, None, None], inverse / scale.sqrt()[:, None, None]
