"""Keyword options that `prune_export` and `sweep` share."""

from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from rich.console import Console

from optin_deploy.data.calibration import Calibration
from optin_deploy.network import Network
from optin_deploy.utils.progress import Stages


class RunOptions(TypedDict, total=False):
    """Options of `prune_export` and `sweep`.

    Attributes:
        output: directory of the results. A directory of the same run or sweep is continued. By default
            ``runs/MODEL-flopsF-HASH`` or ``runs/MODEL-sweep-HASH``.
        network: used instead of the model that the recipe names, for a module of your own.
        calibration: used instead of the calibration data that the recipe names.
        command: the command that repeats the run, for the report; by default derived from the other arguments.
        console: shows the progress; the standard error stream by default.
        quiet: show no progress.
    """

    output: Path | None
    network: Network | None
    calibration: Calibration | None
    command: str | None
    console: Console | None
    quiet: bool


@dataclass(frozen=True)
class RunArguments:
    """`RunOptions` with their defaults."""

    output: Path | None = None
    network: Network | None = None
    calibration: Calibration | None = None
    command: str | None = None
    console: Console | None = None
    quiet: bool = False

    def show_stages(self) -> Stages:
        """Return the progress display of a run."""
        return Stages(self.console or Console(stderr=True), quiet=self.quiet)
