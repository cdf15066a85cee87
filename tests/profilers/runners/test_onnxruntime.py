import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from profilers import MissingPackageError, ProfilingError, open_runner
from profilers.runners.onnxruntime import OnnxRuntimeRunner

Feeds = dict[str, NDArray[np.float32]]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_outputs_are_those_of_the_reference(mlp_onnx: Callable[[int], Path], sample: Feeds, batch_size: int) -> None:
    path = mlp_onnx(32)
    feeds = {"x": np.repeat(sample["x"], batch_size, axis=0) * np.arange(1, batch_size + 1, dtype=np.float32)[:, None]}
    with open_runner("ort-cpu", path, threads=1) as runner:
        outputs = runner.infer(feeds)
        run = runner.prepare(feeds)
        run()
    expected = ReferenceEvaluator(onnx.load(path)).run(None, feeds)[0]
    assert list(outputs) == ["y"]
    np.testing.assert_allclose(outputs["y"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
def test_a_silent_fallback_to_the_cpu_is_an_error(mlp_onnx: Callable[[int], Path]) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(ProfilingError, match="fell back to CPUExecutionProvider") as caught:
        open_runner("ort-cuda", mlp_onnx(32), threads=1)
    assert "\n" not in str(caught.value)


def test_wrong_input_names_are_told(mlp_onnx: Callable[[int], Path], sample: Feeds) -> None:
    with (
        open_runner("ort-cpu", mlp_onnx(32), threads=1) as runner,
        pytest.raises(ProfilingError, match=r"inputs are \['x'\], but the sample holds \['z'\]"),
    ):
        runner.prepare({"z": sample["x"]})


def test_a_broken_file_is_told_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"no onnx at all")
    with pytest.raises(ProfilingError, match=r"cannot load .*broken\.onnx") as caught:
        open_runner("ort-cpu", path, threads=1)
    assert "\n" not in str(caught.value)


def test_unknown_provider(mlp_onnx: Callable[[int], Path]) -> None:
    with pytest.raises(ProfilingError, match="unknown provider 'Abacus'"):
        OnnxRuntimeRunner(mlp_onnx(32), "Abacus", 1)


@pytest.mark.parametrize(("runtime", "extra"), [("ort-cpu", "cpu"), ("ort-cuda", "gpu")])
def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch, runtime: str, extra: str) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingPackageError) as caught:
        open_runner(runtime, Path("any.onnx"), threads=1)
    assert str(caught.value) == f"onnxruntime is not installed: pip install 'optin-deploy[{extra}]'"


def test_unknown_runtime() -> None:
    with pytest.raises(ValueError, match="unknown runtime 'abacus': choose from ort-cpu"):
        open_runner("abacus", Path("any"), threads=1)
