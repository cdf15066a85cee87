"""How a field of `Recipe` appears on the command line, and with which other options it has an effect."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field
from pydantic_core import PydanticUndefined

from optin_deploy.criteria.registry import CRITERIA, LABEL_CRITERIA, LOSS_CRITERIA, list_names
from profilers import ENGINE_RUNTIMES

if TYPE_CHECKING:
    from optin_deploy.config.recipe import Recipe

Command = Literal["prune-export", "sweep", "export", "profile"]
RUNS: tuple[Command, ...] = ("prune-export", "sweep")
RUNS_AND_EXPORT: tuple[Command, ...] = (*RUNS, "export")
RUNS_AND_PROFILE: tuple[Command, ...] = (*RUNS, "profile")
ALL: tuple[Command, ...] = (*RUNS_AND_EXPORT, "profile")


class Panel(StrEnum):
    """Headings in ``--help``, in their order."""

    MODEL = "Model"
    PRUNE = "Pruning"
    DATA = "Calibration and evaluation"
    EXPORT = "Export"
    MEASURE = "Measuring"


@dataclass(frozen=True)
class Condition:
    """A condition on other options: those that fulfil it, in words, and whether a recipe does."""

    words: str
    holds: Callable[["Recipe"], bool]


class Needs:
    """The conditions that options need."""

    BUDGET = Condition("--flops, --latency or --latency-ms", lambda recipe: recipe.has_budget)
    TABLE = Condition("--latency, --latency-ms or --align auto", lambda recipe: recipe.needs_table)
    ENGINES = Condition(
        f"--runtimes {' or '.join(sorted(ENGINE_RUNTIMES))}",
        lambda recipe: any(runtime in ENGINE_RUNTIMES for runtime in recipe.measured_runtimes),
    )
    OPTIN = Condition("--criterion trajectory", lambda recipe: recipe.criterion == "trajectory")
    TRAJECTORY = Condition(f"--criterion {list_names(LOSS_CRITERIA)}", lambda recipe: recipe.criterion in LOSS_CRITERIA)
    PROBES = Condition(
        "random probes",
        lambda recipe: CRITERIA[recipe.criterion].probes is not None and recipe.scorer != "exact",
    )
    LABELS = Condition(f"--criterion {list_names(LABEL_CRITERIA)}", lambda recipe: recipe.criterion in LABEL_CRITERIA)
    COMPENSATION = Condition("--compensate", lambda recipe: recipe.compensate)
    TOKENS_AUTO = Condition("--tokens auto", lambda recipe: recipe.tokens == "auto")


@dataclass(frozen=True)
class Option:
    """A field of `Recipe` on the command line.

    Attributes:
        panel: heading in ``--help``.
        text: what the option does, one phrase without a full stop.
        default: the default in words; None shows that of the field.
        commands: commands that take the option.
        needs: conditions without which a value other than the default is refused.
        several: whether the option takes comma-separated values.
        swept: whether ``sweep`` takes comma-separated values, one run each.
        profile: how ``profile`` shows the option, if not in the same way.
    """

    panel: Panel
    text: str
    default: str | None = None
    commands: tuple[Command, ...] = RUNS
    needs: tuple[Condition, ...] = ()
    several: bool = False
    swept: bool = False
    profile: "Option | None" = None

    def of(self, command: Command) -> "Option | None":
        """Return the option of a command; None if the command does not take it."""
        if command == "profile" and self.profile is not None:
            return self.profile
        if command == "sweep" and self.swept:
            return replace(self, text=f"{self.text}; one run per comma-separated value", several=True)
        return self if command in self.commands else None

    def field(self, default: object = PydanticUndefined, **constraints: Any) -> Any:
        """Return the field of `Recipe`, with pydantic's constraints of its value."""
        return Field(default, json_schema_extra=self, **constraints)

    def __call__(self, schema: dict[str, Any]) -> None:
        """Describe the field in a JSON schema."""
        schema["description"] = self.text
