"""The context and the result of a run."""

from dataclasses import dataclass
from pathlib import Path

from optin_deploy.config.recipe import Recipe
from optin_deploy.distributed.ranks import SINGLE_PROCESS, Ranks
from optin_deploy.network import Network
from optin_deploy.pruning.space import PruningSpace
from optin_deploy.run.prepare import PreparedRun
from optin_deploy.run.run_directory import CHECKPOINT
from optin_deploy.structure.plan import Plan
from optin_deploy.utils.progress import Stages


@dataclass(frozen=True)
class RunContext:
    """The inputs, directory and progress display that all stages of a run share.

    Attributes:
        prepared: the inputs.
        directory: the run directory; only the main process reads and writes it.
        stages: the progress display.
        ranks: the processes that prune together.
    """

    prepared: PreparedRun
    directory: Path
    stages: Stages
    ranks: Ranks = SINGLE_PROCESS

    @property
    def recipe(self) -> Recipe:
        """The options."""
        return self.prepared.recipe

    @property
    def network(self) -> Network:
        """The dense network."""
        return self.prepared.network

    @property
    def space(self) -> PruningSpace:
        """The prunable groups and their costs."""
        return self.prepared.space

    @property
    def checkpoint(self) -> Path:
        """The directory of the pruned network's checkpoint."""
        return self.directory / CHECKPOINT


@dataclass(frozen=True)
class PrunedRun:
    """The result of pruning: the plan, in units of the dense network, and the smaller network, on the CPU."""

    plan: Plan
    network: Network
