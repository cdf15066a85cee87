"""Tiny transformers of the families that people deploy, with random weights, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import tiny
import torch
import transformers as hf
from torch import nn

from optin_deploy.models import transformers_models as library
from optin_deploy.network import Network, Source

WIDTH, HEADS, LAYERS, NEURONS, VOCABULARY, POSITIONS = 32, 4, 2, 64, 50, 40
_LENGTH = 7

_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": NEURONS,
    "max_position_embeddings": POSITIONS,
    "num_labels": 3,
    "pad_token_id": 1,
}
_VISION = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": NEURONS,
}
_TEXT_TOWER = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": NEURONS,
    "max_position_embeddings": POSITIONS,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "bos_token_id": 0,
}
_SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": NEURONS,
    "decoder_ffn_dim": NEURONS,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
_AUDIO = {**_SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 20}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": NEURONS,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "decoder_start_token_id": 0,
    "pad_token_id": 1,
}
_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": NEURONS,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
_SPECIAL = {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
_SWIN = {"embed_dim": 16, "window_size": 4, "num_labels": 3}


def _backbone() -> Any:
    stages = {"depths": [1, 1, 1, 1], "num_heads": [2, 2, 4, 4]}
    return hf.SwinConfig(
        image_size=64, patch_size=4, out_features=[f"stage{i}" for i in range(1, 5)], **_SWIN, **stages
    )


def _mask2former() -> nn.Module:
    config = hf.Mask2FormerConfig(
        backbone_config=_backbone(),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=64,
        encoder_layers=1,
        decoder_layers=3,
        num_attention_heads=4,
        dim_feedforward=64,
        num_queries=6,
        num_labels=3,
    )
    return hf.Mask2FormerForUniversalSegmentation(config)


def _detr() -> nn.Module:
    backbone = hf.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 4, 8, 8], depths=[1] * 4, layer_type="basic", out_features=["stage4"]
    )
    config = hf.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        num_queries=8,
        num_labels=3,
        **{k: v for k, v in _SEQ2SEQ.items() if k.startswith(("d_model", "encoder", "decoder_"))},
    )
    return hf.DetrForObjectDetection(config)


def _dpt() -> nn.Module:
    config = hf.DPTConfig(
        **{**_VISION, "image_size": 32, "patch_size": 8, "num_hidden_layers": 4, "num_labels": 3},
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16,
        use_auxiliary_head=False,
    )
    return hf.DPTForSemanticSegmentation(config)


def _segformer() -> nn.Module:
    config = hf.SegformerConfig(
        image_size=64,
        depths=[1, 1, 1, 2],
        hidden_sizes=[16, 16, 32, 32],
        num_attention_heads=[1, 2, 4, 4],
        decoder_hidden_size=32,
        num_labels=3,
    )
    return hf.SegformerForSemanticSegmentation(config)


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "mlm_bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**_ENCODER)),
    "xlm_roberta": lambda: hf.XLMRobertaForSequenceClassification(hf.XLMRobertaConfig(**_ENCODER)),
    "mpnet": lambda: hf.MPNetForSequenceClassification(hf.MPNetConfig(**_ENCODER)),
    "deberta_v2": lambda: hf.DebertaV2ForSequenceClassification(hf.DebertaV2Config(**_ENCODER, **_DEBERTA)),
    "deberta_v3": lambda: hf.DebertaV2ForSequenceClassification(
        hf.DebertaV2Config(**_ENCODER, **_DEBERTA, share_att_key=True, position_buckets=8, norm_rel_ebd="layer_norm")
    ),
    "albert": lambda: hf.AlbertForSequenceClassification(
        hf.AlbertConfig(**{**_ENCODER, "embedding_size": 16, "num_hidden_layers": 3})
    ),
    "modernbert": lambda: hf.ModernBertForSequenceClassification(
        hf.ModernBertConfig(
            **{**_ENCODER, **_SPECIAL, "num_hidden_layers": 3}, global_attn_every_n_layers=2, local_attention=4
        )
    ),
    "dinov2_swiglu": lambda: hf.Dinov2Model(
        hf.Dinov2Config(**_VISION, mlp_ratio=2, layerscale_value=0.5, use_swiglu_ffn=True)
    ),
    "beit": lambda: hf.BeitForImageClassification(
        hf.BeitConfig(**_VISION, num_labels=3, use_relative_position_bias=True, layer_scale_init_value=0.1)
    ),
    "clip_vision": lambda: hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**_VISION, projection_dim=16)),
    "clip": lambda: hf.CLIPModel(hf.CLIPConfig(text_config=_TEXT_TOWER, vision_config=_VISION, projection_dim=16)),
    "siglip_vision": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**_VISION)),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**_T5)),
    "t5_encoder": lambda: hf.T5EncoderModel(hf.T5Config(**_T5)),
    "t5_gated": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**_T5, feed_forward_proj="gated-gelu")),
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**_SEQ2SEQ)),
    "marian": lambda: hf.MarianMTModel(hf.MarianConfig(**_SEQ2SEQ)),
    "whisper_encoder": lambda: hf.WhisperForAudioClassification(
        hf.WhisperConfig(**_AUDIO, num_labels=3, classifier_proj_size=16)
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=VOCABULARY, n_positions=POSITIONS, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, eos_token_id=1
        )
    ),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_DECODER)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_DECODER, head_dim=8)),
    "swin": lambda: hf.SwinForImageClassification(
        hf.SwinConfig(image_size=32, patch_size=2, depths=[1, 2], num_heads=[2, 4], **_SWIN)
    ),
    "swinv2": lambda: hf.Swinv2ForImageClassification(
        hf.Swinv2Config(image_size=32, patch_size=2, depths=[1, 2], num_heads=[2, 4], **_SWIN)
    ),
    "segformer": _segformer,
    "upernet": lambda: hf.UperNetForSemanticSegmentation(
        hf.UperNetConfig(
            backbone_config=_backbone(), hidden_size=16, num_labels=3, use_auxiliary_head=False, pool_scales=[1, 2]
        )
    ),
    "dpt": _dpt,
    "mask2former": _mask2former,
    "detr": _detr,
}
"""Name -> a new module. The families that ``tiny`` has are not repeated."""


@cache
def network(name: str) -> Network:
    """The network of that name as the library makes one; one object for all tests, so leave it as it is."""
    torch.manual_seed(0)
    module = library.ready(tiny.randomised(FAMILIES[name]()))
    source = Source("transformers", type(module).__name__, module.config.to_dict())
    return library.network_of(module, source, "random", None, _LENGTH)


def batches(network: Network, count: int) -> list[tiny.Batch]:
    """Inputs like those of ``network`` that differ from batch to batch; the last text of each is shorter."""
    found = []
    for seed in range(1, count + 1):
        generator = torch.Generator().manual_seed(seed)
        batch = {}
        for name, given in network.inputs.items():
            if given.is_floating_point():
                batch[name] = torch.randn(given.shape, generator=generator)
            elif name == "attention_mask":
                batch[name] = given.clone()
                batch[name][-1, _LENGTH - 2 :] = 0
            else:
                ids = torch.randint(3, VOCABULARY, given.shape, generator=generator)
                batch[name] = torch.cat([ids[:, :-1], given[:, -1:]], dim=1)
        found.append(batch)
    return found
