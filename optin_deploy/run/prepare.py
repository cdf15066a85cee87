"""Read and check all inputs of a run, before any long work."""

import importlib.metadata
import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from optin_deploy.compensation.sparsity import can_be_sparse
from optin_deploy.config.recipe import Recipe
from optin_deploy.config.validation import check_options
from optin_deploy.criteria.fisher import check_head
from optin_deploy.criteria.registry import CRITERIA
from optin_deploy.criteria.scoring import Scoring, check_reach
from optin_deploy.data.calibration import Calibration, load_calibration
from optin_deploy.errors import UserError
from optin_deploy.evaluation.dataset import Dataset
from optin_deploy.evaluation.load import load_dataset
from optin_deploy.export.requirements import check_pooling, check_runtimes
from optin_deploy.latency.target import Target, target_of
from optin_deploy.models import checkpoint
from optin_deploy.models.load import load_recipe_network
from optin_deploy.models.validation.adopt import validate
from optin_deploy.models.validation.inputs import check_batches
from optin_deploy.network import Network
from optin_deploy.nn.batches import Batch, batch_size
from optin_deploy.pruning.space import PruningSpace, analyze
from optin_deploy.run.run_directory import compute_fingerprint
from optin_deploy.search.knapsack import check_budget
from optin_deploy.structure.plan import Plan
from optin_deploy.tokens.merging import MergingBlocks
from profilers import usable_cores

VERSION = importlib.metadata.version("optin-deploy")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedRun:
    """The checked inputs of a run.

    Attributes:
        earlier: the plan by which ``network`` was pruned before, empty unless it comes from a checkpoint.
        fingerprint: a hash of everything that decides the results.
    """

    recipe: Recipe
    network: Network
    earlier: Plan
    space: PruningSpace
    calibration: Calibration
    dataset: Dataset | None
    device: torch.device
    fingerprint: str

    @property
    def target(self) -> Target:
        """The runtime and batch size that a latency budget applies to."""
        return target_of(self.recipe)

    def deployed(self, network: Network) -> Network:
        """Return ``network`` as it is exported and measured: with sentence embeddings as output if asked for."""
        return network.with_pooling() if self.recipe.pooling_in_graph else network


def scoring_of(recipe: Recipe) -> Scoring:
    """Return the scoring settings of ``recipe``."""
    return Scoring(recipe.criterion, recipe.scorer, recipe.probes, recipe.task_weight, recipe.seed)


def prepare(recipe: Recipe, network: Network | None = None, calibration: Calibration | None = None) -> PreparedRun:
    """Read and check all inputs of a run.

    Args:
        network: used instead of the model that ``recipe`` names.
        calibration: used instead of the calibration data that ``recipe`` names.

    Raises:
        UserError: an input is wrong; the first problem only.
    """
    check_options(recipe)
    check_runtimes(recipe)
    device = _find_device(recipe.device)
    network, earlier = _load_network(recipe) if network is None else (validate(network), Plan({}))
    space = _find_groups(recipe, network)
    if calibration is None:
        data = _load_calibration(recipe, network)
    else:
        data = calibration
        for batches in (data.batches, data.held_out):
            check_batches(network.module, network.inputs, batches)
    _check_labels(recipe, network, data)
    _check_finite(network, data)
    if recipe.has_budget:
        check_reach(network, space.structure, data.batches, scoring_of(recipe))
    dataset = load_dataset(network, recipe.evaluate, recipe.evaluate_columns) if recipe.evaluate else None
    if dataset is not None and dataset.pairs and calibration is None and not _has_pairs(recipe):
        logger.warning(
            "%s contains pairs of texts, but the calibration texts are single: name both columns with "
            "--calibration-column first+second",
            dataset.name,
        )
    fingerprint = compute_fingerprint(recipe, network.module, data.digest, VERSION)
    prepared = PreparedRun(recipe, network, earlier, space, data, dataset, device, fingerprint)
    _log_inputs(prepared)
    return prepared


def _load_network(recipe: Recipe) -> tuple[Network, Plan]:
    """Load the model of ``recipe``, and the plan by which it was pruned before if it is a checkpoint."""
    network = load_recipe_network(recipe)
    is_checkpoint = checkpoint.is_checkpoint(recipe.model)
    return network, checkpoint.read_plan(Path(recipe.model)) if is_checkpoint else Plan({})


