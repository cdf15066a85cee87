import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import own_network
from torch import nn

from optin_deploy import rundir
from optin_deploy.errors import UserError
from optin_deploy.recipe import Recipe


def recipe(**options: Any) -> Recipe:
    return Recipe(model="some/model", **{"flops": 0.5, **options})


def test_fingerprint_changes_with_all_that_decides_the_result() -> None:
    module = own_network().module
    prints = [
        rundir.fingerprint(recipe(), module, "data", "1"),
        rundir.fingerprint(recipe(flops=0.4), module, "data", "1"),
        rundir.fingerprint(recipe(seed=1), module, "data", "1"),
        rundir.fingerprint(recipe(), own_network(seed=1).module, "data", "1"),
        rundir.fingerprint(recipe(), module, "other", "1"),
        rundir.fingerprint(recipe(), module, "data", "2"),
    ]
    assert len(set(prints)) == len(prints)
    assert rundir.fingerprint(recipe(), own_network().module, "data", "1") == prints[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fingerprint_of_scalars_and_empty_tensors(dtype: torch.dtype) -> None:
    def hashed(value: float) -> str:
        module = nn.Module()
        module.register_buffer("scale", torch.tensor(value, dtype=dtype))
        module.register_buffer("nothing", torch.zeros(0, 3, dtype=dtype))
        module.register_buffer("turned", torch.arange(6).reshape(2, 3).to(dtype).T)
        return rundir.fingerprint(recipe(), module, "", "")

    assert hashed(1.0) == hashed(1.0) != hashed(2.0)


def test_default_directory_tells_model_and_budget() -> None:
    directory = rundir.default_directory(recipe(), "0123456789abcdef")
    assert directory == Path("runs/model-flops0.5-01234567")
    for flops, name in ((None, "model-2of4-01234567"), (0.5, "model-flops0.5-2of4-01234567")):
        sparse = recipe(flops=flops, sparsity="2:4")
        assert rundir.default_directory(sparse, "0123456789abcdef") == Path("runs", name)
    assert rundir.default_directory(Recipe(model="..", flops=0.5), "0123456789").parent == Path("runs")


def test_a_run_may_continue_in_its_directory_only(tmp_path: Path) -> None:
    directory = tmp_path / "deep" / "run"
    rundir.check(directory, "a")
    rundir.create(directory, "a", recipe())
    rundir.check(directory, "a")
    with pytest.raises(UserError, match="holds another run"):
        rundir.check(directory, "b")
    assert (directory / "recipe.yaml").is_file()


def test_empty_directory_may_be_used(tmp_path: Path) -> None:
    rundir.check(tmp_path, "a")


@pytest.mark.parametrize("content", [None, "", "[]", "{}", "3"])
def test_foreign_directory_is_refused(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "precious.txt").touch()
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match="holds no run"):
        rundir.check(tmp_path, "a")


def test_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        rundir.check(tmp_path / "file", "a")
    with pytest.raises(UserError, match=r"--output .*file/run cannot be made"):
        rundir.check(tmp_path / "file" / "run", "a")
        rundir.create(tmp_path / "file" / "run", "a", recipe())


def test_kept_json_is_made_once(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert rundir.kept_json(path, lambda: {"x": (1, 2)}) == {"x": [1, 2]}
    assert rundir.kept_json(path, lambda: pytest.fail("made again")) == {"x": [1, 2]}
    assert json.loads(path.read_text()) == {"x": [1, 2]}
