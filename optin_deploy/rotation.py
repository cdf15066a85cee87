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

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from optin_deploy.network import Network
from optin_deploy.replay import recorded_inputs, recorded_outputs
from optin_deploy.structure.groups import Group, Rows, Structure
from optin_deploy.structure.width import change_basis

# Added to the diagonal of second moments, relative to its mean: directions that do not occur must be invertible.
_DAMPING = 1e-4

Batch = Mapping[str, Tensor]


@dataclass
class _Sums:
    """Second moments ``(heads, width, width)`` of one attention, in float64, and the sum of what its heads give."""

    queries: Tensor
    keys: Tensor
    given: Tensor
    total: Tensor
    count: int = 0


@torch.no_grad()
def in_principal_bases(network: Network, structure: Structure, batches: Sequence[Batch]) -> Network:
    """The same network in other bases of its heads; with nothing to get narrower, ``network`` itself.

    Args:
        batches: calibration inputs on the network's device.
    """
    groups = [g for g in structure.groups if g.kind == "width"]
    if not groups:
        return network
    module = copy.deepcopy(network.module)
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


def _moments(network: Network, groups: Sequence[Group], batches: Sequence[Batch]) -> dict[str, _Sums]:
    module = network.module
    sums: dict[str, _Sums] = {}
    sources = tuple(dict.fromkeys(rows.module for g in groups for rows in _rows(g)))
    for batch in batches:
        valid = network.valid_tokens(batch)
        with (
            recorded_outputs(module, sources) as projected,
            recorded_inputs(module, tuple(g.output for g in groups)) as contributed,
        ):
            network.forward(batch)
        for group in groups:
            queries, keys = (_heads(rows, projected[rows.module], group.units, valid) for rows in _rows(group))
            count = keys.new_tensor(keys.shape[1]) if valid is None else valid.sum(1).reshape(-1, 1, 1, 1)
            keys = keys - keys.sum(1, keepdim=True) / count
            if valid is not None:
                keys = keys * valid[:, :, None, None]
            given = _heads(Rows(group.output), contributed[group.output], group.units, valid)
            found = _Sums(
                _second(queries),
                _second(keys),
                _second(given),
                given.sum((0, 1)).double(),
                given.shape[:2].numel() if valid is None else int(valid.sum()),
            )
            sums[group.name] = found if group.name not in sums else _added(sums[group.name], found)
    return sums


def _rows(group: Group) -> tuple[Rows, Rows]:
    assert group.qkv is not None
    return group.qkv.queries, group.qkv.keys


def _heads(rows: Rows, features: Tensor, width: int, valid: Tensor | None) -> Tensor:
    """``(batch, tokens, heads, width)``, zero at padding."""
    part = features[..., rows.of(features.shape[-1])].flatten(1, -2)
    part = part.reshape(*part.shape[:2], -1, width)
    return part if valid is None else part * valid[:, :, None, None]


def _second(heads: Tensor) -> Tensor:
    return torch.einsum("bnhi,bnhj->hij", heads, heads).double()


def _added(a: _Sums, b: _Sums) -> _Sums:
    return _Sums(a.queries + b.queries, a.keys + b.keys, a.given + b.given, a.total + b.total, a.count + b.count)


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
