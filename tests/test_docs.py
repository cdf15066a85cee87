"""The examples of the documentation, run as they stand, and the pages that are filled in."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
from tiny_models import save_bert, save_images, save_lines, texts

from optin_deploy.cli.main import app
from optin_deploy.config.recipe import Recipe

pytestmark = pytest.mark.slow


DOCS = Path(__file__).parents[1] / "docs"


def text_of(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def examples(page: str) -> str:
    """All Python of a page, one piece behind the other."""
    return "\n".join(re.findall(r"```python\n(.*?)```", text_of(page), re.DOTALL))


@pytest.mark.usefixtures("without_layers")
def test_the_python_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(examples("how-to/python.md"), "python.md", "exec"), {"__name__": "example"})
    told = capsys.readouterr().out
    assert "blocks.0.attn" in told and "ONNX Runtime, batch 1: " in told and "<Result in run: " in told
    assert (tmp_path / "half" / "optin.json").is_file() and (tmp_path / "run" / "report.html").is_file()


@pytest.mark.usefixtures("without_layers")
def test_the_page_for_own_models_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    state = timm.create_model("test_vit", img_size=32, num_classes=10).state_dict()
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, "mine.pth")
    save_images(Path("train"), 30)
    for number in range(10):
        save_images(Path("val", f"class {number}"), 1)
    page = re.sub(r"vit_tiny(_patch16_224)?", "test_vit", text_of("how-to/own-model.md"))  # which is far smaller
    first, second = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(first, "own-model.md", "exec"), {"__name__": "example"})

    quick = "batch_sizes=(1,), profile_seconds=0.2, threads=1, calibration_samples=16, "
    exec(compile(second.replace("runtimes=", quick + "runtimes="), "own-model.md", "exec"), {"__name__": "example"})
    assert json.loads(Path("runs/mine/report.json").read_text())["evaluation"]


@pytest.mark.usefixtures("without_layers")
def test_the_hugging_face_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_bert(tmp_path / "bert", num_hidden_layers=1)
    save_lines(tmp_path / "texts.txt", texts(40))
    monkeypatch.chdir(tmp_path)
    (command,) = re.findall(r"```sh\noptin-deploy (.*?)```", text_of("how-to/hugging-face.md"), re.DOTALL)
    quick = "--runtimes ort-cpu --batch-sizes 1 --profile-seconds 0.2 --threads 1 --sequence-length 16 --quiet"
    app(shlex.split(f"{command} {quick}"), standalone_mode=False)
    exec(compile(examples("how-to/hugging-face.md"), "hugging-face.md", "exec"), {"__name__": "example"})
    told = capsys.readouterr().out
    assert "BertForSequenceClassification" in told and "load it with optin_deploy.load" in told
    assert (tmp_path / "run" / "checkpoint" / "README.md").is_file()


def test_the_command_page_lists_every_option() -> None:
    found = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    assert found is not None and found.loader is not None
    hooks = importlib.util.module_from_spec(found)
    found.loader.exec_module(hooks)
    page = hooks.on_page_markdown((DOCS / "reference" / "cli.md").read_text(encoding="utf-8"))
    assert all(f"--{name.replace('_', '-')}" in page for name in Recipe.model_fields)
    assert all(
        f"## {name}\n" in page for name in ("prune-export", "sweep", "export", "profile", "report", "models", "env")
    )


def test_links_between_pages_lead_somewhere() -> None:
    for page in DOCS.rglob("*.md"):
        for link in re.findall(r"\]\(([^)#:]+\.md)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).is_file(), f"{page.relative_to(DOCS)}: {link}"
