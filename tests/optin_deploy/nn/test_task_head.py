"""Heads of one logit, several labels and plain numbers, from the network to what is told of it."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import scipy.special
import tiny
import torch
from scipy.stats import spearmanr
from tiny_models import TinyModule, classifier, own_batches, own_network, save_bert, save_images, save_lines, texts
from torch import Tensor, nn

from optin_deploy.compensation.classifier import Rows, fit, refit_classifier
from optin_deploy.config.recipe import Recipe
from optin_deploy.criteria.fisher import fisher_scores, mask_gradients
from optin_deploy.criteria.scoring import Scoring
from optin_deploy.criteria.trajectory import exact_scores
from optin_deploy.criteria.trajectory_loss import LossSettings
from optin_deploy.data.calibration import from_batches
from optin_deploy.errors import UserError
from optin_deploy.evaluation.agreement import agreement
from optin_deploy.evaluation.example_images import draw_examples, is_map
from optin_deploy.evaluation.load import load_dataset
from optin_deploy.models import checkpoint, timm_models, transformers_models
from optin_deploy.models.custom import custom_network
from optin_deploy.models.load import load_network
from optin_deploy.network import Network, Source
from optin_deploy.nn.task_head import HeadKind, answers, class_axis, head_of
from optin_deploy.pruning.pruner import prune
from optin_deploy.pruning.space import analyze
from optin_deploy.report import read_report, wording
from optin_deploy.report.comparison import lines
from optin_deploy.run.pipeline import prune_export
from optin_deploy.structure.plan import Plan
from optin_deploy.sweeps.report_builder import build_sweep_report
from optin_deploy.sweeps.wording import judged_by, worth

pytestmark = pytest.mark.slow


class Head(nn.Module):
    """Linear, with an output of some shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.map = nn.Linear(4, int(torch.tensor(shape).prod()) if shape else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x).reshape(-1, *self.shape)


# Where it is known from


