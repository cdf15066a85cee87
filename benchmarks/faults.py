"""Faults on purpose: runs that are killed, that run out of disk, that may not write, and two at once in one directory.

    python benchmarks/faults.py --part kills
    python benchmarks/faults.py --part disk,read-only,two

A small network (two blocks of timm's test_vit at 32 pixels, random weights) is pruned, exported and measured in full.
Its artefacts are those of a run in a new interpreter that nothing disturbs; a run counts only if its plan, scores,
weights and ONNX files are the same byte for byte. The disk is a tmpfs,
which takes root to mount: without it that part is skipped. It
is no test, because it takes minutes. Writes ``results/DEVICE/faults.json``; exit code 1 when a case fails.
"""

import json
import random
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import common
import faults_disk
import torch
from faults_process import Ended, Run, artefacts, command_line, ended, faults, last_written, one_line, partial
from rich.console import Console
from rich.table import Table

from optin_deploy.models import checkpoint, timm_models
from optin_deploy.network import Source
from optin_deploy.structure.plan import Plan

PARTS = ("kills", "disk", "read-only", "two")
COMMAND = (
    *("prune-export", "--flops", "0.6", "--calibration-samples", "16"),
    *("--runtimes", "ort-cpu", "--batch-sizes", "1", "--profile-seconds", "0.3"),
    *("--threads", "1", "--device", "cpu"),
)


@dataclass(frozen=True)
class Case:
    """One case: what was done to the run, what it had when that happened, and what was wrong at the end."""

    name: str
    when: str
    wrong: list[str] = field(default_factory=list)


