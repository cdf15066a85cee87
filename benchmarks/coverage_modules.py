"""Modules of a user's own for the coverage table: other libraries' blocks in them, wrapped, merged, or new."""

import timm
import timm.layers
import torch
import torch.nn.functional as F
import transformers
from timm.models.metaformer import MetaFormer
from timm.models.mlp_mixer import MlpMixer
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from timm.models.vgg import VGG
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from optin_deploy.nn.names import join
from optin_deploy.structure.adapters.registry import adapter
from optin_deploy.structure.groups import CostModules, Group, LayerAxis

WIDTH, HEADS, NEURONS = 256, 4, 1024


class LocalFeedForward(nn.Module):
    """The FFN of CeiT (Yuan et al., ICCV 2021): a depthwise convolution over the map between its two layers."""

    def __init__(self, width: int, neurons: int) -> None:
        super().__init__()
        self.up, self.norm1 = nn.Conv2d(width, neurons, 1), nn.BatchNorm2d(neurons)
        self.local, self.norm2 = nn.Conv2d(neurons, neurons, 3, padding=1, groups=neurons), nn.BatchNorm2d(neurons)
        self.down, self.norm3 = nn.Conv2d(neurons, width, 1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        side = int(x.shape[1] ** 0.5)
        x = x.transpose(1, 2).unflatten(2, (side, side))
        x = F.gelu(self.norm2(self.local(F.gelu(self.norm1(self.up(x))))))
        return self.norm3(self.down(x)).flatten(2).transpose(1, 2)


class CeiT(nn.Module):
    """Two blocks of timm's attention and `LocalFeedForward`, average pooling, 100 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 192, 16, stride=16)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(192),
                    "attn": timm.layers.Attention(192, 3, qkv_bias=True),
                    "norm2": nn.LayerNorm(192),
                    "ffn": LocalFeedForward(192, 768),
                }
            )
            for _ in range(2)
        )
        self.head = nn.Linear(192, 100)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = x + block["attn"](block["norm1"](x))
            x = x + block["ffn"](block["norm2"](x))
        return self.head(x.mean(1))


class Segmenter(nn.Module):
    """A timm backbone with a convolutional decoder of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model("vit_tiny_patch16_224", img_size=112, depth=2, num_classes=0)
        self.decoder = nn.Sequential(nn.Conv2d(192, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        patches = self.backbone.forward_features(image)[:, 1:]
        side = int(patches.shape[1] ** 0.5)
        return self.decoder(patches.transpose(1, 2).unflatten(2, (side, side)))


class TorchEncoder(nn.Module):
    """``nn.TransformerEncoder`` behind a projection, in front of a head."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, NEURONS, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


class OwnAttentionBlocks(nn.Module):
    """Two post-norm blocks of the user's own around ``nn.MultiheadAttention``."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "attention": nn.MultiheadAttention(WIDTH, HEADS, batch_first=True),
                    "norm1": nn.LayerNorm(WIDTH),
                    "ffn": nn.Sequential(nn.Linear(WIDTH, NEURONS), nn.GELU(), nn.Linear(NEURONS, WIDTH)),
                    "norm2": nn.LayerNorm(WIDTH),
                }
            )
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block["norm1"](x + block["attention"](x, x, x, need_weights=False)[0])
            x = block["norm2"](x + block["ffn"](x))
        return x


class ReluSquared(nn.Module):
    """A feed-forward network that no adapter of the package knows: squared ReLU, layers of names of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.widen, self.narrow = nn.Linear(WIDTH, NEURONS), nn.Linear(NEURONS, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(F.relu(self.widen(x)).square())


@adapter
def relu_squared(name: str, module: nn.Module, parent_name: str, parent: nn.Module) -> Group | None:
    """Neurons of the benchmark's own `ReluSquared`."""
    if not isinstance(module, ReluSquared):
        return None
    up, down = join(name, "widen"), join(name, "narrow")
    return Group(
        name=name,
        kind="neuron",
        units=module.widen.out_features,
        width=1,
        output=down,
        sides=(LayerAxis(up, "out"), LayerAxis(down, "in")),
        cost=CostModules((name,)),
        placeholders=((name, "constant"),),
    )


class OwnBlocks(nn.Module):
    """Three pre-norm blocks of `ReluSquared`, for which the user has registered an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.blocks = nn.ModuleList(ReluSquared() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return x


def mvit() -> nn.Module:
    """timm's MViT v2 of one block a stage."""
    return MultiScaleVit(MultiScaleVitCfg(depths=(1, 1, 1, 1)), img_size=(112, 112), num_classes=100)


def mixer() -> nn.Module:
    """timm's MLP-Mixer of two blocks."""
    return MlpMixer(img_size=224, num_blocks=2, embed_dim=192, num_classes=100)


def poolformer() -> nn.Module:
    """timm's PoolFormer, narrower than the smallest that it has by name."""
    return MetaFormer(depths=(1, 1, 2, 1), dims=(64, 96, 128, 192), num_classes=100)


def vgg() -> nn.Module:
    """timm's VGG with batch norm, narrower than the smallest that it has by name."""
    layers = [32, "M", 64, "M", 128, 128, "M", 48, "M"]
    return VGG(layers, num_classes=100, norm_layer=nn.BatchNorm2d, mlp_ratio=0.1)


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch norm over the features of tokens, in the place of LayerNorm (Yao et al., ICCVW 2021)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.dim() == 2 else super().forward(x.transpose(1, 2)).transpose(1, 2)


def batch_norm_vit() -> nn.Module:
    """A ViT whose norms are `TokenBatchNorm`."""
    return VisionTransformer(
        img_size=112,
        embed_dim=192,
        depth=2,
        num_heads=3,
        num_classes=100,
        class_token=False,
        global_pool="avg",
        norm_layer=TokenBatchNorm,
    )


def lora() -> nn.Module:
    """BERT with LoRA weights of peft beside its layers, as it comes out of training: pruning merges them."""
    import peft

    config = transformers.BertConfig(
        vocab_size=512,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=NEURONS,
        max_position_embeddings=72,
    )
    module = transformers.BertForSequenceClassification(config)
    adapters = peft.LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False)
    return peft.get_peft_model(module, adapters)


def whisper_encoder() -> nn.Module:
    """The encoder of Whisper on spectra of one second."""
    config = transformers.WhisperConfig(
        num_mel_bins=40,
        d_model=WIDTH,
        encoder_layers=2,
        encoder_attention_heads=HEADS,
        encoder_ffn_dim=NEURONS,
        max_source_positions=50,
    )
    return transformers.models.whisper.modeling_whisper.WhisperEncoder(config)


def spectra(count: int, seed: int) -> dict[str, Tensor]:
    """Log-mel spectra for `whisper_encoder`: noise ``(samples, 40, 100)``."""
    return {"input_features": torch.randn(count, 40, 100, generator=torch.Generator().manual_seed(seed))}
