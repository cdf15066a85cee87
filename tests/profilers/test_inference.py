from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from profilers import ProfilingError, infer_file
from profilers.runners.base import Feeds


def test_outputs_are_those_of_the_runtime_itself(mlp_onnx: Callable[[int], Path], sample: Feeds) -> None:
    batches = [sample, {"x": np.concatenate([sample["x"], -sample["x"], 2 * sample["x"]])}]
    found = infer_file("ort-cpu", mlp_onnx(32), batches, threads=1)
    session = onnxruntime.InferenceSession(mlp_onnx(32), providers=["CPUExecutionProvider"])
    for outputs, batch in zip(found, batches, strict=True):
        assert list(outputs) == ["y"]
        np.testing.assert_allclose(outputs["y"], session.run(["y"], batch)[0], rtol=1e-5, atol=1e-6)


def test_what_cannot_be_run_is_one_line(mlp_onnx: Callable[[int], Path], sample: Feeds, tmp_path: Path) -> None:
    with pytest.raises(ProfilingError, match=r"'abacus'.*ort-cpu"):
        infer_file("abacus", mlp_onnx(32), [sample])
    with pytest.raises(ProfilingError, match=r"none\.onnx does not exist"):
        infer_file("ort-cpu", tmp_path / "none.onnx", [sample])
    with pytest.raises(ProfilingError, match=r"mlp32\.onnx.*\['x'\]") as caught:
        infer_file("ort-cpu", mlp_onnx(32), [{"z": sample["x"]}], threads=1)
    assert "\n" not in str(caught.value)
