"""Tiny networks with random weights of every supported kind, by name, and plans drawn for them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import timm.layers
import torch
import torch.nn.functional as F
import transformers
from hypothesis import strategies as st
from timm.models import resnet
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from optin_deploy.network import Network, Source
from optin_deploy.nn.outputs import named_outputs
from optin_deploy.structure.describe import describe
from optin_deploy.structure.groups import Group, Structure
from optin_deploy.structure.plan import Plan

WIDTH, HEADS, LAYERS, NEURONS = 16, 4, 2, 24
VOCABULARY = 50

Batch = dict[str, Tensor]


class Segmenter(nn.Module):
    """The user's own module: a timm backbone with a convolutional decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = _vit(num_classes=0, global_pool="")
        self.decoder = nn.Sequential(nn.Conv2d(WIDTH, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        patches = self.backbone.forward_features(image)[:, 1:]
        side = int(patches.shape[1] ** 0.5)
        return self.decoder(patches.transpose(1, 2).unflatten(2, (side, side)))


class Upsampler(nn.Module):
    """A timm backbone with a decoder of transposed convolutions, in a container that does not run itself."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = _vit(num_classes=0, global_pool="")
        self.decoder = nn.ModuleDict(
            {
                "up1": nn.ConvTranspose2d(WIDTH, 6, 4, stride=2, padding=1),
                "norm1": nn.BatchNorm2d(6),
                "up2": nn.ConvTranspose2d(6, 5, 3, stride=2, padding=1, output_padding=1),
                "up3": nn.ConvTranspose2d(5, 4, 2, stride=2, bias=False),
                "norm3": nn.BatchNorm2d(4),
                "last": nn.Conv2d(4, 1, 1),
            }
        )

    def forward(self, image: Tensor) -> Tensor:
        decoder, patches = self.decoder, self.backbone.forward_features(image)[:, 1:]
        side = int(patches.shape[1] ** 0.5)
        x = F.relu(decoder["norm1"](decoder["up1"](patches.transpose(1, 2).unflatten(2, (side, side)))))
        x = F.relu(decoder["norm3"](decoder["up3"](F.relu(decoder["up2"](x)))))
        return decoder["last"](x)


class PlainBlock(nn.Module):
    """Two convolutions beside a shortcut without weights; adds to new tensors, and its ReLU is no module."""

    def __init__(self, inputs: int, width: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, outputs, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if inputs == outputs else Padded(stride, outputs - inputs)

    def forward(self, x: Tensor) -> Tensor:
        update = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.shortcut(x) + update)


class Padded(nn.Module):
    """Every ``stride``-th pixel, with ``more`` channels of zeros."""

    def __init__(self, stride: int, more: int) -> None:
        super().__init__()
        self.stride, self.more = stride, more

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))


class PlainResNet(nn.Module):
    """Three blocks of `PlainBlock` behind a stem, the second with a shortcut that pads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.blocks = nn.Sequential(PlainBlock(6, 10, 6, 1), PlainBlock(6, 8, 12, 2), PlainBlock(12, 9, 12, 1))
        self.linear = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.blocks(F.relu(self.bn1(self.conv1(x)))).mean((2, 3)))


def _resnet(block: type[nn.Module] = resnet.BasicBlock, **arguments: Any) -> nn.Module:
    """timm's, with one block a stage and two in the second; at 16 pixels the maps are 8, 4, 2 and 1 wide."""
    sizes = {"layers": (1, 2, 1, 1), "channels": (8, 8, 12, 12), "stem_width": 8, "num_classes": 3}
    return resnet.ResNet(block, **{**sizes, **arguments})


def _vit(cls: type[nn.Module] = VisionTransformer, **arguments: Any) -> nn.Module:
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": WIDTH, "depth": LAYERS, "num_heads": HEADS}
    return cls(**{**sizes, "mlp_ratio": NEURONS / WIDTH, "num_classes": 3, **arguments})


_HAS_GATE = "gated" in inspect.signature(timm.layers.Attention.__init__).parameters
_NEEDS_GATE = {"vit_gated"}


def _gated_vit() -> nn.Module:
    if not _HAS_GATE:
        pytest.skip("this version of timm has no gated attention")
    module = _vit()
    for block in module.blocks:
        block.attn = timm.layers.Attention(WIDTH, HEADS, qkv_bias=True, gated=True)
    return module


def _image_config(cls: Any, **arguments: Any) -> Any:
    return cls(
        image_size=16,
        patch_size=8,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        **{"intermediate_size": NEURONS, **arguments},
    )


def _text_config(cls: Any, **arguments: Any) -> Any:
    return cls(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=NEURONS,
        max_position_embeddings=40,
        num_labels=3,
        **arguments,
    )


def _distilbert() -> nn.Module:
    return transformers.DistilBertModel(
        transformers.DistilBertConfig(
            vocab_size=VOCABULARY,
            dim=WIDTH,
            n_layers=LAYERS,
            n_heads=HEADS,
            hidden_dim=NEURONS,
            max_position_embeddings=40,
        )
    )


_VISION: dict[str, Callable[[], nn.Module]] = {
    "vit": _vit,
    "vit_layer_scale": partial(_vit, init_values=0.1),
    "vit_pooled": partial(_vit, class_token=False, global_pool="avg"),
    "vit_qk_norm": partial(_vit, qk_norm=True),
    "vit_gated": _gated_vit,
    "vit_without_biases": partial(_vit, qkv_bias=False, proj_bias=False),
    "deit_distilled": partial(_vit, VisionTransformerDistilled),
    "hf_vit": lambda: transformers.ViTForImageClassification(_image_config(transformers.ViTConfig, num_labels=3)),
    "hf_deit": lambda: transformers.DeiTModel(_image_config(transformers.DeiTConfig), add_pooling_layer=False),
    "dinov2": lambda: transformers.Dinov2Model(
        _image_config(transformers.Dinov2Config, mlp_ratio=2, layerscale_value=0.1)
    ),
    "segmenter": Segmenter,
    "upsampler": Upsampler,
}
_CNN: dict[str, Callable[[], nn.Module]] = {
    "resnet": _resnet,
    "resnet_silu_se": partial(_resnet, act_layer=nn.SiLU, block_args={"attn_layer": "se"}),
    "plain_resnet": PlainResNet,
}
_TEXT: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: transformers.BertModel(_text_config(transformers.BertConfig), add_pooling_layer=False),
    "bert_classifier": lambda: transformers.BertForSequenceClassification(_text_config(transformers.BertConfig)),
    "roberta": lambda: transformers.RobertaForSequenceClassification(_text_config(transformers.RobertaConfig)),
    "electra": lambda: transformers.ElectraForSequenceClassification(
        _text_config(transformers.ElectraConfig, embedding_size=12)
    ),
    "distilbert": _distilbert,
}
TEXT_NAMES = tuple(_TEXT)
NAMES = tuple(name for name in (*_VISION, *_TEXT) if _HAS_GATE or name not in _NEEDS_GATE)
CNN_NAMES = tuple(_CNN)
ALL_NAMES = (*NAMES, *CNN_NAMES)


