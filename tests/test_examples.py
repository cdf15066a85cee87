"""The numbered examples, run as a user runs them, on a tiny model."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import save_shallow

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples"
QUICK = ["--runtimes", "ort-cpu", "--batch-sizes", "1", "--profile-seconds", "0.2", "--threads", "1", "--quiet"]


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a checkpoint of one block."""
    path = tmp_path_factory.mktemp("shallow") / "model"
    save_shallow(path)
    return str(path)


def run(name: str, *arguments: str, folder: Path, **variables: str) -> str:
    """Run an example in ``folder`` and return what it prints."""
    program = ["sh"] if name.endswith(".sh") else [sys.executable]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(EXAMPLES.parent), **variables}
    ended = subprocess.run(
        [*program, str(EXAMPLES / name), *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    return ended.stdout


def test_every_example_is_run_and_listed() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for file in EXAMPLES.glob("0*"):
        assert f'"{file.name}"' in source and f"]({file.name})" in listed, file.name


def test_the_command_line(shallow: str, tmp_path: Path) -> None:
    shown = run("01_command_line.sh", shallow, "--align", "8", *QUICK, folder=tmp_path)
    assert "example-0.5" in shown and "example-0.7" in shown
    assert (tmp_path / "runs" / "example-0.5" / "report.html").is_file()


def test_python(shallow: str, tmp_path: Path) -> None:
    shown = run("02_python.py", shallow, folder=tmp_path)
    assert shown.count("<Pruned") == 2 and shown.count("ONNX Runtime, batch 1") == 2


def test_a_custom_module(tmp_path: Path) -> None:
    shown = run("03_custom_module.py", folder=tmp_path)
    assert "<Pruned" in shown and "<OnnxFile" in shown


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT for RTX is not installed")
def test_engines_without_a_gpu(shallow: str, tmp_path: Path) -> None:
    options = ("--align", "8", *QUICK[2:])
    shown = run("04_tensorrt.sh", shallow, *options, folder=tmp_path, RUNTIME="rtx")
    assert "model.rtx.engine" in shown and "model.rtx.engine.json" in shown


def test_triton(shallow: str, tmp_path: Path) -> None:
    shown = run("05_triton.sh", shallow, "--quiet", folder=tmp_path)
    assert 'name: "example_onnx"' in shown
    assert (tmp_path / "runs" / "triton" / "example_onnx" / "1" / "model.onnx").is_file()
