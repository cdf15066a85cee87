"""The plan that a run has chosen, sliced against masked: what no trial foresaw ends the run before compensation."""

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny_models import save_bert, save_lines, texts
from together import together
from torch import Tensor, nn

from optin_deploy.cli.main import main
from optin_deploy.config.recipe import Recipe
from optin_deploy.data.calibration import from_batches
from optin_deploy.distributed.ranks import SINGLE_PROCESS, Ranks, Shared
from optin_deploy.errors import GateError
from optin_deploy.models.custom import custom_network
from optin_deploy.network import Network
from optin_deploy.pruning import removal, verify_plan
from optin_deploy.pruning.pruner import prune, prune_to
from optin_deploy.pruning.space import analyze
from optin_deploy.pruning.verify_plan import check_cut
from optin_deploy.run.pipeline import prune_export
from optin_deploy.search.knapsack import lowest
from optin_deploy.structure.describe import describe
from optin_deploy.structure.groups import Structure
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import slice_network
from optin_deploy.structure.verify_slices import Verdict

pytestmark = pytest.mark.slow


WIDTH, NEURONS = 12, 120


class FeedForward(nn.Module):
    """One that takes sines where its neurons are a multiple of 8, as no trial keeps, if it is ``odd``."""

    def __init__(self, odd: bool) -> None:
        super().__init__()
        self.up, self.down, self.odd = nn.Linear(WIDTH, NEURONS), nn.Linear(NEURONS, WIDTH), odd

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        sine = self.odd and x.shape[-1] < NEURONS and x.shape[-1] % 8 == 0
        return self.down(x.sin() if sine else x.relu())


class Block(nn.Module):
    def __init__(self, odd: bool) -> None:
        super().__init__()
        self.inner = FeedForward(odd)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def network(*odd: bool) -> Network:
    torch.manual_seed(0)
    module = tiny.randomised(nn.Sequential(*map(Block, odd or (False, True, False))))
    return custom_network(module, {"input": torch.randn(2, 5, WIDTH)})


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input": torch.randn(6, 5, WIDTH, generator=generator)} for _ in range(count)]


LINE = r"\.inner.* cannot be cut as this plan asks: its units are not interchangeable: with \d+ of 120 left, it is "
ODD = (True, True, True)


def test_a_plan_that_no_trial_foresaw_is_not_compensated(monkeypatch: pytest.MonkeyPatch) -> None:
    of = network(*ODD)
    assert len(describe(of.module, of.inputs).groups) == 3
    monkeypatch.setattr(removal.Remover, "_compensate", lambda *_: pytest.fail("compensated"))
    with pytest.raises(GateError, match=LINE) as found:
        prune(of, batches(), 0.5, align=8)
    assert "\n" not in str(found.value)
    with pytest.raises(GateError, match=r"1\.inner .*40 of 120"):
        prune_to(network(), batches(), Plan({"1.inner": tuple(range(40)), "0.inner": tuple(range(7))}))


def test_a_plan_that_works_passes_with_the_same_network() -> None:
    of = network()
    pruned = prune_to(of, batches(), Plan({"1.inner": tuple(range(41))}))
    assert pruned.network.module[1].inner.up.out_features == 41


def test_every_round_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[int] = []

    def note(dense: Network, small: nn.Module, structure: Structure, plan: Plan, batches: Any) -> None:
        check_cut(dense, small, structure, plan, batches)
        checked.append(sum(p.numel() for p in small.parameters()))

    monkeypatch.setattr(removal, "check_cut", note)
    of = tiny.network("vit")
    prune(of, tiny.batches(of, 2), 0.5, align=1, rounds=3)
    assert len(checked) == 3 and checked == sorted(checked, reverse=True)


@pytest.mark.parametrize("name", ["vit", "bert_classifier", "resnet", "plain_resnet"])
@pytest.mark.parametrize("part", [0.0, 0.3, 0.7])
def test_networks_that_can_be_pruned_pass(name: str, part: float) -> None:
    """``part`` of what may be removed stays."""
    of = tiny.network(name)
    space = analyze(of)
    least = lowest(space.structure, space.costs) + 0.01
    prune(of, tiny.batches(of, 2), least + part * (1 - least), align=1)


