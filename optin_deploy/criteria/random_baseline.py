"""Random scores: the baseline for every criterion."""

import torch
from torch import Tensor

from optin_deploy.criteria.scoring import ScoringInputs
from optin_deploy.search.costs import Costs
from optin_deploy.structure.groups import Structure


def score_random(inputs: ScoringInputs) -> dict[str, Tensor]:
    """Return `random_scores` of the structure."""
    return random_scores(inputs.structure, inputs.costs, inputs.scoring.seed)


def random_scores(structure: Structure, costs: Costs, seed: int) -> dict[str, Tensor]:
    """Uniform draws from [0, 1) times what the unit costs: group name -> float64 ``(units,)`` on the CPU.

    The knapsack of `search.search` keeps the units with the most score per cost. Here that is the bare draw, whatever
    the group, so that every group keeps about the same share of its units. Draws without the cost would favour groups
    of cheap units.

    Args:
        costs: of the network that ``structure`` describes.
        seed: the same seed gives the same scores.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        group.name: torch.rand(group.units, generator=generator, dtype=torch.float64) * costs.per_unit[group.name]
        for group in structure.groups
    }