@pytest.mark.parametrize(
    ("shape", "said", "kind"),
    [
        ((), None, "binary"),
        ((1,), None, "binary"),
        ((3,), None, "classes"),
        ((5, 1), None, "binary"),
        ((5, 3), None, "classes"),
        ((1, 6, 6), None, "binary"),
        ((2, 6, 6), None, "classes"),
        ((1, 3, 6, 6), None, "binary"),
        ((2, 3, 6, 1), None, "classes"),
        ((3,), "binary", "binary"),
        ((1,), "regression", "regression"),
        ((4,), "regression", "regression"),
    ],
)
def test_what_a_module_of_ones_own_means(shape: tuple[int, ...], said: HeadKind | None, kind: HeadKind) -> None:
    network = custom_network(Head(shape), {"x": torch.randn(2, 4)}, logits="output", head=said)
    assert network.head == kind


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"logits": "output", "head": "classes"}, "one class"),
        ({"logits": "output", "head": "softmax"}, "head='softmax'"),
        ({"head": "binary"}, "logits="),
    ],
)
def test_heads_that_cannot_be(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        custom_network(Head((1,)), {"x": torch.randn(2, 4)}, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("classes", "kind", "logits"), [(1, "binary", "logits"), (5, "classes", "logits"), (0, "classes", None)]
)
def test_what_timm_networks_mean(classes: int, kind: HeadKind, logits: str | None) -> None:
    network = classifier(classes)
    assert (network.head, network.logits) == (kind, logits)


@pytest.mark.parametrize(
    ("labels", "problem", "kind"),
    [
        (1, None, "binary"),
        (1, "multi_label_classification", "binary"),
        (1, "regression", "regression"),
        (3, None, "classes"),
        (3, "single_label_classification", "classes"),
        (3, "multi_label_classification", "binary"),
        (3, "regression", "regression"),
    ],
)
def test_what_transformers_networks_mean(tmp_path: Path, labels: int, problem: str | None, kind: HeadKind) -> None:
    save_bert(tmp_path / "m", id2label=None, label2id=None, num_labels=labels, problem_type=problem)
    network = load_network(str(tmp_path / "m"), sequence_length=8)
    assert network.head == kind
    checkpoint.save(network, Plan({}), tmp_path / "saved")
    assert checkpoint.load_network(tmp_path / "saved").head == kind
    # As a version wrote it that knew of no heads.
    path = tmp_path / "saved" / "optin.json"
    old = {name: value for name, value in json.loads(path.read_text()).items() if name != "head"}
    path.write_text(json.dumps(old))
    assert checkpoint.load_network(tmp_path / "saved").head == kind


@pytest.mark.parametrize(("labels", "kind"), [(1, "binary"), (3, "classes")])
def test_problem_types_are_of_whole_samples(labels: int, kind: HeadKind) -> None:
    """A token classifier takes no notice of `problem_type`."""
    from tiny_models import bert_config
    from transformers import BertForTokenClassification

    config = bert_config(id2label=None, label2id=None, num_labels=labels, problem_type="regression")
    module = BertForTokenClassification(config).eval()
    with torch.no_grad():
        logits = module(torch.randint(4, 40, (2, 6))).logits
    assert transformers_models.head_kind(module, logits) == kind


@pytest.mark.parametrize("said", [None, "regression"])
def test_checkpoints_of_ones_own_modules_keep_the_head(tmp_path: Path, said: HeadKind | None) -> None:
    module = TinyModule()
    module.head = nn.Linear(32, 1)
    network = custom_network(module, {"features": torch.randn(2, 5, 8)}, logits="output", head=said)
    checkpoint.save(network, Plan({}), tmp_path / "saved")
    assert checkpoint.load_network(tmp_path / "saved", module).head == (said or "binary")


def test_a_checkpoint_that_says_one_logit_tells_classes(tmp_path: Path) -> None:
    checkpoint.save(classifier(1, depth=1), Plan({}), tmp_path / "saved")
    path = tmp_path / "saved" / "optin.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "head": "classes"}))
    with pytest.raises(UserError, match="one class"):
        checkpoint.load_network(tmp_path / "saved")


def test_answers() -> None:
    logits = torch.tensor([[-1.0, 2.0], [3.0, 0.5]])
    assert answers("classes", logits).tolist() == [1, 0]
    assert answers("binary", logits).tolist() == [[False, True], [True, True]]
    assert answers("regression", logits) is logits
    assert class_axis(torch.zeros(2, 3, 4, 5, 6)) == 1
    assert head_of(torch.zeros(2, 1)) == "binary"


# One logit in the place of two


def one_of_two(network: Network, name: str) -> Network:
    """The network whose one logit is the second of two less the first."""
    module = copy.deepcopy(network.module)
    old = module.get_submodule(name)
    assert isinstance(old, nn.Linear) and old.out_features == 2
    new = nn.Linear(old.in_features, 1)
    with torch.no_grad():
        new.weight.copy_(old.weight[1:] - old.weight[:1])
        new.bias.copy_(old.bias[1:] - old.bias[:1])
    module.set_submodule(name, new)
    return replace(network, module=module.eval(), head="binary")


@pytest.fixture(scope="module")
def two() -> Network:
    return classifier(2, depth=2)


def images(count: int = 4, size: int = 6) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [{"x": torch.randn(size, 3, 32, 32, generator=generator)} for _ in range(count)]


def test_one_logit_scores_units_as_two_do(two: Network) -> None:
    """Masked one by one, with the same weight of the task part: no draws differ."""
    one, structure = one_of_two(two, "head"), analyze(two).structure
    found = [
        exact_scores(n, structure, structure.groups, images(1), LossSettings(factors={"logits": 1e6}, seed=0))
        for n in (one, two)
    ]
    for name, scores in found[0].items():
        torch.testing.assert_close(scores, found[1][name], rtol=1e-3, atol=1e-6 * float(scores.max()))


@pytest.mark.parametrize("strength", [0.01, 0.3])
def test_one_logit_is_refitted_as_two_are(strength: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, old, y = (torch.randn(*shape, generator=generator).double() for shape in ((60, 3), (4, 2), (60, 2)))
    none = torch.zeros(60, dtype=torch.bool)
    two = fit(Rows(x, y.softmax(1), none), old, [strength], bias=True)
    one = fit(
        Rows(x, (y[:, 1:] - y[:, :1]).sigmoid(), none), old[:, 1:] - old[:, :1], [strength], bias=True, head="binary"
    )
    torch.testing.assert_close(one, two[:, 1:] - two[:, :1], rtol=0, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(), (1,), (3,)])
def test_a_refit_of_yes_and_no_comes_nearer(shape: tuple[int, ...]) -> None:
    network = values_network("binary", shape)
    other = Head(shape)
    batches = [{"x": torch.randn(20, 4, generator=torch.Generator().manual_seed(i))} for i in range(4)]

    def divergence() -> float:
        p, q = (torch.cat([m(b["x"]) for b in batches]).double().sigmoid() for m in (network.module, other))
        return float((p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean())

    before = divergence()
    refit_classifier(network, other, batches)
    assert divergence() < before / 4


def test_fisher_is_the_same_for_one_logit_and_for_two(two: Network) -> None:
    one, structure = one_of_two(two, "head"), analyze(two, narrow=False).structure
    labels = [torch.tensor([0, 1, 1, 0, 1, 0])]
    found = [fisher_scores(mask_gradients(n, structure, images(1), labels)) for n in (one, two)]
    for name, scores in found[0].items():
        torch.testing.assert_close(scores, found[1][name], rtol=1e-3, atol=1e-6 * float(scores.max()))


@pytest.mark.parametrize("head", ["binary", "regression"])
def test_fits_of_other_heads_are_minima(head: HeadKind) -> None:
    generator = torch.Generator().manual_seed(0)
    x, old = (torch.randn(*shape, generator=generator).double() for shape in ((40, 3), (4, 2)))
    y = x @ old[:-1] + old[-1] + torch.randn(40, 2, generator=generator)
    target, none = y.sigmoid() if head == "binary" else y, torch.zeros(40, dtype=torch.bool)
    found = fit(Rows(x, target, none), old, [0.1], bias=True, head=head)

    def problem(weights: Tensor) -> Tensor:
        z, pull = x @ weights[:-1] + weights[-1], (weights - old)[:-1].square().sum() * x.square().mean() / 2
        if head == "regression":
            return (z - y).square().sum() / 80 + 0.1 * pull
        log_q = target * torch.as_tensor(scipy.special.log_expit(z.numpy()))
        log_q = log_q + (1 - target) * torch.as_tensor(scipy.special.log_expit(-z.numpy()))
        return -log_q.sum() / 40 + 0.05 * pull

    least = problem(found)
    for seed in range(8):
        step = 1e-3 * torch.randn(4, 2, generator=torch.Generator().manual_seed(seed)).double()
        assert problem(found + step) > least


# Whole prunings


@pytest.mark.parametrize("criterion", ["trajectory-obs", "trajectory", "magnitude"])
@pytest.mark.parametrize(("outputs", "head"), [(1, "binary"), (3, "binary"), (1, "regression"), (2, "regression")])
def test_all_heads_are_pruned_by_scores_with_a_signal(outputs: int, head: HeadKind, criterion: Any) -> None:
    network = replace(own_network(), head=head)
    network.module.head = nn.Linear(32, outputs)
    pruned = prune(network, own_batches(), 0.6, scoring=Scoring(criterion))
    for scores in pruned.scores.values():
        assert float(scores.max()) > max(1e-200, float(scores.min()))
    (found,) = agreement(network, pruned.network.module, own_batches(1))
    assert found.top1_agreement is None


# Agreement


def test_signs_and_ranks_of_one_logit(two: Network) -> None:
    one = one_of_two(two, "head")
    other = copy.deepcopy(one.module)
    with torch.no_grad():
        other.head.bias.add_(0.3)
        other.head.weight.mul_(torch.randn(other.head.weight.shape, generator=torch.Generator().manual_seed(0)))
    batches = images(2, 9)
    with torch.no_grad():
        a, b = (torch.cat([one.forward(x, m)["logits"][:, 0] for x in batches]) for m in (one.module, other))
    (found,) = agreement(one, other, batches)
    assert found.top1_agreement is None
    assert found.sign_agreement == pytest.approx(float(((a > 0) == (b > 0)).double().mean()))
    assert found.rank_correlation == pytest.approx(spearmanr(a, b).statistic)
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(a.double(), b.double(), dim=0)))
    told = wording.agreement(found)
    assert "same yes or no on" in told and "rank correlation" in told and "top" not in told


