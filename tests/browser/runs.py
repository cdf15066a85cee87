"""Small real runs whose pages the browser opens: a sweep, a text classifier with labels, a dense prediction with its
pictures.

    python tests/browser/runs.py FOLDER
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import families
from tiny_models import POSITIONS, save_bert, save_images, save_lines, texts
from transformers import SegformerImageProcessor

from optin_deploy.config.recipe import Recipe
from optin_deploy.run.pipeline import prune_export
from optin_deploy.sweeps.run import sweep

SHORT: dict[str, Any] = {"profile_seconds": 0.5, "threads": 1, "calibration_samples": 32}


def main(folder: Path) -> None:
    """Make the inputs where they are not there yet, and the runs."""
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    if not Path("photos").exists():
        save_images(Path("photos"), 40)
        torch.manual_seed(0)
        families.FAMILIES["segformer"]().save_pretrained("segmenter")
        SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained("segmenter")
        save_bert(Path("classifier"))
        rows = [f"{text}\t{('bad', 'fair', 'good')[i % 3]}" for i, text in enumerate(texts(60))]
        save_lines(Path("labelled.tsv"), ["text\tlabel", *rows])
    vision = Recipe(model="test_vit", weights="random", image_size=32, **SHORT)
    sweep(vision, {"flops": [0.8, 0.5]}, output=Path("sweep"))
    text: dict[str, Any] = {"calibration": "labelled.tsv", "calibration_column": "text", "evaluate": "labelled.tsv"}
    prune_export(
        Recipe(
            model="classifier", flops=0.6, sequence_length=POSITIONS, evaluate_columns="text,label", **text, **SHORT
        ),
        output=Path("text"),
    )
    maps = Recipe(model="segmenter", flops=0.7, calibration="photos", runtimes=("ort-cpu",), batch_sizes=(1,), **SHORT)
    prune_export(maps, output=Path("maps"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
