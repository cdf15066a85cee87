"""Rotate heads to the basis of their principal components, so that they can get narrower by losing the last dimensions.

The basis of a head's queries and keys, and that of its values, do not change an attention's output. Let Q, K and O be
the second moments, over calibration data, of the queries, of the keys (centred over the tokens of each sample, because
softmax ignores a component that all keys share) and of the head's output (centred):

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

# Added to the diagonal of second moments, relative to its mean, so that the matrices are invertible.
_DAMPING = 1e-4

Batch = Mapping[str, Tensor]


@dataclass
class _Sums:
    """Second moments ``(heads, width, width)`` of one attention in float64; sum and count of its head outputs."""

    queries: Tensor = field(default_factory=lambda: torch.zeros(()))
    keys: Tensor = field(default_factory=lambda: torch.zeros(()))
    outputs: Tensor = field(default_factory=lambda: torch.zeros(()))
    total: Tensor = field(default_factory=lambda: torch.zeros(()))
    count: int = 0

    def over(self, ranks: Ranks) -> "_Sums":
        """Return the sum over all processes."""
        local = {"q": self.queries, "k": self.keys, "outputs": self.outputs, "total": self.total}
        sums = ranks.all_reduce({**local, "count": torch.tensor(self.count)})
        return _Sums(sums["q"], sums["k"], sums["outputs"], sums["total"], int(sums["count"]))


@torch.no_grad()
def rotate_heads_to_pca(network: Network, structure: Structure, batches: Sequence[Batch]) -> Network:
    """Return the same network with its heads in their principal bases; ``network`` itself if no head can get narrower.

    Args:
        batches: calibration inputs on the network's device.
    """
    groups = [g for g in structure.groups if g.kind == "width"]
    if not groups:
        return network
    module = _copy_changed(network.module, groups)
    sums = _moments(network, groups, batches)
    for group in groups:
        weight = module.get_submodule(group.output).get_parameter("weight")
        moments = sums[group.name]
        queries, keys = query_key_bases(moments.queries, moments.keys)
        mean = moments.total / moments.count
        spread = moments.outputs / moments.count - torch.einsum("hi,hj->hij", mean, mean)
        heads = weight.T.double().reshape(-1, group.units, len(weight))
        change_basis(module, group, queries, keys, value_bases(spread, heads))
    return network.with_module(module)


def _copy_changed(module: nn.Module, groups: Sequence[Group]) -> nn.Module:
    """Return a copy that shares the parameters and buffers whose basis does not change, to save memory."""
    qkv = [rows for g in groups if g.qkv for rows in (g.qkv.queries, g.qkv.keys, g.qkv.values)]
    changed = {*(g.output for g in groups), *(rows.module for rows in qkv)}
    separate = {id(t) for name in changed for t in module.get_submodule(name).state_dict(keep_vars=True).values()}
    every = (*module.parameters(), *module.buffers())
    return copy_module(module, {id(t): t for t in every if id(t) not in separate})


def _moments(network: Network, groups: Sequence[Group], batches: Sequence[Batch]) -> dict[str, _Sums]:
    sums: dict[str, _Sums] = {}
    for index in own_indices(batches):
        batch = batches[index]
        valid = network.valid_tokens(batch)
        with ExitStack() as stack:
            for group in groups:
                moments = sums.setdefault(group.name, _Sums())
                for name, hook in _hooks(group, moments, valid):
                    stack.enter_context(forward_hooks(network.module, [name], after=hook))
            network.forward(batch)
    return {name: moments.over(ranks_of(batches)) for name, moments in sums.items()}


def _hooks(group: Group, sums: _Sums, valid: Tensor | None) -> list[tuple[str, Hook]]:
    """Return module names, and forward hooks that add the activations there to the sums."""
    rows, key_rows = _rows(group)

    def queries(_: str, __: nn.Module, ___: object, output: Tensor) -> None:
        sums.queries = sums.queries + _second(_heads(rows, output, group.units, _fitting(valid, output)))

    def keys(_: str, __: nn.Module, ___: object, output: Tensor) -> None:
        mask = _fitting(valid, output)
        heads = _heads(key_rows, output, group.units, mask)
        count = heads.new_tensor(heads.shape[1]) if mask is None else mask.sum(1).reshape(-1, 1, 1, 1)
        heads = heads - heads.sum(1, keepdim=True) / count
        sums.keys = sums.keys + _second(heads if mask is None else heads * mask[:, :, None, None])

    def outputs(_: str, __: nn.Module, args: tuple[Tensor, ...], ___: object) -> None:
        mask = _fitting(valid, args[0])
        heads = _heads(OutputSlice(group.output), args[0], group.units, mask)
        sums.outputs = sums.outputs + _second(heads)
        sums.total = sums.total + heads.sum((0, 1)).double()
        sums.count += heads.shape[:2].numel() if mask is None else int(mask.sum())

    return [(rows.module, queries), (key_rows.module, keys), (group.output, outputs)]


def _rows(group: Group) -> tuple[OutputSlice, OutputSlice]:
    qkv = projections(group)
    return qkv.queries, qkv.keys


def _fitting(valid: Tensor | None, features: Tensor) -> Tensor | None:
    """Return ``valid`` if it has an entry for each token of ``features``, else None: not all tokens need be text."""
    return valid if valid is not None and valid.shape == features.flatten(1, -2).shape[:2] else None


def _heads(rows: OutputSlice, features: Tensor, width: int, valid: Tensor | None) -> Tensor:
    """Return features ``(batch, tokens, heads, width)``, zero at padding."""
    heads = features[..., rows.of(features.shape[-1])].flatten(1, -2)
    heads = heads.reshape(*heads.shape[:2], -1, width)
    return heads if valid is None else heads * valid[:, :, None, None]


def _second(heads: Tensor) -> Tensor:
    return torch.einsum("bnhi,bnhj->hij", heads, heads).double()


def query_key_bases(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return bases A of queries and B of keys with A Bᵀ = 1, most important dimension first.

    Args:
        queries, keys: second moments ``(heads, width, width)``.
    """
    root, inverse = _roots(queries)
    key_root, _ = _roots(keys)
    left, strength, _ = torch.linalg.svd(root @ key_root)
    scaled = strength.clamp_min(1e-12 * strength[:, :1]).sqrt()
    basis = inverse @ left * scaled[:, None, :]
    return basis, torch.linalg.inv(basis).transpose(1, 2)