def values_network(head: HeadKind, shape: tuple[int, ...]) -> Network:
    torch.manual_seed(0)
    return custom_network(Head(shape), {"x": torch.randn(2, 4)}, logits="output", head=head)


@pytest.mark.parametrize("shape", [(), (1,), (3,)])
def test_ranks_of_plain_numbers(shape: tuple[int, ...]) -> None:
    network, batch = values_network("regression", shape), {"x": torch.randn(30, 4)}
    other = Head(shape)
    with torch.no_grad():
        a, b = (m(batch["x"]).reshape(30, -1) for m in (network.module, other))
    (found,) = agreement(network, other, [{"x": batch["x"][:20]}, {"x": batch["x"][20:]}])
    each = [spearmanr(x, y).statistic for x, y in zip(a.T, b.T, strict=True)]
    assert found.rank_correlation == pytest.approx(sum(each) / len(each))
    assert (found.top1_agreement, found.sign_agreement) == (None, None)
    assert wording.likeness(found).startswith("rank correlation")


def test_every_label_counts_of_several() -> None:
    network, batch = values_network("binary", (3,)), {"x": torch.randn(30, 4)}
    other = Head((3,))
    (found,) = agreement(network, other, [batch])
    with torch.no_grad():
        equal = (network.module(batch["x"]) > 0) == (other(batch["x"]) > 0)
    assert found.sign_agreement == pytest.approx(float(equal.double().mean()))
    assert found.rank_correlation is None


