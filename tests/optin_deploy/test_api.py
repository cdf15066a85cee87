import doctest
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from tiny_models import classifier, own_batches, own_network, save_bert
from torch import Tensor, nn

import optin_deploy
from exporters import ExportError
from optin_deploy import api
from optin_deploy.criteria.scoring import Scoring
from optin_deploy.data.calibration import from_batches
from optin_deploy.errors import UserError
from optin_deploy.models.load import load_network
from optin_deploy.network import Network
from optin_deploy.pruning import pruner
from optin_deploy.structure.plan import Plan

pytestmark = pytest.mark.slow


QUICK: dict[str, Any] = {"seconds": 0.2, "threads": 1}
HANDFUL = ("score", "plan", "prune", "export_onnx", "build_engine", "profile", "compare")


def batches(network: Network, count: int = 2) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        {name: torch.randn(4, *t.shape[1:], generator=generator) for name, t in network.inputs.items()}
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def dense() -> Network:
    return classifier(10, depth=1)


@pytest.fixture(scope="module")
def pruned(dense: Network) -> pruner.Pruned:
    return api.prune(dense, batches(dense), 0.5)


# The examples of the documentation


@pytest.mark.parametrize("name", HANDFUL)
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "build_engine" and importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("needs tensorrt_rtx")
    monkeypatch.chdir(tmp_path)
    function = getattr(optin_deploy, name)
    assert function is getattr(api, name), "no submodule has that name"
    (found,) = doctest.DocTestFinder(recurse=False).find(function, name, globs={})
    assert found.examples
    said: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(found, out=said.append)
    assert result.failed == 0, "".join(said)


# Steps


def test_steps_are_what_one_call_does(dense: Network, pruned: pruner.Pruned) -> None:
    scores = api.score(dense, batches(dense))
    assert {name: t.tolist() for name, t in scores.items()} == {n: t.tolist() for n, t in pruned.scores.items()}
    plan = api.plan(dense, scores, flops=0.5)
    assert plan == pruned.plan
    again = api.prune(dense, batches(dense), plan=plan)
    expected = pruned.network.module.state_dict()
    assert again.plan == plan and not again.scores
    assert all(torch.equal(t, expected[name]) for name, t in again.network.module.state_dict().items())


