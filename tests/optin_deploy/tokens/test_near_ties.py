"""Networks whose tokens are made to tie: what torch may give, and what the parity gate makes of it."""

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from tiny_models import POSITIONS, classifier, save_bert
from torch import Tensor, nn

from optin_deploy.config.recipe import Recipe
from optin_deploy.export.onnx_file import check_onnx, export_files
from optin_deploy.models.load import load_network
from optin_deploy.network import Network
from optin_deploy.pruning.space import analyze
from optin_deploy.structure.plan import Plan
from optin_deploy.tokens.merging import MergingBlocks, with_merging
from optin_deploy.tokens.near_ties import NudgedBlocks, alternatives

pytestmark = pytest.mark.slow


RECIPE = Recipe(model="mine", flops=0.5, runtimes=("ort-cpu",), threads=1)


def merging(network: Network, schedule: tuple[int, ...]) -> Network:
    space = analyze(network, tokens=True)
    assert space.stack is not None
    with_merging(network.module, space.structure, space.stack, Plan({}, schedule))
    return network


def directions(lead: float) -> Tensor:
    """Of a class token and 16 patches: the second patch is as similar to the first as the fourth is to the third, but
    for ``lead``, and no others are alike."""
    patches = torch.eye(16)
    patches[1] = 0.9 * patches[0] + (0.19**0.5) * patches[1]
    patches[3] = (0.9 - lead) * patches[2] + (1 - (0.9 - lead) ** 2) ** 0.5 * patches[3]
    return torch.cat([torch.ones(1, 16), patches])[None]


def leading(monkeypatch: pytest.MonkeyPatch, lead: float) -> None:
    """Tokens are compared by `directions`, whatever they hold."""
    made = directions(lead)
    monkeypatch.setattr(MergingBlocks, "_metric", lambda self, index, block, x: made + 0 * x[:, :, :1])


def image_network() -> Network:
    torch.manual_seed(0)
    return merging(classifier(10, depth=2, patch_size=8), (17, 16))


def sample(network: Network, count: int = 1) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(0)
    return {name: torch.randn(count, *t.shape[1:], generator=made) for name, t in network.inputs.items()}


def found(network: Network, given: dict[str, Tensor]) -> Tensor:
    others = alternatives(network)
    assert others is not None
    with torch.inference_mode():
        return others(given, {})[0]


def test_both_outcomes_of_a_near_tie_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    network = image_network()
    given = sample(network)
    outcomes = []
    for lead in (1e-7, -1e-7):
        leading(monkeypatch, lead)
        outcomes.append(network.forward(given)["logits"].detach())
    assert (outcomes[0] - outcomes[1]).abs().max() > 1e-3
    candidates = found(network, given)
    which = torch.stack([(candidates - outcome).abs().amax(1) < 1e-6 for outcome in outcomes])
    assert which.any(1).all() and (which.sum(0) == 1).all()


def test_what_rounding_cannot_decide_has_no_alternative(monkeypatch: pytest.MonkeyPatch) -> None:
    network = image_network()
    given = sample(network)
    leading(monkeypatch, 1e-3)
    expected = network.forward(given)["logits"]
    torch.testing.assert_close(found(network, given), expected.expand(32, -1).detach(), atol=1e-6, rtol=0)


def test_the_network_itself_stays_as_it_is_and_its_weights_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    network = image_network()
    shared: list[nn.Module] = []

    def watched(self: NudgedBlocks, *rest: Any) -> Tensor:
        shared.append(self)
        return MergingBlocks._metric(self, *rest)

    monkeypatch.setattr(NudgedBlocks, "_metric", watched)
    found(network, sample(network))
    assert not any(isinstance(part, NudgedBlocks) for part in network.module.modules())
    own = {p.data_ptr() for p in network.module.parameters()}
    assert {p.data_ptr() for p in shared[0].parameters()} <= own


def test_a_network_that_merges_nothing_has_none() -> None:
    assert alternatives(classifier(10)) is None


def test_texts_have_alternatives_of_their_length(tmp_path: Path) -> None:
    save_bert(tmp_path)
    network = load_network(str(tmp_path), sequence_length=POSITIONS)
    merging(network, (POSITIONS, POSITIONS // 2 + 1))
    given = {name: t[:1, :7] for name, t in network.inputs.items()}
    expected = network.forward(given)
    name = next(iter(expected))
    assert found(network, given).shape == (32, *expected[name].shape[1:])


def changed(path: Path) -> None:
    model = onnx.load(path)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("head.weight"))
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * 1.01, tensor.name))
    onnx.save(model, path)


def test_the_parity_gate_passes_a_file_that_decides_the_other_way_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = image_network()
    batches: Any = (sample(network, 8),)
    leading(monkeypatch, -1e-7)
    export_files(network, tmp_path / "net.onnx", tmp_path / "net.pt2", RECIPE, batches)
    leading(monkeypatch, 1e-7)
    (parity,) = check_onnx(network, tmp_path / "net.onnx", batches, RECIPE)
    assert parity.passed and parity.max_abs_error < 1e-5
    assert (parity.near_ties, parity.samples) == (12, 12)
    changed(tmp_path / "net.onnx")
    (parity,) = check_onnx(network, tmp_path / "net.onnx", batches, RECIPE)
    assert not parity.passed and parity.near_ties == 0
    leading(monkeypatch, 1e-3)
    export_files(network, tmp_path / "other.onnx", tmp_path / "other.pt2", RECIPE, batches)
    leading(monkeypatch, -1e-3)
    (parity,) = check_onnx(network, tmp_path / "other.onnx", batches, RECIPE)
    assert not parity.passed