def test_numbers_that_stand_still_have_no_ranks() -> None:
    network = values_network("regression", (1,))
    other = copy.deepcopy(network.module)
    nn.init.zeros_(other.map.weight)
    (found,) = agreement(network, other, [{"x": torch.randn(5, 4)}])
    assert found.rank_correlation is None
    assert wording.likeness(found).startswith("cosine")


def test_maps_of_one_class_are_compared_by_sign_and_drawn_by_value() -> None:
    network = values_network("binary", (1, 8, 8))
    batch = {"x": torch.randn(3, 4)}
    other = Head((1, 8, 8))
    (found,) = agreement(network, other, [batch])
    with torch.no_grad():
        equal = (network.module(batch["x"]) > 0) == (other(batch["x"]) > 0)
    assert found.sign_agreement == pytest.approx(float(equal.double().mean()))
    assert found.correlation is not None and found.top1_agreement is None
    assert len(draw_examples(network, other, [batch])) == 3


def test_several_labels_for_each_pixel_are_not_drawn() -> None:
    network = values_network("binary", (2, 8, 8))
    assert not is_map(network, "output", torch.zeros(3, 2, 8, 8))
    assert is_map(replace(network, head="classes"), "output", torch.zeros(3, 2, 8, 8))


def test_one_label_for_each_token_leaves_padding_out() -> None:
    network = replace(tiny.network("bert_classifier"), head="binary")
    batch = {"input_ids": torch.tensor([[2, 5, 3, 0]]), "attention_mask": torch.tensor([[1, 1, 0, 0]])}

    class Tokens(nn.Module):
        def __init__(self, values: list[float]) -> None:
            super().__init__()
            self.values = nn.Parameter(torch.tensor(values))

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.values[None, :, None].expand(len(input_ids), -1, 1)

    network = replace(network, outputs={"logits": "output"}, logits="logits", module=Tokens([1.0, -1.0, 1.0, 1.0]))
    (found,) = agreement(network, Tokens([1.0, 1.0, -1.0, -1.0]), [batch])
    assert found.sign_agreement == 0.5


# Labels


