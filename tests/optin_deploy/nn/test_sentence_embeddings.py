"""Directories of sentence-transformers: every layout against its arithmetic, written out slowly."""

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from text_models import add_modules, save_encoder
from tiny_models import save_lines, texts
from torch import Tensor, nn

import optin_deploy
from optin_deploy.data.calibration import load_calibration
from optin_deploy.errors import UserError
from optin_deploy.evaluation.agreement import agreement
from optin_deploy.evaluation.load import load_dataset
from optin_deploy.models import checkpoint
from optin_deploy.models.load import load_network
from optin_deploy.network import Network
from optin_deploy.pruning.pruner import prune
from optin_deploy.structure.plan import Plan

pytestmark = pytest.mark.slow


FLAGS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}


def flags(*modes: str) -> dict[str, object]:
    return {"word_embedding_dimension": 32, **{flag: mode in modes for mode, flag in FLAGS.items()}}


def pooled(mode: str, tokens: list[Tensor]) -> Tensor:
    """One text's token features to one vector, by loops."""
    if mode == "cls":
        return tokens[0]
    if mode == "lasttoken":
        return tokens[-1]
    if mode == "max":
        return torch.tensor([max(float(t[i]) for t in tokens) for i in range(len(tokens[0]))])
    weights = [float(i + 1) if mode == "weightedmean" else 1.0 for i in range(len(tokens))]
    total = sum(w * t for w, t in zip(weights, tokens, strict=True))
    return total / (sum(weights) ** 0.5 if mode == "mean_sqrt_len_tokens" else sum(weights))


class Reference:
    """What sentence-transformers computes of one text after the other."""

    def __init__(
        self, encoder: nn.Module, modes: list[str], layers: list[Any], *, limit: int = 32, **text: Any
    ) -> None:
        self.encoder, self.modes, self.layers, self.limit, self.text = encoder, modes, layers, limit, text

    def ids(self, network: Network, text: str) -> list[int]:
        text = self.text.get("prompt", "") + text
        text = text.lower() if self.text.get("lower") else text
        whole = network.preprocessing.tokenizer(text)["input_ids"]
        return whole if len(whole) <= self.limit else [*whole[: self.limit - 1], whole[-1]]

    @torch.inference_mode()
    def __call__(self, network: Network, text: str) -> Tensor:
        ids = torch.tensor([self.ids(network, text)])
        features = self.encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0].double()
        start = self.text.get("skipped", 0)
        x = torch.cat([self._pooled(mode, features, start) for mode in self.modes]).double()
        for layer in self.layers:
            x = layer(x)
        return x

    @staticmethod
    def _pooled(mode: str, features: Tensor, start: int) -> Tensor:
        if mode != "weightedmean":
            return pooled(mode, list(features[start:]))
        weights = torch.arange(1, len(features) + 1).double()[start:]
        return (weights[:, None] * features[start:]).sum(0) / weights.sum()


def embeddings(network: Network, lines: list[str], module: nn.Module | None = None) -> Tensor:
    with torch.inference_mode():
        return network.with_pooling().forward(network.preprocessing(lines), module)["sentence_embedding"]


def check(network: Network, reference: Reference, similarity: str, path: Path) -> None:
    """Embeddings and the figure of pairs are those of the reference; scores that it gives are worth 100."""
    lines = texts(24)
    wanted = torch.stack([reference(network, line) for line in lines])
    torch.testing.assert_close(embeddings(network, lines).double(), wanted, atol=2e-5, rtol=1e-4)
    pairs = list(zip(lines[:20], lines[4:], strict=True))
    alike = {
        "cosine": lambda a, b: float(a @ b / (a.norm() * b.norm())),
        "dot": lambda a, b: float(a @ b),
        "euclidean": lambda a, b: -float((a - b).square().sum().sqrt()),
        "manhattan": lambda a, b: -float((a - b).abs().sum()),
    }[similarity]
    scores = [alike(reference(network, a), reference(network, b)) for a, b in pairs]
    rows = [f"{a}\t{b}\t{s:.9f}" for (a, b), s in zip(pairs, scores, strict=True)]
    dataset = load_dataset(network, save_lines(path / "pairs.tsv", rows))
    assert dataset.measure(network.module) == pytest.approx(100, abs=0.2)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [*(("bert", mode) for mode in FLAGS), ("roberta", "cls"), ("mpnet", "mean"), ("distilbert", "max")],
)
def test_poolings(tmp_path: Path, kind: str, mode: str) -> None:
    encoder = save_encoder(tmp_path / "m", kind)
    add_modules(tmp_path / "m", flags(mode))
    network = load_network(str(tmp_path / "m"), sequence_length=8)
    check(network, Reference(encoder, [mode], []), "cosine", tmp_path)


