import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from exporters import EngineConfig, build_engine, input_ranges
from profilers import MissingPackageError, ProfilingError, open_runner

Feeds = dict[str, NDArray[np.float32]]


def test_without_a_gpu_nothing_is_constructed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    # Constructing these without a device can end the process.
    for name in ("Logger", "Runtime"):
        monkeypatch.setattr(trt, name, None)
    with pytest.raises(ProfilingError, match=r"^no GPU is present to run net\.engine$"):
        open_runner("rtx", tmp_path / "net.engine", threads=1)


@pytest.mark.parametrize(("runtime", "package"), [("tensorrt", "tensorrt"), ("rtx", "tensorrt_rtx")])
def test_a_missing_product_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=rf"^{package} is not installed: .*optin-deploy\[{runtime}\]"):
        open_runner(runtime, tmp_path / "net.engine", threads=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("batch_size", [1, 4])
def test_outputs_are_those_of_onnx_runtime(
    mlp_onnx: Callable[[int], Path], sample: Feeds, tmp_path: Path, batch_size: int
) -> None:
    pytest.importorskip("tensorrt_rtx")
    onnx, engine = mlp_onnx(32), tmp_path / "net.engine"
    shapes = {name: array.shape for name, array in sample.items()}
    inputs = input_ranges(shapes, {"x": {0: "batch"}}, (1, 4), 4, static=False)
    build_engine(onnx, engine, inputs, EngineConfig("rtx"))
    feeds = {"x": np.repeat(sample["x"], batch_size, axis=0)}
    with open_runner("ort-cpu", onnx, threads=1) as reference, open_runner("rtx", engine, threads=1) as runner:
        np.testing.assert_allclose(runner.infer(feeds)["y"], reference.infer(feeds)["y"], rtol=1e-3, atol=1e-4)
        runner.prepare(feeds)()
        with pytest.raises(ProfilingError, match="does not take x of shape"):
            runner.prepare({"x": np.repeat(sample["x"], 5, axis=0)})
