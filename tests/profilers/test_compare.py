import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter

from profilers import Comparison, ProfileConfig, ProfilingError, Variant, compare

pytestmark = pytest.mark.slow


Feeds = dict[str, NDArray[np.float32]]
QUICK = ProfileConfig(runtimes=("ort-cpu",), batch_sizes=(1,), threads=1, seconds=0.5)


@pytest.fixture
def empty_temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder of its own, to see what is left in it."""
    folder = tmp_path / "temp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"runtimes": ("abacus",)}, "'abacus'.*ort-cpu, ort-cuda, ort-tensorrt, torch"),
        ({"runtimes": ()}, "no runtime.*ort-cpu"),
        ({"batch_sizes": ()}, "batch sizes"),
        ({"batch_sizes": (1, 0)}, "batch sizes"),
        ({"threads": 0}, "threads"),
        ({"seconds": 0.0}, "seconds"),
        ({"seconds": float("nan")}, "seconds"),
        ({"seed": -1}, "seed"),
    ],
)
def test_config_is_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProfileConfig(**fields)


def test_a_comparison_has_all_figures_of_every_case(
    mlp_onnx: Callable[[int], Path],
    mlp_program: Callable[[int], tuple[torch.nn.Module, Path]],
    sample: Feeds,
    tmp_path: Path,
    empty_temp: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A foreign folder whose files must not be mistaken for packages, and a relative path into it.
    (tmp_path / "onnxruntime.py").write_text("raise RuntimeError('imported from the current folder')")
    (tmp_path / "dense.onnx").write_bytes(mlp_onnx(64).read_bytes())
    monkeypatch.chdir(tmp_path)
    dense = Variant(Path("dense.onnx"), mlp_program(64)[1])
    pruned = Variant(mlp_onnx(32), mlp_program(32)[1])
    config = ProfileConfig(runtimes=("ort-cpu", "torch"), batch_sizes=(2,), threads=1, seconds=1.0)
    seen: list[tuple[float, str]] = []
    comparison = compare(dense, pruned, sample, config, lambda fraction, name: seen.append((fraction, name)))

    assert [(one.runtime, one.batch_size) for one in comparison.measurements] == [("ort-cpu", 2), ("torch", 2)]
    for one in comparison.measurements:
        assert len({len(turns) for turns in vars(one.samples_ms).values()}) == 1
        # How fast each is depends on the machine: the figures must be those of the samples.
        assert 0 < one.speedup.low <= one.speedup.value <= one.speedup.high
        assert one.noise.low <= one.noise.value <= one.noise.high
        assert one.throughput_per_s["dense"] == pytest.approx(2e3 / one.summary["dense"].mean_ms)
        assert one.peak_rss_mib > 10
    assert comparison.protocol["threads"] == 1
    assert comparison.environment["versions"]["onnxruntime"]
    assert [fraction for fraction, _ in seen] == sorted(fraction for fraction, _ in seen)
    assert (seen[0], seen[-1]) == ((0.0, "ort-cpu, batch 2"), (1.0, "torch, batch 2"))
    saved = TypeAdapter(Comparison).dump_json(comparison)
    assert TypeAdapter(Comparison).validate_json(saved) == comparison
    assert not list(empty_temp.glob("optin-*"))


def test_a_worker_that_fails_is_one_line(
    mlp_onnx: Callable[[int], Path], sample: Feeds, tmp_path: Path, empty_temp: Path
) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no onnx at all")
    with pytest.raises(ProfilingError) as caught:
        compare(Variant(mlp_onnx(32)), Variant(broken), sample, QUICK)
    message = str(caught.value)
    assert re.search(r"ort-cpu, batch 1.*cannot load.*broken\.onnx", message)
    assert "\n" not in message
    assert not list(empty_temp.glob("optin-*"))


@pytest.mark.parametrize(("code", "ending"), [("SEGV", "SIGSEGV"), ("KILL", "SIGKILL.*out of memory")])
def test_a_worker_that_crashes_is_one_line(
    mlp_onnx: Callable[[int], Path],
    sample: Feeds,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: str,
    ending: str,
) -> None:
    crash = tmp_path / "crash"
    crash.write_text(f"#!/bin/sh\nkill -{code} $$\n")
    crash.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(crash))
    with pytest.raises(ProfilingError, match=f"ort-cpu, batch 1.*{ending}"):
        compare(Variant(mlp_onnx(32)), Variant(mlp_onnx(32)), sample, QUICK)


def test_an_interruption_ends_the_worker_and_cleans_up(
    mlp_onnx: Callable[[int], Path], sample: Feeds, empty_temp: Path
) -> None:
    def interrupt(fraction: float, name: str) -> None:
        if fraction > 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(Variant(mlp_onnx(32)), Variant(mlp_onnx(32)), sample, QUICK, interrupt)
    assert not list(empty_temp.glob("optin-*"))


def test_what_is_missing_is_told_before_measuring(mlp_onnx: Callable[[int], Path], sample: Feeds) -> None:
    here = Variant(mlp_onnx(32))
    with pytest.raises(ProfilingError, match=r"torch, batch 1.*pruned.*exported program"):
        compare(Variant(here.onnx, here.onnx), here, sample, ProfileConfig(runtimes=("torch",)))
    with pytest.raises(ProfilingError, match=r"dense.*absent\.onnx does not exist"):
        compare(Variant(Path("absent.onnx")), here, sample, QUICK)
    with pytest.raises(ProfilingError, match=r"'x'.*\(2, 64\)"):
        compare(here, here, {"x": np.repeat(sample["x"], 2, axis=0)}, QUICK)


def test_several_builds_are_told_apart(
    mlp_onnx: Callable[[int], Path], sample: Feeds, monkeypatch: pytest.MonkeyPatch
) -> None:
    # ONNX files in the place of engines, which need a GPU.
    monkeypatch.setattr(Variant, "builds", lambda self, *_: self.engines["rtx", 1])
    dense = Variant(mlp_onnx(64), engines={("rtx", 1): (mlp_onnx(64), mlp_onnx(64), mlp_onnx(64))})
    pruned = Variant(mlp_onnx(32), engines={("rtx", 1): (mlp_onnx(32),)})
    (found,) = compare(dense, pruned, sample, QUICK).measurements
    assert {name: len(of.p50_ms) for name, of in found.builds.items()} == {"dense": 3, "dense_again": 3}
    assert all(of.spread >= 0 for of in found.builds.values())


def test_engines_are_one_file_or_several() -> None:
    one, two = Path("1.engine"), Path("2.engine")
    variant = Variant(Path("net.onnx"), engines={("rtx", 1): one, ("rtx", 8): (one, two)})
    assert variant.builds("rtx", 1) == (one,) and variant.builds("rtx", 8) == (one, two)
    assert variant.file("rtx", 8) == one and variant.file("rtx", 2) is None and variant.builds("torch", 1) == ()
    assert variant.builds("ort-cpu", 8) == (Path("net.onnx"),)
