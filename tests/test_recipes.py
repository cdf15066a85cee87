"""Every recipe of the gallery, run as it stands but for a network of a few thousand weights and a short measurement."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from test_docs import DOCS, examples
from tiny_models import POSITIONS, WORDS, save_bert, save_images, save_lines, save_shallow, texts
from transformers import SegformerImageProcessor

from optin_deploy.config.recipe import make_recipe
from optin_deploy.report import Report
from optin_deploy.run.pipeline import prune_export

pytestmark = pytest.mark.slow


RECIPES = DOCS / "recipes"
SHORT: dict[str, Any] = {"batch_sizes": (1,), "runtimes": ("ort-cpu",), "profile_seconds": 0.2, "threads": 1}


def vision_classifier(folder: Path) -> dict[str, Any]:
    save_shallow(folder / "vit")
    save_images(folder / "photos", 12)
    for number in range(10):
        save_images(folder / "val" / str(number), 1, seed=number)
    return {"model": str(folder / "vit")}


def text_classifier(folder: Path) -> dict[str, Any]:
    save_bert(folder / "my-classifier", num_hidden_layers=1)
    labels = ["bad", "fair", "good"]
    for name, count in (("train.tsv", 60), ("dev.tsv", 30)):
        rows = [f"{text}\t{labels[i % 3]}" for i, text in enumerate(texts(count))]
        save_lines(folder / name, ["text\tlabel", *rows])
    return {"sequence_length": POSITIONS}


def embedding(folder: Path) -> dict[str, Any]:
    save_bert(folder / "my-encoder", head=False, num_hidden_layers=1)
    save_lines(folder / "sentences.txt", texts(60))
    rng = np.random.default_rng(0)
    pairs = [f"{rng.choice(WORDS)},{rng.choice(WORDS)} {rng.choice(WORDS)},{rng.uniform(0, 5):.1f}" for _ in range(20)]
    save_lines(folder / "pairs.csv", ["sentence1,sentence2,score", *pairs])
    return {"sequence_length": POSITIONS}


def segmentation(folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    families.FAMILIES["segformer"]().save_pretrained(folder / "my-segmenter")
    SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder / "my-segmenter")
    save_images(folder / "photos", 12)
    return {}


def cnn(folder: Path) -> dict[str, Any]:
    save_images(folder / "photos", 12)
    return {"model": "test_resnet", "weights": "random", "image_size": 32}


RUNS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "vision-classifier": vision_classifier,
    "text-classifier": text_classifier,
    "embedding": embedding,
    "segmentation": segmentation,
    "cnn": cnn,
}
METRICS = {"vision-classifier", "text-classifier", "embedding"}


def check(report: Report, directory: Path) -> None:
    """The run has passed its gates and left what a user opens."""
    assert all(gate.passed for gate in report.gates), report.gates
    assert (directory / "report.html").is_file() and (directory / "pruned.onnx").is_file()


@pytest.mark.usefixtures("without_layers")
@pytest.mark.parametrize("name", RUNS)
def test_a_recipe_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = RUNS[name](tmp_path)
    result = prune_export(make_recipe({**SHORT, **small}, RECIPES / f"{name}.yaml"), output=Path("run"), quiet=True)
    check(result.report, Path("run"))
    assert (result.report.evaluation is not None) == (name in METRICS)


@pytest.mark.usefixtures("without_layers")
def test_the_recipe_of_a_module_of_ones_own_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (RECIPES / "custom-module.yaml").read_text(encoding="utf-8")
    short = text.replace("profile_seconds: 5", "profile_seconds: 0.2").replace("[1, 8]", "[1]") + "threads: 1\n"
    Path("custom-module.yaml").write_text(short, encoding="utf-8")
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(examples("recipes/index.md"), "index.md", "exec"), names)
    check(names["result"].report, names["result"].directory)


def test_every_recipe_is_shown_and_run() -> None:
    shown = re.findall(r"<!-- recipe (\S+)\.yaml -->", (RECIPES / "index.md").read_text(encoding="utf-8"))
    assert sorted(shown) == sorted(path.stem for path in RECIPES.glob("*.yaml")) == sorted([*RUNS, "custom-module"])