def main() -> None:
    arguments = common.parser(__doc__.splitlines()[0])
    arguments.add_argument("--part", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    arguments.add_argument("--kills", type=int, default=30, help="runs that are killed")
    arguments.add_argument("--seed", type=int, default=0, help="of the moments")
    given = arguments.parse_args()
    unknown = set(given.part.split(",")) - set(PARTS)
    if unknown:
        sys.exit(f"--part {given.part}: choose from {', '.join(PARTS)}")
    with TemporaryDirectory(prefix="optin-faults-") as name:
        folder = Path(name)
        reference = _reference(folder)
        _warm_up(folder)
        took = _undisturbed(folder, reference)
        made: dict[str, Callable[[], list[Case]]] = {
            "kills": lambda: _kills(folder, reference, took, given.kills, given.seed),
            "disk": lambda: _disk(folder, reference),
            "read-only": lambda: _read_only(folder),
            "two": lambda: _two(folder, reference),
        }
        cases = {part: made[part]() for part in PARTS if part in given.part.split(",")}
    for part, found in cases.items():
        _show(part, found)
    path = _write(cases)
    print(f"written to {path}")
    if any(case.wrong for found in cases.values() for case in found):
        sys.exit(1)


def _command(network: Path, output: Path) -> list[str]:
    return [*COMMAND, "--model", str(network), "--output", str(output)]


def _save_network(path: Path) -> None:
    source = Source("timm", "test_vit", {"img_size": 32, "num_classes": 10, "depth": 2})
    torch.manual_seed(0)
    checkpoint.save(timm_models.network_of(timm_models.build(source), source, "random"), Plan({}), path)


def _warm_up(folder: Path) -> None:
    torch.set_num_threads(1)
    code = command_line([*_command(folder / "network", folder / "warm-up"), "--quiet"])
    if code != 0:
        sys.exit(f"a run that nothing disturbs ends with {code}")


def _reference(folder: Path) -> dict[str, bytes]:
    """The artefacts of a run in an interpreter of its own."""
    _save_network(folder / "network")
    command = [sys.executable, "-m", "optin_deploy", *_command(folder / "network", folder / "reference"), "--quiet"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return artefacts(folder / "reference")


def _run(folder: Path, output: Path, environment: Mapping[str, str] | None = None) -> Run:
    return Run(_command(folder / "network", output), folder, environment)


def _undisturbed(folder: Path, reference: Mapping[str, bytes]) -> float:
    """Seconds that a forked run takes; ends the program when that gives something else."""
    end = ended(_run(folder, folder / "undisturbed"))
    wrong = faults(end, folder / "undisturbed", reference)
    if wrong:
        sys.exit(f"a run that nothing disturbs differs from another one: {'; '.join(wrong)}\n{end.err}")
    print(f"a run takes {end.seconds:.1f} s", flush=True)
    return end.seconds


def _kills(folder: Path, reference: Mapping[str, bytes], seconds: float, count: int, seed: int) -> list[Case]:
    """Runs killed at moments drawn evenly from the time that a run takes, a third of them twice; then they go on."""
    draw, cases = random.Random(seed), []
    while len(cases) < count:
        output = folder / f"killed-{len(cases)}"
        moments = [_killed(folder, output, draw.uniform(0, seconds)) for _ in range(1 if draw.random() < 2 / 3 else 2)]
        if moments[0] is None:
            print("a run was done before it could be killed: another moment is drawn", flush=True)
            output.rename(folder / f"done-{random.getrandbits(32):08x}")
            continue
        end = ended(_run(folder, output))
        told = ", again ".join(moment for moment in moments if moment is not None)
        cases.append(Case(f"kill -9 {len(cases) + 1}", told, faults(end, output, reference)))
        print(f"{cases[-1].name}, {told}: {'; '.join(cases[-1].wrong) or 'the same'}", flush=True)
    return cases


def _killed(folder: Path, output: Path, seconds: float) -> str | None:
    """Start the run, kill it after so many seconds; what it had then, None where it was done before."""
    run = _run(folder, output)
    if run.wait(seconds) is not None:
        return None
    run.kill()
    ended(run)
    left = partial(output)
    return f"at {seconds:.2f} s, behind {last_written(output)}{f', writing {left[0]}' if left else ''}"


def _disk(folder: Path, reference: Mapping[str, bytes]) -> list[Case]:
    """Runs on disks of several sizes that are too small; then there is room, and they are given again."""
    if not faults_disk.can_mount():
        print("disk: skipped, a tmpfs takes root to mount")
        return []
    whole = sum(file.stat().st_size for file in (folder / "undisturbed").rglob("*") if file.is_file())
    cases = []
    for number, part in enumerate((0.002, 0.05, 0.3, 0.5, 0.7, 0.9)):
        with faults_disk.tmpfs(folder / f"disk-{number}", int(part * whole)) as disk:
            end = ended(_run(folder, disk / "run"))
            wrong = one_line(end) + [f"{name} is left over" for name in partial(disk)]
            behind = last_written(disk / "run")
            faults_disk.resize(disk, 4 * whole)
            wrong += faults(ended(_run(folder, disk / "run")), disk / "run", reference)
            cases.append(Case(f"full at {part * whole / 2**20:.2f} MiB", f"behind {behind}", wrong))
            print(f"{cases[-1].name}, {cases[-1].when}: {'; '.join(wrong) or 'the same'}\n  {_said(end)}", flush=True)
    return [*cases, _full_temporary(folder, reference)]


def _full_temporary(folder: Path, reference: Mapping[str, bytes]) -> Case:
    """The folder for temporary files has room for a small one: where there is none at all, Python takes another."""
    with faults_disk.tmpfs(folder / "temporary", 0) as disk:
        end = ended(_run(folder, folder / "no-temporary", {"TMPDIR": str(disk)}))
        wrong = one_line(end)
    wrong += faults(ended(_run(folder, folder / "no-temporary")), folder / "no-temporary", reference)
    print(f"full TMPDIR: {'; '.join(wrong) or 'the same'}\n  {_said(end)}", flush=True)
    return Case("full TMPDIR", "", wrong)


def _said(end: Ended) -> str:
    return (end.err.splitlines() or ["nothing"])[-1]


def _read_only(folder: Path) -> list[Case]:
    """A directory that cannot be written."""
    with faults_disk.read_only(folder / "read-only") as place:
        if place is None:
            print("read-only: skipped, root may write everywhere and no tmpfs can be mounted")
            return []
        end = ended(_run(folder, place / "run"))
        wrong = one_line(end) + ([f"{place} is not empty"] if any(place.iterdir()) else [])
    print(f"read-only: {'; '.join(wrong) or 'refused'}\n  {_said(end)}", flush=True)
    return [Case("read-only output", "at the start", wrong)]


def _two(folder: Path, reference: Mapping[str, bytes]) -> list[Case]:
    """A second run in the directory of one that is at work."""
    output, logs = folder / "two", folder / "second"
    logs.mkdir()
    first = _run(folder, output)
    while not (output / "run.json").exists():
        if first.wait(0) is not None:
            sys.exit("the first of two runs was done before it held its directory")
    second = ended(Run(_command(folder / "network", output), logs))
    wrong = one_line(second)
    if "another run is at work there" not in second.err:
        wrong.append(f"the second said {_said(second)}")
    wrong += faults(ended(first), output, reference)
    print(f"two at once: {'; '.join(wrong) or 'one refused, the other the same'}\n  {_said(second)}", flush=True)
    return [Case("two at once", "while the first scores", wrong)]


def _show(part: str, cases: list[Case]) -> None:
    table = Table(title=part, title_justify="left")
    for column in ("case", "when", "result"):
        table.add_column(column, overflow="fold")
    for case in cases:
        table.add_row(case.name, case.when, "; ".join(case.wrong) or "same artefacts, byte for byte")
    Console(width=120).print(table)
    print(f"{part}: {sum(not case.wrong for case in cases)} of {len(cases)}")


def _write(cases: Mapping[str, list[Case]]) -> Path:
    """With those parts of an earlier file that were not made again."""
    path = common.RESULTS / common.device_name() / "faults.json"
    before = json.loads(path.read_text(encoding="utf-8"))["figures"] if path.is_file() else {}
    made = {
        part: {
            "cases": len(found),
            "passed": sum(not case.wrong for case in found),
            "rows": [asdict(case) for case in found],
        }
        for part, found in cases.items()
    }
    figures = {"command": "optin-deploy " + " ".join(COMMAND), **before, **made}
    return common.write_results("faults", figures)


if __name__ == "__main__":
    main()