def test_steps_without_narrower_heads(dense: Network) -> None:
    scores = api.score(dense, batches(dense), Scoring("magnitude"))
    plan = api.plan(dense, dict(scores), 0.6, align=8)
    whole = api.prune(dense, batches(dense), 0.6, scoring=Scoring("magnitude"), align=8)
    assert plan == whole.plan and not any(name.endswith(".width") for name in plan.kept)
    again = api.prune(dense, batches(dense), plan=plan).network.module.state_dict()
    assert all(torch.equal(t, again[name]) for name, t in whole.network.module.state_dict().items())


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda n: api.prune(n, []), "give one of the two"),
        (lambda n: api.prune(n, [], 0.5, plan=Plan({})), "give one of the two"),
        (lambda n: api.prune(n, [], plan=Plan({}), align=8), "leave out align"),
        (lambda n: api.prune(n, [], plan=Plan({"none": (0,)})), "names group 'none'"),
        (lambda n: api.plan(n, {}, 0.5), "of another network"),
        (lambda n: api.plan(n, {}, 2), "above 0 and below 1"),
        (lambda n: api.export_onnx(n, "a.pt"), "ends in .onnx"),
        (lambda n: api.export_onnx(n.module, "a.onnx"), "give inputs="),
        (lambda n: api.export_onnx(n, "a.onnx", inputs=n.inputs), "has its own"),
        (lambda n: api.export_onnx(n, "a.onnx", precision="int8"), "give calibration="),
        (lambda n: api.export_onnx(n, "a.onnx", opset=3), "opset"),
        (lambda n: api.profile(n, runtime="none"), "runtime"),
        (lambda n: api.profile("none.onnx"), "inputs="),
        (lambda n: api.compare("a.onnx", "b.onnx"), "inputs="),
        (lambda n: api.compare(n, "b.onnx", runtimes=("torch",)), "files are compared"),
        (lambda n: api.compare(n, n, threads=9999), "threads"),
        (lambda n: api.build_engine("none.onnx", "a.engine"), "does not exist"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(
    dense: Network,
    call: Callable[[Network], Any],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=expected) as caught:
        call(dense)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


# Files


def test_an_exported_file_computes_what_torch_does(pruned: pruner.Pruned, tmp_path: Path) -> None:
    made = api.export_onnx(pruned.network, tmp_path / "half.onnx")
    assert made.inputs == {"x": ("batch", 3, 32, 32)} and made.sizes == {"batch": 2}
    batch = batches(pruned.network)[0]
    session = onnxruntime.InferenceSession(made.path, providers=["CPUExecutionProvider"])
    (given,) = session.run(None, {"x": batch["x"].numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(given, pruned.network.module(**batch).numpy(), atol=1e-4)
    assert [p.name for p in tmp_path.iterdir()] == ["half.onnx"]


def test_a_module_and_a_text_network_export(tmp_path: Path) -> None:
    own = own_network()
    made = api.export_onnx(own.module, tmp_path / "own.onnx", inputs=own.inputs, precision="fp16")
    assert made.precision == "fp16" and made.outputs == ("output",)
    low = api.export_onnx(own, tmp_path / "int8.onnx", precision="int8", calibration=from_batches(own_batches()))
    assert low.parity[0].max_abs_error > 0
    save_bert(tmp_path / "bert", num_hidden_layers=1)
    texts = api.export_onnx(load_network(str(tmp_path / "bert"), sequence_length=12), tmp_path / "bert.onnx")
    assert texts.inputs["input_ids"] == ("batch", "sequence") and texts.sizes == {"batch": 2, "sequence": 12}
    with pytest.raises(UserError, match="sequence"):
        api.build_engine(texts.path, tmp_path / "bert.engine")


def test_what_does_not_compute_the_same_is_not_written(dense: Network, tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_text("before")
    with pytest.raises(optin_deploy.GateError, match=r"^parity"):
        api.export_onnx(dense, tmp_path / "a.onnx", precision="fp16", tolerance=1e-9)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.onnx", "before")]


def test_what_cannot_be_exported_is_not_written(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError):
        api.export_onnx(Branching(), tmp_path / "a.onnx", inputs={"x": torch.ones(2, 3)})
    assert not list(tmp_path.iterdir())


# Measuring, and what is shown


def test_files_are_profiled_by_operator_and_compared(dense: Network, pruned: pruner.Pruned, tmp_path: Path) -> None:
    first = api.export_onnx(dense, tmp_path / "dense.onnx")
    second = api.export_onnx(pruned.network, tmp_path / "pruned.onnx")
    profile = api.profile(first, dense.inputs, **QUICK)
    assert "MatMul" in {part.name for part in profile.parts}
    assert sum(part.ms for part in profile.parts) == pytest.approx(profile.summary.p50_ms)
    found = api.compare(first, str(second.path), dense.inputs, batch_sizes=(1,), **QUICK)
    assert [(m.runtime, m.batch_size) for m in found.measurements] == [("ort-cpu", 1)]
    assert found.flops_reduction is None and found.realised == ()
    assert "realised —" in repr(found) and "<pre" in found._repr_html_() and "p99 ms" in found._repr_html_()


def test_values_show_themselves_in_short(dense: Network, pruned: pruner.Pruned) -> None:
    scores = api.Scores(pruned.scores, Scoring(), 8)
    calibration = from_batches(batches(dense))
    for value in (dense, pruned, pruned.plan, scores, calibration):
        assert len(repr(value)) < 400 and "tensor(" not in repr(value)
    assert repr(pruned).startswith("<Pruned test_vit: 0.")
    for shown in (pruned._repr_html_(), scores._repr_html_()):
        assert "blocks.0.mlp" in shown and "<html" not in shown
