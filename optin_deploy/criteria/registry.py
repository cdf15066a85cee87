"""The table of criteria. A new criterion is a row here and a function in a file of its own.

Nothing here imports torch, so that ``--help`` is quick.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Literal, Protocol, cast

if TYPE_CHECKING:
    from torch import Tensor

    from optin_deploy.criteria.scoring import ScoringInputs

Criterion = Literal["trajectory-obs", "trajectory", "fisher", "magnitude", "random"]


class ScoreFunction(Protocol):
    """Returns group name -> float64 scores ``(units,)`` on the CPU; a higher score matters more."""

    def __call__(self, inputs: "ScoringInputs", /) -> "dict[str, Tensor]": ...


@dataclass(frozen=True)
class CriterionSpec:
    """One criterion.

    Attributes:
        name: key on the command line, in recipes and in Python.
        function: ``module:function`` of its `ScoreFunction`.
        source: where it comes from, in a word for ``--help``.
        probes: random probes per batch by default; None if it uses none.
        needs_derivatives: whether it takes derivatives of the network.
        needs_labels: whether it needs labels of the calibration data.
        measures_loss: whether scores are a trajectory loss, with manifold and task parts.
        after_compensation: whether scores predict the loss after compensation. Only these scores are compared with
            the loss of narrower heads and of merged tokens.
        ignores_network: whether scores do not depend on what the network computes.
    """

    name: Criterion
    function: str
    source: str = ""
    probes: int | None = None
    needs_derivatives: bool = False
    needs_labels: bool = False
    measures_loss: bool = False
    after_compensation: bool = False
    ignores_network: bool = False

    @property
    def label(self) -> str:
        """Name in ``--help``."""
        return f"{self.name} ({self.source})" if self.source else self.name

    def load(self) -> ScoreFunction:
        """Import the function and return it."""
        module, _, function = self.function.partition(":")
        return cast(ScoreFunction, getattr(import_module(module), function))


_ROWS = (
    CriterionSpec(
        "trajectory-obs",
        "optin_deploy.criteria.scoring:score_trajectory_obs",
        probes=1,
        needs_derivatives=True,
        measures_loss=True,
        after_compensation=True,
    ),
    CriterionSpec(
        "trajectory",
        "optin_deploy.criteria.scoring:score_trajectory",
        "OPTIN",
        probes=4,
        needs_derivatives=True,
        measures_loss=True,
    ),
    CriterionSpec("fisher", "optin_deploy.criteria.fisher:score_fisher", needs_derivatives=True, needs_labels=True),
    CriterionSpec("magnitude", "optin_deploy.criteria.magnitude:score_magnitude"),
    CriterionSpec("random", "optin_deploy.criteria.random_baseline:score_random", ignores_network=True),
)

CRITERIA: dict[str, CriterionSpec] = {spec.name: spec for spec in _ROWS}
"""All criteria by name; the first is the default."""

LABEL_CRITERIA = tuple(spec.name for spec in _ROWS if spec.needs_labels)
"""Criteria that need labels."""

LOSS_CRITERIA = tuple(spec.name for spec in _ROWS if spec.measures_loss)
"""Criteria whose scores are a trajectory loss."""

COMPENSATED_CRITERIA = tuple(spec.name for spec in _ROWS if spec.after_compensation)
"""Criteria whose scores predict the loss after compensation."""


def list_names(names: tuple[str, ...]) -> str:
    """Return names as words: "a", "a or b", "a, b or c"."""
    return " or ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))
