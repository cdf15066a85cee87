import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engine_runtimes import needs_device
from numpy.typing import NDArray

from exporters import EngineConfig, build_engine, input_ranges
from profilers import MissingPackageError, ProfilingError, lacking_device, open_runner
from profilers.runners import tensorrt
from profilers.runners.tensorrt import TensorRTRunner

Feeds = dict[str, NDArray[np.float32]]


def test_without_a_gpu_nothing_is_constructed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    # Constructing these without a device can end the process.
    for name in ("Logger", "Runtime"):
        monkeypatch.setattr(trt, name, None)
    with pytest.raises(ProfilingError, match=r"^net\.engine cannot run: no GPU is present$"):
        open_runner("rtx", tmp_path / "net.engine", threads=1)


@pytest.mark.parametrize(("runtime", "package"), [("tensorrt", "tensorrt"), ("rtx", "tensorrt_rtx")])
def test_a_missing_product_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=rf"^{package} is not installed: .*optin-deploy\[{runtime}\]"):
        open_runner(runtime, tmp_path / "net.engine", threads=1)


class Context:
    """A pretended execution context."""

    def __init__(self, capturable: bool | None = None) -> None:
        if capturable is not None:
            self.is_stream_capturable = lambda stream: capturable


@pytest.mark.parametrize(
    ("context", "error", "graph"),
    [
        (Context(), None, "a graph"),
        (Context(capturable=True), None, "a graph"),
        (Context(capturable=False), None, None),
        (Context(), RuntimeError("operation not permitted when stream is capturing"), None),
        (Context(), ProfilingError("the engine did not run"), None),
    ],
)
def test_an_engine_that_cannot_be_captured_has_no_graph(
    context: Context, error: Exception | None, graph: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def captured(launch: object, stream: object) -> str:
        if error is not None:
            raise error
        return "a graph"

    monkeypatch.setattr(tensorrt, "captured", captured)
    runner = TensorRTRunner.__new__(TensorRTRunner)
    runner._context, runner._stream = context, SimpleNamespace(cuda_stream=1)
    assert runner._graph(partial(runner._launch, {})) == graph


def build(runtime: str, onnx: Path, engine: Path, sample: Feeds) -> None:
    """An engine for up to 4 samples; skips where it cannot be run."""
    needs_device(runtime)
    shapes = {name: array.shape for name, array in sample.items()}
    inputs = input_ranges(shapes, {"x": {0: "batch"}}, (1, 4), 4, static=False)
    build_engine(onnx, engine, inputs, EngineConfig(runtime))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("runtime", ["tensorrt", "rtx"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_outputs_are_those_of_onnx_runtime(
    mlp_onnx: Callable[[int], Path], sample: Feeds, tmp_path: Path, runtime: str, batch_size: int
) -> None:
    onnx, engine = mlp_onnx(32), tmp_path / "net.engine"
    build(runtime, onnx, engine, sample)
    feeds = {"x": np.repeat(sample["x"], batch_size, axis=0)}
    with open_runner("ort-cpu", onnx, threads=1) as reference, open_runner(runtime, engine, threads=1) as runner:
        np.testing.assert_allclose(runner.infer(feeds)["y"], reference.infer(feeds)["y"], rtol=1e-3, atol=1e-4)
        device_ms = runner.prepare(feeds)()
        assert device_ms is not None
        assert device_ms > 0
        with pytest.raises(ProfilingError, match="does not take x of shape"):
            runner.prepare({"x": np.repeat(sample["x"], 5, axis=0)})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("runtime", ["tensorrt", "rtx"])
def test_a_replayed_graph_fills_the_same_outputs(
    mlp_onnx: Callable[[int], Path], sample: Feeds, tmp_path: Path, runtime: str
) -> None:
    engine = tmp_path / "net.engine"
    build(runtime, mlp_onnx(32), engine, sample)
    with TensorRTRunner(engine, runtime) as runner:
        expected = runner.infer(sample)["y"]
        tensors = runner._placed(sample)
        graph = runner._graph(partial(runner._launch, tensors))
        assert graph is not None
        tensors["y"].zero_()
        graph.replay()
        torch.cuda.synchronize()
        np.testing.assert_array_equal(tensors["y"].cpu().numpy(), expected)
        runner.prepare(sample)()
        assert runner.cuda_graph


def test_gpus_of_data_centres_do_not_run_rtx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    for capability, expected in (
        ((9, 0), "NVIDIA H200 cannot run TensorRT for RTX, take tensorrt there"),
        ((8, 9), ""),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert lacking_device("rtx") == expected
        assert lacking_device("tensorrt") == lacking_device("ort-cpu") == ""