def _find_groups(recipe: Recipe, network: Network) -> PruningSpace:
    """Find the prunable groups, and check that the options of ``recipe`` fit the network."""
    if recipe.has_budget and any(isinstance(module, MergingBlocks) for module in network.module.modules()):
        raise UserError(f"--model {recipe.model}: its tokens merge already; prune the network that it was made of")
    if recipe.pooling_in_graph:
        check_pooling(network)
    space = analyze(network, narrow=recipe.narrows_heads and recipe.has_budget, tokens=recipe.tokens != "off")
    if space.stack is not None and not isinstance(recipe.tokens, str):
        space.stack.check(recipe.tokens)
    if recipe.sparsity is not None and not can_be_sparse(network.module, space.structure):
        raise UserError(
            f"--sparsity {recipe.sparsity}: no linear layer or convolution in the blocks of {network.source.name} has "
            "inputs in groups of four; prune it with --flops instead"
        )
    if recipe.flops is not None:
        check_budget(space.structure, space.costs, recipe.flops)
    return space


def _load_calibration(recipe: Recipe, network: Network) -> Calibration:
    return load_calibration(
        network,
        recipe.calibration,
        column=recipe.calibration_column,
        labels=recipe.calibration_labels,
        samples=recipe.calibration_samples,
        seed=recipe.seed,
    )


def _log_inputs(prepared: PreparedRun) -> None:
    recipe, network, data = prepared.recipe, prepared.network, prepared.calibration
    source, structure = network.source, prepared.space.structure
    inputs = ", ".join(f"{name} {tuple(t.shape)}" for name, t in network.inputs.items())
    logger.info("network: %s %s, weights: %s, inputs: %s", source.library, source.name, network.weights, inputs)
    for group in structure.groups:
        together = f", {group.together}" if group.together else ""
        logger.info("prunable: %s, %s, %d units%s", group.name, group.kind, group.units, together)
    for left in structure.left_dense:
        logger.info("left dense: %s, %s", left.module, left.reason)
    logger.info("dense network: %.4g FLOPs a sample", prepared.space.costs.total)
    held_out = sum(map(batch_size, data.held_out))
    logger.info(
        "calibration: %s, %d samples in %d batches, %d held out", data.source, data.samples, len(data.batches), held_out
    )
    if (dataset := prepared.dataset) is not None:
        logger.info("evaluation: %s, %d samples, %s", dataset.name, dataset.samples, dataset.metric)
    logger.info("pruning on %s", prepared.device)
    logger.info(
        "measuring: %s, batch sizes %s, %d CPU threads",
        ", ".join(recipe.measured_runtimes),
        ", ".join(map(str, recipe.measured_batch_sizes)),
        recipe.threads or usable_cores().physical,
    )


def _has_pairs(recipe: Recipe) -> bool:
    """Return whether calibration inputs are pairs of texts, or tensors, which need no columns."""
    tensors = recipe.calibration is not None and recipe.calibration.suffix.lower() in (".npz", ".safetensors")
    return tensors or "+" in (recipe.calibration_column or "")


def _check_labels(recipe: Recipe, network: Network, calibration: Calibration) -> None:
    if not CRITERIA[recipe.criterion].needs_labels:
        return
    check_head(network)
    if calibration.labels is None:
        raise UserError(
            f"--criterion {recipe.criterion} needs labels for the calibration data: give --calibration-labels"
        )


def _check_finite(network: Network, calibration: Calibration) -> None:
    """Raise UserError unless outputs are finite, for the batch with the largest values and a held-out one."""
    for batch in (calibration.held_out[0], max(calibration.batches, key=_largest_value)):
        with torch.no_grad():
            outputs = network.forward(batch)
        bad = next((name for name, output in outputs.items() if not output.isfinite().all()), None)
        if bad:
            raise UserError(
                f"the network gives NaN or infinity in {bad} on {calibration.source}: check its weights and the samples"
            )


def _largest_value(batch: Batch) -> float:
    return max((float(t.abs().max()) for t in batch.values() if t.is_floating_point()), default=0.0)


def _find_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is present; use --device cpu")
    return torch.device(name)
