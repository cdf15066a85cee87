"""Runs of the command line as processes that can be killed, and what they leave in their directories.

A process is forked from one that has made the run once and so has imported everything: it starts in no time, and a
moment drawn at random hits the run and not Python's imports.
"""

import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from optin_deploy.report import read_report
from optin_deploy.utils.atomic_files import is_partial

ARTEFACTS = (
    *("plan.json", "scores.safetensors", "checkpoint/model.safetensors", "checkpoint/optin.json"),
    *("dense.onnx", "pruned.onnx"),
)
# In the order in which a run writes them.
_WRITTEN = (
    *("run.json", "recipe.yaml", "scores.safetensors", "plan.json", "checkpoint", "agreement.json", "pictures.json"),
    *("dense.onnx", "pruned.onnx", "parity.json", "profile.json", "layers.json", "report.json", "report.md"),
)


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code (None where it was killed), what it said on stderr, and its seconds."""

    code: int | None
    err: str
    seconds: float


class Run:
    """``optin-deploy`` with these arguments, under way; its output goes to files in ``logs``."""

    def __init__(self, arguments: Sequence[str], logs: Path, environment: Mapping[str, str] | None = None) -> None:
        self._err = logs / "stderr.txt"
        self._started = time.monotonic()
        self._pid = os.fork()
        if self._pid == 0:
            _become(arguments, logs, environment or {})

    def kill(self) -> None:
        """As ``kill -9`` does; workers that it has started are not told."""
        os.kill(self._pid, signal.SIGKILL)

    def wait(self, seconds: float | None = None) -> Ended | None:
        """The end of the run, or None where that does not come within so many seconds."""
        while True:
            pid, status = os.waitpid(self._pid, os.WNOHANG if seconds is not None else 0)
            spent = time.monotonic() - self._started
            if pid:
                code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
                return Ended(code, self._err.read_text(encoding="utf-8"), spent)
            if seconds is not None and spent > seconds:
                return None
            time.sleep(0.002)


def ended(run: Run) -> Ended:
    """The end of the run, whenever that comes."""
    found = run.wait()
    assert found is not None
    return found


def command_line(arguments: Sequence[str]) -> int:
    """The command line in this process; its exit code."""
    from optin_deploy.cli.main import main

    sys.argv = ["optin-deploy", *arguments]
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def _become(arguments: Sequence[str], logs: Path, environment: Mapping[str, str]) -> None:
    """Be the command line, in a process just forked; does not return."""
    code = 1
    try:
        for number, name in ((1, "stdout.txt"), (2, "stderr.txt")):
            os.dup2(os.open(logs / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.environ.update(environment)
        # Where an earlier run in the process that was forked has found temporary files to go.
        tempfile.tempdir = None
        code = command_line(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def artefacts(directory: Path) -> dict[str, bytes]:
    """What has to be the same, byte for byte, however often a run was killed."""
    return {name: (directory / name).read_bytes() for name in ARTEFACTS}


def last_written(directory: Path) -> str:
    """The last of what a run writes that is there; "nothing" at first."""
    return next((name for name in reversed(_WRITTEN) if (directory / name).exists()), "nothing")


def partial(directory: Path) -> list[str]:
    """Names of what was being written when a run ended."""
    return [path.name for path in directory.rglob("*") if is_partial(path)] if directory.is_dir() else []


def faults(end: Ended, directory: Path, reference: Mapping[str, bytes]) -> list[str]:
    """What is wrong with a run that should be done: nothing, if all is well."""
    if end.code != 0:
        return [f"exit code {end.code}: {(end.err.splitlines() or ['nothing on stderr'])[-1]}"]
    found = artefacts(directory)
    wrong = [f"{name} differs" for name, content in reference.items() if found[name] != content]
    wrong += [f"{name} is left over" for name in partial(directory)]
    return wrong + [f"gate {gate.name} failed" for gate in read_report(directory).gates if not gate.passed]


def one_line(end: Ended) -> list[str]:
    """What is wrong with a run that should have been refused: exit code 2, and one line behind those of its stages."""
    lines = [line for line in end.err.splitlines() if not line.endswith(" s")]
    wrong = [] if end.code == 2 else [f"exit code {end.code}"]
    return wrong if len(lines) == 1 and lines[0].startswith("error: ") else [*wrong, f"said {lines}"]
