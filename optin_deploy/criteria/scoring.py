"""Scores of every unit by the chosen criterion. A higher score matters more."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from optin_deploy.criteria.gradient_reach import Reach, find_forward_reach, find_reach
from optin_deploy.criteria.registry import CRITERIA, Criterion, CriterionSpec
from optin_deploy.criteria.restored_gradients import plain_checkpoints, restore_gradients
from optin_deploy.criteria.score_signal import check_signal, names_of
from optin_deploy.criteria.trajectory import Sketch, exact_scores, masked_totals, sketch_scores, task_factors
from optin_deploy.criteria.trajectory_forward import Draws, forward_scores
from optin_deploy.criteria.trajectory_loss import LossSettings, chunks, is_saturated
from optin_deploy.criteria.trajectory_obs import obs_scores, probe_moments
from optin_deploy.distributed.ranks import ranks_of
from optin_deploy.errors import UserError
from optin_deploy.network import Network
from optin_deploy.nn.copies import check_copyable
from optin_deploy.search.costs import Costs
from optin_deploy.structure.groups import Group, Structure
from optin_deploy.utils.atomic_files import write_tensors
from optin_deploy.utils.progress import progress_until

Scorer = Literal["sketch", "exact", "forward"]
Batches = Sequence[Mapping[str, Tensor]]
logger = logging.getLogger(__name__)

# With a sketch, heads are scored exactly on the first batches that hold this many tokens together.
_EXACT_TOKENS = 3_000
# A backward pass takes a quarter of a batch: it keeps the activations of all layers, inference only those of one.
_CHUNKS = 4
_CHUNK_TOKENS = 512
_LONG, _LONG_TOKENS = 128, 256
# Without derivatives there are many passes, so the weight of the task part is found on fewer samples.
_FACTOR_SAMPLES = 2
# Shares of the time, for the progress bar: backward passes of trajectory-obs; masking of heads with the sketch.
_PROBING, _MASKING = 0.9, 0.7


@dataclass(frozen=True)
class Scoring:
    """Settings of the scores.

    Attributes:
        criterion: "trajectory-obs" (see ``criteria.trajectory_obs``), "trajectory" (OPTIN's own), "fisher" (needs
            labels), "magnitude" or "random".
        scorer: for "trajectory". "sketch" scores neurons by random probes, and heads exactly on the batches that hold
            3,000 tokens. "exact" masks each unit on all batches. "forward" estimates the sketch's scores without a
            backward pass, for networks whose activations do not fit in memory.
        probes: random draws per batch. None takes 4 for "trajectory" and 1 for "trajectory-obs", which draws again for
            each quarter of a batch.
        task_weight: weight of the task part relative to the manifold part (see ``criteria.trajectory_loss``). None
            takes 1. For "trajectory-obs" it takes the task part alone if the network has class logits, since a
            classifier uses only some features of its tokens, or if all blocks return maps, whose single pixels matter
            little.
        seed: on one machine, the same seed gives the same scores, bit for bit.
    """

    criterion: Criterion = "trajectory-obs"
    scorer: Scorer = "sketch"
    probes: int | None = None
    task_weight: float | None = None
    seed: int = 0

    @property
    def spec(self) -> CriterionSpec:
        """The criterion's row in the table."""
        return CRITERIA[self.criterion]

    @property
    def draws(self) -> int:
        """Random draws per batch."""
        return self.probes or self.spec.probes or 1

    def weights(self, network: Network, structure: Structure) -> tuple[float, float]:
        """Weights of the manifold part and of the task part."""
        if self.task_weight is not None:
            return 1.0, self.task_weight
        alone = network.logits is not None or all(group.axis == 1 for group in structure.groups)
        return (0.0 if alone and self.spec.after_compensation else 1.0), 1.0

    @property
    def narrows_heads(self) -> bool:
        """Whether heads may get narrower by default: if their dimensions' scores compare with other scores."""
        return self.spec.after_compensation


@dataclass(frozen=True)
class ScoringInputs:
    """What a criterion's function scores.

    Attributes:
        batches: calibration batches on the network's device, perhaps shared with other processes.
        labels: class numbers for each batch; empty for a criterion that needs none.
        has_derivatives: whether a derivative of the network's outputs reaches all units.
    """

    network: Network
    structure: Structure
    costs: Costs
    batches: Batches
    scoring: Scoring
    labels: Sequence[Tensor] = ()
    has_derivatives: bool = False


def save_scores(scores: Mapping[str, Tensor], path: Path) -> None:
    """Write as safetensors; the file appears whole or not at all."""
    write_tensors(path, scores)