def test_bottlenecks_pass() -> None:
    """The first convolution's channels end where the second's begin."""
    of = tiny.cnn(block=tiny.resnet.Bottleneck)
    structure = describe(of.module, of.inputs)
    assert all(g.together is None for g in structure.groups) and any(g.parent for g in structure.groups)
    prune(of, tiny.batches(of, 2), 0.97, align=1)


def test_a_stand_in_that_is_none_is_found() -> None:
    of = network()
    structure = describe(of.module, of.inputs)
    wrong = replace(structure.groups[0], placeholders=(("0.inner", "pass"),))
    structure = replace(structure, groups=(wrong, *structure.groups[1:]))
    plan = Plan({"0.inner": (), "2.inner": tuple(range(9))})
    small = slice_network(of.module, structure, plan)
    with pytest.raises(GateError, match=r"^0\.inner .* 0 of 120"):
        check_cut(of, small, structure, plan, batches())


def test_a_network_that_is_not_the_sliced_one_is_found() -> None:
    of = network()
    structure = describe(of.module, of.inputs)
    plan = Plan({"0.inner": tuple(range(9))})
    small = slice_network(of.module, structure, plan)
    check_cut(of, small, structure, plan, batches())
    other = copy.deepcopy(small)
    with torch.no_grad():
        other[0].inner.up.weight[0] += 0.01
    with pytest.raises(GateError, match=r"^the network cannot be cut"):
        check_cut(of, other, structure, plan, batches())


def test_a_calibration_batch_tells_what_the_sample_does_not() -> None:
    class OnlyLarge(FeedForward):
        def forward(self, x: Tensor) -> Tensor:
            inner = self.up(x)
            return self.down(inner.flip(-1) if float(x.abs().max()) > 50 else inner.relu())

    torch.manual_seed(0)
    block = Block(False)
    block.inner = OnlyLarge(False)
    of = custom_network(tiny.randomised(nn.Sequential(block)), {"input": torch.randn(2, 5, WIDTH)})
    assert describe(of.module, of.inputs).groups
    with pytest.raises(GateError, match=r"0\.inner cannot be cut"):
        prune(of, [{"input": 100 * b["input"]} for b in batches()], 0.5, align=1)


def gate_message(ranks: Ranks) -> dict[str, Tensor]:
    with pytest.raises(GateError) as raised:
        prune(network(*ODD), Shared(batches(), ranks), 0.5, align=8)
    return {"message": torch.tensor(list(str(raised.value).encode()))}


def test_all_processes_end_with_the_gate(tmp_path: Path) -> None:
    expected = gate_message(SINGLE_PROCESS)
    for found in together(gate_message, 2, tmp_path):
        assert torch.equal(found["message"], expected["message"])


def test_a_run_leaves_no_checkpoint(tmp_path: Path) -> None:
    recipe = Recipe(model="mine", flops=0.5, runtimes=("ort-cpu",), batch_sizes=(1,), threads=1, align=8)
    with pytest.raises(GateError, match=LINE):
        prune_export(
            recipe, output=tmp_path / "run", network=network(*ODD), calibration=from_batches(batches()), quiet=True
        )
    left = {file.name for file in (tmp_path / "run").iterdir()}
    assert not left & {"checkpoint", "plan.json", "pruned.onnx", "report.json"}


def test_the_command_ends_with_3_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_bert(tmp_path / "model", num_hidden_layers=1)
    save_lines(tmp_path / "texts.txt", texts(20))
    monkeypatch.setattr(verify_plan, "compare_slices", lambda *_: Verdict({}, 0.138))
    arguments = [
        "prune-export",
        "--model",
        str(tmp_path / "model"),
        "--flops",
        "0.7",
        "--output",
        str(tmp_path / "run"),
    ]
    arguments += ["--calibration", str(tmp_path / "texts.txt"), "--calibration-samples", "8", "--runtimes", "ort-cpu"]
    monkeypatch.setattr("sys.argv", ["optin-deploy", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 3
    lines = [line for line in capsys.readouterr().err.splitlines() if "gate failed" in line]
    assert len(lines) == 1 and re.search(r"the network cannot be cut", lines[0]) and "14 % off" in lines[0]
