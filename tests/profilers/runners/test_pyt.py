import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from profilers import SPECS, Case, ProfilingError, measure_files, open_runner
from profilers.runners.base import RunSettings
from profilers.runners.pyt import TorchRunner

pytestmark = pytest.mark.slow


Feeds = dict[str, NDArray[np.float32]]
Program = Callable[[int], tuple[torch.nn.Module, Path]]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_outputs_are_those_of_the_module(mlp_program: Program, sample: Feeds, batch_size: int) -> None:
    module, path = mlp_program(32)
    feeds = {"x": np.repeat(sample["x"], batch_size, axis=0)}
    with open_runner("torch", path, threads=1) as runner:
        (output,) = runner.infer(feeds).values()
        run = runner.prepare(feeds)
        run()
    with torch.inference_mode():
        expected = module(torch.from_numpy(feeds["x"])).numpy()
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_outputs_are_those_of_the_module(
    mlp_program: Program, sample: Feeds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    module, path = mlp_program(32)
    feeds = {"x": np.repeat(sample["x"], 3, axis=0)}
    with open_runner("torch-compile", path, threads=1) as runner:
        (output,) = runner.infer(feeds).values()
        runner.prepare(feeds)()
    with torch.inference_mode():
        expected = module(torch.from_numpy(feeds["x"])).numpy()
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)
    assert list((tmp_path / "inductor").iterdir())


class Keywords(torch.nn.Module):
    def forward(self, a: torch.Tensor, *, mask: torch.Tensor, scale: torch.Tensor) -> dict[str, object]:
        return {"first": a * mask - scale, "rest": (a + scale, mask * 2)}


def test_keyword_inputs_and_nested_outputs(tmp_path: Path) -> None:
    path = tmp_path / "keywords.pt2"
    rng = np.random.default_rng(0)
    feeds = {name: rng.normal(size=(2, 3)).astype(np.float32) for name in ("scale", "a", "mask")}
    tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
    program = torch.export.export(Keywords(), (tensors["a"],), {"mask": tensors["mask"], "scale": tensors["scale"]})
    torch.export.save(program, path)
    with open_runner("torch", path, threads=1) as runner:
        first, second, third = runner.infer(feeds).values()
    np.testing.assert_allclose(first, feeds["a"] * feeds["mask"] - feeds["scale"], rtol=1e-6)
    np.testing.assert_allclose(second, feeds["a"] + feeds["scale"], rtol=1e-6)
    np.testing.assert_allclose(third, feeds["mask"] * 2, rtol=1e-6)


def test_wrong_input_names_are_told(mlp_program: Program, sample: Feeds) -> None:
    with (
        open_runner("torch", mlp_program(32)[1], threads=1) as runner,
        pytest.raises(ProfilingError, match=r"\['x'\].*\['z'\]"),
    ):
        runner.infer({"z": sample["x"]})


def test_a_broken_file_is_told_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.pt2"
    path.write_bytes(b"no archive at all")
    with pytest.raises(ProfilingError, match=r"cannot load .*broken\.pt2") as caught:
        open_runner("torch", path, threads=1)
    assert "\n" not in str(caught.value)


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_nothing_in_a_program_is_unpickled(mlp_program: Program, tmp_path: Path) -> None:
    folder, payload, path = tmp_path / "boom", tmp_path / "bomb.pt", tmp_path / "bomb.pt2"
    torch.save(Bomb(folder), payload)
    with zipfile.ZipFile(mlp_program(32)[1]) as original, zipfile.ZipFile(path, "w") as changed:
        for entry in original.namelist():
            is_sample = "/sample_inputs/" in entry
            changed.writestr(entry, payload.read_bytes() if is_sample else original.read(entry))
    with pytest.raises(ProfilingError, match=r"cannot load .*bomb\.pt2"):
        open_runner("torch", path, threads=1)
    assert not folder.exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.parametrize("part", ["data/constants/opaque_obj_0", "data/aotinductor/model/code.so"])
def test_an_archive_with_code_is_refused(mlp_program: Program, tmp_path: Path, part: str) -> None:
    path = tmp_path / "code.pt2"
    path.write_bytes(mlp_program(32)[1].read_bytes())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"mlp32/{part}", b"")
    with pytest.raises(ProfilingError, match="code"):
        open_runner("torch", path, threads=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("runtime", ["torch-cuda", "torch-graph-cuda", "torch-compile-cuda"])
def test_an_absent_gpu_is_told(mlp_program: Program, runtime: str) -> None:
    with pytest.raises(ProfilingError, match="no CUDA device"):
        open_runner(runtime, mlp_program(32)[1], threads=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda_outputs_are_those_of_the_cpu(mlp_program: Program, sample: Feeds) -> None:
    path = mlp_program(32)[1]
    with open_runner("torch-cuda", path, threads=1) as gpu, open_runner("torch", path, threads=1) as cpu:
        device_ms = gpu.prepare(sample)()
        assert device_ms is not None
        assert device_ms > 0
        assert gpu.cuda_graph is None
        (got,), (expected,) = gpu.infer(sample).values(), cpu.infer(sample).values()
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_replayed_graph_gives_the_outputs_of_the_program(mlp_program: Program, sample: Feeds) -> None:
    path = mlp_program(32)[1]
    with (
        TorchRunner(path, SPECS["torch-graph-cuda"], RunSettings(1)) as runner,
        open_runner("torch-cuda", path, threads=1) as plain,
    ):
        (expected,) = plain.infer(sample).values()
        inputs = runner._place(sample)
        graph, output = runner._capture(inputs)
        with torch.inference_mode():
            output.zero_()
        graph.replay()
        torch.cuda.synchronize()
        np.testing.assert_allclose(output.cpu().numpy(), expected, rtol=1e-5, atol=1e-6)
        # It reads the inputs anew each time.
        inputs[0].mul_(2)
        graph.replay()
        torch.cuda.synchronize()
        (doubled,) = plain.infer({"x": 2 * sample["x"]}).values()
        np.testing.assert_allclose(output.cpu().numpy(), doubled, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_graphs_are_measured_with_their_time_on_the_device(mlp_program: Program, sample: Feeds) -> None:
    path = mlp_program(32)[1]
    case = Case("torch-graph-cuda", 4, threads=1, seconds=0.5)
    found = measure_files({"dense": path, "pruned": path}, sample, case, [("dense", "pruned")])
    assert found.cuda_graph == {"dense": True, "pruned": True}
    assert found.device_ms is not None
    assert min(found.device_ms.values()) > 0
    assert found.gpu is not None
