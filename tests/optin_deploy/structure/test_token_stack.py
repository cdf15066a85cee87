"""Stacks of real families are found, and merge; what cannot merge says why."""

import copy
import inspect
from collections.abc import Callable

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn
from transformers.models.vit import modeling_vit

from optin_deploy.costs import count_flops, flop_costs
from optin_deploy.errors import UserError
from optin_deploy.network import named_outputs
from optin_deploy.plans import Plan
from optin_deploy.slicing import sliced
from optin_deploy.structure.describe import describe
from optin_deploy.structure.groups import Structure
from optin_deploy.structure.token_stack import MergingBlocks, TokenStack, token_stack, with_merging
from optin_deploy.token_costs import token_costs

# The first releases of transformers 5 have layers without.
_MASKED = "attention_mask" in inspect.signature(modeling_vit.ViTLayer.forward).parameters

Made = tuple[nn.Module, dict[str, Tensor]]
_SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 64}


def vit(name: str, **arguments: object) -> Made:
    torch.manual_seed(0)
    options = {"embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 5, **arguments}
    module = timm.create_model(name, **options).eval()
    return module, {"x": torch.randn(2, 3, *module.patch_embed.img_size)}


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
        with pytest.raises(UserError, match="take no attention mask"):
            found(make())
        return
    module, inputs = make()
    structure, stack = found((module, inputs))
    assert stack.prefix == prefix and len(stack.blocks) == 3
    # Keys that are turned by their places are not compared.
    assert all(stack.keys) == (not stack.places)
    n = stack.tokens
    kept = {g.name: tuple(range(g.units // 2)) for g in structure.groups}
    plan = Plan(kept, (n, n - 3, n - 5))
    small = sliced(module, structure, plan)
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
    small = sliced(made[0], structure, plan)
    with_merging(small, structure, stack, plan)
    assert output(small, made[1]).shape == (2, 5)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: vit("vit_base_patch16_rope_mixed_224", img_size=64), "also given rope"),
        (lambda: vit("vit_tiny_patch16_224", img_size=16), "no two patches"),
        (lambda: vit("beit_base_patch16_224", img_size=64), "take no attention mask"),
        (lambda: (timm.create_model("test_resnet").eval(), {"x": torch.randn(2, 3, 64, 64)}), "all of one shape|list"),
    ],
)
def test_what_cannot_merge_says_why(make: Callable[[], Made], reason: str) -> None:
    with pytest.raises(UserError, match=f"tokens cannot merge in this network: .*({reason}).*--tokens off"):
        found(make())


def test_merging_networks_do_not_merge_again_and_keep_their_size() -> None:
    module, inputs = vit("vit_tiny_patch16_224", img_size=64)
    structure, stack = found((module, inputs))
    with_merging(module, structure, stack, Plan({}, (17, 12, 12)))
    assert isinstance(module.blocks, MergingBlocks)
    with pytest.raises(UserError, match="merge already"):
        found((module, inputs))
    with pytest.raises(UserError, match="merge among 17, and here are 9"):
        module.blocks(torch.randn(2, 9, 32))


@pytest.mark.parametrize(
    ("schedule", "told"),
    [
        ((17, 12), "give a number for each of the 3 blocks"),
        ((17, 5, 5), "behind 17 tokens there can be 9 to 17, not 5"),
        ((17, 12, 13), "behind 12 tokens there can be 7 to 12, not 13"),
        ((18, 12, 12), "behind 17 tokens there can be 9 to 17, not 18"),
    ],
)
def test_schedules_are_checked(schedule: tuple[int, ...], told: str) -> None:
    _, stack = found(vit("vit_tiny_patch16_224", img_size=64))
    with pytest.raises(UserError, match=told):
        stack.check(schedule)
