"""A run whose inputs have all been read and checked, before any long work."""

import importlib.metadata
import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from optin_deploy.compensation.sparsity import can_be_sparse
from optin_deploy.config.recipe import Recipe, check_options
from optin_deploy.criteria.fisher import check_head
from optin_deploy.criteria.scoring import Scoring, check_reach
from optin_deploy.data.calibration import Calibration, load_calibration
from optin_deploy.errors import UserError
from optin_deploy.evaluation.images import Dataset, load_dataset
from optin_deploy.export.requirements import check_pooling, check_runtimes
from optin_deploy.latency.tables import Target, target_of
from optin_deploy.models import checkpoint
from optin_deploy.models.intake import validate
from optin_deploy.models.intake.inputs import check_batches
from optin_deploy.models.load import load_network
from optin_deploy.network import Network
from optin_deploy.pruning.pruner import Anatomy, examine
from optin_deploy.run import run_directory
from optin_deploy.search.knapsack import check_budget
from optin_deploy.structure.plan import Plan
from optin_deploy.tokens.merging import MergingBlocks
from profilers import (
    usable_cores,
)

VERSION = importlib.metadata.version("optin-deploy")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A run whose inputs have all been read and checked."""

    recipe: Recipe
    network: Network
    earlier: Plan
    anatomy: Anatomy
    calibration: Calibration
    dataset: Dataset | None
    device: torch.device
    fingerprint: str

    @property
    def target(self) -> Target:
        """Where a latency budget holds."""
        return target_of(self.recipe)

    def served(self, network: Network) -> Network:
        """``network`` as it is exported and measured: with sentence embeddings for its output where asked for."""
        return network.with_pooling() if self.recipe.pooling_in_graph else network


def scoring_of(recipe: Recipe) -> Scoring:
    """How a run by ``recipe`` scores units."""
    return Scoring(recipe.criterion, recipe.scorer, recipe.probes, recipe.task_weight, recipe.seed)


def prepare(recipe: Recipe, network: Network | None = None, calibration: Calibration | None = None) -> Job:
    """Read and check all inputs of a run; UserError for the first thing that is wrong."""
    check_options(recipe)
    check_runtimes(recipe)
    device = _device(recipe.device)
    earlier = Plan({})
    if network is not None:
        network = validate(network)
    else:
        network = load_network(
            recipe.model,
            weights=recipe.weights,
            image_size=recipe.image_size,
            sequence_length=recipe.sequence_length,
            max_text_length=recipe.max_text_length,
            seed=recipe.seed,
        )
        if checkpoint.is_checkpoint(recipe.model):
            earlier = checkpoint.read_plan(Path(recipe.model))
    if recipe.has_budget and any(isinstance(part, MergingBlocks) for part in network.module.modules()):
        raise UserError(f"--model {recipe.model}: its tokens merge already; prune the network that it was made of")
    if recipe.pooling_in_graph:
        check_pooling(network)
    anatomy = examine(network, narrow=recipe.narrows_heads and recipe.has_budget, tokens=recipe.tokens != "off")
    if anatomy.stack is not None and not isinstance(recipe.tokens, str):
        anatomy.stack.check(recipe.tokens)
    if recipe.sparsity is not None and not can_be_sparse(network.module, anatomy.structure):
        raise UserError(
            f"--sparsity {recipe.sparsity}: no linear layer or convolution in the blocks of {network.source.name} has "
            "inputs in groups of four; prune it with --flops instead"
        )
    if recipe.flops is not None:
        check_budget(anatomy.structure, anatomy.costs, recipe.flops)
    if calibration is not None:
        for batches in (calibration.batches, calibration.held_out):
            check_batches(network.module, network.inputs, batches)
    given = calibration is not None
    calibration = calibration or load_calibration(
        network,
        recipe.calibration,
        column=recipe.calibration_column,
        labels=recipe.calibration_labels,
        samples=recipe.calibration_samples,
        seed=recipe.seed,
    )
    _check_labels(recipe, network, calibration)
    _check_finite(network, calibration)
    if recipe.has_budget:
        check_reach(network, anatomy.structure, calibration.batches, scoring_of(recipe))
    dataset = load_dataset(network, recipe.evaluate, recipe.evaluate_columns) if recipe.evaluate else None
    if dataset is not None and dataset.pairs and not given and not _has_pairs(recipe):
        logger.warning(
            "%s holds pairs of texts, the calibration texts are single ones: give pairs, with --calibration-column "
            "first+second",
            dataset.name,
        )
    run = run_directory.fingerprint(recipe, network.module, calibration.digest, VERSION)
    job = Job(recipe, network, earlier, anatomy, calibration, dataset, device, run)
    _tell(job)
    return job


def _tell(job: Job) -> None:
    """Log what was found."""
    recipe, source, structure, data = job.recipe, job.network.source, job.anatomy.structure, job.calibration
    inputs = ", ".join(f"{name} {tuple(t.shape)}" for name, t in job.network.inputs.items())
    logger.info("network: %s %s, weights: %s, inputs: %s", source.library, source.name, job.network.weights, inputs)
    for group in structure.groups:
        together = f", {group.together}" if group.together else ""
        logger.info("prunable: %s, %s, %d units%s", group.name, group.kind, group.units, together)
    for left in structure.left_dense:
        logger.info("left dense: %s, %s", left.module, left.reason)
    logger.info("dense network: %.4g FLOPs a sample", job.anatomy.costs.total)
    drawn, held_out = len(data.batches), sum(len(next(iter(batch.values()))) for batch in data.held_out)
    logger.info("calibration: %s, %d samples in %d batches, %d held out", data.source, data.samples, drawn, held_out)
    if job.dataset is not None:
        logger.info("evaluation: %s, %d samples, %s", job.dataset.name, job.dataset.samples, job.dataset.metric)
    logger.info("pruning on %s", job.device)
    logger.info(
        "measuring: %s, batch sizes %s, %d CPU threads",
        ", ".join(recipe.measured_runtimes),
        ", ".join(map(str, recipe.measured_batch_sizes)),
        recipe.threads or usable_cores().physical,
    )


def _has_pairs(recipe: Recipe) -> bool:
    """Whether calibration inputs are pairs of texts, or ready tensors."""
    tensors = recipe.calibration is not None and recipe.calibration.suffix.lower() in (".npz", ".safetensors")
    return tensors or "+" in (recipe.calibration_column or "")


def _check_labels(recipe: Recipe, network: Network, calibration: Calibration) -> None:
    if recipe.criterion != "fisher":
        return
    check_head(network)
    if calibration.labels is None:
        raise UserError("--criterion fisher needs labels for the calibration data: give --calibration-labels")


def _check_finite(network: Network, calibration: Calibration) -> None:
    """Raise UserError where the outputs for samples with the largest values, or some others, are not finite."""

    def largest(batch: Mapping[str, Tensor]) -> float:
        return max((float(t.abs().max()) for t in batch.values() if t.is_floating_point()), default=0.0)

    for batch in (calibration.held_out[0], max(calibration.batches, key=largest)):
        with torch.no_grad():
            outputs = network.forward(batch)
        bad = next((name for name, output in outputs.items() if not output.isfinite().all()), None)
        if bad:
            raise UserError(
                f"the network gives NaN or infinity in {bad} on {calibration.source}: check its weights and the samples"
            )


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is present; use --device cpu")
    return torch.device(name)
