"""The architectures of the coverage table: how each is built, small and with random weights, and what goes in.

Depths and pictures are small, widths those of real networks: a row is to tell whether a kind of block can be pruned and
gets faster, in seconds. ``fifth`` marks those that CI runs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import coverage_modules as own
import torch
import transformers
from torch import Tensor, nn

from optin_deploy.models.libraries import build
from optin_deploy.network import Source

Batch = dict[str, Tensor]
Inputs = Callable[[int, int], Batch]
Family = Literal["timm", "CNNs", "transformers encoders", "dense prediction", "decoders", "wrappers"]

VOCABULARY, LENGTH = 512, 64
WIDTH, HEADS, LAYERS, NEURONS = 256, 4, 2, 1024


@dataclass(frozen=True)
class Architecture:
    """One row.

    Attributes:
        inputs: (samples, seed) -> inputs by name.
        source: how the library builds it; None for a module of the user's own, which ``make`` builds.
        outputs: those of the module's outputs that count; all where empty.
        logits: that one of them that has class logits.
        text: whether the second axis of all inputs is a sequence of any length, with an ``attention_mask``.
        fifth: whether CI runs it.
    """

    name: str
    family: Family
    inputs: Inputs
    source: Source | None = None
    make: Callable[[], nn.Module] | None = None
    outputs: tuple[str, ...] = ()
    logits: str | None = None
    text: bool = False
    fifth: bool = False

    def module(self) -> nn.Module:
        """The dense module, the same at every call; nothing in it is zero or one by construction."""
        torch.manual_seed(0)
        assert self.source is not None or self.make is not None
        return shaken(build(self.source) if self.source is not None else self.make())  # type: ignore[misc]


def shaken(module: nn.Module) -> nn.Module:
    """Noise on what starts as zeros or ones, like scales of layers, in whose shadow every mistake would vanish."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        if parameter.dim() < 2 or float(parameter.detach().std()) < 1e-5:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d) and norm.running_mean is not None:
            norm.running_mean += 0.1 * torch.randn(norm.num_features, generator=generator)
            norm.running_var *= 0.5 + torch.rand(norm.num_features, generator=generator)
    return module.eval()


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(name: str, height: int, width: int | None = None) -> Inputs:
    """Noise, three channels."""
    return lambda count, seed: {name: torch.randn(count, 3, height, width or height, generator=_generator(seed))}


def _ids(count: int, seed: int, length: int = LENGTH) -> Tensor:
    return torch.randint(4, VOCABULARY, (count, length), generator=_generator(seed))


def texts(count: int, seed: int) -> Batch:
    """Token ids of different lengths, padded at the end; the first has no padding."""
    lengths = LENGTH - 7 * torch.arange(count)
    mask = (torch.arange(LENGTH) < lengths.clamp_min(8)[:, None]).long()
    return {"input_ids": torch.where(mask.bool(), _ids(count, seed), 1), "attention_mask": mask}


def whole_texts(count: int, seed: int) -> Batch:
    """Token ids without padding."""
    return {"input_ids": _ids(count, seed)}


def text_pairs(count: int, seed: int) -> Batch:
    """What an encoder and a decoder read."""
    return {**texts(count, seed), "decoder_input_ids": _ids(count, seed + 1000, 24)}


def sequences(width: int) -> Inputs:
    """Vectors ``(samples, 64, width)`` for a module of the user's own."""
    return lambda count, seed: {"x": torch.randn(count, LENGTH, width, generator=_generator(seed))}


def _timm(label: str, name: str, size: int = 224, fifth: bool = False, **arguments: Any) -> Architecture:
    source = Source("timm", name, {"num_classes": 100, **arguments})
    return Architecture(label, "timm", images("x", size), source, outputs=("output",), logits="output", fifth=fifth)


def _cnn(label: str, name: str, size: int = 128, fifth: bool = False, **arguments: Any) -> Architecture:
    source = Source("timm", name, {"num_classes": 100, **arguments})
    return Architecture(label, "CNNs", images("x", size), source, outputs=("output",), logits="output", fifth=fifth)


def _text(label: str, cls: str, config: Any, fifth: bool = False) -> Architecture:
    logits = "logits" if cls.endswith(("Classification", "LM")) else None
    outputs = (logits or "last_hidden_state",)
    source = Source("transformers", cls, config.to_dict())
    return Architecture(
        label, "transformers encoders", texts, source, outputs=outputs, logits=logits, text=True, fifth=fifth
    )


