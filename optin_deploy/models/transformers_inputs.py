"""Sample inputs and exported outputs of networks from transformers."""

import inspect
import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from optin_deploy.data.preprocessing import TextPreprocessing, VisionPreprocessing
from optin_deploy.errors import UserError
from optin_deploy.network import Preprocessing
from optin_deploy.nn.batches import Batch, batch_size
from optin_deploy.nn.outputs import all_outputs, named_outputs, unfit_reason
from optin_deploy.utils.json_types import JsonObject

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

IMAGE_INPUT = "pixel_values"
AUDIO_INPUT = "input_features"
TEXT_INPUT = "input_ids"
MASK_INPUT = "attention_mask"
DECODER_INPUT = "decoder_input_ids"
logger = logging.getLogger(__name__)
_SAMPLE_TEXT = "the quick brown fox jumps over the lazy dog and then it rests a while "
# More tokens than any network takes: tokenizers without a limit have a huge one.
_MOST_POSITIONS = 1 << 24
_SAMPLES = 2
_INNER_STATES = ("hidden_state", "hidden_states", "pooler_output")
_PLAIN_OUTPUTS = ("last_hidden_state", "pooler_output")


def input_kinds(module: nn.Module) -> list[str]:
    """Return the names of the forward arguments for images, audio and texts."""
    arguments = inspect.signature(module.forward).parameters
    return [name for name in (IMAGE_INPUT, AUDIO_INPUT, TEXT_INPUT) if name in arguments]


def takes_decoder_ids(module: nn.Module) -> bool:
    """Whether the network needs token ids for its decoder; some networks derive them from the encoder's."""
    arguments = inspect.signature(module.forward).parameters
    if DECODER_INPUT not in arguments or not getattr(module.config, "is_encoder_decoder", False):
        return False
    return module.get_output_embeddings() is not None or module.base_model is module  # type: ignore[operator]


def decoder_start(module: nn.Module) -> int | None:
    """Return the first token of the decoder's input; None if the network needs no token ids for a decoder."""
    if not takes_decoder_ids(module):
        return None
    configs = (module.config, getattr(module, "generation_config", None), getattr(module.config, "text_config", None))
    for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        for config in configs:
            if isinstance(token := getattr(config, name, None), int):
                return token
    return 0


