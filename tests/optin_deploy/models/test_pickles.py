"""The command that converts pickles, run by a shell as it is printed."""

import argparse
import collections
import enum
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import bad_input
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from optin_deploy.errors import UserError
from optin_deploy.models import pickles
from optin_deploy.models.load import load_network

pytestmark = pytest.mark.slow


class Attributes(dict):
    """As Lightning keeps hyperparameters."""


def mark() -> None:
    Path(bad_input.MARK).touch()


class Marking:
    """Unpickled, it calls a function of this file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (mark, ())


class Kind(enum.Enum):
    ONE = 1


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def model() -> nn.Module:
    torch.manual_seed(3)
    return timm.create_model("test_vit", num_classes=3, img_size=32).eval()


ROOT = Path(pickles.__file__).parents[2]
STATE = model().state_dict()
OPTIONS = argparse.Namespace(lr=np.float64(0.1), output=Path("x"), kind=Kind.ONE, device=torch.device("cuda"))
NESTED = {
    "model": STATE,
    "args": OPTIONS,
    "epoch": 3,
    "best": np.float32(0.9),
    "history": np.arange(3),
    "random": np.random.default_rng(0).bit_generator.state,
    "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": np.float64(0.1)}]},
}
CASES: dict[str, Any] = {
    "w.pth": STATE,
    "of an option's script.pth": NESTED,
    "averaged.pth.tar": {"state_dict": collections.OrderedDict(STATE), "arch": "x"},
    'lightning "$HOME" `x`.ckpt': {
        "state_dict": {f"model.{name}": tensor for name, tensor in STATE.items()},
        "hyper_parameters": Attributes(net=Wrapper(nn.Linear(2, 2)), lr=Attributes(a=1)),
        "callbacks": {"best": Attributes(score=torch.tensor(1.0))},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
        "loops": collections.defaultdict(dict, {"a": {}}),
    },
    "whole.pt": Wrapper(model()),
    "shared.bin": {"model": STATE, "again": STATE},
}


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    # `python` is that of the tests.
    whole = command.replace("python", shlex.quote(sys.executable), 1)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(whole, shell=True, cwd=folder, env=env, capture_output=True, text=True, check=False)


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_network("test_vit", weights=str(path), image_size=32)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", CASES)
def test_what_is_printed_converts(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    torch.save(CASES[name], path)
    told = refusal(path)
    assert "pickles are never loaded" in told
    done = run(told[told.index("python -c ") :], tmp_path)
    assert done.returncode == 0, done.stderr
    network = load_network("test_vit", weights=str(pickles.converted_path(path)), image_size=32)
    torch.testing.assert_close(dict(network.module.state_dict()), dict(STATE), rtol=0, atol=0)


def test_files_of_old_torch(tmp_path: Path) -> None:
    torch.save(
        {"model": STATE, "args": OPTIONS.__class__(lr=1)}, tmp_path / "w.pth", _use_new_zipfile_serialization=False
    )
    pickles.convert(tmp_path / "w.pth", tmp_path / "w.safetensors")
    assert load_file(tmp_path / "w.safetensors").keys() == {f"model.{name}" for name in STATE}


def test_a_moving_average_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    average = {name: tensor + 1 for name, tensor in STATE.items()}
    torch.save({"state_dict": STATE, "state_dict_ema": average}, tmp_path / "w.pth")
    pickles.convert(tmp_path / "w.pth", tmp_path / "w.safetensors")
    assert re.search(r"state_dict, state_dict_ema", capsys.readouterr().out)
    path = tmp_path / "w.safetensors"
    assert f"--weights {path}#state_dict or --weights {path}#state_dict_ema" in refusal(path)


def test_several_files(tmp_path: Path) -> None:
    names = sorted(STATE)
    for i, part in enumerate((names[:9], names[9:])):
        torch.save({name: STATE[name] for name in part}, tmp_path / f"{i}.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text('{"weight_map": {"a": "0.bin", "b": "1.bin"}}')
    pickles.convert(index, tmp_path / "model.safetensors")
    assert load_file(tmp_path / "model.safetensors").keys() == STATE.keys()


def test_torchscript(tmp_path: Path) -> None:
    layer = nn.Linear(2, 3)
    with pytest.warns():
        torch.jit.script(layer).save(tmp_path / "w.pt")
    pickles.convert(tmp_path / "w.pt", tmp_path / "w.safetensors")
    assert torch.equal(load_file(tmp_path / "w.safetensors")["weight"], layer.weight)


def test_code_in_a_pickle_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bad_input.save_pickle(Path("w.pth"))
    with pytest.raises(SystemExit, match="cannot be converted"):
        pickles.convert("w.pth", "w.safetensors")
    torch.save({"weight": torch.ones(2), "evil": Marking()}, "w.pth")
    pickles.convert("w.pth", "w.safetensors")
    assert not Path(bad_input.MARK).exists()
    assert list(load_file("w.safetensors")) == ["weight"]


def test_what_cannot_be_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("damaged.pth").write_bytes(b"\x80\x02no pickle")
    torch.save({"epoch": 3}, "empty.pth")
    torch.save(STATE, "w.pth")
    Path("there.safetensors").touch()
    for name, target, told in [
        ("damaged.pth", "w.safetensors", "cannot be converted"),
        ("none.pth", "w.safetensors", "cannot be converted"),
        ("empty.pth", "w.safetensors", "no tensors"),
        ("w.pth", "there.safetensors", "exists already"),
    ]:
        with pytest.raises(SystemExit, match=told) as caught:
            pickles.convert(name, target)
        assert "\n" not in str(caught.value)
        assert not Path("w.safetensors").exists()


def test_a_pickle_by_another_name(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    torch.save(STATE, path)
    told = refusal(path)
    assert re.search(r"pickle by another name", told)
    assert run(told[told.index("python -c ") :], tmp_path).returncode == 0
    load_network("test_vit", weights=str(tmp_path / "w-converted.safetensors"), image_size=32)
