import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import own_network
from torch import nn

from optin_deploy.config.recipe import Recipe
from optin_deploy.errors import UserError
from optin_deploy.run import run_directory


def recipe(**options: Any) -> Recipe:
    return Recipe(model="some/model", **{"flops": 0.5, **options})


def test_fingerprint_changes_with_all_that_decides_the_result() -> None:
    module = own_network().module
    prints = [
        run_directory.compute_fingerprint(recipe(), module, "data", "1"),
        run_directory.compute_fingerprint(recipe(flops=0.4), module, "data", "1"),
        run_directory.compute_fingerprint(recipe(seed=1), module, "data", "1"),
        run_directory.compute_fingerprint(recipe(), own_network(seed=1).module, "data", "1"),
        run_directory.compute_fingerprint(recipe(), module, "other", "1"),
        run_directory.compute_fingerprint(recipe(), module, "data", "2"),
    ]
    assert len(set(prints)) == len(prints)
    assert run_directory.compute_fingerprint(recipe(), own_network().module, "data", "1") == prints[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fingerprint_of_scalars_and_empty_tensors(dtype: torch.dtype) -> None:
    def hashed(value: float) -> str:
        module = nn.Module()
        module.register_buffer("scale", torch.tensor(value, dtype=dtype))
        module.register_buffer("nothing", torch.zeros(0, 3, dtype=dtype))
        module.register_buffer("turned", torch.arange(6).reshape(2, 3).to(dtype).T)
        return run_directory.compute_fingerprint(recipe(), module, "", "")

    assert hashed(1.0) == hashed(1.0) != hashed(2.0)


def test_default_directory_tells_model_and_budget() -> None:
    directory = run_directory.default_directory(recipe(), "0123456789abcdef")
    assert directory == Path("runs/model-flops0.5-01234567")
    for flops, name in ((None, "model-2of4-01234567"), (0.5, "model-flops0.5-2of4-01234567")):
        sparse = recipe(flops=flops, sparsity="2:4")
        assert run_directory.default_directory(sparse, "0123456789abcdef") == Path("runs", name)
    assert run_directory.default_directory(Recipe(model="..", flops=0.5), "0123456789").parent == Path("runs")


def test_a_run_may_continue_in_its_directory_only(tmp_path: Path) -> None:
    directory = tmp_path / "deep" / "run"
    run_directory.check(directory, "a")
    with run_directory.hold(directory, "a", recipe()):
        run_directory.check(directory, "a")
    with pytest.raises(UserError, match="holds another run"), run_directory.hold(directory, "b", recipe()):
        pytest.fail("it is another run's")
    assert sorted(p.name for p in directory.iterdir() if p.name != ".lock") == ["recipe.yaml", "run.json"]


# Holds the directory named by its argument until its standard input ends.
HOLDER = """
import sys
from pathlib import Path
from optin_deploy.run import run_directory
from optin_deploy.config.recipe import Recipe
with run_directory.hold(Path(sys.argv[1]), "a", Recipe(model="some/model", flops=0.5)):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.slow
def test_two_processes_are_never_in_one_directory(tmp_path: Path, killed: bool) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        refused = pytest.raises(UserError, match="another run is at work there")
        with refused, run_directory.hold(tmp_path / "run", "a", recipe()):
            pytest.fail("it is held by another process")
        if killed:
            holder.kill()
        else:
            holder.communicate("")
        holder.wait()
    # However it ended, the directory is free again.
    with run_directory.hold(tmp_path / "run", "a", recipe()):
        assert (tmp_path / "run" / "run.json").is_file()


def test_an_error_inside_is_the_callers_own(tmp_path: Path) -> None:
    with pytest.raises(BlockingIOError, match="mine"), run_directory.hold(tmp_path, "a", recipe()):
        raise BlockingIOError("mine")


@pytest.mark.parametrize("entry", [".lock", ".run.json.x.partial"])
def test_what_a_killed_run_left_in_its_first_moments_is_no_obstacle(tmp_path: Path, entry: str) -> None:
    (tmp_path / entry).touch()
    run_directory.check(tmp_path, "a")
    with run_directory.hold(tmp_path, "a", recipe()):
        assert (tmp_path / "run.json").is_file()


def test_infinite_figures_are_read(tmp_path: Path) -> None:
    """Infinity is written as json.dumps does."""
    (tmp_path / "a.json").write_text('{"x": Infinity}')
    assert run_directory.read_json(tmp_path / "a.json", dict[str, float]) == {"x": float("inf")}


def test_empty_directory_may_be_used(tmp_path: Path) -> None:
    run_directory.check(tmp_path, "a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [None, "", "[]", "{}", "3"])
def test_foreign_directory_is_refused(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "precious.txt").touch()
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match="holds no run"):
        run_directory.check(tmp_path, "a")


def test_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        run_directory.check(tmp_path / "file", "a")
    below = r"--output .*file/run cannot be made"
    with pytest.raises(UserError, match=below):
        run_directory.check(tmp_path / "file" / "run", "a")
    with pytest.raises(UserError, match=below), run_directory.hold(tmp_path / "file" / "run", "a", recipe()):
        pytest.fail("there is no such directory")


def test_a_result_is_computed_once(tmp_path: Path) -> None:
    path = tmp_path / "run" / "a.json"
    with run_directory.hold(tmp_path / "run", "a", recipe()):
        kind = dict[str, tuple[float, ...]]
        results = {"x": (1.0, float("inf"))}
        assert run_directory.load_or_compute(path, kind, dict, results) == results
        assert run_directory.load_or_compute(path, kind, pytest.fail, "made again") == results
    assert json.loads(path.read_text()) == {"x": [1.0, float("inf")]}


def kept_run(directory: Path) -> None:
    """A run that has kept a file and a directory."""
    with run_directory.hold(directory, "a", recipe()):
        run_directory.load_or_compute(directory / "a.json", int, lambda: 1)
        (directory / "checkpoint" / "deep").mkdir(parents=True)
        (directory / "checkpoint" / "deep" / "file").write_text("one")
        run_directory.record(directory / "checkpoint")


@pytest.mark.parametrize("name", ["a.json", "checkpoint/deep/file", "checkpoint/another"])
def test_what_a_run_wrote_may_be_removed_but_not_changed(tmp_path: Path, name: str) -> None:
    kept_run(tmp_path / "run")
    run_directory.check(tmp_path / "run", "a")
    (tmp_path / "run" / name).write_text("2")
    changed = Path(name).parts[0]
    with pytest.raises(UserError, match=f"{changed} .*the run wrote"):
        run_directory.check(tmp_path / "run", "a")
    shutil.rmtree(tmp_path / "run" / changed) if changed == "checkpoint" else (tmp_path / "run" / changed).unlink()
    with run_directory.hold(tmp_path / "run", "a", recipe()):
        assert run_directory.load_or_compute(tmp_path / "run" / "a.json", int, lambda: 1) == 1


@pytest.mark.parametrize("name", ["../a.json", "/dev/zero", "a\0", ".."])
def test_a_run_names_its_own_files_only(tmp_path: Path, name: str) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"fingerprint": "a", "files": {name: "0"}}))
    with pytest.raises(UserError, match="holds no run"):
        run_directory.check(tmp_path, "a")


def test_json_that_is_none_is_told(tmp_path: Path) -> None:
    for content in ("", "{", '["a"]', "[" * 100_000, "\ud800".encode("utf-8", "surrogatepass")):
        path = tmp_path / "a.json"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(UserError, match=r"a\.json is damaged: remove it"):
            run_directory.read_json(path, list[int])


def test_a_run_that_was_killed_while_it_wrote_goes_on(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / ".run.json.x.partial").touch()
    (directory / ".checkpoint.y.partial").mkdir()
    (directory / ".checkpoint.y.partial" / "model.safetensors").touch()
    run_directory.check(directory, "a")
    with run_directory.hold(directory, "a", recipe()):
        assert sorted(p.name for p in directory.iterdir() if p.name != ".lock") == ["recipe.yaml", "run.json"]
