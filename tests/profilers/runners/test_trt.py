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
from profilers import SPECS, MissingPackageError, ProfilingError, lacking_device, lacking_precision, open_runner
from profilers.runners import trt as tensorrt
from profilers.runners.base import RunSettings
from profilers.runners.trt import TensorRTRunner

Feeds = dict[str, NDArray[np.float32]]


def test_without_a_gpu_nothing_is_constructed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    # Constructing these without a device can end the process.
    for name in ("Logger", "Runtime"):
        monkeypatch.setattr(trt, name, None)
    with pytest.raises(ProfilingError, match=r"net\.engine.*no GPU"):
        open_runner("rtx", tmp_path / "net.engine", threads=1)


@pytest.mark.parametrize(("runtime", "package"), [("tensorrt", "tensorrt"), ("rtx", "tensorrt_rtx")])
def test_a_missing_product_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=rf"{package}.*optin-deploy\[{runtime}\]"):
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
    def capture(launch: object, stream: object) -> tuple[str, None]:
        if error is not None:
            raise error
        return "a graph", None

    monkeypatch.setattr(tensorrt, "capture_graph", capture)
    runner = TensorRTRunner.__new__(TensorRTRunner)
    runner._context, runner._stream, runner._cuda_graphs = context, SimpleNamespace(cuda_stream=1), True
    assert runner._graph(partial(runner._launch, {})) == graph
    runner._cuda_graphs = False
    assert runner._graph(partial(runner._launch, {})) is None


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
        with pytest.raises(ProfilingError, match="x of shape"):
            runner.prepare({"x": np.repeat(sample["x"], 5, axis=0)})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("runtime", ["tensorrt", "rtx"])
def test_a_replayed_graph_fills_the_same_outputs(
    mlp_onnx: Callable[[int], Path], sample: Feeds, tmp_path: Path, runtime: str
) -> None:
    engine = tmp_path / "net.engine"
    build(runtime, mlp_onnx(32), engine, sample)
    with TensorRTRunner(engine, SPECS[runtime], RunSettings(1)) as runner:
        expected = runner.infer(sample)["y"]
        tensors = runner._place(sample)
        graph = runner._graph(partial(runner._launch, tensors))
        assert graph is not None
        tensors["y"].zero_()
        graph.replay()
        torch.cuda.synchronize()
        np.testing.assert_array_equal(tensors["y"].cpu().numpy(), expected)
        runner.prepare(sample)()
        assert runner.cuda_graph


RTX_GPUS = ((7, 5), (8, 6), (8, 9), (12, 0), (12, 1))
OTHER_GPUS = ((7, 0), (8, 0), (8, 7), (9, 0), (10, 0), (10, 3), (11, 0))


@pytest.mark.parametrize("capability", [*RTX_GPUS, *OTHER_GPUS])
def test_rtx_runs_on_the_gpus_that_nvidia_names(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    runs = capability in RTX_GPUS
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert lacking_device("rtx") == ("" if runs else "NVIDIA H200 cannot run TensorRT for RTX, take tensorrt there")
    assert lacking_device("tensorrt") == lacking_device("ort-cpu") == ""


@pytest.mark.parametrize(
    ("precision", "capability", "has"),
    [
        ("fp8", (8, 6), False),
        ("fp8", (8, 9), True),
        ("fp8", (9, 0), True),
        ("bf16", (7, 5), False),
        ("bf16", (8, 0), True),
        ("tf32", (7, 5), False),
        ("fp16", (7, 5), True),
        ("int8", (7, 5), True),
    ],
)
def test_a_gpu_without_a_precision_is_told(
    monkeypatch: pytest.MonkeyPatch, precision: str, capability: tuple[int, int], has: bool
) -> None:
    assert not lacking_precision("tensorrt", precision)  # there is no GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    reason = lacking_precision("tensorrt", precision)
    assert (reason == "") == has
    assert has or f"GPU (compute capability {capability[0]}.{capability[1]}) has no {precision}, 8." in reason
    assert not lacking_precision("torch-cuda", precision)


def test_only_version_compatible_engines_may_bring_code(tmp_path: Path) -> None:
    engine = tmp_path / "net.engine"
    assert not tensorrt._is_version_compatible(engine)
    beside = tmp_path / "net.engine.json"
    for text, expected in (
        ("no JSON", False),
        ("[]", False),
        ('{"config": {"version_compatible": false}}', False),
        ('{"config": {"version_compatible": "yes"}}', False),
        ('{"config": {"version_compatible": true}}', True),
    ):
        beside.write_text(text)
        assert tensorrt._is_version_compatible(engine) == expected