def randomised(module: nn.Module, seed: int = 0, gain: float = 0.8) -> nn.Module:
    """Every parameter and batch-norm statistic drawn anew, so that nothing is zero or one by construction."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.data = noise * gain / parameter[0].numel() ** 0.5
        else:
            parameter.data = parameter.data + 0.2 * noise
    for submodule in module.modules():
        if isinstance(submodule, nn.BatchNorm2d):
            submodule.running_mean += 0.2 * torch.randn(submodule.num_features, generator=generator)
            submodule.running_var *= torch.rand(submodule.num_features, generator=generator) + 0.5
    return module.eval()


def texts(batch: int = 3, length: int = 7, seed: int = 0) -> Batch:
    """Token ids of lengths that differ, padded at the end; the first text has no padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    lengths = length - torch.arange(batch) % (length - 2)
    mask = (torch.arange(length) < lengths[:, None]).long()
    return {"input_ids": torch.where(mask.bool(), ids, 1), "attention_mask": mask}


def images(name: str, batch: int = 3, seed: int = 0) -> Batch:
    return {name: torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed))}


def batches(network: Network, count: int, size: int = 3) -> list[Batch]:
    """Inputs for ``network`` that differ from batch to batch."""
    name = next(iter(network.inputs))
    seeds = range(1, count + 1)
    return [texts(size, seed=s) if network.token_mask else images(name, size, seed=s) for s in seeds]


