"""What a module gives, flattened: names, what is left out, and networks with every shape of output."""

import dataclasses
import re
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import tiny
import torch
import transformers
from torch import Tensor, nn

from optin_deploy import api
from optin_deploy.errors import UserError
from optin_deploy.evaluation.agreement import agreement
from optin_deploy.models import checkpoint, transformers_inputs
from optin_deploy.models.custom import custom_network
from optin_deploy.nn.outputs import named_outputs, unfit_reason
from optin_deploy.pruning.pruner import prune

A, B, C = (torch.full((2, 3), float(value)) for value in range(3))
Pair = namedtuple("Pair", "first second")


@dataclasses.dataclass
class Boxes:
    boxes: Tensor
    label: str = "cat"


@pytest.mark.parametrize(
    ("output", "names"),
    [
        pytest.param(A, ["output"], id="a tensor"),
        pytest.param((A, B), ["output_0", "output_1"], id="a tuple"),
        pytest.param([A], ["output_0"], id="a list"),
        pytest.param(Pair(A, B), ["output_0", "output_1"], id="a named tuple is a tuple"),
        pytest.param({"a": A, "b": B}, ["a", "b"], id="a mapping"),
        pytest.param(OrderedDict([("0", A), ("pool", B)]), ["0", "pool"], id="torchvision's"),
        pytest.param({0: A, "0": B}, ["0", "0_2"], id="keys that read alike"),
        pytest.param((None, A, 3), ["output_1"], id="places are those of all"),
        pytest.param((A, [B, (C,)]), ["output_0", "output_1_0", "output_1_1_0"], id="nested lists"),
        pytest.param([{"a": A}, {"a": B}], ["output_0_a", "output_1_a"], id="a list of dicts"),
        pytest.param({"a": {"b": A}, "a_b": B}, ["a_b_2", "a_b"], id="what is not nested keeps its name"),
        pytest.param({"aux": [A, {"x": B}]}, ["aux_0", "aux_1_x"], id="a dict of a list of a dict"),
        pytest.param(Boxes(A), ["boxes"], id="a dataclass"),
        pytest.param({"found": Boxes(A)}, ["found_boxes"], id="a dataclass inside"),
        pytest.param(
            transformers.modeling_outputs.BaseModelOutput(last_hidden_state=A, hidden_states=(B, C)),
            ["last_hidden_state", "hidden_states_0", "hidden_states_1"],
            id="transformers'",
        ),
        pytest.param({}, [], id="nothing"),
    ],
)
def test_names_of_outputs(output: Any, names: list[str]) -> None:
    found = named_outputs(output)
    assert list(found) == names
    assert all(isinstance(value, Tensor) for value in found.values())


def test_every_name_stands_for_its_own_tensor() -> None:
    found = named_outputs({"a": {"b": A}, "a_b": B, "c": (C,)})
    assert found["a_b"] is B
    assert found["a_b_2"] is A
    assert found["c_0"] is C


@pytest.mark.parametrize("output", [None, 3, "text", {A}, iter([A])])
def test_outputs_without_tensors_are_refused(output: Any) -> None:
    with pytest.raises(UserError, match=f"a {type(output).__name__}"):
        named_outputs(output)


def test_a_list_that_holds_itself() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(UserError, match="32 levels"):
        named_outputs(endless)


@pytest.mark.parametrize(
    ("value", "alone", "reason"),
    [
        (A, A[:1], None),
        (A[:, :, None, None, None], A[:1, :, None, None, None], None),
        (A.argmax(1), A[:1].argmax(1), None),
        (A > 0, A[:1] > 0, None),
        (None, None, "is None"),
        (3, 3, "is 3"),
        ("text", "text", "is of type str"),
        (A.sum(), A.sum(), "one number"),
        (A.T, A[:1].T, "first axis"),
        (A.T[None], A[:1].T[None], "first axis"),
        (A @ A.T, A[:1] @ A[:1].T, "first axis"),
        (A[0], A[0], "first axis"),
        (A[:, :0], A[:1, :0], "is empty"),
        (A, None, "every batch"),
        (torch.fft.fft(A), torch.fft.fft(A[:1]), "complex"),
        (A.bfloat16(), A[:1].bfloat16(), "bfloat16"),
        (A.to_sparse(), A[:1].to_sparse(), "sparse"),
    ],
)
def test_values_that_cannot_be_outputs(value: Any, alone: Any, reason: str | None) -> None:
    found = unfit_reason(value, alone, 2)
    assert found is None if reason is None else reason in (found or "")


class Giving(nn.Module):
    """A block of convolutions that can be pruned, and what ``make`` makes of features, logits and input."""

    def __init__(self, make: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.stem, self.head, self.make = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 3), make
        self.blocks = nn.Sequential(tiny.PlainBlock(6, 10, 6, 1))

    def forward(self, x: Tensor) -> Any:
        features = self.blocks(self.stem(x))
        return self.make(features, self.head(features.mean((2, 3))), x)


def giving(make: Callable[[Tensor, Tensor, Tensor], Any], logits: str | None = None) -> Any:
    return custom_network(tiny.randomised(Giving(make)), tiny.images("x"), logits=logits)


