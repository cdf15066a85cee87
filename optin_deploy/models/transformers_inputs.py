"""What a network from transformers takes and gives: sample inputs of every kind, and which of its outputs count."""

import inspect
import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from optin_deploy.data.preprocessing import PicturePreprocessing, Preprocessing, TextPreprocessing
from optin_deploy.errors import UserError
from optin_deploy.nn.outputs import all_outputs, named_outputs, unfit

IMAGE_INPUT = "pixel_values"
AUDIO_INPUT = "input_features"
TEXT_INPUT = "input_ids"
MASK_INPUT = "attention_mask"
DECODER_INPUT = "decoder_input_ids"
logger = logging.getLogger(__name__)
_SAMPLE_TEXT = "the quick brown fox jumps over the lazy dog and then it rests a while "
# More tokens than any network takes.
_MOST_POSITIONS = 1 << 24
_SAMPLES = 2
_INNER_STATES = ("hidden_state", "hidden_states", "pooler_output")
_PLAIN_OUTPUTS = ("last_hidden_state", "pooler_output")


def input_kinds(module: nn.Module) -> list[str]:
    """Which of pictures, sounds and texts the forward pass takes, by the names of its arguments."""
    arguments = inspect.signature(module.forward).parameters
    return [name for name in (IMAGE_INPUT, AUDIO_INPUT, TEXT_INPUT) if name in arguments]


def takes_decoder_ids(module: nn.Module) -> bool:
    """Whether token ids for a decoder are an input; some networks make them of the encoder's."""
    arguments = inspect.signature(module.forward).parameters
    if DECODER_INPUT not in arguments or not getattr(module.config, "is_encoder_decoder", False):
        return False
    return module.get_output_embeddings() is not None or module.base_model is module  # type: ignore[operator]


def decoder_start(module: nn.Module) -> int | None:
    """The token that a decoder's input begins with; None where token ids for a decoder are no input."""
    if not takes_decoder_ids(module):
        return None
    configs = (module.config, getattr(module, "generation_config", None), getattr(module.config, "text_config", None))
    for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        for config in configs:
            if isinstance(token := getattr(config, name, None), int):
                return token
    return 0


def sample_inputs(module: nn.Module, preprocessing: Preprocessing | None, sequence_length: int) -> dict[str, Tensor]:
    """A batch of two; noise for pictures and sounds, and for texts where there is no tokenizer.

    Raises:
        UserError: the network takes neither pictures nor sounds nor texts.
    """
    generator = torch.Generator().manual_seed(0)
    if isinstance(preprocessing, TextPreprocessing):
        limits = (most_positions(module), tokenizer_limit(preprocessing.tokenizer))
        length = min([sequence_length, *(limit for limit in limits if limit is not None)])
        text = _SAMPLE_TEXT * max(64, length // len(_SAMPLE_TEXT.split()) + 1)
        return replace(preprocessing, max_length=length)([text] * _SAMPLES)
    if isinstance(preprocessing, PicturePreprocessing):
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
            f"{type(module).__name__} takes none of {IMAGE_INPUT}, {AUDIO_INPUT} and {TEXT_INPUT}: "
            "networks of other inputs are pruned through Python, see custom_network"
        )
    if takes_decoder_ids(module):
        inputs[DECODER_INPUT] = _token_ids(module, sequence_length, generator)
    return inputs


def most_positions(module: nn.Module) -> int | None:
    """How many tokens the network has positions for; None where any number has."""
    config: Any = module.config
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(text, "max_position_embeddings", None)
    # XLNet has -1 for none.
    return positions - _first_position(module) if isinstance(positions, int) and positions > 0 else None


def tokenizer_limit(tokenizer: Any) -> int | None:
    """How many tokens a tokenizer cuts texts to; None where it does not, which it says by a huge number."""
    return int(tokenizer.model_max_length) if tokenizer.model_max_length <= _MOST_POSITIONS else None


def _first_position(module: nn.Module) -> int:
    """The position of the first token: RoBERTa and its kin count from behind that of padding."""
    for name, table in module.named_modules():
        if name.endswith("position_embeddings") and isinstance(table, nn.Embedding):
            return 0 if table.padding_idx is None else table.padding_idx + 1
    return 0


def image_size(config: Any) -> tuple[int, int, int]:
    """Channels, height and width of the pictures that a configuration is for, 224 pixels where it does not say."""
    for each in (config, getattr(config, "vision_config", None), getattr(config, "backbone_config", None)):
        size = getattr(each, "image_size", None)
        if size is not None:
            height, width = size if isinstance(size, tuple | list) else (size, size)
            return getattr(each, "num_channels", 3), height, width
    return getattr(config, "num_channels", 3), 224, 224


def _frames(module: nn.Module) -> tuple[int, int]:
    """Mel bins, and the frames that the encoder has positions for."""
    config: Any = module.config
    reduction = math.prod(m.stride[0] for m in module.modules() if isinstance(m, nn.Conv1d))
    return config.num_mel_bins, config.max_source_positions * reduction


def _token_ids(module: nn.Module, length: int, generator: torch.Generator) -> Tensor:
    whole: Any = module.config
    config = getattr(whole, "text_config", whole)
    positions = [getattr(config, n, None) for n in ("max_position_embeddings", "max_target_positions")]
    length = min([length, *(p for p in positions if isinstance(p, int) and p > 0)])
    ids = torch.randint(config.vocab_size, (_SAMPLES, length), generator=generator)
    return end_of_text(ids, whole.to_dict())


def end_of_text(ids: Tensor, config: Mapping[str, Any]) -> Tensor:
    """``ids`` with the token at the end of each text that some networks read their output off, as ``config`` has it."""
    text = config.get("text_config") or config
    end = text.get("eos_token_id")
    # Configurations may keep the token of another vocabulary.
    if not isinstance(end, int) or not 0 <= end < text.get("vocab_size", 0):
        return ids
    return torch.cat([ids[:, :-1], torch.full_like(ids[:, -1:], end)], dim=1)


def counted_outputs(module: nn.Module, inputs: Mapping[str, Tensor]) -> list[str]:
    """Names of the outputs that are exported and compared.

    What the network is for (logits, boxes, masks, embeddings) if it gives any of that, else its last hidden state.
    Outputs that compare the samples of a batch with each other do not count, nor do those inside of others (all hidden
    states, what the parts of a network give) where there are any beside them.

    Raises:
        UserError: none counts.
    """
    with torch.no_grad():
        output = module(**inputs)
        alone = named_outputs(module(**{name: tensor[:1] for name, tensor in inputs.items()}))
    size, given = len(next(iter(inputs.values()))), all_outputs(output)
    reasons = {name: unfit(value, alone.get(name), size) for name, value in given.items()}
    fit = [name for name, reason in reasons.items() if reason is None]
    if not fit:
        told = ", ".join(f"{name} {reason}" for name, reason in reasons.items())[:400] or "it gives nothing"
        raise UserError(f"{type(module).__name__} gives no output that can be exported: {told}")
    own = [name for name in fit if not isinstance(output, Mapping) or name in output] or fit
    left_out = [name for name in given if name not in own]
    if left_out:
        logger.info("outputs that are not exported: %s", ", ".join(left_out))
    task = [n for n in own if not n.endswith(_INNER_STATES)]
    return task or [n for n in own if n in _PLAIN_OUTPUTS] or own
