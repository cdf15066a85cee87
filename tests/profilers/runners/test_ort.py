import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from profilers import ORT_PROVIDERS, MissingPackageError, ProfilingError, check_provider, open_runner
from profilers.runners.ort import _library_name, _loading_error, provider_options

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


@pytest.mark.parametrize(("runtime", "extras"), [("ort-cuda", "gpu"), ("ort-tensorrt", "ort-tensorrt")])
def test_a_silent_fallback_to_the_cpu_is_an_error(
    runtime: str, extras: str, mlp_onnx: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if ORT_PROVIDERS[runtime] in onnxruntime.get_available_providers():
        pytest.skip(f"this onnxruntime has {ORT_PROVIDERS[runtime]}")
    # The runner changes it, for this process.
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    with pytest.raises(ProfilingError, match="CPUExecutionProvider") as caught:
        open_runner(runtime, mlp_onnx(32), threads=1)
    assert "\n" not in str(caught.value)
    assert f"'optin-deploy[{extras}]'" in str(caught.value)


@pytest.mark.parametrize("tf32", [False, True])
def test_cuda_is_told_whether_tf32_is_allowed(tf32: bool) -> None:
    for provider in ("CUDAExecutionProvider", "TensorrtExecutionProvider"):
        options = provider_options(provider, tf32)
        assert options[0][0] == provider
        assert dict(options)["CUDAExecutionProvider"]["use_tf32"] == str(int(tf32))
    assert provider_options("CPUExecutionProvider", tf32) == [("CPUExecutionProvider", {})]


def test_wrong_input_names_are_told(mlp_onnx: Callable[[int], Path], sample: Feeds) -> None:
    with (
        open_runner("ort-cpu", mlp_onnx(32), threads=1) as runner,
        pytest.raises(ProfilingError, match=r"\['x'\].*\['z'\]"),
    ):
        runner.prepare({"z": sample["x"]})


def test_a_broken_file_is_told_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"no onnx at all")
    with pytest.raises(ProfilingError, match=r"cannot load .*broken\.onnx") as caught:
        open_runner("ort-cpu", path, threads=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("runtime", "extra"), [("ort-cpu", "cpu"), ("ort-cuda", "gpu")])
def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch, runtime: str, extra: str) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingPackageError) as caught:
        open_runner(runtime, Path("any.onnx"), threads=1)
    assert str(caught.value) == f"onnxruntime is not installed: pip install 'optin-deploy[{extra}]'"


def test_unknown_runtime() -> None:
    with pytest.raises(ValueError, match=r"'abacus'.*ort-cpu"):
        open_runner("abacus", Path("any"), threads=1)


def _needs(provider: str) -> None:
    try:
        check_provider(provider)
    except ProfilingError as error:
        pytest.skip(str(error))


def test_a_provider_is_tried_before_it_is_relied_on(monkeypatch: pytest.MonkeyPatch) -> None:
    check_provider("CPUExecutionProvider")
    if torch.cuda.is_available():
        pytest.skip("here it may start")
    with pytest.raises(ProfilingError, match=r"optin-deploy\[gpu\]"):
        check_provider("CUDAExecutionProvider")
    everything = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: everything)
    with pytest.raises(ProfilingError, match=r"TensorrtExecutionProvider.*fell back"):
        check_provider("TensorrtExecutionProvider")


def test_the_loaders_own_error_is_told(tmp_path: Path) -> None:
    library = tmp_path / "libonnxruntime_providers_tensorrt.so"
    assert _library_name("TensorrtExecutionProvider") == "tensorrt" and _loading_error(library) == ""
    library.write_bytes(b"no library")
    assert str(library) in _loading_error(library) and "\n" not in _loading_error(library)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_float32_is_rounded_only_where_tf32_is_allowed(mlp_onnx: Callable[[int], Path]) -> None:
    _needs("CUDAExecutionProvider")
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no TF32")
    feeds = {"x": np.random.default_rng(0).normal(size=(256, 64)).astype(np.float32)}
    outputs = {}
    for name, runtime, tf32 in (("cpu", "ort-cpu", False), ("off", "ort-cuda", False), ("on", "ort-cuda", True)):
        with open_runner(runtime, mlp_onnx(1024), threads=1, tf32=tf32) as runner:
            outputs[name] = runner.infer(feeds)["y"]
            runner.prepare(feeds)()
    scale = np.abs(outputs["cpu"]).max()
    errors = {name: float(np.abs(outputs[name] - outputs["cpu"]).max() / scale) for name in ("off", "on")}
    # TF32 keeps 10 bits of the operands' mantissas, float32 23.
    assert errors["off"] < 1e-5
    assert errors["on"] > 10 * errors["off"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_tensorrt_inside_onnx_runtime_gives_the_outputs_of_the_cpu(
    mlp_onnx: Callable[[int], Path], sample: Feeds, monkeypatch: pytest.MonkeyPatch
) -> None:
    _needs("TensorrtExecutionProvider")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    with (
        open_runner("ort-tensorrt", mlp_onnx(32), threads=1) as runner,
        open_runner("ort-cpu", mlp_onnx(32), threads=1) as reference,
    ):
        runner.prepare(sample)()
        np.testing.assert_allclose(runner.infer(sample)["y"], reference.infer(sample)["y"], rtol=1e-3, atol=1e-4)
