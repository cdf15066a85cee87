"""The networks of ``benchmarks/gpu.sh``, random weights and random inputs throughout: scored and pruned.

Weights change neither how long scoring takes nor how fast a network runs. Needs no downloads, and no pydantic.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig

from optin_deploy.criteria.scoring import Scoring, score
from optin_deploy.criteria.trajectory import exact_scores, task_factors
from optin_deploy.criteria.trajectory_loss import LossSettings
from optin_deploy.models import timm_models, transformers_models
from optin_deploy.network import Network, Source
from optin_deploy.nn.flops import count_flops
from optin_deploy.pruning.pruner import prune
from optin_deploy.pruning.space import analyze

FLOPS = 0.5
METHODS = ("trajectory-obs", "trajectory", "trajectory-exact")
"""Ways to score: the default; OPTIN's neurons by sketch and heads exactly; OPTIN's units all exactly."""
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Pair:
    """A network before and after pruning, on the CPU; ``flops`` is the part of its FLOPs that is left."""

    dense: Network
    pruned: Network
    flops: float


def _vision(name: str, **arguments: Any) -> Network:
    source = Source("timm", name, arguments)
    return timm_models.network_of(_initialised(partial(timm_models.build, source)), source, "random")


def _text(layers: int, width: int, heads: int, neurons: int, words: int = 30522, tokens: int = 128) -> Network:
    """A BERT encoder; its sample is two texts of ``tokens`` tokens."""
    config = BertConfig(
        vocab_size=words,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=neurons,
    )
    source = Source("transformers", "BertModel", config.to_dict())
    module = _initialised(lambda: transformers_models.prepare_module(transformers_models.create_module(source)))
    ids = torch.randint(words, (2, tokens), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    outputs = {"last_hidden_state": "last_hidden_state"}
    return Network(module, inputs, outputs, source, "random", tuple(inputs), "attention_mask")


def _initialised(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


NETWORKS: dict[str, Callable[[], Network]] = {
    "deit_small": partial(_vision, "deit_small_patch16_224"),
    "deit_base": partial(_vision, "deit_base_patch16_224"),
    "minilm": partial(_text, 6, 384, 12, 1536),
    "bert_base": partial(_text, 12, 768, 12, 3072),
    "tiny_vit": partial(_vision, "test_vit", img_size=32, depth=1, num_classes=10),
    "tiny_bert": partial(_text, 1, 32, 4, 64, words=100, tokens=16),
}
"""minilm has the sizes of all-MiniLM-L6-v2, bert_base those of BERT base."""


def on_device(network: Network, device: str) -> Network:
    """The network, whose module is moved, and its sample inputs on ``device``."""
    moved = network.with_module(network.module.to(device))
    return replace(moved, inputs={name: tensor.to(device) for name, tensor in network.inputs.items()})


def random_batches(network: Network, samples: int, size: int) -> list[Batch]:
    """Batches of noise, for text of random words without padding, on the device of the network's inputs."""
    generator = torch.Generator().manual_seed(1)

    def like(name: str, sample: Tensor) -> Tensor:
        shape = (size, *sample.shape[1:])
        if sample.is_floating_point():
            return torch.randn(shape, generator=generator).to(sample.device)
        if name == "input_ids":
            return torch.randint(int(sample.max()) + 1, shape, generator=generator).to(sample.device)
        return sample[:1].expand(shape).contiguous()

    return [{name: like(name, sample) for name, sample in network.inputs.items()} for _ in range(samples // size)]


def seconds_of(device: str, work: Callable[[], Any]) -> float:
    """How long ``work`` takes, what it leaves to the device included."""
    start = perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return perf_counter() - start


def scoring_row(name: str, method: str, device: str, samples: int, size: int, units: int) -> dict[str, Any]:
    """Seconds to score all units on ``samples`` samples in batches of ``size``, after one batch to warm up.

    Args:
        units: of "trajectory-exact": masked of every group, on one batch, from which the rest is extrapolated.
    """
    network = on_device(NETWORKS[name](), device)
    batches = random_batches(network, samples, size)
    space = analyze(network, narrow=method == "trajectory-obs")
    total = sum(group.units for group in space.structure.groups)
    row = {"network": name, "method": method, "samples": len(batches) * size, "units": total, "measured_units": total}
    if method == "trajectory-exact":
        return {**row, **_exact(network, batches, device, units)}
    criterion = Scoring("trajectory-obs" if method == "trajectory-obs" else "trajectory")
    scored = partial(score, network, space.structure, space.costs, scoring=criterion)
    scored(batches[:1])
    return {**row, "seconds": seconds_of(device, lambda: scored(batches))}


def _exact(network: Network, batches: Sequence[Batch], device: str, units: int) -> dict[str, Any]:
    """Units are spread over their groups; a kind's seconds grow with its units, and all with the batches."""
    structure = analyze(network, narrow=False).structure
    # It runs the network forwards and backwards, which warms up.
    factors = task_factors(network, structure, [batches[0]], 1.0, 0)
    seconds, masked = 0.0, 0
    for kind in sorted({group.kind for group in structure.groups}):
        groups = [group for group in structure.groups if group.kind == kind]
        only = {g.name: torch.linspace(0, g.units - 1, min(units, g.units)).long().tolist() for g in groups}
        found = seconds_of(
            device,
            partial(exact_scores, network, structure, groups, batches[:1], LossSettings(factors), only=only),
        )
        chosen = sum(map(len, only.values()))
        seconds += found * sum(group.units for group in groups) / chosen * len(batches)
        masked += chosen
    return {"seconds": seconds, "measured_units": masked}


def pruned_pair(name: str, device: str, samples: int, size: int, align: int) -> tuple[Pair, dict[str, Any]]:
    """The network pruned on ``device`` with the default settings, and what that took."""
    dense = on_device(NETWORKS[name](), device)
    batches = random_batches(dense, samples, size)
    made: list[Network] = []
    seconds = seconds_of(device, lambda: made.append(prune(dense, batches, FLOPS, align=align).network))
    pruned, dense = on_device(made[0], "cpu"), on_device(dense, "cpu")
    flops = [count_flops(network.module, dense.inputs) for network in (dense, pruned)]
    pair = Pair(dense, pruned, flops[1] / flops[0])
    row = {"network": name, "seconds": seconds, "samples": len(batches) * size, "dense_flops": flops[0]}
    return pair, {**row, "flops": pair.flops}
