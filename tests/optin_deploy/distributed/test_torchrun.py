"""Runs that torchrun has started, and what becomes of them when a process ends."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from time import monotonic, sleep

import psutil
import pytest
import torch
import torch.distributed as dist
import typer
from safetensors.torch import load_file
from tiny_models import save_bert, save_lines, texts

from optin_deploy.cli.main import main
from optin_deploy.criteria.scoring import Scoring
from optin_deploy.data.calibration import load_calibration
from optin_deploy.distributed import torchrun
from optin_deploy.distributed.torchrun import RankLostError, launched_ranks, process_group, quiet_unless_main
from optin_deploy.errors import GateError
from optin_deploy.models.load import load_network
from optin_deploy.pruning.pruner import prune

pytestmark = pytest.mark.slow


_SECONDS = 600
# Many probes keep the processes scoring for as long as it takes to end one of them.
_PROBES = 60


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "optin_deploy"]
    command += ["prune-export", "--model", str(folder / "model"), "--flops", "0.6", "--output", str(folder / "run")]
    command += ["--calibration", str(folder / "texts.txt"), "--align", "1", "--probes", str(_PROBES), *options]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )


def end_rank(run: subprocess.Popen[str], rank: int, when: Path) -> None:
    """Kill a process of ``run`` as soon as there is a file."""
    until = monotonic() + _SECONDS
    while not when.exists() and run.poll() is None and monotonic() < until:
        sleep(0.01)
    for process in psutil.Process(run.pid).children():
        if process.environ().get("RANK") == str(rank):
            process.kill()


def told(errors: str) -> list[str]:
    """Our lines among what torchrun writes."""
    return [line for line in errors.splitlines() if line.startswith("error:")]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the environment of processes")
def test_a_run_of_two_processes_goes_on_after_one_was_killed(tmp_path: Path) -> None:
    save_bert(tmp_path / "model", num_hidden_layers=1)
    save_lines(tmp_path / "texts.txt", texts(160))
    run = tmp_path / "run"
    quick = ("--runtimes", "ort-cpu", "--batch-sizes", "1", "--profile-seconds", "0.2", "--threads", "1")

    first = start(tmp_path, *quick)
    end_rank(first, 1, run / "run.json")
    _, errors = first.communicate(timeout=_SECONDS)
    assert first.returncode != 0
    # The other process may not have heard yet that there is a directory.
    (line,) = told(errors)
    assert re.fullmatch(r"error: a process of 2 ended during '(load and check|score)'.* same command again", line)
    assert not (run / "plan.json").exists()

    second = start(tmp_path, *quick)
    output, errors = second.communicate(timeout=_SECONDS)
    assert second.returncode == 0, errors
    assert output.count("Everything is in") == 1 and errors.count("slice and compensate:") == 1

    network = load_network(str(tmp_path / "model"))
    calibration = load_calibration(network, tmp_path / "texts.txt")
    alone = prune(network, calibration.batches, 0.6, align=1, scoring=Scoring(probes=_PROBES))
    for name, scores in load_file(run / "scores.safetensors").items():
        torch.testing.assert_close(scores, alone.scores[name], rtol=1e-6, atol=0)
    kept = json.loads((run / "plan.json").read_text())["kept"]
    assert kept == {name: list(units) for name, units in alone.plan.kept.items()}
    weights = alone.network.module.state_dict()
    for name, tensor in load_file(run / "checkpoint" / "model.safetensors").items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-5, atol=1e-6)


def as_rank(patch: pytest.MonkeyPatch, rank: int, world: int = 2) -> None:
    for name, value in (("TORCHELASTIC_RUN_ID", "none"), ("RANK", str(rank)), ("WORLD_SIZE", str(world))):
        patch.setenv(name, value)
    patch.setattr(torchrun, "_PRINT_SECONDS", 0.01)


def test_numbers_of_other_launchers_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert launched_ranks() == (0, 1)
    with process_group(lambda: "score", cuda=False) as ranks:
        assert (ranks.rank, ranks.world, dist.is_initialized()) == (0, 1, False)
    as_rank(monkeypatch, 1)
    assert launched_ranks() == (1, 2)


@pytest.mark.parametrize("rank", [None, "a"])
def test_a_launcher_that_gives_no_numbers_is_told(
    rank: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    as_rank(monkeypatch, 0)
    monkeypatch.delenv("RANK") if rank is None else monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(sys, "argv", ["optin-deploy", "export", "--model", "m"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert re.fullmatch("error: .*TORCHELASTIC_RUN_ID.*RANK.*WORLD_SIZE.*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    "arguments",
    [["sweep", "--model", "m", "--flops", "0.5"], ["export", "--model", "m"], ["profile", "--model", "m"]],
    ids=lambda arguments: arguments[0],
)
def test_other_commands_are_refused(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in (0, 1):
        as_rank(monkeypatch, rank)
        monkeypatch.setattr(sys, "argv", ["optin-deploy", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        told = capsys.readouterr().err
        assert re.fullmatch("" if rank else f"error: {arguments[0]} .*torchrun.*\n", told)


def test_wrong_options_are_told_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (0, 1):
        as_rank(monkeypatch, rank)
        monkeypatch.setattr(sys, "argv", ["optin-deploy", "prune-export", "--nothing"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert ("No such option" in capsys.readouterr().err) == (rank == 0)


@pytest.mark.parametrize("error", [RankLostError("rank 0 ended"), ZeroDivisionError()], ids=repr)
def test_what_only_one_process_knows_is_told_by_it(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(monkeypatch, 1)
    with pytest.raises(type(error)), quiet_unless_main():
        raise error
    with pytest.raises(SystemExit), quiet_unless_main():
        raise typer.Abort


def test_a_gate_is_told_once_and_ends_all_with_3(monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(monkeypatch, 1)
    with pytest.raises(SystemExit) as ended, quiet_unless_main():
        raise GateError("not what was promised")
    assert ended.value.code == 3


def test_one_process_prints_the_error(tmp_path: Path) -> None:
    first, second = (dist.FileStore(str(tmp_path / "store"), 2) for _ in range(2))
    assert [torchrun._claim_message(store) for store in (first, second, first)] == [True, False, False]