def one_logit_text(tmp_path: Path, labels: int = 1, **changes: object) -> Network:
    save_bert(tmp_path / "m", id2label=None, label2id=None, num_labels=labels, **changes)
    return load_network(str(tmp_path / "m"), sequence_length=12)


def given(network: Network, count: int) -> Tensor:
    with torch.no_grad():
        return torch.cat([network.forward(network.preprocessing([t]))["logits"].reshape(1, -1) for t in texts(count)])


def test_a_single_logit_answers_by_its_sign(tmp_path: Path) -> None:
    network = one_logit_text(tmp_path)
    z = given(network, 30)[:, 0]
    network.module.classifier.bias.data.sub_(z.median())
    z = z - z.median()
    labels = [int(i % 3 == 0) for i in range(30)]
    path = save_lines(tmp_path / "t.csv", [f"{t},{label}" for t, label in zip(texts(30), labels, strict=True)])
    dataset = load_dataset(network, path)
    assert dataset.metric == "accuracy"
    right = (z > 0) == torch.tensor(labels).bool()
    assert dataset.measure(network.module) == pytest.approx(100 * float(right.double().mean()))


@pytest.mark.parametrize("problem", [None, "regression"])
def test_numbers_are_judged_by_their_ranks(tmp_path: Path, problem: str | None) -> None:
    network = one_logit_text(tmp_path, problem_type=problem)
    scores = [float(i % 7) / 2 for i in range(30)]
    path = save_lines(tmp_path / "t.csv", [f"{t},{score}" for t, score in zip(texts(30), scores, strict=True)])
    dataset = load_dataset(network, path)
    assert dataset.metric == "Spearman × 100"
    expected = 100 * spearmanr(given(network, 30)[:, 0], scores).statistic
    assert dataset.measure(network.module) == pytest.approx(expected, abs=0.5)


@pytest.mark.parametrize(
    ("labels", "problem", "column", "told"),
    [
        (3, "multi_label_classification", "1", "3 answers for each text"),
        (3, "regression", "1.5", "3 answers for each text"),
        (1, "regression", "good", "last column must be a number"),
        (1, None, "good", "'good' is no class number from 0 to 1"),
        (1, None, "LABEL_0", "'LABEL_0' is no class number"),
    ],
)
def test_labels_that_say_nothing(tmp_path: Path, labels: int, problem: str | None, column: str, told: str) -> None:
    network = one_logit_text(tmp_path, labels, problem_type=problem)
    lines = [f"{t},{column if i else '0'}" for i, t in enumerate(texts(5))]
    with pytest.raises(UserError, match=told) as caught:
        load_dataset(network, save_lines(tmp_path / "t.csv", lines))
    assert "\n" not in str(caught.value)


def test_class_folders_of_no_and_yes(tmp_path: Path) -> None:
    network = classifier(1, depth=1)
    for name in ("0", "1"):
        save_images(tmp_path / name, 3, int(name))
    dataset = load_dataset(network, tmp_path)
    assert dataset.metric == "accuracy"
    with torch.no_grad():
        network.module.head.weight.zero_()
        network.module.head.bias.fill_(1.0)
    assert dataset.measure(network.module) == 50.0


def test_class_folders_say_nothing_of_numbers(tmp_path: Path) -> None:
    network = replace(classifier(1, depth=1), head="regression")
    save_images(tmp_path / "0", 2)
    with pytest.raises(UserError, match="numbers, not classes"):
        load_dataset(network, tmp_path)


# Fisher


@pytest.mark.parametrize(
    ("outputs", "head", "labels", "told"),
    [
        (1, "regression", torch.zeros(8), "numbers, not classes"),
        (3, "binary", torch.zeros(8, dtype=torch.long), "1 or 0"),
        (1, "binary", torch.full((8,), 2), "1 or 0, not"),
    ],
)
def test_labels_that_fisher_cannot_take(outputs: int, head: HeadKind, labels: Tensor, told: str) -> None:
    network = replace(own_network(), head=head)
    network.module.head = nn.Linear(32, outputs)
    with pytest.raises(UserError, match=told):
        mask_gradients(network, analyze(network, narrow=False).structure, own_batches(1), [labels])


