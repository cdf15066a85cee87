"""Scores of every unit: neurons by sketch and heads exactly, or everything exactly."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from optin_deploy.criteria.trajectory import exact_scores, sketch_scores, task_factor
from optin_deploy.errors import UserError
from optin_deploy.network import Network
from optin_deploy.structure.groups import Structure

Scorer = Literal["sketch", "exact"]


# Beside a sketch, heads are scored exactly on the first batches that hold this many tokens together.
_EXACT_TOKENS = 3_000


def save_scores(scores: Mapping[str, Tensor], path: Path) -> None:
    """Write as safetensors; the file appears whole or not at all."""
    temporary = path.with_name(f".{path.name}")
    save_file(dict(scores), temporary)
    temporary.chmod(0o644)
    temporary.replace(path)


def scoring_steps(structure: Structure, batches: int, scorer: Scorer, probes: int) -> int:
    """How often `score` will advance its progress, at most."""
    exact = sum(g.units for g in structure.groups if scorer == "exact" or g.kind == "head")
    return exact * batches + (probes * batches if scorer == "sketch" else 0)


def score(
    network: Network,
    structure: Structure,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    scorer: Scorer = "sketch",
    probes: int = 4,
    task_weight: float = 1.0,
    seed: int = 0,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Tensor]:
    """Trajectory scores per sample on ``batches``, which lie on the network's device.

    Args:
        scorer: "sketch" scores neurons by ``probes`` random draws per batch, and heads exactly on as many batches as
            hold 3,000 tokens; "exact" masks each unit on all batches.
        task_weight: weight of the task part relative to the manifold part (see ``criteria.trajectory``).
        seed: the same seed gives the same scores, bit for bit, on the same machine.

    Returns:
        group name -> float64 ``(units,)`` on the CPU; a higher score matters more.

    Raises:
        UserError: the network gives NaN or infinity on the calibration data.
    """
    exactly = [g for g in structure.groups if scorer == "exact" or g.kind == "head"]
    some = batches if scorer == "exact" else batches[: _exact_batches(network, structure, batches)]
    factor = task_factor(network, structure, batches[0], task_weight, seed) if task_weight else 0.0
    exact = exact_scores(network, structure, exactly, some, factor=factor, seed=seed, advance=advance)
    scores = _per_sample(exact, some)
    if scorer == "sketch":
        sketched = sketch_scores(
            network, structure, batches, probes=probes, weights=(1.0, factor), seed=seed, advance=advance
        )
        scores = {**_per_sample(sketched, batches), **scores}
    bad = next((name for name, values in scores.items() if not torch.isfinite(values).all()), None)
    if bad:
        raise UserError(f"scores of {bad} are not finite: the network gives NaN or infinity on the calibration data")
    return scores


def _exact_batches(network: Network, structure: Structure, batches: Sequence[Mapping[str, Tensor]]) -> int:
    """How many of the first batches hold enough tokens."""
    tokens = 0
    for index, batch in enumerate(batches):
        valid = network.valid_tokens(batch)
        tokens += int(valid.sum()) if valid is not None else structure.tokens * len(next(iter(batch.values())))
        if tokens >= _EXACT_TOKENS:
            return index + 1
    return len(batches)


def _per_sample(scores: Mapping[str, Tensor], batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    samples = sum(len(next(iter(batch.values()))) for batch in batches)
    return {name: values / samples for name, values in scores.items()}
