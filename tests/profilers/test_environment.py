import json
import os
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from profilers.environment import _quota_cores, environment, usable_cores


def test_environment_is_json_and_complete() -> None:
    data = environment()
    assert json.loads(json.dumps(data)) == data
    assert data["cpu"]
    assert data["memory_gib"] > 0
    assert data["versions"]["numpy"] == np.__version__
    assert data["versions"]["torch"]
    assert set(data["versions"]) >= {"onnx", "onnxruntime", "onnxruntime-gpu", "timm", "tensorrt", "tensorrt_rtx"}
    assert isinstance(data["cuda_devices"], list)
    assert datetime.fromisoformat(data["date"]).utcoffset() == timedelta(0)


def test_usable_cores_respect_the_affinity_mask() -> None:
    cores = usable_cores()
    assert 1 <= cores.physical <= cores.logical <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("text", "cores"),
    [("max 100000\n", None), ("250000 100000\n", 2), ("50000 100000\n", 1), ("nonsense", None), (None, None)],
)
def test_container_quota(tmp_path: Path, text: str | None, cores: int | None) -> None:
    path = tmp_path / "cpu.max"
    if text is not None:
        path.write_text(text)
    assert _quota_cores(path) == cores


def test_importing_profilers_imports_no_runtime() -> None:
    code = "import sys, profilers; sys.exit(any(name in sys.modules for name in ('torch', 'onnxruntime', 'onnx')))"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