def test_fisher_of_several_labels_is_the_mean_over_them() -> None:
    network = replace(own_network(), head="binary")
    structure, batches = analyze(network, narrow=False).structure, own_batches(1)
    labels = (torch.arange(24).reshape(8, 3) % 2).float()
    whole = mask_gradients(network, structure, batches, [labels])
    parts = []
    for label in range(3):
        only = torch.full_like(labels, -100)
        only[:, label] = labels[:, label]
        parts.append(mask_gradients(network, structure, batches, [only]))
    for name, gradients in whole.items():
        torch.testing.assert_close(gradients, sum(p[name] for p in parts) / 3, rtol=1e-4, atol=1e-7)


# Sources


def test_timm_sources_with_one_class_are_pruned(tmp_path: Path) -> None:
    source = Source("timm", "test_vit", {"img_size": 32, "num_classes": 1, "depth": 1})
    network = timm_models.network_of(timm_models.build(source), source, "random")
    pruned = prune(network, images(2), 0.6)
    checkpoint.save(pruned.network, pruned.plan, tmp_path / "saved")
    assert checkpoint.load_network(tmp_path / "saved").head == "binary"
    assert all(float(scores.max()) > 1e-200 for scores in pruned.scores.values())


# Whole runs


def quick(**options: Any) -> Recipe:
    measuring: dict[str, Any] = {"runtimes": ("ort-cpu",), "batch_sizes": (1,), "profile_seconds": 0.1, "threads": 1}
    return Recipe(model="mine", flops=0.6, **measuring, **options)


class Single(TinyModule):
    """One logit for each sample, without an axis, and without gradients in its block."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(32, 1)

    def forward(self, features: Tensor) -> Tensor:
        x = self.embed(self.norm(features))
        with torch.no_grad():
            x = self.blocks[0](x)
        return self.head(x.mean(1))[:, 0]


def test_a_run_tells_what_its_head_means(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = custom_network(Single(), {"features": torch.randn(2, 5, 8)}, logits="output")
    calibration = from_batches(own_batches())
    result = prune_export(quick(), output=tmp_path / "run", network=network, calibration=calibration, quiet=True)
    report = read_report(tmp_path / "run")
    assert report.agreement[0].sign_agreement is not None and report.agreement[0].top1_agreement is None
    for text in (
        (tmp_path / "run" / name).read_text() for name in ("report.md", "report.html", "checkpoint/README.md")
    ):
        assert "top answer" not in text
        assert "same yes or no" in text.lower()
        assert "cuts its own derivatives off" in text
    assert "same yes or no" in repr(result.report)
    assert "same yes or no" in lines({"run": report})[0].outputs
    swept = build_sweep_report({"run": report}, {}, "again")
    assert (swept.quality.kind, swept.runs[0].quality) == ("sign", report.agreement[0].sign_agreement)
    assert "yes-or-no" in judged_by(swept.quality) and worth(0.5, swept.quality) == "50.0 %"
    # Continued, it says the same.
    again = prune_export(quick(), output=tmp_path / "run", network=network, calibration=calibration, quiet=True)
    assert again.report.warnings == report.warnings
    small = checkpoint.load(tmp_path / "run" / "checkpoint", Single())
    with torch.no_grad():
        torch.testing.assert_close(
            small(**own_batches(1)[0]), result.network.module(**own_batches(1)[0]), rtol=1e-4, atol=1e-5
        )


def test_what_cannot_be_scored_is_told_before_anything_is_written(tmp_path: Path) -> None:
    class Rounded(Single):
        def forward(self, features: Tensor) -> Tensor:
            return super().forward(features).mul(1e3).round()

    network = custom_network(Rounded(), {"features": torch.randn(2, 5, 8)}, logits="output")
    with pytest.raises(UserError, match="no derivative reaches"):
        prune_export(
            quick(), output=tmp_path / "run", network=network, calibration=from_batches(own_batches()), quiet=True
        )
    assert not (tmp_path / "run").exists()
