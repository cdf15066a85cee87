"""Stacks of real families are found, and merge; what cannot merge says why."""

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import onnxruntime
import pytest
import timm
import torch
import transformers
from torch import Tensor, nn
from transformers.models.vit import modeling_vit

from exporters import onnx_from_program, trace
from optin_deploy.errors import UserError
from optin_deploy.network import TensorOutputs
from optin_deploy.nn.flops import count_flops
from optin_deploy.nn.outputs import named_outputs
from optin_deploy.search.costs import flop_costs
from optin_deploy.structure.describe import describe
from optin_deploy.structure.groups import Structure
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import slice_network
from optin_deploy.tokens.costs import token_costs
from optin_deploy.tokens.find_stack import token_stack
from optin_deploy.tokens.merging import MergingBlocks, with_merging
from optin_deploy.tokens.stack import TokenStack

pytestmark = pytest.mark.slow


# The first releases of transformers 5 have layers without.
_MASKED = "attention_mask" in inspect.signature(modeling_vit.ViTLayer.forward).parameters

Made = tuple[nn.Module, dict[str, Tensor]]
_SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 64}


def vit(name: str, **arguments: object) -> Made:
    torch.manual_seed(0)
    options = {"embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 5, **arguments}
    module = timm.create_model(name, **options).eval()
    return module, {"x": torch.randn(2, 3, *module.patch_embed.img_size)}


def beit(**arguments: object) -> Made:
    """With biases that matter."""
    module, inputs = vit("beit_base_patch16_224", img_size=64, init_values=0.1, **arguments)
    for name, parameter in module.named_parameters():
        if "relative_position_bias_table" in name:
            nn.init.normal_(parameter)
    return module, inputs


def library(model: type, config: type, **arguments: object) -> Made:
    torch.manual_seed(0)
    module = model(config(**_SMALL, **arguments)).eval()
    return module, {"pixel_values": torch.randn(2, 3, 64, 64)}


FAMILIES: dict[str, tuple[Callable[[], Made], int]] = {
    "ViT": (lambda: vit("vit_tiny_patch16_224", img_size=64), 1),
    "average pooling": (lambda: vit("vit_tiny_patch16_224", img_size=64, global_pool="avg"), 1),
    "DeiT, distilled": (lambda: vit("deit_tiny_distilled_patch16_224", img_size=64), 2),
    "DeiT-3": (lambda: vit("deit3_small_patch16_224", img_size=64), 1),
    "DINOv2": (lambda: vit("vit_small_patch14_dinov2", img_size=56), 1),
    "registers": (lambda: vit("vit_small_patch14_reg4_dinov2", img_size=56), 5),
    "attention pooling": (lambda: vit("vit_base_patch16_siglip_224", img_size=64), 0),
    "BEiT": (lambda: beit(), 1),
    "BEiT, shared biases": (lambda: beit(use_rel_pos_bias=False, use_shared_rel_pos_bias=True), 1),
    "BEiT, both biases": (lambda: beit(use_shared_rel_pos_bias=True), 1),
    "EVA-02, rotary positions": (lambda: vit("eva02_tiny_patch14_224", img_size=56), 1),
    "transformers ViT": (lambda: library(transformers.ViTModel, transformers.ViTConfig, intermediate_size=64), 1),
    "transformers DINOv2": (lambda: library(transformers.Dinov2Model, transformers.Dinov2Config, patch_size=14), 1),
    "CLIP": (
        lambda: library(
            transformers.CLIPVisionModel, transformers.CLIPVisionConfig, intermediate_size=64, patch_size=16
        ),
        1,
    ),
}


def found(made: Made) -> tuple[Structure, TokenStack]:
    module, inputs = made
    structure = describe(module, inputs)
    return structure, token_stack(module, inputs, structure)


def output(module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        return next(iter(named_outputs(module(**inputs)).values()))


@pytest.mark.parametrize("family", FAMILIES)
def test_families_merge(family: str) -> None:
    make, prefix = FAMILIES[family]
    if family in ("transformers ViT", "transformers DINOv2") and not _MASKED:
        with pytest.raises(UserError, match="attention mask"):
            found(make())
        return
    module, inputs = make()
    structure, stack = found((module, inputs))
    assert stack.prefix == prefix and len(stack.blocks) == 3
    # Keys that are turned by their places, or mean what they do with biases only, are not compared.
    assert all(stack.keys) == (not stack.places and not stack.biased)
    n = stack.tokens
    kept = {g.name: tuple(range(g.units // 2)) for g in structure.groups}
    plan = Plan(kept, (n, n - 3, n - 5))
    small = slice_network(module, structure, plan)
    expected = output(small, inputs)
    with_merging(small, structure, stack, plan)
    entered: list[int] = []
    for block in stack.blocks:
        small.get_submodule(block).register_forward_pre_hook(lambda _, args: entered.append(args[0].shape[1]))
    got = output(small, inputs)
    assert entered == [n, n - 3, n - 5] and got.shape == expected.shape
    assert 0 < float((got - expected).norm()) < float(expected.norm())
    costs = token_costs(module, structure, flop_costs(module, structure, inputs), stack, inputs)
    assert costs.at(plan.tokens).of(plan) == pytest.approx(count_flops(small, inputs), rel=1e-6)


def test_one_step_of_all_tokens_changes_nothing() -> None:
    made = vit("vit_tiny_patch16_224", img_size=64)
    structure, stack = found(made)
    small = copy.deepcopy(made[0])
    with_merging(small, structure, stack, Plan({}, (stack.tokens,) * 3))
    assert torch.equal(output(small, made[1]), output(made[0], made[1]))


def test_equal_tokens_merge_without_a_trace() -> None:
    """Attention counts a merged token as often as it stands for one: of equal tokens nothing is lost."""
    module, inputs = vit("vit_tiny_patch16_224", img_size=64, class_token=False, global_pool="avg")
    nn.init.zeros_(module.pos_embed)
    flat = {"x": torch.full_like(inputs["x"], 0.3)}
    structure, stack = found((module, flat))
    small = copy.deepcopy(module)
    n = stack.tokens
    with_merging(small, structure, stack, Plan({}, (n, n // 2, n // 2)))
    torch.testing.assert_close(output(small, flat), output(module, flat), atol=1e-5, rtol=1e-5)


def test_where_heads_are_gone_tokens_are_compared_as_they_come() -> None:
    made = vit("vit_tiny_patch16_224", img_size=64)
    structure, stack = found(made)
    plan = Plan({"blocks.1.attn": (), "blocks.1.mlp": ()}, (stack.tokens, stack.tokens - 4, stack.tokens - 4))
    small = slice_network(made[0], structure, plan)
    with_merging(small, structure, stack, plan)
    assert output(small, made[1]).shape == (2, 5)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: vit("vit_base_patch16_rope_mixed_224", img_size=64), "rope"),
        (lambda: vit("vit_tiny_patch16_224", img_size=16), "no two patches"),
        (lambda: (timm.create_model("test_resnet").eval(), {"x": torch.randn(2, 3, 64, 64)}), "all of one shape|list"),
    ],
)
def test_what_cannot_merge_says_why(make: Callable[[], Made], reason: str) -> None:
    with pytest.raises(UserError, match=f"({reason}).*--tokens off"):
        found(make())


def test_biases_between_places_export() -> None:
    module, inputs = beit(use_shared_rel_pos_bias=True)
    structure, stack = found((module, inputs))
    with_merging(module, structure, stack, Plan({}, (17, 13, 9)))
    axes = {"x": {0: "batch"}}
    with TemporaryDirectory() as folder:
        file = Path(folder, "beit.onnx")
        onnx_from_program(trace(module, inputs, axes), file, output_names=("logits",), dynamic_axes=axes)
        session = onnxruntime.InferenceSession(file)
    x = torch.randn(3, 3, 64, 64)
    (got,) = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), output(module, {"x": x}), atol=1e-4, rtol=1e-4)


def test_merging_networks_do_not_merge_again_and_keep_their_size() -> None:
    module, inputs = vit("vit_tiny_patch16_224", img_size=64)
    structure, stack = found((module, inputs))
    with_merging(module, structure, stack, Plan({}, (17, 12, 12)))
    assert isinstance(module.blocks, MergingBlocks)
    with pytest.raises(UserError, match="merge already"):
        found((module, inputs))
    with pytest.raises(UserError, match=r"17.* 9"):
        module.blocks(torch.randn(2, 9, 32))


@pytest.mark.parametrize(
    ("schedule", "told"),
    [
        ((17, 12), "give a number for each of the 3 blocks"),
        ((17, 5, 5), r"after 17 .*9 to 17.*5"),
        ((17, 12, 13), r"after 12 .*7 to 12.*13"),
        ((18, 12, 12), r"after 17 .*9 to 17.*18"),
    ],
)
def test_schedules_are_checked(schedule: tuple[int, ...], told: str) -> None:
    _, stack = found(vit("vit_tiny_patch16_224", img_size=64))
    with pytest.raises(UserError, match=told):
        stack.check(schedule)


TEXTS: dict[str, Callable[[], nn.Module]] = {
    "BERT": lambda: text_model(transformers.BertModel, transformers.BertConfig, intermediate_size=64),
    "RoBERTa": lambda: text_model(
        transformers.RobertaModel, transformers.RobertaConfig, intermediate_size=64, max_position_embeddings=34
    ),
    "DistilBERT": lambda: text_model(
        transformers.DistilBertModel, transformers.DistilBertConfig, dim=32, hidden_dim=64, n_layers=3, n_heads=4
    ),
    "ELECTRA": lambda: text_model(
        transformers.ElectraModel, transformers.ElectraConfig, intermediate_size=64, embedding_size=32
    ),
}


def text_model(model: type, config: type, **arguments: object) -> nn.Module:
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 60}
    own = {name: value for name, value in small.items() if "dim" not in arguments or name == "vocab_size"}
    return model(config(**{**own, **arguments})).eval()


def words(length: int, *lengths: int) -> dict[str, Tensor]:
    """Texts of these lengths, padded."""
    made = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 60, (len(lengths), length), generator=made)
    mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": torch.where(mask.bool(), ids, 1), "attention_mask": mask}


@pytest.mark.parametrize("family", TEXTS)
def test_words_merge_by_parts_and_padding_is_none_of_them(family: str) -> None:
    module = TEXTS[family]()
    inputs = words(16, 16, 16)
    structure = describe(module, inputs)
    stack = token_stack(module, inputs, structure, "attention_mask")
    assert stack.text and stack.prefix == 1 and stack.tokens == 16
    small = copy.deepcopy(module)
    plan = Plan({}, (16, 12, 8))
    with_merging(small, structure, stack, plan)
    costs = token_costs(module, structure, flop_costs(module, structure, inputs), stack, inputs)
    assert costs.at(plan.tokens).of(plan) == pytest.approx(count_flops(small, inputs), rel=1e-6)
    # A quarter of the words before the second block, then a third of the rest: of 6 real ones in 16 none has to leave.
    padded = words(16, 6)
    torch.testing.assert_close(output(small, padded)[:, :6], output(module, padded)[:, :6], atol=1e-5, rtol=1e-5)
    entered: list[int] = []
    for block in stack.blocks:
        small.get_submodule(block).register_forward_pre_hook(lambda _, args: entered.append(args[0].shape[1]))
    got = output(small, words(10, 10, 7))
    assert entered == [10, 8, 6] and got.shape[1] == 10 and got.isfinite().all()


def test_what_padding_holds_is_nowhere_to_be_seen() -> None:
    module = TEXTS["BERT"]()
    inputs = words(16, 16, 16)
    structure = describe(module, inputs)
    stack = token_stack(module, inputs, structure, "attention_mask")
    with_merging(module, structure, stack, Plan({}, (16, 16, 9)))
    both = words(12, 12, 4)
    changed = {**both, "input_ids": torch.where(both["attention_mask"].bool(), both["input_ids"], 33)}
    torch.testing.assert_close(output(module, both)[1, :4], output(module, changed)[1, :4], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "config", "arguments", "reason"),
    [
        (transformers.BertModel, transformers.BertConfig, {"is_decoder": True}, "the mask of its blocks"),
        (transformers.LlamaModel, transformers.LlamaConfig, {}, "position_embeddings"),
    ],
)
def test_texts_that_cannot_merge_say_why(model: type, config: type, arguments: dict[str, bool], reason: str) -> None:
    module, inputs = text_model(model, config, intermediate_size=64, use_cache=False, **arguments), words(16, 16, 16)
    with pytest.raises(UserError, match=f"tokens.*{reason}"):
        token_stack(module, inputs, describe(module, inputs), "attention_mask")


def test_merging_texts_export_with_any_length() -> None:
    module = text_model(transformers.BertModel, transformers.BertConfig, intermediate_size=64, num_hidden_layers=2)
    inputs = words(16, 16, 16)
    structure = describe(module, inputs)
    stack = token_stack(module, inputs, structure, "attention_mask")
    with_merging(module, structure, stack, Plan({}, (12, 8)))
    tensors = TensorOutputs(module, {"tokens": "last_hidden_state"})
    axes = {name: {0: "batch", 1: "sequence"} for name in inputs}
    with TemporaryDirectory() as folder:
        file = Path(folder, "text.onnx")
        onnx_from_program(trace(tensors, inputs, axes), file, output_names=("tokens",), dynamic_axes=axes)
        session = onnxruntime.InferenceSession(file)
    for lengths in ((16, 16), (9, 5, 7), (3,), (2, 2)):
        batch = words(max(lengths), *lengths)
        (got,) = session.run(None, {name: tensor.numpy() for name, tensor in batch.items()})
        valid = batch["attention_mask"].bool()
        expected = output(module, batch)
        torch.testing.assert_close(torch.from_numpy(got)[valid], expected[valid], atol=1e-4, rtol=1e-4)
