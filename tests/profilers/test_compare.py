import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from profilers import Comparison, ProfileConfig, ProfilingError, Variant, compare
from profilers.plain import from_plain

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
        ({"runtimes": ("abacus",)}, "unknown runtime 'abacus': choose from ort-cpu, ort-cuda, ort-tensorrt, torch"),
        ({"runtimes": ()}, "no runtime given: choose from"),
        ({"batch_sizes": ()}, "batch sizes must be 1 or more"),
        ({"batch_sizes": (1, 0)}, "batch sizes must be 1 or more"),
        ({"threads": 0}, "threads must be 1 or more"),
        ({"seconds": 0.0}, "seconds must be more than 0"),
        ({"seconds": float("nan")}, "seconds must be more than 0"),
        ({"seed": -1}, "seed must be 0 or more"),
    ],
)
def test_config_is_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProfileConfig(**fields)


def test_a_much_smaller_network_is_found_to_be_faster(
    mlp_onnx: Callable[[int], Path],
    mlp_program: Callable[[int], tuple[torch.nn.Module, Path]],
    sample: Feeds,
    tmp_path: Path,
    empty_temp: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A foreign folder whose files must not be mistaken for packages, and a relative path into it.
    (tmp_path / "onnxruntime.py").write_text("raise RuntimeError('imported from the current folder')")
    (tmp_path / "dense.onnx").write_bytes(mlp_onnx(2048).read_bytes())
    monkeypatch.chdir(tmp_path)
    dense = Variant(Path("dense.onnx"), mlp_program(16384)[1])
    pruned = Variant(mlp_onnx(256), mlp_program(256)[1])
    config = ProfileConfig(runtimes=("ort-cpu", "torch"), batch_sizes=(2,), threads=1, seconds=1.0)
    seen: list[tuple[float, str]] = []
    comparison = compare(dense, pruned, sample, config, lambda fraction, name: seen.append((fraction, name)))

    assert [(one.runtime, one.batch_size) for one in comparison.measurements] == [("ort-cpu", 2), ("torch", 2)]
    for one in comparison.measurements:
        assert set(one.samples_ms) == set(one.summary) == {"dense", "dense_again", "pruned"}
        assert len({len(turns) for turns in one.samples_ms.values()}) == 1
        assert one.speedup.value > 2
        assert one.speedup.low > 1
        assert one.significant
        assert 0.5 < one.noise.value < 2
        assert one.throughput_per_s["dense"] == pytest.approx(2e3 / one.summary["dense"].mean_ms)
        assert one.peak_rss_mib > 10
    assert comparison.protocol["threads"] == 1
    assert comparison.environment["versions"]["onnxruntime"]
    assert [fraction for fraction, _ in seen] == sorted(fraction for fraction, _ in seen)
    assert (seen[0], seen[-1]) == ((0.0, "ort-cpu, batch 2"), (1.0, "torch, batch 2"))
    assert from_plain(Comparison, json.loads(json.dumps(comparison.to_dict()))) == comparison
    assert not list(empty_temp.glob("optin-*"))


def test_a_worker_that_fails_is_one_line(
    mlp_onnx: Callable[[int], Path], sample: Feeds, tmp_path: Path, empty_temp: Path
) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no onnx at all")
    with pytest.raises(ProfilingError) as caught:
        compare(Variant(mlp_onnx(32)), Variant(broken), sample, QUICK)
    message = str(caught.value)
    assert message.startswith("measuring ort-cpu, batch 1 failed: onnxruntime cannot load")
    assert "\n" not in message
    assert not list(empty_temp.glob("optin-*"))


@pytest.mark.parametrize(("code", "ending"), [("SEGV", "SIGSEGV: it"), ("KILL", r"SIGKILL \(out of memory\?\): it")])
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
    with pytest.raises(ProfilingError, match=f"measuring ort-cpu, batch 1 was killed by {ending} said nothing"):
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
    with pytest.raises(ProfilingError, match=r"runtime torch, batch 1, needs the pruned network's exported program"):
        compare(Variant(here.onnx, here.onnx), here, sample, ProfileConfig(runtimes=("torch",)))
    with pytest.raises(ProfilingError, match=r"the dense network's file .*absent\.onnx does not exist"):
        compare(Variant(Path("absent.onnx")), here, sample, QUICK)
    with pytest.raises(ProfilingError, match=r"sample 'x' has shape \(2, 64\): its leading dimension must be 1"):
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