def value_bases(covariance: Tensor, heads: Tensor) -> Tensor:
    """Return orthogonal bases of values, most important dimension first.

    Args:
        covariance: of the heads' outputs, ``(heads, width, width)``.
        heads: their rows of the output projection's weights transposed, ``(heads, width, outputs)``.
    """
    root, inverse = _roots(covariance)
    # With fewer outputs than dimensions, outputs of zeros complete the basis.
    heads = nn.functional.pad(heads, (0, max(0, heads.shape[1] - heads.shape[2])))
    left, _, _ = torch.linalg.svd(root @ heads, full_matrices=False)
    return torch.linalg.qr(inverse @ left).Q


def _roots(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Return the symmetric root of each (damped) matrix, and its inverse."""
    scale = moments.diagonal(dim1=1, dim2=2).mean(1)
    # A head with constant activations has no scale of its own.
    scale = torch.where(scale > 1e-30, scale, 1.0)
    values, vectors = torch.linalg.eigh(moments / scale[:, None, None])
    values = values.clamp_min(0.0) + _DAMPING
    root = vectors * values.sqrt()[:, None, :] @ vectors.transpose(1, 2)
    inverse = vectors * values.rsqrt()[:, None, :] @ vectors.transpose(1, 2)
    return root * scale.sqrt()[:, None, None], inverse / scale.sqrt()[:, None, None]
