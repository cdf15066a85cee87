import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_models
import torch
from torch import Tensor, nn

# The benchmarks are scripts: they import each other by name.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import common
import realised_ratio
import torch_pruned
from realised_ratio import OURS, THEIRS, Row

from exporters import onnx_from_program, trace
from optin_deploy.data.calibration import from_batches
from optin_deploy.network import Network, TensorOutputs
from optin_deploy.nn.flops import count_flops
from profilers.stats import Interval

pytestmark = pytest.mark.slow


needs_torch_pruning = pytest.mark.skipif(not torch_pruned.installed(), reason="torch-pruning is not installed")


def networks() -> dict[str, Network]:
    return {"vit": tiny_models.vision_network(), "bert": tiny.network("bert")}


def row(method: str = OURS, batch_size: int = 1, speedup: float = 1.8) -> Row:
    found = Interval(speedup, speedup - 0.1, speedup + 0.1)
    noise = Interval(1.0, 0.98, 1.02)
    return Row("deit_tiny", method, "ort-cpu", batch_size, 0.5, 20.0, 20 / speedup, found, noise, speedup / 2, 12, True)


def held_out(network: Network) -> tuple[dict[str, Tensor], ...]:
    batch = {name: tensor.repeat_interleave(8, 0)[:8] for name, tensor in network.inputs.items()}
    return (batch,)


@needs_torch_pruning
def test_torch_pruning_meets_the_flops() -> None:
    network = tiny_models.vision_network()
    module, ratio = torch_pruned.prune(network, 0.5)
    dense = count_flops(network.module, network.inputs)
    assert count_flops(module, network.inputs) / dense == pytest.approx(0.5, abs=torch_pruned.WINDOW)
    assert 0.1 < ratio < 0.5
    assert count_flops(network.module, network.inputs) == dense


@needs_torch_pruning
@pytest.mark.parametrize("name", ["vit", "bert"])
def test_what_torch_pruning_leaves_is_exported_as_it_computes(name: str, tmp_path: Path) -> None:
    network = networks()[name]
    small = network.with_module(torch_pruned.at_ratio(network, 0.5))
    assert count_flops(small.module, network.inputs) < 0.6 * count_flops(network.module, network.inputs)
    # It ends the program when the ONNX file is not equal to torch.
    realised_ratio.export(small, tmp_path / "small", held_out(network))
    assert {file.suffix for file in tmp_path.iterdir()} == {".onnx", ".pt2"}


@needs_torch_pruning
def test_torch_pruning_narrows_the_heads_of_a_vit_and_removes_those_of_bert() -> None:
    dense = networks()
    vit, bert = (torch_pruned.at_ratio(dense[name], 0.5) for name in ("vit", "bert"))
    attention, whole = vit.blocks[0].attn, dense["vit"].module.blocks[0].attn
    assert (attention.num_heads, attention.head_dim) == (whole.num_heads, whole.head_dim // 2)
    attention, whole = bert.encoder.layer[0].attention.self, dense["bert"].module.encoder.layer[0].attention.self
    assert attention.num_attention_heads == whole.num_attention_heads // 2
    assert attention.attention_head_size == whole.attention_head_size


def test_bisection_finds_the_ratio_and_keeps_the_closest() -> None:
    def pruned(ratio: float) -> tuple[nn.Module, float]:
        return nn.Identity(), (1 - ratio) ** 2

    _, ratio, share = torch_pruned.bisected(pruned, 0.5)
    assert share == pytest.approx(0.5, abs=0.002)
    assert (1 - ratio) ** 2 == share
    # In steps of a quarter nothing is closer to 0.6 than 0.5.
    _, _, share = torch_pruned.bisected(lambda r: (nn.Identity(), round(4 * (1 - r)) / 4), 0.6)
    assert share == 0.5


def test_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    network = tiny_models.vision_network()
    monkeypatch.setattr(torch_pruned, "at_ratio", lambda network, ratio: network.module)
    with pytest.raises(ValueError, match=r"0\.5 of the FLOPs.* 1\.000"):
        torch_pruned.prune(network, 0.5)


def test_a_file_that_is_not_equal_to_torch_is_not_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    network, other = tiny_models.own_network(), tiny_models.own_network(seed=1)

    def of_other_weights(*_: object, **arguments: Any) -> None:
        traced = trace(TensorOutputs(other.module, other.outputs), other.inputs, other.dynamic_axes)
        onnx_from_program(traced, tmp_path / "small.onnx", **arguments)

    monkeypatch.setattr(realised_ratio, "onnx_from_program", of_other_weights)
    with pytest.raises(SystemExit, match=r"small\.onnx.* output .*nothing"):
        realised_ratio.export(network, tmp_path / "small", held_out(network))


def test_ours_is_pruned_to_the_same_flops() -> None:
    network = tiny_models.vision_network()
    generator = torch.Generator().manual_seed(0)
    batches = tuple({"x": torch.randn(8, 3, 32, 32, generator=generator)} for _ in range(2))
    calibration = from_batches(batches)
    pruned = realised_ratio.pruned_by_all(network, calibration)
    assert list(pruned) == [OURS, THEIRS] if torch_pruned.installed() else [OURS]
    dense = count_flops(network.module, network.inputs)
    for small in pruned.values():
        assert count_flops(small.module, network.inputs) / dense == pytest.approx(0.5, abs=0.02)


def test_a_case_measured_again_replaces_its_rows() -> None:
    old = [row(), row(THEIRS), row(batch_size=8)]
    new = [row(speedup=1.9)]
    assert realised_ratio.RESULT.merge(old, new) == [row(batch_size=8), row(speedup=1.9)]


def test_table_has_a_line_a_case_and_columns_for_each_method() -> None:
    heading, lines = realised_ratio.cells([row(), row(THEIRS, speedup=1.6), row(batch_size=8)])
    assert len(lines) == 2
    assert all(len(line) == len(heading) for line in lines)
    assert lines[0][4:8] == ["1.80× [1.70–1.90]", "0.90", "1.60× [1.50–1.70]", "0.80"]
    assert lines[1][6:8] == ["–", "–"]
    assert THEIRS not in " ".join(realised_ratio.cells([row()])[0])
    written = realised_ratio.markdown([row()]).splitlines()
    assert written[1].startswith("| --- |")
    assert "[1.70–1.90]" in written[2]


def test_rows_come_back_from_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    assert realised_ratio.RESULT.read() == []
    realised_ratio.RESULT.write([row(), row(THEIRS)], threads=1)
    assert (
        realised_ratio.RESULT.add([row(speedup=1.9)], threads=1) == realised_ratio.RESULT.read() == [row(speedup=1.9)]
    )


def test_every_result_file_is_read_by_its_script() -> None:
    for name in ("alignment", "equal_latency", "latency_budget", "noise", "realised_ratio", "precision", "tokens"):
        script = importlib.import_module(name)
        assert script.table(script.RESULT.read()).row_count > 0, name