def network_around(module: nn.Module, inputs: Batch, logits: bool = False) -> Network:
    """A `Network` with all outputs of ``module``."""
    with torch.no_grad():
        outputs = named_outputs(module(**inputs))
    found = next(iter(outputs)) if logits else None
    mask = "attention_mask" if "attention_mask" in inputs else None
    source = Source("custom", type(module).__name__)
    return Network(module, inputs, {n: n for n in outputs}, source, "random", token_mask=mask, logits=found)


@cache
def network(name: str) -> Network:
    """The network of that name; one object for all tests, so leave it as it is."""
    torch.manual_seed(0)
    module = randomised({**_VISION, **_CNN, **_TEXT}[name](), gain=1.6 if name in _CNN else 0.8)
    if name in _TEXT:
        return network_around(module, texts(), logits=hasattr(module, "classifier"))
    arguments = {"hf": "pixel_values", "dinov2": "pixel_values", "segmenter": "image", "upsampler": "image"}
    argument = arguments.get(name.split("_")[0], "x")
    classifies = argument == "x" or name == "hf_vit"
    return network_around(module, images(argument), logits=classifies)


def renamed() -> bool:
    """Whether vision transformers of this transformers hold their layers, and attentions theirs, by the later names."""
    return hasattr(network("hf_vit").module.vit, "layers")


@cache
def structure(name: str) -> Structure:
    return describe(network(name).module, network(name).inputs)


def vit(**arguments: Any) -> Network:
    """A new timm vision transformer with the given arguments."""
    return network_around(randomised(_vit(**arguments)), images("x"), logits=True)


def cnn(**arguments: Any) -> Network:
    """A new timm ResNet with the given arguments."""
    return network_around(randomised(_resnet(**arguments), gain=1.6), images("x"), logits=True)


def kept_units(group: Group) -> st.SearchStrategy[tuple[int, ...]]:
    """None, all or some of the units; of a width one dimension at least."""
    least = 1 if group.outer is not None else 0
    some = st.sets(st.integers(0, group.units - 1), min_size=least).map(lambda s: tuple(sorted(s)))
    return st.one_of(st.just((0,) * least), st.just(tuple(range(group.units))), some)


def plans(structure: Structure) -> st.SearchStrategy[Plan]:
    """Plans that name some of the groups."""
    return st.fixed_dictionaries({}, optional={g.name: kept_units(g) for g in structure.groups}).map(Plan)


def empty_plan(structure: Structure, *kinds: str) -> Plan:
    """No unit left in any group of these kinds (any kind if none is given); widths, which cannot be empty, left out."""
    return Plan({g.name: () for g in structure.groups if g.outer is None and (not kinds or g.kind in kinds)})


def uneven_plan(structure: Structure) -> Plan:
    """Keeps a different number of units in every group, none in the second that is no width."""
    kept = {}
    empty = structure.without_widths().groups[1].name
    for i, group in enumerate(structure.groups):
        generator = torch.Generator().manual_seed(i)
        number = max(1, (i + 1) * group.units // (len(structure.groups) + 1)) if group.name != empty else 0
        kept[group.name] = tuple(torch.randperm(group.units, generator=generator)[:number].sort().values.tolist())
    return Plan(kept)


def masks_of(structure: Structure, plan: Plan) -> dict[str, Tensor]:
    """The masks that do what slicing by ``plan`` does."""
    masks = {}
    for name, kept in plan.kept.items():
        masks[name] = torch.zeros(structure.group(name).units)
        masks[name][list(kept)] = 1.0
    return masks