def sample_inputs(module: nn.Module, preprocessing: Preprocessing | None, sequence_length: int) -> dict[str, Tensor]:
    """Return a batch of two samples: noise for images and audio, and for texts without a tokenizer.

    Raises:
        UserError: the network takes neither images nor audio nor texts.
    """
    generator = torch.Generator().manual_seed(0)
    if isinstance(preprocessing, TextPreprocessing):
        limits = (most_positions(module), tokenizer_limit(preprocessing.tokenizer))
        length = min([sequence_length, *(limit for limit in limits if limit is not None)])
        text = _SAMPLE_TEXT * max(64, length // len(_SAMPLE_TEXT.split()) + 1)
        return replace(preprocessing, max_length=length)([text] * _SAMPLES)
    if isinstance(preprocessing, VisionPreprocessing):
        size: tuple[int, ...] = (preprocessing.channels, *preprocessing.size)
        return {IMAGE_INPUT: torch.randn(_SAMPLES, *size, generator=generator)}
    inputs = {}
    for kind in input_kinds(module):
        if kind == TEXT_INPUT:
            inputs[kind] = _token_ids(module, sequence_length, generator)
            if MASK_INPUT in inspect.signature(module.forward).parameters:
                inputs[MASK_INPUT] = torch.ones_like(inputs[kind])
        else:
            size = image_size(module.config) if kind == IMAGE_INPUT else _frames(module)
            inputs[kind] = torch.randn(_SAMPLES, *size, generator=generator)
    if not inputs:
        raise UserError(
            f"{type(module).__name__} does not take {IMAGE_INPUT}, {AUDIO_INPUT} or {TEXT_INPUT}: "
            "networks with other inputs are pruned in Python, see custom_network"
        )
    if takes_decoder_ids(module):
        inputs[DECODER_INPUT] = _token_ids(module, sequence_length, generator)
    return inputs


def most_positions(module: nn.Module) -> int | None:
    """Return the number of tokens that the network has positions for; None if it is unlimited."""
    config: PretrainedConfig = module.config
    text: PretrainedConfig = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(text, "max_position_embeddings", None)
    # XLNet has -1 for no limit.
    return positions - _first_position(module) if isinstance(positions, int) and positions > 0 else None


def tokenizer_limit(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """Return the number of tokens to which a tokenizer truncates texts; None if it does not."""
    return int(tokenizer.model_max_length) if tokenizer.model_max_length <= _MOST_POSITIONS else None


def _first_position(module: nn.Module) -> int:
    """Return the position id of the first token; for RoBERTa it follows the id of padding."""
    for name, table in module.named_modules():
        if name.endswith("position_embeddings") and isinstance(table, nn.Embedding):
            return 0 if table.padding_idx is None else table.padding_idx + 1
    return 0


def image_size(config: "PretrainedConfig") -> tuple[int, int, int]:
    """Return channels, height and width of the images of a configuration; 224 pixels if it states no size."""
    for part in (config, getattr(config, "vision_config", None), getattr(config, "backbone_config", None)):
        size = getattr(part, "image_size", None)
        if size is not None:
            height, width = size if isinstance(size, tuple | list) else (size, size)
            return getattr(part, "num_channels", 3), height, width
    return getattr(config, "num_channels", 3), 224, 224


def _frames(module: nn.Module) -> tuple[int, int]:
    """Return the number of mel bins, and the number of frames that the encoder has positions for."""
    config: PretrainedConfig = module.config
    reduction = math.prod(m.stride[0] for m in module.modules() if isinstance(m, nn.Conv1d))
    return config.num_mel_bins, config.max_source_positions * reduction


def _token_ids(module: nn.Module, length: int, generator: torch.Generator) -> Tensor:
    whole: PretrainedConfig = module.config
    config = getattr(whole, "text_config", whole)
    positions = [getattr(config, n, None) for n in ("max_position_embeddings", "max_target_positions")]
    length = min([length, *(p for p in positions if isinstance(p, int) and p > 0)])
    ids = torch.randint(config.vocab_size, (_SAMPLES, length), generator=generator)
    return end_of_text(ids, whole.to_dict())


def end_of_text(ids: Tensor, config: JsonObject) -> Tensor:
    """Return ``ids`` with the end token of ``config`` last: some networks read their output at that position."""
    text = config.get("text_config") or config
    end = text.get("eos_token_id")
    # A configuration may contain the end token of another vocabulary.
    if not isinstance(end, int) or not 0 <= end < text.get("vocab_size", 0):
        return ids
    return torch.cat([ids[:, :-1], torch.full_like(ids[:, -1:], end)], dim=1)


def exported_outputs(module: nn.Module, inputs: Batch) -> list[str]:
    """Return the names of the outputs that are exported and compared.

    These are the outputs of the network's task (logits, boxes, masks, embeddings), or else its last hidden state.
    Outputs that compare the samples of a batch are not exported, and nested ones (all hidden states, outputs of
    submodules) only if there are no others.

    Raises:
        UserError: no output can be exported.
    """
    with torch.no_grad():
        output = module(**inputs)
        alone = named_outputs(module(**{name: tensor[:1] for name, tensor in inputs.items()}))
    values = all_outputs(output)
    reasons = {name: unfit_reason(value, alone.get(name), batch_size(inputs)) for name, value in values.items()}
    fit = [name for name, reason in reasons.items() if reason is None]
    if not fit:
        listed = ", ".join(f"{name} {reason}" for name, reason in reasons.items())[:400] or "it returns nothing"
        raise UserError(f"{type(module).__name__} gives no output that can be exported: {listed}")
    top_level = [name for name in fit if not isinstance(output, Mapping) or name in output] or fit
    left_out = [name for name in values if name not in top_level]
    if left_out:
        logger.info("outputs that are not exported: %s", ", ".join(left_out))
    task = [name for name in top_level if not name.endswith(_INNER_STATES)]
    return task or [name for name in top_level if name in _PLAIN_OUTPUTS] or top_level
