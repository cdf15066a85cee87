"""Torch-Pruning (Fang et al., "DepGraph", CVPR 2023) at a given part of the FLOPs, through its own public API.

Set up as in the examples of its release 1.6 for a timm ViT and for a BERT, so that a network comes out as its users get
it: magnitude importance (no data), the same pruning ratio in every layer, and what ties layers together pruned in all
of them, so that the width of the residual stream shrinks too.

- Vision transformers of timm: the classifier is left as it is, and every head loses dimensions (``prune_head_dims``,
  its default and what its ViT scripts use) while all heads stay; ``prune_num_heads`` is what its BERT example uses.
- BERT: whole heads are removed (``prune_num_heads``) at the same ratio as everything else. The encoder's output gets
  narrower with the stream: 384 features of MiniLM become about 270, while ours keeps them. A pooler is left as it is.

Afterwards the numbers of heads are written into the attention modules by hand, as its examples do. Its example for
timm also replaces the forward of the attention; timm's own now runs with narrower heads once ``attn_dim`` is right.
"""

import copy
import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertSelfAttention

from optin_deploy.network import Network
from optin_deploy.nn.flops import count_flops
from optin_deploy.nn.outputs import named_outputs

WINDOW = 0.01
# Bisection goes on for a while inside the window: the closer, the better the comparison.
_CLOSE, _STEPS = 0.002, 10
# What attentions of timm and transformers call their projections and sizes.
_PROJECTIONS = (("qkv",), ("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("q_lin", "k_lin", "v_lin"))
_HEADS = ("num_heads", "num_attention_heads", "n_heads")
_ALL_WIDTHS = ("attn_dim", "all_head_size", "embed_dim")
_WIDTHS = ("head_dim", "attention_head_size")


def installed() -> bool:
    """Whether torch-pruning can be imported."""
    return find_spec("torch_pruning") is not None


def prune(network: Network, flops: float) -> tuple[nn.Module, float]:
    """The network pruned to ``flops`` (a part of the dense FLOPs, ± `WINDOW`), and the pruning ratio that did it.

    Raises:
        ValueError: no pruning ratio comes that close.
    """
    module, ratio, share = bisected(_at_ratios(network), flops)
    if abs(share - flops) > WINDOW:
        raise ValueError(f"torch-pruning comes no closer to {flops:g} of the FLOPs than {share:.3f}; try another part")
    return module, ratio


def closest(network: Network, flops: float) -> tuple[nn.Module, float]:
    """The network pruned to about ``flops``, and the part of the dense FLOPs that it has."""
    module, _, share = bisected(_at_ratios(network), flops, close=WINDOW)
    return module, share


def _at_ratios(network: Network) -> Callable[[float], tuple[nn.Module, float]]:
    dense = count_flops(network.module, network.inputs)

    def pruned(ratio: float) -> tuple[nn.Module, float]:
        module = at_ratio(network, ratio)
        return module, count_flops(module, network.inputs) / dense

    return pruned


def bisected(
    pruned: Callable[[float], tuple[nn.Module, float]], flops: float, close: float = _CLOSE
) -> tuple[nn.Module, float, float]:
    """The module, its ratio and its part of the FLOPs that is closest to ``flops`` among those tried.

    Args:
        pruned: pruning ratio -> module and its part of the dense FLOPs, which falls as the ratio grows.
        close: how close is close enough to stop.
    """
    low, high = 0.0, 1.0
    best: tuple[nn.Module, float, float] | None = None
    for _ in range(_STEPS):
        ratio = (low + high) / 2
        module, share = pruned(ratio)
        if best is None or abs(share - flops) < abs(best[2] - flops):
            best = module, ratio, share
        if abs(share - flops) <= close:
            break
        low, high = (ratio, high) if share > flops else (low, ratio)
    assert best is not None
    return best


def at_ratio(network: Network, ratio: float) -> nn.Module:
    """A copy of the network's module with ``ratio`` of the channels of every layer removed, and of its heads."""
    import torch_pruning

    module = copy.deepcopy(network.module)
    sample = {name: tensor[:1] for name, tensor in network.inputs.items()}
    whole_heads = any(isinstance(m, BertSelfAttention) for m in module.modules())
    with warnings.catch_warnings():
        # It tells that it found the position embeddings and prunes them, too, as it should.
        warnings.simplefilter("ignore")
        pruner = torch_pruning.pruner.MetaPruner(
            module,
            sample,
            importance=torch_pruning.importance.MagnitudeImportance(p=2, group_reduction="mean"),
            pruning_ratio=ratio,
            ignored_layers=[*_last_layers(module, sample), *([m] if (m := getattr(module, "pooler", None)) else [])],
            num_heads=heads_of(module),
            prune_num_heads=whole_heads,
            prune_head_dims=not whole_heads,
            head_pruning_ratio=ratio,
            forward_fn=lambda called, inputs: called(**inputs),
            output_transform=_first_tensor,
            # Its defaults are dictionaries that all pruners of a process share.
            in_channel_groups={},
            out_channel_groups={},
        )
        pruner.step()
    _tell_heads(module, pruner.num_heads)
    return module.eval()


def heads_of(module: nn.Module) -> dict[nn.Module, int]:
    """Projections to queries, keys and values, and how many heads they have."""
    heads: dict[nn.Module, int] = {}
    for m in module.modules():
        number = next((n for name in _HEADS if isinstance(n := getattr(m, name, None), int)), None)
        if number is not None:
            heads |= dict.fromkeys(_projections(m), number)
    return heads


def _last_layers(module: nn.Module, sample: Mapping[str, Tensor]) -> list[nn.Module]:
    """Linear layers and convolutions that give an output of the network: classes and the like."""
    given: list[tuple[nn.Module, Tensor]] = []
    layers = [m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    handles = [m.register_forward_hook(lambda layer, _, output: given.append((layer, output))) for m in layers]
    try:
        with torch.no_grad():
            outputs = named_outputs(module(**sample)).values()
    finally:
        for handle in handles:
            handle.remove()
    return [layer for layer, tensor in given if any(tensor is output for output in outputs)]


def _projections(attention: nn.Module) -> list[nn.Linear]:
    for names in _PROJECTIONS:
        found = [getattr(attention, name, None) for name in names]
        if all(isinstance(layer, nn.Linear) for layer in found):
            return found  # type: ignore[return-value]
    return []


def _tell_heads(module: nn.Module, heads: dict[nn.Module, int]) -> None:
    """Write the numbers and widths of heads where the attentions keep them."""
    for m in module.modules():
        projections = _projections(m)
        if not projections or projections[0] not in heads:
            continue
        number, features = heads[projections[0]], projections[0].out_features // (3 if len(projections) == 1 else 1)
        for names, value in ((_HEADS, number), (_ALL_WIDTHS, features), (_WIDTHS, features // max(1, number))):
            for name in names:
                if isinstance(getattr(m, name, None), int):
                    setattr(m, name, value)


def _first_tensor(output: object) -> Tensor:
    return next(iter(named_outputs(output).values()))