EVERYTHING = {
    "nested": (lambda f, y, x: {"logits": y, "aux": [f, {"sums": f.sum((2, 3))}]}, ["logits", "aux_0", "aux_1_sums"]),
    "list of dicts": (lambda f, y, x: [{"logits": y}, {"map": f}], ["output_0_logits", "output_1_map"]),
    "five axes": (lambda f, y, x: (y, f.unflatten(1, (3, -1))), ["output_0", "output_1"]),
    "answers": (lambda f, y, x: {"logits": y, "answer": y.argmax(1), "sure": y > 0}, ["logits", "answer", "sure"]),
    "the same twice": (lambda f, y, x: (y, y), ["output_0", "output_1"]),
    "its input": (lambda f, y, x: (y, x, x[:, :1]), ["output_0", "output_1", "output_2"]),
    "an input's name": (lambda f, y, x: {"x": y, "x_output": f}, ["x_output_2", "x_output"]),
    "no name": (lambda f, y, x: {"": y, "a\nb": f}, ["output", "a_b"]),
    "a loss beside": (lambda f, y, x: {"loss": f.mean(), "logits": y, "none": None}, ["logits"]),
    "sequence first": (lambda f, y, x: {"logits": y, "tokens": f.flatten(2).permute(2, 0, 1)}, ["logits"]),
    "similarities": (lambda f, y, x: {"logits": y, "similar": y @ y.T}, ["logits"]),
    "complex": (lambda f, y, x: {"logits": y, "spectrum": torch.fft.fft(y)}, ["logits"]),
    "half": (lambda f, y, x: {"logits": y, "half": y.half()}, ["logits", "half"]),
    "double": (lambda f, y, x: {"logits": y.double()}, ["logits"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERYTHING)
def test_a_network_that_gives_it_is_pruned_compared_saved_and_exported(name: str, tmp_path: Path) -> None:
    make, names = EVERYTHING[name]
    network = giving(make, "logits" if "logits" in names else None)
    assert list(network.outputs) == names
    batches = tiny.batches(network, 2, size=4)
    pruned = prune(network, batches, 0.7, align=1)
    small = pruned.network
    assert {a.output for a in agreement(network, small.module, batches)} == set(names)

    checkpoint.save(small, pruned.plan, tmp_path / "saved")
    dense = tiny.randomised(Giving(make))
    again = checkpoint.load_network(tmp_path / "saved", dense)
    assert dict(again.outputs) == dict(network.outputs)
    for given, expected in zip(again.forward(batches[0]).values(), small.forward(batches[0]).values(), strict=True):
        torch.testing.assert_close(given, expected)

    found = api.export_onnx(small, tmp_path / "small.onnx")
    assert [value.name for value in onnx.load(tmp_path / "small.onnx").graph.output] == names
    assert all(each.passed for each in found.parity)


def test_answers_alone_cannot_be_scored() -> None:
    network = giving(lambda f, y, x: (f.argmax(1),))
    told = r"floating-point.*output_0"
    with pytest.raises(UserError, match=told):
        prune(network, tiny.batches(network, 2, size=4), 0.7, align=1)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda f, y, x: y.mean(), "output is one number"),
        (lambda f, y, x: {}, "it gives nothing"),
        (lambda f, y, x: [{"scores": None}], "output_0_scores is None"),
        (lambda f, y, x: f.permute(2, 0, 1, 3), "first axis"),
        (lambda f, y, x: y[:, 0].squeeze(), None),
        (lambda f, y, x: [{"boxes": each.flatten()} for each in f], "output_0_boxes .*batch"),
        (lambda f, y, x: torch.fft.fft(y), "complex"),
    ],
)
def test_no_output_is_an_error(make: Any, reason: str | None) -> None:
    with pytest.raises(UserError, match=reason or "first axis"):
        giving(make)


def test_omitted_outputs_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    network = giving(lambda f, y, x: {"loss": f.mean(), "logits": y, "cache": object(), "rows": None})
    (note,) = network.notes
    assert re.search("loss .*, cache .*object, rows is None", note)
    assert note in caplog.text


def test_logits_may_be_named_as_the_module_does() -> None:
    network = giving(lambda f, y, x: {"x": y}, "x")
    assert network.logits == "x_output"


def test_an_output_that_is_missing_later_is_reported() -> None:
    network = giving(lambda f, y, x: {"logits": y, "large": f} if float(x.detach().abs().max()) < 50 else {"logits": y})
    with pytest.raises(UserError, match="large for this batch"):
        network.forward({"x": 100 * torch.ones(1, 3, 16, 16)})


def test_transformers_outputs_stay_what_they_were() -> None:
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        output_hidden_states=True,
        output_attentions=True,
    )
    module = transformers.BertForSequenceClassification(config).eval()
    assert transformers_inputs.exported_outputs(module, tiny.texts()) == ["logits"]
    plain = transformers.BertModel(config, add_pooling_layer=False).eval()
    assert transformers_inputs.exported_outputs(plain, tiny.texts()) == ["last_hidden_state"]
