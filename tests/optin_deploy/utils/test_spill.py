import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import save_images
from transformers.modeling_outputs import BaseModelOutput

from optin_deploy.nn.partial_forward import keep_shapes_only
from optin_deploy.utils.spill import SpillList

LIMIT = 3 * 4 * 1_000


def value(seed: int, size: int = 1_000) -> dict[str, object]:
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(size, generator=generator), "more": (torch.tensor(seed), "name", None)}


def same(first: object, second: object) -> bool:
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return (
            isinstance(second, dict) and list(first) == list(second) and all(same(first[k], second[k]) for k in first)
        )
    if isinstance(first, tuple):
        return isinstance(second, tuple) and all(map(same, first, second))
    return first == second


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """The temporary files that are made."""
    files: list[object] = []
    make = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **options: files.append(make(**options)) or files[-1])
    yield files


def test_a_spill_list_is_a_list(written: list[object]) -> None:
    expected = [value(i) for i in range(8)]
    spill_list = SpillList(expected, in_memory=LIMIT)
    assert len(written) == 1
    assert len(spill_list) == 8 and all(map(same, spill_list, expected))
    # What is as large goes where the one before was, what is larger behind all others.
    for index, size in ((6, 1_000), (5, 3_000), (0, 10), (7, 2_000), (6, 500), (-1, 2_500)):
        expected[index] = spill_list[index] = value(20 + index, size)
        assert all(map(same, spill_list, expected))
    assert all(map(same, spill_list[2:7][1:], expected[3:7]))
    assert same(spill_list[1::2][-1], expected[7])


def test_what_fits_stays_as_it_is(written: list[object]) -> None:
    own = value(0)
    spill_list = SpillList([own, value(1)], in_memory=LIMIT)
    assert spill_list[0]["x"] is own["x"] and not written


def test_other_types(written: list[object]) -> None:
    odd = {
        "half": torch.randn(1_000).bfloat16(),
        "turned": torch.randn(30, 40).T,
        "none": torch.zeros(0, 5),
        "flags": torch.rand(2_000) > 0.5,
    }
    assert same(SpillList([odd], in_memory=0)[0], odd)
    output = BaseModelOutput(last_hidden_state=torch.randn(2, 700))
    found = SpillList([output], in_memory=0)[0]
    assert isinstance(found, BaseModelOutput) and torch.equal(found.last_hidden_state, output.last_hidden_state)
    assert len(written) == 2


def test_outputs_that_only_tell_a_shape_take_no_place(written: list[object]) -> None:
    done = {"block": torch.randn(100, 1_000)}
    keep_shapes_only(done)
    shelf = SpillList([done], in_memory=0)
    assert shelf[0]["block"].shape == (100, 1_000) and not written


_PEAK = """
import re, sys
sys.path.insert(0, sys.argv[1])
import torch
from pathlib import Path
from timm.models.vision_transformer import VisionTransformer
from optin_deploy.utils import spill
from optin_deploy.data.calibration import load_calibration
from optin_deploy.models.custom import custom_network
from optin_deploy.data.preprocessing import ImagePreprocessing
from optin_deploy.pruning.pruner import prune
spill.IN_MEMORY = 2**20
torch.set_num_threads(1)
torch.manual_seed(0)
module = VisionTransformer(img_size=128, patch_size=16, embed_dim=64, depth=2, num_heads=2, num_classes=4)
network = custom_network(module, {"x": torch.randn(2, 3, 128, 128)}, preprocessing=ImagePreprocessing("x", (128, 128)))
calibration = load_calibration(network, Path(sys.argv[2]), samples=int(sys.argv[3]))
prune(network, calibration.batches, 0.6, align=8)
print(calibration.samples, re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def peak_mib(folder: Path, samples: int) -> float:
    """Peak memory of scoring and compensation on so many images, in a process of its own."""
    found = subprocess.run(
        [sys.executable, "-c", _PEAK, str(Path(__file__).parents[3]), str(folder), str(samples)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert int(found[0]) == samples
    return int(found[1]) / 2**10


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.slow
def test_memory_does_not_grow_with_the_calibration_set(tmp_path: Path) -> None:
    save_images(tmp_path / "images", 32 + 256)
    few, many = (peak_mib(tmp_path / "images", samples) for samples in (32, 256))
    # The inputs alone, (256 − 32) · 3 · 128 · 128 numbers of 4 bytes, would take 42 MiB more.
    assert many - few < 21