def _library(
    label: str, family: Family, cls: str, config: Any, inputs: Inputs, outputs: tuple[str, ...], fifth: bool = False
) -> Architecture:
    logits = "logits" if outputs == ("logits",) else None
    return Architecture(
        label,
        family,
        inputs,
        Source("transformers", cls, config.to_dict()),
        outputs=outputs,
        logits=logits,
        fifth=fifth,
    )


def _own(
    label: str, make: Callable[[], nn.Module], inputs: Inputs, fifth: bool = False, family: Family = "wrappers"
) -> Architecture:
    return Architecture(label, family, inputs, make=make, fifth=fifth)


def _sizes(**changes: Any) -> dict[str, Any]:
    """Of a text network: two layers of four heads of 64 and 1,024 neurons."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": NEURONS,
        "max_position_embeddings": LENGTH + 8,
        "pad_token_id": 1,
        **changes,
    }


def _image_sizes(**changes: Any) -> dict[str, Any]:
    own = {k: v for k, v in _sizes().items() if k in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    return {**own, "intermediate_size": NEURONS, "image_size": 112, "patch_size": 16, **changes}


def _layers(**changes: Any) -> dict[str, Any]:
    """Of an encoder–decoder whose sizes are named by half."""
    return {
        "vocab_size": VOCABULARY,
        "d_model": WIDTH,
        "encoder_layers": LAYERS,
        "decoder_layers": LAYERS,
        "encoder_attention_heads": HEADS,
        "decoder_attention_heads": HEADS,
        "encoder_ffn_dim": NEURONS,
        "decoder_ffn_dim": NEURONS,
        "max_position_embeddings": LENGTH + 8,
        "use_cache": False,
        **changes,
    }


_DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 64}
_TIMM_VITS = [
    _timm("ViT", "vit_tiny_patch16_224", depth=2, fifth=True),
    _timm("DeiT, distilled", "deit_tiny_distilled_patch16_224", depth=2),
    _timm("DeiT-3", "deit3_small_patch16_224", depth=2, embed_dim=192, num_heads=3),
    _timm("BEiT", "beit_base_patch16_224", depth=2, embed_dim=192, num_heads=3, fifth=True),
    _timm("EVA-02", "eva02_tiny_patch14_224", depth=2, fifth=True),
    _timm("DINOv2, registers", "vit_small_patch14_reg4_dinov2", depth=2, img_size=224, embed_dim=192, num_heads=3),
    _timm("DINOv3", "vit_tiny_patch16_dinov3_qkvb", depth=2),
    _timm("CaiT", "cait_xxs24_224", depth=2, depth_token_only=1),
    _timm("XCiT", "xcit_tiny_12_p16_224", depth=2),
    _timm("Swin", "swin_tiny_patch4_window7_224", embed_dim=64, depths=[2, 2], num_heads=[2, 4], fifth=True),
    _timm("Swin v2", "swinv2_tiny_window8_256", 256, embed_dim=64, depths=[2, 2], num_heads=[2, 4]),
    _timm("PVT v2", "pvt_v2_b1", depths=[1, 1, 1, 1]),
    _own("MViT v2", own.mvit, images("x", 112), family="timm"),
    _timm("Twins, PCPVT", "twins_pcpvt_small", depths=[1, 1, 1, 1]),
    _timm("Twins, SVT", "twins_svt_small", depths=[1, 1, 2, 1]),
    _timm("LeViT", "levit_128s"),
    _timm("CoaT", "coat_lite_mini", serial_depths=[1, 1, 1, 1]),
    _timm("MaxViT", "test_maxvit", 160),
    _timm("MobileViT", "mobilevit_xs", 256),
    _timm("EfficientFormer", "efficientformer_l1", depths=[1, 1, 2, 2]),
    _timm("Hiera", "hiera_tiny_224", stages=[1, 1, 2, 1], embed_dim=64),
    _timm("NaFlexViT", "naflexvit_base_patch16_gap", depth=2, embed_dim=192, num_heads=3),
    _own("MLP-Mixer", own.mixer, images("x", 224), family="timm"),
    _own("PoolFormer", own.poolformer, images("x", 224), family="timm"),
    _timm("ViT with a ResNet stem", "vit_tiny_r_s16_p8_224", depth=2),
    _own("CeiT: convolutions in the FFN", own.CeiT, images("x", 112), family="timm"),
]
_CNNS = [
    _cnn("ResNet, basic blocks", "resnet18", channels=[32, 64, 96, 128], layers=[1, 1, 2, 1]),
    _cnn("ResNet, bottlenecks", "resnet50", channels=[32, 64, 96, 128], layers=[1, 1, 2, 1], fifth=True),
    _own("VGG", own.vgg, images("x", 64), family="CNNs"),
    _cnn("ConvNeXt", "convnext_atto", depths=[1, 1, 2, 1]),
    _cnn("ConvNeXt v2", "convnextv2_atto", depths=[1, 1, 2, 1]),
    _cnn("RegNet X", "regnetx_004"),
    _cnn("RegNet Y", "regnety_004"),
    _cnn("MobileNet v3", "mobilenetv3_small_100"),
    _cnn("EfficientNet", "efficientnet_b0"),
]
_ENCODERS = [
    _text("BERT", "BertForSequenceClassification", transformers.BertConfig(**_sizes()), fifth=True),
    _text(
        "DistilBERT",
        "DistilBertModel",
        transformers.DistilBertConfig(
            vocab_size=VOCABULARY, dim=WIDTH, n_layers=LAYERS, n_heads=HEADS, hidden_dim=NEURONS, pad_token_id=1
        ),
    ),
    _text("RoBERTa", "RobertaForSequenceClassification", transformers.RobertaConfig(**_sizes())),
    _text("XLM-R", "XLMRobertaModel", transformers.XLMRobertaConfig(**_sizes())),
    _text("ELECTRA", "ElectraForSequenceClassification", transformers.ElectraConfig(**_sizes(embedding_size=128))),
    _text("MPNet", "MPNetModel", transformers.MPNetConfig(**_sizes())),
    _text("DeBERTa v2", "DebertaV2Model", transformers.DebertaV2Config(**_sizes(**_DEBERTA))),
    _text(
        "DeBERTa v3",
        "DebertaV2Model",
        transformers.DebertaV2Config(
            **_sizes(**_DEBERTA, share_att_key=True, position_buckets=32, norm_rel_ebd="layer_norm", type_vocab_size=0)
        ),
        fifth=True,
    ),
    _text("ALBERT", "AlbertModel", transformers.AlbertConfig(**_sizes(embedding_size=128))),
    _text(
        "ModernBERT",
        "ModernBertModel",
        transformers.ModernBertConfig(
            **_sizes(intermediate_size=512, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3)
        ),
    ),
    *(
        _library(label, "transformers encoders", cls, config, images("pixel_values", 112), outputs)
        for label, cls, config, outputs in (
            ("ViT", "ViTForImageClassification", transformers.ViTConfig(**_image_sizes()), ("logits",)),
            ("DeiT", "DeiTModel", transformers.DeiTConfig(**_image_sizes()), ("last_hidden_state",)),
            ("DINOv2", "Dinov2Model", transformers.Dinov2Config(**_image_sizes()), ("last_hidden_state",)),
            ("CLIP, images", "CLIPVisionModel", transformers.CLIPVisionConfig(**_image_sizes()), ("pooler_output",)),
            (
                "SigLIP, images",
                "SiglipVisionModel",
                transformers.SiglipVisionConfig(**_image_sizes()),
                ("pooler_output",),
            ),
        )
    ),
    _library(
        "CLIP, texts",
        "transformers encoders",
        "CLIPTextModel",
        transformers.CLIPTextConfig(**_sizes(bos_token_id=0, eos_token_id=2)),
        texts,
        ("pooler_output",),
    ),
    _library(
        "SigLIP, texts",
        "transformers encoders",
        "SiglipTextModel",
        transformers.SiglipTextConfig(**_sizes(max_position_embeddings=LENGTH)),
        whole_texts,
        ("pooler_output",),
    ),
]
_SWIN = {"embed_dim": 48, "depths": [1, 1, 2, 1], "num_heads": [2, 4, 8, 16], "window_size": 7, "image_size": 112}
_STAGES = ["stage1", "stage2", "stage3", "stage4"]
_DENSE = [
    _library(
        "SegFormer",
        "dense prediction",
        "SegformerForSemanticSegmentation",
        transformers.SegformerConfig(depths=[1, 1, 2, 1], decoder_hidden_size=128, num_labels=19),
        images("pixel_values", 128, 256),
        ("logits",),
    ),
    _library(
        "UperNet on Swin",
        "dense prediction",
        "UperNetForSemanticSegmentation",
        transformers.UperNetConfig(
            backbone_config=transformers.SwinConfig(**_SWIN, out_features=_STAGES),
            hidden_size=128,
            auxiliary_in_channels=192,
            use_auxiliary_head=False,
            num_labels=19,
        ),
        images("pixel_values", 112),
        ("logits",),
    ),
    _library(
        "DPT",
        "dense prediction",
        "DPTForSemanticSegmentation",
        transformers.DPTConfig(
            **_image_sizes(num_hidden_layers=4),
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[32, 64, 128, 128],
            fusion_hidden_size=64,
            use_auxiliary_head=False,
            num_labels=19,
        ),
        images("pixel_values", 112),
        ("logits",),
        fifth=True,
    ),
    _library(
        "Mask2Former on Swin",
        "dense prediction",
        "Mask2FormerForUniversalSegmentation",
        transformers.Mask2FormerConfig(
            backbone_config=transformers.SwinConfig(**_SWIN, out_features=_STAGES),
            encoder_layers=2,
            decoder_layers=3,
            encoder_feedforward_dim=512,
            dim_feedforward=512,
            feature_size=128,
            mask_feature_size=128,
            hidden_dim=128,
            num_queries=20,
            num_labels=19,
        ),
        images("pixel_values", 112),
        ("class_queries_logits", "masks_queries_logits"),
    ),
    _library(
        "DETR",
        "dense prediction",
        "DetrForObjectDetection",
        transformers.DetrConfig(
            **{k: v for k, v in _layers().items() if k not in ("vocab_size", "max_position_embeddings", "use_cache")},
            # The first releases of transformers 5 have a backbone by name unless told otherwise.
            backbone=None,
            use_timm_backbone=False,
            backbone_config=transformers.ResNetConfig(
                embedding_size=32, hidden_sizes=[64, 128], depths=[1, 1], layer_type="basic", out_features=["stage2"]
            ),
            num_queries=20,
            num_labels=19,
        ),
        images("pixel_values", 128),
        ("logits", "pred_boxes"),
    ),
]
_DECODERS = [
    _library(
        "T5",
        "decoders",
        "T5ForConditionalGeneration",
        transformers.T5Config(
            vocab_size=VOCABULARY,
            d_model=WIDTH,
            d_kv=64,
            d_ff=NEURONS,
            num_layers=LAYERS,
            num_heads=HEADS,
            use_cache=False,
        ),
        text_pairs,
        ("logits",),
        fifth=True,
    ),
    *(
        _library(label, "decoders", cls, config, text_pairs, ("logits",))
        for label, cls, config in (
            ("BART", "BartForConditionalGeneration", transformers.BartConfig(**_layers())),
            (
                "Marian",
                "MarianMTModel",
                transformers.MarianConfig(**_layers(pad_token_id=1, decoder_start_token_id=1)),
            ),
        )
    ),
    _own("Whisper, encoder", own.whisper_encoder, own.spectra, family="decoders"),
    _library(
        "GPT-2",
        "decoders",
        "GPT2LMHeadModel",
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=LENGTH, use_cache=False
        ),
        texts,
        ("logits",),
    ),
    *(
        _library(
            label,
            "decoders",
            f"{kind}ForCausalLM",
            getattr(transformers, f"{kind}Config")(
                **_sizes(num_attention_heads=8, num_key_value_heads=2, head_dim=32, use_cache=False)
            ),
            texts,
            ("logits",),
            fifth=kind == "Llama",
        )
        for label, kind in (("LLaMA, grouped queries", "Llama"), ("Qwen2", "Qwen2"), ("Qwen3", "Qwen3"))
    ),
]
_WRAPPERS = [
    _own("LoRA of peft, merged", own.lora, texts),
    _own("LayerNorm made BatchNorm", own.batch_norm_vit, images("x", 112)),
    _library(
        "Tied head",
        "wrappers",
        "BertForMaskedLM",
        transformers.BertConfig(**_sizes(tie_word_embeddings=True)),
        texts,
        ("logits",),
    ),
    _own("nn.TransformerEncoder", own.TorchEncoder, sequences(WIDTH)),
    _own("nn.MultiheadAttention", own.OwnAttentionBlocks, sequences(WIDTH)),
    _own("Own head on a backbone", own.Segmenter, images("image", 112), fifth=True),
    _own("Own block with an adapter", own.OwnBlocks, sequences(WIDTH)),
]
ARCHITECTURES: Mapping[str, Architecture] = {
    f"{each.family}: {each.name}": each for each in (*_TIMM_VITS, *_CNNS, *_ENCODERS, *_DENSE, *_DECODERS, *_WRAPPERS)
}