@pytest.mark.parametrize(
    ("config", "modes"),
    [
        ({"pooling_mode": "cls", "embedding_dimension": 32}, ["cls"]),
        ({"pooling_mode": ["cls", "mean"]}, ["cls", "mean"]),
        ({"pooling_mode": ["lasttoken", "max", "weightedmean"]}, ["lasttoken", "max", "weightedmean"]),
        (flags("mean", "max", "cls"), ["cls", "max", "mean"]),
        ({"word_embedding_dimension": 32}, ["mean"]),
        (flags(), ["mean"]),
    ],
)
def test_poolings_by_name_and_one_behind_the_other(tmp_path: Path, config: dict[str, object], modes: list[str]) -> None:
    encoder = save_encoder(tmp_path / "m")
    add_modules(tmp_path / "m", config)
    check(load_network(str(tmp_path / "m"), sequence_length=8), Reference(encoder, modes, []), "cosine", tmp_path)


def dense(inputs: int, outputs: int, *, bias: bool = True, residual: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(1)
    weights = {"linear.weight": torch.randn(outputs, inputs)}
    if bias:
        weights["linear.bias"] = torch.randn(outputs)
    if residual and inputs != outputs:
        weights["residual.weight"] = torch.randn(outputs, inputs)
    return weights


ACTIVATIONS = {
    "torch.nn.modules.activation.Tanh": torch.tanh,
    "torch.nn.modules.linear.Identity": lambda x: x,
    "torch.nn.modules.activation.GELU": F.gelu,
    "torch.nn.ReLU": torch.relu,
}


@pytest.mark.parametrize(
    ("activation", "similarity"),
    zip([*ACTIVATIONS, None], ["cosine", "dot", "euclidean", "manhattan", "dot"], strict=True),
)
def test_dense_and_normalised(tmp_path: Path, activation: str | None, similarity: str) -> None:
    encoder, weights = save_encoder(tmp_path / "m"), dense(32, 12)
    own = {"in_features": 32, "out_features": 12, "bias": True, "activation_function": activation}
    own = {key: value for key, value in own.items() if value is not None}
    add_modules(
        tmp_path / "m",
        flags("mean"),
        [("Dense", own, weights), ("Normalize", None, {})],
        whole={"similarity_fn_name": similarity},
    )
    function = ACTIVATIONS[activation or "torch.nn.modules.activation.Tanh"]
    layers = [
        lambda x: function(weights["linear.weight"].double() @ x + weights["linear.bias"].double()),
        lambda x: x / x.norm(),
    ]
    network = load_network(str(tmp_path / "m"), sequence_length=8)
    check(network, Reference(encoder, ["mean"], layers), similarity, tmp_path)


@pytest.mark.parametrize("outputs", [12, 32])
def test_dense_without_bias_and_with_residual_and_layer_norm(tmp_path: Path, outputs: int) -> None:
    encoder, weights = save_encoder(tmp_path / "m"), dense(32, outputs, bias=False, residual=True)
    norm = {"norm.weight": torch.rand(outputs) + 0.5, "norm.bias": torch.randn(outputs)}
    own = {"in_features": 32, "out_features": outputs, "bias": False, "use_residual": True}
    add_modules(
        tmp_path / "m",
        flags("cls"),
        [("Dense", own, weights), ("Dropout", {"dropout": 0.5}, {}), ("LayerNorm", {"dimension": outputs}, norm)],
    )

    def projected(x: Tensor) -> Tensor:
        beside = weights["residual.weight"].double() @ x if outputs != 32 else x
        return torch.tanh(weights["linear.weight"].double() @ x) + beside

    def normed(x: Tensor) -> Tensor:
        y = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
        return y * norm["norm.weight"].double() + norm["norm.bias"].double()

    network = load_network(str(tmp_path / "m"), sequence_length=8)
    check(network, Reference(encoder, ["cls"], [projected, normed]), "cosine", tmp_path)


@pytest.mark.parametrize(
    "package", ["sentence_transformers.models", "sentence_transformers.sentence_transformer.modules"]
)
def test_encoder_in_a_folder(tmp_path: Path, package: str) -> None:
    encoder = save_encoder(tmp_path / "m" / "0_Transformer")
    add_modules(tmp_path / "m", flags("max"), folder="0_Transformer", config={"max_seq_length": 6}, package=package)
    network = load_network(str(tmp_path / "m"), sequence_length=8)
    check(network, Reference(encoder, ["max"], [], limit=6), "cosine", tmp_path)
    checkpoint.save(network, Plan({}), tmp_path / "saved")
    again = load_network(str(tmp_path / "saved"))
    assert torch.equal(embeddings(again, texts(9)), embeddings(network, texts(9)))


def test_length_and_lower_case(tmp_path: Path) -> None:
    encoder = save_encoder(tmp_path / "m")
    add_modules(tmp_path / "m", flags("mean"), config={"max_seq_length": 5, "do_lower_case": True})
    network = load_network(str(tmp_path / "m"), sequence_length=8)
    reference = Reference(encoder, ["mean"], [], limit=5, lower=True)
    check(network, reference, "cosine", tmp_path)
    assert torch.equal(embeddings(network, ["W1 W2"]), embeddings(network, ["w1 w2"]))
    # What is measured has its own length.
    assert network.inputs["input_ids"].shape == (2, 8)


@pytest.mark.parametrize(("mode", "include"), [("mean", True), *((mode, False) for mode in FLAGS)])
def test_default_prompt(tmp_path: Path, include: bool, mode: str) -> None:
    encoder = save_encoder(tmp_path / "m")
    whole = {"prompts": {"query": "w7 w8 ", "document": "w9 "}, "default_prompt_name": "query"}
    add_modules(tmp_path / "m", {**flags(mode), "include_prompt": include}, whole=whole)
    network = load_network(str(tmp_path / "m"), sequence_length=8)
    # [CLS] and the two words of the prompt.
    reference = Reference(encoder, [mode], [], prompt="w7 w8 ", skipped=0 if include else 3)
    check(network, reference, "cosine", tmp_path)
    (batch,) = load_calibration(network, save_lines(tmp_path / "t.txt", texts(12)), samples=8).batches
    assert (
        batch["input_ids"][:, 1:3].unique(dim=0).tolist()
        == network.preprocessing.tokenizer([["w7", "w8"]], is_split_into_words=True, add_special_tokens=False)[
            "input_ids"
        ]
    )


def test_prompts_without_a_default_change_nothing(tmp_path: Path) -> None:
    encoder = save_encoder(tmp_path / "m")
    add_modules(tmp_path / "m", flags("mean"), whole={"prompts": {"query": "w7 "}, "default_prompt_name": None})
    network = load_network(str(tmp_path / "m"), sequence_length=8)
    check(network, Reference(encoder, ["mean"], []), "cosine", tmp_path)


def test_a_named_class_with_a_head_is_loaded_as_its_encoder(tmp_path: Path) -> None:
    encoder = save_encoder(tmp_path / "m", "mpnet")
    text = (tmp_path / "m" / "config.json").read_text()
    (tmp_path / "m" / "config.json").write_text(text.replace("MPNetModel", "MPNetForMaskedLM"))
    add_modules(tmp_path / "m", flags("mean"))
    network = load_network(str(tmp_path / "m"), sequence_length=8)
    assert network.source.name == "MPNetModel"
    check(network, Reference(encoder, ["mean"], []), "cosine", tmp_path)


def test_checkpoint_keeps_all_of_it(tmp_path: Path) -> None:
    save_encoder(tmp_path / "m")
    own = {"in_features": 32, "out_features": 12, "bias": True, "activation_function": "torch.nn.Identity"}
    add_modules(
        tmp_path / "m",
        {**flags("cls"), "include_prompt": False},
        [("Dense", own, dense(32, 12)), ("Normalize", None, {})],
        config={"max_seq_length": 9, "do_lower_case": True},
        whole={"prompts": {"a": "w3 "}, "default_prompt_name": "a", "similarity_fn_name": "dot"},
    )
    network = load_network(str(tmp_path / "m"), sequence_length=8)
    calibration = load_calibration(network, save_lines(tmp_path / "t.txt", texts(20)))
    pruned = prune(network, calibration.batches, 0.6, align=8)
    checkpoint.save(pruned.network, pruned.plan, tmp_path / "small")
    again = load_network(str(tmp_path / "small"))
    lines = [*texts(9), "W1 W2 W3"]
    assert torch.equal(embeddings(again, lines), embeddings(pruned.network, lines))
    assert not torch.allclose(embeddings(again, lines), embeddings(network, lines))
    assert again.sentences is not None
    assert (again.sentences.similarity, again.preprocessing.max_length) == ("dot", 9)
    for name in ("modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors", "sentence_bert_config.json"):
        assert (tmp_path / "small" / name).read_bytes() == (tmp_path / "m" / name).read_bytes()
    (tmp_path / "small" / "modules.json").unlink()
    with pytest.raises(UserError, match=r"small .*damaged.*modules"):
        load_network(str(tmp_path / "small"))


def test_a_plain_encoder_is_pooled_to_its_mean_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder = save_encoder(tmp_path / "m")
    network = load_network(str(tmp_path / "m"), sequence_length=8)
    assert network.sentences is None
    with caplog.at_level(logging.WARNING):
        check(network, Reference(encoder, ["mean"], []), "cosine", tmp_path)
    assert re.search(r"no modules\.json .*mean", caplog.text)


@pytest.mark.parametrize("mode", ["cls", "max", "lasttoken", "weightedmean", "prompt"])
def test_exported_with_pooling(tmp_path: Path, mode: str) -> None:
    save_encoder(tmp_path / "m")
    own = {"in_features": 32, "out_features": 12, "bias": True, "activation_function": "torch.nn.Tanh"}
    whole = {"prompts": {"a": "w3 "}, "default_prompt_name": "a"} if mode == "prompt" else {}
    pooling = {**flags("mean" if mode == "prompt" else mode), "include_prompt": mode != "prompt"}
    add_modules(tmp_path / "m", pooling, [("Dense", own, dense(32, 12)), ("Normalize", None, {})], whole=whole)
    network = load_network(str(tmp_path / "m"), sequence_length=8)
    file = optin_deploy.export_onnx(network.with_pooling(), tmp_path / "m.onnx")
    assert file.outputs == ("sentence_embedding",)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for lines in (texts(3), texts(20)):
        batch = network.preprocessing(lines)
        (given,) = session.run(None, {name: tensor.numpy() for name, tensor in batch.items()})
        np.testing.assert_allclose(given, embeddings(network, lines), atol=1e-5)


def test_what_is_scored_is_the_same_with_and_without_modules(tmp_path: Path) -> None:
    save_encoder(tmp_path / "m")
    lines = save_lines(tmp_path / "t.txt", texts(40))
    found = []
    for pooling in (False, True):
        if pooling:
            add_modules(tmp_path / "m", flags("cls"))
        network = load_network(str(tmp_path / "m"), sequence_length=8)
        found.append(optin_deploy.score(network, load_calibration(network, lines, samples=16).batches))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_as_many_tokens_as_dimensions_are_no_padding(tmp_path: Path) -> None:
    save_encoder(tmp_path / "m")
    add_modules(tmp_path / "m", flags("mean"))
    network = load_network(str(tmp_path / "m"), sequence_length=8)
    batch = network.preprocessing([" ".join(f"w{i}" for i in range(40)), "w1 w2"])
    assert batch["input_ids"].shape == (2, 32)
    other = load_network(str(tmp_path / "m"), weights="random", sequence_length=8).module
    (row,) = agreement(network.with_pooling(), other, [batch])
    a, b = (
        network.with_pooling().forward(batch, module)["sentence_embedding"].detach()
        for module in (network.module, other)
    )
    assert row.cosine == pytest.approx(float(F.cosine_similarity(a, b).mean()), abs=1e-6)


def test_a_run_exports_what_it_evaluates(tmp_path: Path) -> None:
    save_encoder(tmp_path / "m")
    add_modules(tmp_path / "m", flags("cls"), [("Normalize", None, {})], whole={"similarity_fn_name": "dot"})
    rows = [f"{a}\t{b}\t{i % 5}" for i, (a, b) in enumerate(zip(texts(30)[:20], texts(30)[10:], strict=True))]
    common = {
        "model": str(tmp_path / "m"),
        "flops": 0.7,
        "align": 8,
        "sequence_length": 8,
        "calibration": save_lines(tmp_path / "t.txt", texts(40)),
        "evaluate": save_lines(tmp_path / "pairs.tsv", rows),
        "runtimes": ("ort-cpu",),
        "batch_sizes": (1,),
        "profile_seconds": 0.1,
        "threads": 1,
        "pooling_in_graph": True,
    }
    result = optin_deploy.prune_export(optin_deploy.Recipe(**common), output=tmp_path / "run", quiet=True)
    assert [entry.output for entry in result.report.agreement] == ["last_hidden_state", "sentence_embedding"]
    session = onnxruntime.InferenceSession(tmp_path / "run" / "pruned.onnx")
    assert [output.name for output in session.get_outputs()] == ["sentence_embedding"]
    small = load_network(str(tmp_path / "run" / "checkpoint"))

    def embedded(lines: list[str]) -> np.ndarray:
        batch = small.preprocessing(lines)
        return session.run(None, {name: tensor.numpy() for name, tensor in batch.items()})[0]

    first, second = embedded([r.split("\t")[0] for r in rows]), embedded([r.split("\t")[1] for r in rows])
    served = spearmanr((first * second).sum(1), [i % 5 for i in range(20)]).statistic
    assert result.report.evaluation is not None
    assert result.report.evaluation.pruned == pytest.approx(100 * served, abs=0.2)


# What is not read


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_network(str(path), sequence_length=8)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("layer", "told"),
    [
        (("Asym", {}, {}), "Asym is not"),
        (("Router", {}, {}), "Router is not"),
        (("WeightedLayerPooling", {}, {}), "WeightedLayerPooling is not"),
        (("LSTM", {}, {}), "LSTM is not"),
        (("Pooling", {}, {}), "second Pooling"),
        (("Dense", {"in_features": 32, "out_features": 8}, {}), "model.safetensors is missing"),
        (("Dense", {"in_features": 16, "out_features": 8}, dense(16, 8)), "modules.json does not fit BertModel"),
        (("Dense", {"in_features": 32, "out_features": 8}, dense(16, 8)), "does not fit"),
        (("Dense", {"in_features": "32"}, dense(32, 8)), "names in_features and out_features"),
        (
            ("Dense", {"in_features": 32, "out_features": 8, "activation_function": "mine.Gate"}, dense(32, 8)),
            "activation_function mine.Gate",
        ),
        (
            ("Dense", {"in_features": 32, "out_features": 8, "activation_function": "torch.nn.PReLU"}, dense(32, 8)),
            "activation_function torch.nn.PReLU",
        ),
        (
            ("Dense", {"in_features": 32, "out_features": 8, "module_input_name": "token_embeddings"}, dense(32, 8)),
            "module_input_name 'token_embeddings'",
        ),
        (("Normalize", {"module_input_name": "token_embeddings"}, {}), "module_input_name 'token_embeddings'"),
        (("LayerNorm", {}, {}), "names its dimension"),
    ],
)
def test_modules_that_are_not_read(tmp_path: Path, layer: Any, told: str) -> None:
    save_encoder(tmp_path / "m")
    add_modules(tmp_path / "m", flags("mean"), [layer])
    message = refusal(tmp_path / "m")
    assert told in message
    assert str(tmp_path / "m") in message or "BertModel" in message