def score(
    network: Network,
    structure: Structure,
    costs: Costs,
    batches: Batches,
    scoring: Scoring | None = None,
    *,
    labels: Sequence[Tensor] | None = None,
    tell: Callable[[str], None] = logger.warning,
) -> dict[str, Tensor]:
    """Score every unit on ``batches``, which are on the network's device.

    Args:
        costs: of ``structure``; random scores are in proportion to them.
        labels: class numbers for each batch, for the criterion "fisher".
        tell: called with a sentence if the scores are not computed exactly as ``scoring`` says.

    Returns:
        group name -> float64 ``(units,)`` on the CPU; a higher score matters more.

    Raises:
        UserError: the network returns NaN or infinity on the calibration data; labels are missing; no derivative
            reaches some units; the scores carry no signal.
    """
    scoring = scoring or Scoring()
    spec = scoring.spec
    if spec.needs_labels and labels is None:
        raise UserError(f"the criterion {spec.name} needs labels for the calibration data: give --calibration-labels")
    with plain_checkpoints(), _with_derivatives(network, structure, batches, scoring, tell) as (ready, derivatives):
        scores = spec.load()(ScoringInputs(ready, structure, costs, batches, scoring, labels or (), derivatives))
    bad = next((name for name, values in scores.items() if not torch.isfinite(values).all()), None)
    if bad:
        raise UserError(f"scores of {bad} are not finite: the network gives NaN or infinity on the calibration data")
    if not spec.ignores_network:
        first = batches[0] if len(batches) else network.inputs
        arbitrary = ranks_of(batches).broadcast_object(lambda: check_signal(network, structure, first, scores))
        if arbitrary is not None:
            tell(arbitrary)
    return scores


@contextmanager
def _with_derivatives(
    network: Network, structure: Structure, batches: Batches, scoring: Scoring, tell: Callable[[str], None]
) -> Iterator[tuple[Network, bool]]:
    """Yield the network as it is scored, and whether derivatives reach all units.

    A saturated head is scored by squared changes. Derivatives that the network cuts off are restored meanwhile. Masking
    units one by one needs none.

    Raises:
        UserError: the scorer needs derivatives that the network does not give.
    """
    if not scoring.spec.needs_derivatives:
        yield network, False
        return
    if scoring.spec.measures_loss and ranks_of(batches).broadcast_object(lambda: is_saturated(network, batches)):
        tell(
            f"{network.logits} is saturated: probabilities are 0 or 1 on all calibration data, where small changes of "
            "the logits change none; units are scored by the squared change of the logits"
        )
        network = replace(network, head="regression")
    reach = _reach(network, structure, batches, scoring)
    if reach.wrong:
        tell(
            f"derivatives for {names_of(reach.wrong)} are far from what the outputs do, as behind coarse rounding or "
            "where a part of the graph is missing: scores there may be poor"
        )
    if reach.restoring:
        tell(
            "the network cuts its own derivatives off (no_grad, inference_mode or detach): they are "
            "brought back while units are scored"
        )
    with restore_gradients(network.module) if reach.restoring else nullcontext():
        yield network, not reach.cut and reach.reason is None


def check_reach(network: Network, structure: Structure, batches: Batches, scoring: Scoring) -> None:
    """Raise UserError if no derivative reaches some units, as `score` would; it takes two samples and little time."""
    if scoring.spec.needs_derivatives:
        with plain_checkpoints():
            _reach(network, structure, batches, scoring)


def _reach(network: Network, structure: Structure, batches: Batches, scoring: Scoring) -> Reach:
    forth = scoring.criterion == "trajectory" and scoring.scorer == "forward"
    find = find_forward_reach if forth else find_reach
    reach = ranks_of(batches).broadcast_object(lambda: find(network, structure, batches[0]))
    # Passes with gradients may leave tensors on a module that cannot be copied.
    check_copyable(network.module)
    masking = scoring.criterion == "trajectory" and scoring.scorer == "exact"
    if masking or (not reach.cut and reach.reason is None):
        return reach
    what = f"no derivative can be taken ({reach.reason})" if reach.reason else "no derivative reaches its units"
    raise UserError(
        f"{names_of(reach.cut) if reach.cut else network.source.name}: {what}, so they cannot be scored this way; give "
        "--criterion trajectory --scorer exact, which masks each unit and needs none"
    )


def output_factors(
    network: Network, structure: Structure, batches: Batches, scoring: Scoring
) -> tuple[Network, Mapping[str, float]]:
    """Return the network as its derivatives are taken, and the factor of each output in its trajectory loss."""
    samples = _samples_at_once(network, structure, batches)
    # `score` has already logged the notes.
    backward = replace(scoring, criterion="trajectory-obs")
    with plain_checkpoints(), _with_derivatives(network, structure, batches, backward, _nothing) as (ready, _):
        return ready, _factors(ready, structure, chunks(batches[:1], samples)[:1], scoring)


def _nothing(_: str) -> None:
    pass


def score_trajectory_obs(inputs: ScoringInputs) -> dict[str, Tensor]:
    """Score by the trajectory loss after compensation; see `criteria.trajectory_obs`."""
    network, structure, batches, scoring = inputs.network, inputs.structure, inputs.batches, inputs.scoring
    samples = _samples_at_once(network, structure, batches)
    factors = _factors(network, structure, chunks(batches[:1], samples)[:1], scoring)
    settings = LossSettings(factors, scoring.weights(network, structure)[0], scoring.seed)
    with progress_until(_PROBING):
        moments = probe_moments(network, structure, batches, settings, probes=scoring.draws, samples_at_once=samples)
    own = _own_groups(batches, structure.groups, lambda g: (g.units * g.width) ** 3)
    scores = obs_scores(network.module, replace(structure, groups=own), moments)
    return _together(batches, structure.groups, scores)


