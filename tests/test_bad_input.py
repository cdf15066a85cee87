"""Hostile, damaged and odd input of every kind that is read: one line, exit code 2, nothing written, or it works."""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import bad_input
import huggingface_hub.constants
import pytest
import torch
from bad_input import Material, Row
from tiny_models import save_bert, save_images, save_shallow

from optin_deploy.cli.main import main
from optin_deploy.config.recipe import Recipe
from optin_deploy.models.load import load_network
from optin_deploy.run.pipeline import prune_export

pytestmark = pytest.mark.slow


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module", autouse=True)
def offline() -> Iterator[None]:
    """A machine without GPU and hub."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory, offline: None) -> Material:
    """Good input, from which each row makes what it needs: networks, pictures, and the directory of a finished run."""
    folder = tmp_path_factory.mktemp("material")
    save_shallow(folder / "shallow")
    save_bert(folder / "bert")
    save_images(folder / "images", 9)
    bad_input.save_text_checkpoint(load_network(str(folder / "bert"), sequence_length=12), folder / "small-bert")
    with pytest.MonkeyPatch.context() as patch:
        # As its command line will say it.
        patch.chdir(folder)
        recipe = Recipe(model="shallow", calibration=Path("images"), **bad_input.QUICK)
        prune_export(recipe, output=Path("run"), quiet=True)
    return Material(folder)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and a cache of its own."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "no-cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here" / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def run(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line in this process: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["optin-deploy", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        return int(caught.value.code or 0), *capsys.readouterr()

    return call


def contents(directory: Path) -> dict[str, object]:
    """Every file below ``directory``: what is in it, and when it was changed."""
    return {
        os.fsdecode(path): (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in directory.rglob("*")
    }


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in bad_input.ROWS])
def test_bad_input_is_one_line_and_leaves_nothing(here: Path, material: Material, run: Run, row: Row) -> None:
    arguments = row.make(material)
    before = contents(here)
    code, out, err = run(*arguments)
    assert (code, out) == (2, ""), err
    assert re.fullmatch(r"error: [^\n]+\n", err), err
    assert re.search(row.told, err), err
    assert "Traceback" not in err
    assert len(err) < 2000
    assert contents(here) == before


def test_every_kind_of_bad_input_has_a_name_of_its_own() -> None:
    names = [row.name for row in bad_input.ROWS]
    assert len(names) == len(set(names))


@pytest.mark.usefixtures("without_layers")
@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in bad_input.ODD])
def test_odd_input_works(here: Path, material: Material, run: Run, row: Row) -> None:
    code, _, err = run(*row.make(material), "--quiet", "--output", "out")
    assert (code, err) == (0, "")
    gates = json.loads((here / "out" / "report.json").read_text(encoding="utf-8"))["gates"]
    assert gates
    assert all(gate["passed"] for gate in gates)
    assert not (here / bad_input.MARK).exists()


def test_rows_that_bring_code_would_be_seen_to_run_it(here: Path, tmp_path: Path) -> None:
    # The rows above compare all files before and after: this is what they would find.
    bad_input.save_pickle(tmp_path / "w.pt")
    torch.load(tmp_path / "w.pt", weights_only=False)
    assert (here / bad_input.MARK).exists()
    assert sum(row.runs_code for row in (*bad_input.ROWS, *bad_input.ODD)) >= 8


def test_a_full_disk_behind_stdout_is_told(
    here: Path, material: Material, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        code, _, err = run("report", material.folder / "run", "--json")
        monkeypatch.undo()
        assert code == 2
        assert re.fullmatch(r"error: [^\n]*No space left on device[^\n]*\n", err)


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in bad_input.UNNOTED])
def test_damage_that_no_hash_tells_is_found_when_it_is_read(here: Path, material: Material, run: Run, row: Row) -> None:
    code, out, err = run(*row.make(material), "--quiet")
    assert (code, out) == (2, ""), err
    assert re.fullmatch(r"error: [^\n]+\n", err), err
    assert re.search(row.told, err), err