def test_pickled_dense(tmp_path: Path) -> None:
    save_encoder(tmp_path / "m")
    add_modules(tmp_path / "m", flags("mean"), [("Dense", {"in_features": 32, "out_features": 8}, {})])
    (tmp_path / "m" / "2_Dense" / "pytorch_model.bin").write_bytes(b"pickle")
    assert re.search(r"pytorch_model\.bin.*pickle", refusal(tmp_path / "m"))


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("modules.json", "{", "modules.json cannot be read as JSON"),
        ("modules.json", "{}", "modules.json holds a dict, not a list"),
        ("modules.json", "[]", "begins with nothing"),
        ("modules.json", '[{"type": "custom_st.Transformer", "path": ""}]', "code that comes with the model"),
        ("modules.json", '[{"type": "sentence_transformers.models.StaticEmbedding"}]', "StaticEmbedding is not"),
        ("modules.json", '[{"type": "sentence_transformers.models.WordEmbeddings"}]', "WordEmbeddings is not"),
        ("modules.json", '[{"type": "sentence_transformers.models.Pooling"}]', "begins with Pooling"),
        ("modules.json", '[{"type": "sentence_transformers.models.Transformer", "path": ""}]', "followed by nothing"),
        ("modules.json", '[{"type": "sentence_transformers.models.Transformer", "path": "../x"}]', "no folder of"),
        ("modules.json", '[{"type": "sentence_transformers.models.Transformer", "path": "/x"}]', "no folder of"),
        ("modules.json", '[{"path": ""}]', "every module is an object with a type"),
        ("1_Pooling/config.json", '{"pooling_mode": "median"}', "pooling_mode 'median' is not one of cls"),
        ("1_Pooling/config.json", '{"pooling_mode": 3}', "pooling_mode '3'"),
        ("1_Pooling/config.json", "[]", "holds a list, not a dict"),
        ("sentence_bert_config.json", '{"max_seq_length": 0}', "max_seq_length 0"),
        ("sentence_bert_config.json", '{"max_seq_length": "long"}', "max_seq_length long"),
        ("sentence_bert_config.json", '{"transformer_task": "fill-mask"}', "is for fill-mask"),
        ("config_sentence_transformers.json", '{"similarity_fn_name": "hamming"}', "'hamming' is not one of cosine"),
        ("config_sentence_transformers.json", '{"default_prompt_name": "q"}', "default_prompt_name 'q' is not one of"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: str, told: str) -> None:
    save_encoder(tmp_path / "m")
    add_modules(tmp_path / "m", flags("mean"))
    (tmp_path / "m" / name).write_text(content)
    assert told in refusal(tmp_path / "m")


def test_missing_folders(tmp_path: Path) -> None:
    save_encoder(tmp_path / "m" / "0_Transformer")
    add_modules(tmp_path / "m", flags("mean"), folder="0_Transformer")
    (tmp_path / "m" / "0_Transformer").rename(tmp_path / "moved")
    assert re.search(r"0_Transformer .*modules\.json", refusal(tmp_path / "m"))
    (tmp_path / "m" / "1_Pooling" / "config.json").unlink()
    assert re.search(r"config\.json is missing", refusal(tmp_path / "m"))


def test_pooling_of_a_classifier_is_refused() -> None:
    network = load_network("test_vit", weights="random", image_size=32)
    with pytest.raises(UserError, match="no token features"):
        network.with_pooling()