def _samples_at_once(network: Network, structure: Structure, batches: Batches) -> int:
    """Return the number of samples in a backward pass.

    It is a quarter of a batch, but at least 512 tokens, so that matrices do not get thin. Long samples are limited to
    256 tokens together.
    """
    mask = network.token_mask
    tokens = max(batch[mask].shape[1] for batch in batches) if mask else structure.tokens
    if tokens >= _LONG and structure.groups[0].axis != 1:
        return max(1, _LONG_TOKENS // tokens)
    return max(-(-_size(batches[0]) // _CHUNKS), -(-_CHUNK_TOKENS // max(1, tokens)))


def score_trajectory(inputs: ScoringInputs) -> dict[str, Tensor]:
    """Score by the trajectory loss of masking each unit; see `criteria.trajectory`."""
    network, structure, batches, scoring = inputs.network, inputs.structure, inputs.batches, inputs.scoring
    if scoring.scorer == "forward":
        return _forward(network, structure, batches, scoring)
    exactly = [g for g in structure.groups if scoring.scorer == "exact" or g.kind == "head"]
    some = batches if scoring.scorer == "exact" else batches[: _exact_batches(network, structure, batches)]
    if inputs.has_derivatives:
        factors = _factors(network, structure, batches[:1], scoring)
    else:
        first = chunks(batches[:1], _FACTOR_SAMPLES)[:1]
        factors = _factors(network, structure, first, scoring, masked_totals)
    settings = LossSettings(factors, seed=scoring.seed)
    own = _own_groups(batches, exactly, lambda g: g.units * (len(structure.blocks) - g.layer))
    with progress_until(1.0 if scoring.scorer == "exact" else _MASKING):
        masked = exact_scores(network, structure, own, some, settings)
    scores = _per_sample(_together(batches, exactly, masked), some)
    if scoring.scorer == "sketch":
        sketched = sketch_scores(network, structure, batches, settings, probes=scoring.draws)
        scores = {**_per_sample(sketched, batches), **scores}
    return scores


def _forward(network: Network, structure: Structure, batches: Batches, scoring: Scoring) -> dict[str, Tensor]:
    if scoring.draws < 2:
        raise UserError("the scorer forward compares draws: it needs 2 probes at least")
    draws = Draws(scoring.draws)
    factors = _factors(network, structure, chunks(batches[:1], _FACTOR_SAMPLES)[:1], scoring, _forward_sketch)

    def cost(group: Group) -> float:
        return draws.passes(group) * (len(structure.blocks) - group.layer)

    own = _own_groups(batches, structure.groups, cost)
    settings = LossSettings(factors, seed=scoring.seed)
    scores = forward_scores(network, structure, batches, settings, draws=draws, groups=own)
    return _per_sample(_together(batches, structure.groups, scores), batches)


def _forward_sketch(
    network: Network, structure: Structure, batches: Batches, settings: LossSettings, *, probes: int
) -> dict[str, Tensor]:
    """Estimate scores as `sketch_scores` does, without a backward pass."""
    return forward_scores(network, structure, batches, settings, draws=Draws(probes))


def _own_groups(batches: Batches, groups: Sequence[Group], cost: Callable[[Group], float]) -> tuple[Group, ...]:
    """Return this process's part of ``groups``, which are scored one by one at these costs."""
    return tuple(groups[index] for index in ranks_of(batches).balanced_shard([cost(group) for group in groups]))


def _together(batches: Batches, groups: Sequence[Group], scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the scores of all ``groups`` from those of each process."""
    nothing = {g.name: torch.zeros(g.units, dtype=torch.float64) for g in groups}
    return ranks_of(batches).all_reduce(nothing | dict(scores))


def _factors(
    network: Network, structure: Structure, batches: Batches, scoring: Scoring, sketch: Sketch = sketch_scores
) -> Mapping[str, float]:
    """Return the weight of each output's task term, found on one batch."""
    weight = scoring.weights(network, structure)[1]
    if not weight:
        return {}
    return task_factors(network, structure.without_widths(), batches, weight, scoring.seed, sketch)


def _exact_batches(network: Network, structure: Structure, batches: Batches) -> int:
    """Return how many of the first batches hold enough tokens together."""
    tokens = 0
    for index, batch in enumerate(batches):
        valid = network.valid_tokens(batch)
        tokens += int(valid.sum()) if valid is not None else structure.tokens * _size(batch)
        if tokens >= _EXACT_TOKENS:
            return index + 1
    return len(batches)


def _per_sample(scores: Mapping[str, Tensor], batches: Batches) -> dict[str, Tensor]:
    samples = sum(_size(batch) for batch in batches)
    return {name: values / samples for name, values in scores.items()}


def _size(batch: Mapping[str, Tensor]) -> int:
    return len(next(iter(batch.values())))
