"""Networks from transformers, by local directory or model id. Remote code is never run."""

import inspect
import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from torch import Tensor, nn
from transformers.modelcard import TASK_MAPPING

from optin_deploy.data.preprocessing import TextPreprocessing
from optin_deploy.errors import UserError, one_line
from optin_deploy.models import transformers_inputs as inputs_of
from optin_deploy.models.hub import PROCESSOR_FILES, TOKENIZER_FILES
from optin_deploy.models.sentence_files import SentenceFiles
from optin_deploy.models.transformers_images import read_image_preprocessing
from optin_deploy.models.weight_names import first_and_count
from optin_deploy.network import Network, Preprocessing, Source
from optin_deploy.nn.batches import Batch
from optin_deploy.nn.outputs import named_outputs
from optin_deploy.nn.task_head import HeadKind, head_of
from optin_deploy.structure.canonicalize import canonicalize
from optin_deploy.utils.json_types import JsonObject

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

# The pipeline has its own progress display.
transformers.utils.logging.disable_progress_bar()

logger = logging.getLogger(__name__)

DEFAULT_TEXT_LENGTH = 512
"""Tokens to which texts are truncated for models without a limit."""
CONFIG_NAME, GENERATION_NAME = "config.json", "generation_config.json"
# transformers reads "transformers_weights" as the name of the file of weights, and its error for a missing file shows
# this text. Without it, transformers would give the layers that the pruned network lacks random weights.
_REFUSAL = "load it with optin_deploy.load(path): it is pruned by optin-deploy"
# More layers than any network has: a huge number would be built before the weights are refused.
_MOST_LAYERS = 10_000
# Tokens of the sample on which a network without pooler is tested.
_FEW_TOKENS = 8


def read_config(name: str) -> "PretrainedConfig":
    """Return the configuration of a local directory or model id.

    Raises:
        OSError: it cannot be fetched or found.
        ValueError: transformers does not know the model type.
    """
    # By default, transformers would ask on the terminal whether to run the model's own code.
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    _check_code(config.to_dict())
    return config


def _check_code(config: JsonObject) -> None:
    """Raise UserError if an attention (or the like) is code that transformers would fetch from a hub and run."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            _check_code(value)
        elif str(key).endswith("_implementation") and isinstance(value, str) and "/" in value:
            raise UserError(f"{key} {value!r} is remote code, which is never run: remove it from config.json")


def source_of(config: "PretrainedConfig", task: str | None = None) -> Source:
    """Return the source: the class that the configuration names, or else the plain encoder, and the configuration.

    Args:
        task: "feature-extraction" for the plain encoder in any case, as sentence-transformers loads it.
    """
    if task == "feature-extraction":
        return Source("transformers", _encoder_class(config), config.to_dict())
    architectures = config.architectures or [""]
    if not isinstance(architectures, list | tuple) or not isinstance(architectures[0], str):
        raise UserError(
            f'architectures in config.json is {str(architectures)[:40]}: write the class as ["BertModel"], or null'
        )
    class_name = architectures[0]
    if not _is_model_class(class_name):
        class_name = _plain_class(config)
    return Source("transformers", class_name, config.to_dict())


def _plain_class(config: "PretrainedConfig") -> str:
    if type(config) not in transformers.AutoModel._model_mapping:
        raise UserError(f"transformers {transformers.__version__} has no model for {type(config).__name__}")
    classes = transformers.AutoModel._model_mapping[type(config)]
    return str((classes[0] if isinstance(classes, tuple | list) else classes).__name__)


def _encoder_class(config: "PretrainedConfig") -> str:
    """Return the class of the plain encoder; for T5 and its relatives, the encoder without the decoder."""
    plain = _plain_class(config)
    alone = plain.removesuffix("Model") + "EncoderModel"
    return alone if config.model_type in ("t5", "mt5", "umt5", "longt5") and _is_model_class(alone) else plain


def _is_model_class(name: str) -> bool:
    cls = getattr(transformers, name, None)
    return isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)


def create_module(source: Source) -> nn.Module:
    """Return the dense module with initial weights, in fp32, as transformers makes it."""
    if not _is_model_class(source.name):
        installed = transformers.__version__
        raise UserError(f"transformers {installed} has no model class {source.name!r}: install the version it is from")
    cls = getattr(transformers, source.name)
    return cls(_config(source)).float().eval()


def _config(source: Source) -> "PretrainedConfig":
    _check_code(source.arguments)
    config = getattr(transformers, source.name).config_class.from_dict(dict(source.arguments))
    # transformers maps other names of this attribute to this one.
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > _MOST_LAYERS:
        raise UserError(f"num_hidden_layers {layers} in config.json: at most {_MOST_LAYERS} are built; correct it")
    config.dtype = torch.float32
    if getattr(config, "use_pretrained_backbone", False):
        # The backbone's own weights would be fetched and then overwritten.
        config.use_pretrained_backbone = False
    return config


def load_pretrained(name: str, source: Source, variant: str | None = None) -> nn.Module:
    """Return the module with the weights of a local directory or model id, in fp32.

    Args:
        variant: of the file of weights, as "fp16" in ``model.fp16.safetensors``.

    Raises:
        OSError: the weights cannot be fetched or found.
        UserError: they do not fit the configuration.
    """
    cls = getattr(transformers, source.name)
    module, info = cls.from_pretrained(
        name,
        config=_config(source),
        dtype=torch.float32,
        use_safetensors=True,
        variant=variant,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    module = prepare_module(module)
    own = module.state_dict()
    for key, shape, wanted in info["mismatched_keys"]:
        if key in own:
            raise UserError(f"{name}: {key} has shape {tuple(shape)}, its configuration says {tuple(wanted)}")
    missing = sorted(set(info["missing_keys"]) & set(own))
    if missing:
        raise UserError(
            f"{name} has no weights for {missing[0]} and {len(missing) - 1} more parameters of {source.name}"
        )
    _check_unexpected(name, source, module, sorted(info["unexpected_keys"]))
    if variant is not None:
        logger.info("%s: the weights are those of model.%s.safetensors", name, variant)
    return module


def _check_unexpected(name: str, source: Source, module: nn.Module, keys: list[str]) -> None:
    """Raise UserError if there are weights for more layers than in the configuration, or for more in a layer.

    Other unexpected weights, such as those of another head, only cause a warning.
    """
    patterns = unused_names(module)
    keys = [key for key in keys if not any(re.search(pattern, key) for pattern in patterns)]
    base = f"{getattr(module, 'base_model_prefix', '')}."
    # Files may name the tensors with or without the prefix of the base model.
    lists = {name.removeprefix(base) for name, m in module.named_modules() if isinstance(m, nn.ModuleList) and name}
    inside = [key for key in keys if key.removeprefix(base).startswith(tuple(f"{name}." for name in lists))]
    if inside:
        raise UserError(
            f"{name} has weights for {inside[0]}, which {source.name} does not have in its configuration: correct "
            "config.json"
        )
    if keys:
        logger.warning("%s: %s does not use the weights of %s", name, source.name, first_and_count(keys))


def prepare_module(module: nn.Module) -> nn.Module:
    """Return the module as it is pruned and exported: in eval mode, with linear layers, without cache and pooler."""
    for submodule in module.modules():
        config = getattr(submodule, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False  # type: ignore[union-attr]
    return without_pooler(with_linear_layers(module)).eval()


def write_configs(module: nn.Module, source: Source, directory: Path) -> None:
    """Write the configuration of the dense network, and that of text generation if the module has one.

    transformers needs the first for the tokenizer and the labels, but refuses to build the network from it.
    """
    config = {**source.arguments, "architectures": [source.name], "dtype": "float32", "transformers_weights": _REFUSAL}
    (directory / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    generation = getattr(module, "generation_config", None)
    if generation is not None:
        generation.to_json_file(directory / GENERATION_NAME)


def read_generation(module: nn.Module, directory: Path) -> None:
    """Set the module's generation configuration that `write_configs` wrote, if there is one."""
    if (directory / GENERATION_NAME).is_file():
        module.generation_config = transformers.GenerationConfig.from_pretrained(directory)


def task(class_name: str, inputs: Iterable[str]) -> str | None:
    """Return the hub's name for the task of a class; feature extraction for plain encoders, None if unknown."""
    for name, classes in TASK_MAPPING.items():
        if any(class_name in (entry if isinstance(entry, tuple | list) else (entry,)) for entry in classes.values()):
            return str(name)
    features = {inputs_of.IMAGE_INPUT: "image-feature-extraction", inputs_of.TEXT_INPUT: "feature-extraction"}
    tasks = [features[name] for name in inputs if name in features]
    return tasks[0] if len(tasks) == 1 else None


def companion_files(module: nn.Module) -> tuple[str, ...]:
    """Return the names of files next to the weights that no preprocessing of the network holds."""
    kinds = inputs_of.input_kinds(module)
    if kinds == [inputs_of.TEXT_INPUT]:
        return ()
    return PROCESSOR_FILES if kinds == [inputs_of.IMAGE_INPUT] else PROCESSOR_FILES + TOKENIZER_FILES


def with_linear_layers(module: nn.Module) -> nn.Module:
    """Replace transformers' ``Conv1D`` layers by linear layers with transposed weights, in place."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, transformers.pytorch_utils.Conv1D):
            inputs, outputs = layer.weight.shape
            linear = nn.utils.skip_init(nn.Linear, inputs, outputs)
            linear.weight = nn.Parameter(layer.weight.detach().T.contiguous(), layer.weight.requires_grad)
            linear.bias = layer.bias
            module.set_submodule(name, linear)
    return module


class NoPooler(nn.Module):
    """Replaces an unused pooler in networks that call it in any case."""

    def forward(self, *_: object, **__: object) -> None:
        """Return None."""


def without_pooler(module: nn.Module) -> nn.Module:
    """Remove the pooler of a plain encoder, in place.

    Its output is not exported, and often its weights were never trained. It stays if a forward pass without it fails,
    as for EfficientNet, which computes other outputs from it.
    """
    pooler: nn.Module | None = getattr(module, "pooler", None)
    if pooler is None or isinstance(pooler, NoPooler) or not hasattr(module, "embeddings"):
        return module
    module.eval()
    inputs = _short_inputs(module)
    for replacement in (None, NoPooler()):
        setattr(module, "pooler", replacement)  # noqa: B010 - modules take any attribute
        if inputs is None or _runs(module, inputs):
            return module
    setattr(module, "pooler", pooler)  # noqa: B010
    return module


def _short_inputs(module: nn.Module) -> dict[str, Tensor] | None:
    """Return one short sample that ``module`` takes; None if none is known."""
    try:
        inputs = {name: t[:1] for name, t in inputs_of.sample_inputs(module, None, _FEW_TOKENS).items()}
    except (UserError, AttributeError, TypeError, ValueError, RuntimeError):
        return None
    return inputs if _runs(module, inputs) else None


def _runs(module: nn.Module, inputs: Batch) -> bool:
    try:
        # Not in inference mode: tensors that a module stores in its first pass could not be saved.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            module(**inputs)
    except Exception:  # a forward pass may raise errors of any type
        return False
    return True


def file_names(module: nn.Module) -> list[dict[str, str]]:
    """Return alternative namings of the module's tensors in files, each as name in the file -> the module's name.

    These are transformers' names on disk (those of earlier releases), and names without the base model's prefix.
    """
    own = module.state_dict()
    saved = _names_as_saved(module, own)
    bases = {f"{getattr(module, 'base_model_prefix', '') or '-'}."}
    tops = {name.partition(".")[0] for name in own}
    if len(tops) == 1:
        bases.add(f"{tops.pop()}.")
    namings = [saved]
    for base in sorted(bases):
        for naming in ({name: name for name in own}, saved):
            bare = {name.removeprefix(base): to for name, to in naming.items()}
            if len(bare) == len(naming) and bare.keys() != naming.keys():
                namings.append(bare)
    return namings


def _names_as_saved(module: nn.Module, own: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the name that ``save_pretrained`` writes -> the module's, for tensors that it does not convert."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # releases that rename nothing
        return {name: name for name in own}
    # The conversion is run on empty tensors, whose identity shows where each name went.
    marks = {name: tensor.detach().to("meta") for name, tensor in own.items()}
    names = {id(mark): name for name, mark in marks.items()}
    try:
        written: Mapping[str, Tensor] = revert_weight_conversion(module, dict(marks))
    except Exception:  # a private function, which may fail; there are other namings
        return {name: name for name in own}
    return {name: names[id(tensor)] for name, tensor in written.items() if id(tensor) in names}


def unused_names(module: nn.Module) -> list[str]:
    """Return patterns of names that files of weights may hold and ``module`` does not need."""
    known = list(getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ())
    has_none = hasattr(module, "pooler") and isinstance(module.pooler, NoPooler | None)
    return [*known, *([r"(^|\.)pooler\."] if has_none else [])]


def network_of(
    module: nn.Module, source: Source, weights: str, preprocessing: Preprocessing | None, sequence_length: int
) -> Network:
    """Return a `Network` around a transformers model.

    Args:
        sequence_length: tokens of a sample text, if the network has that many positions.
    """
    inputs = inputs_of.sample_inputs(module, preprocessing, sequence_length)
    names = inputs_of.exported_outputs(module, inputs)
    with torch.no_grad():
        logits = named_outputs(module(**inputs))["logits"] if "logits" in names else None
    return Network(
        module=canonicalize(module),
        inputs=inputs,
        outputs={name: name for name in names},
        source=source,
        weights=weights,
        sequence_inputs=tuple(n for n, t in inputs.items() if not t.is_floating_point() and t.dim() == 2),
        token_mask="attention_mask" if "attention_mask" in inputs else None,
        logits="logits" if "logits" in names else None,
        head=head_kind(module, logits) if logits is not None else "classes",
        preprocessing=preprocessing,
    )


def head_kind(module: nn.Module, logits: Tensor) -> HeadKind:
    """Return what the ``logits`` of a transformers model mean, by its ``problem_type`` for logits ``(batch, labels)``.

    A single label without ``problem_type`` is a yes or no, as in transformers' pipelines; training a regression sets
    it.
    """
    problem_type = getattr(module.config, "problem_type", None) if logits.dim() == 2 else None
    kinds = {"regression": "regression", "multi_label_classification": "binary"}
    return head_of(logits, kinds.get(str(problem_type)))


def read_preprocessing(
    name: str, module: nn.Module, max_text_length: int | None = None, sentences: SentenceFiles | None = None
) -> Preprocessing | None:
    """Return the tokenizer or image processor next to the weights.

    None for networks of audio, of images and texts together, or of another number of channels than the processor makes:
    they are calibrated on tensors.

    Args:
        max_text_length: tokens to which texts are truncated; the model's limit when None.
        sentences: files of sentence-transformers, which may state a length, a prompt and lower-casing.

    Raises:
        UserError: there is no tokenizer, or it is damaged.
    """
    kinds = inputs_of.input_kinds(module)
    if kinds == [inputs_of.IMAGE_INPUT]:
        return read_image_preprocessing(name, module)
    if kinds != [inputs_of.TEXT_INPUT]:
        return None
    tokenizer = read_tokenizer(name)
    if tokenizer.model_max_length < 1:
        raise UserError(
            f"the tokenizer of {name} returns no tokens: correct model_max_length {tokenizer.model_max_length} in "
            "tokenizer_config.json"
        )
    if type(module).__name__.endswith("ForSequenceClassification") and hasattr(module, "score"):
        config: PretrainedConfig = module.config
        _pad_by_config(name, tokenizer, config.get_text_config())
    elif tokenizer.pad_token is None:
        # Decoders are often trained without padding. Any token will do, since the mask is 0 there.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return _text_preprocessing(tokenizer, module, name, max_text_length, sentences)


def _pad_by_config(name: str, tokenizer: "PreTrainedTokenizerBase", config: "PretrainedConfig") -> None:
    """Set the same padding token in the tokenizer and the configuration of a decoder's classifier.

    The classifier finds the end of a text by the padding. If neither states a token, a special token is used that no
    text ends with.

    Raises:
        UserError: there is no such token.
    """
    known = range(config.vocab_size)
    if config.pad_token_id in known:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)
        return
    if tokenizer.pad_token is None or tokenizer.pad_token_id not in known:
        last = tokenizer("")["input_ids"][-1:]
        others = [token for token in tokenizer.all_special_tokens if token != tokenizer.unk_token]
        special = (tokenizer.eos_token, tokenizer.bos_token, *others, tokenizer.unk_token)
        ids = [i for i in tokenizer.convert_tokens_to_ids([t for t in special if t]) if i in known and i not in last]
        if not ids:
            raise UserError(
                f"{name} has no padding token, which its classifier needs to find the end of a text: set pad_token in "
                "tokenizer_config.json and pad_token_id in config.json"
            )
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(ids[0])
    config.pad_token_id = tokenizer.pad_token_id
    logger.info("%s: texts are padded with %s, which is set as pad_token_id", name, tokenizer.pad_token)


def with_padding(source: Source, module: nn.Module) -> Source:
    """Return ``source`` with the padding token of ``module``, if it states none."""
    whole: PretrainedConfig = module.config
    arguments, config = dict(source.arguments), whole.get_text_config()
    key = "text_config" if config is not whole and "text_config" in arguments else None
    text = dict(arguments[key]) if key else arguments
    if text.get("pad_token_id") is not None or getattr(config, "pad_token_id", None) is None:
        return source
    text["pad_token_id"] = config.pad_token_id
    return replace(source, arguments={**arguments, key: text} if key else text)


def read_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of a local directory or model id; UserError if there is none or it is damaged."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exceptions
        raise UserError(f"the tokenizer of {name} cannot be read: {one_line(error)}") from error
    # If the files are missing, transformers 5 makes a tokenizer without words.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise UserError(f"{name} has no tokenizer: add tokenizer.json (or vocab.txt and the like) to it")
    return tokenizer


def _text_preprocessing(
    tokenizer: "PreTrainedTokenizerBase",
    module: nn.Module,
    name: str,
    max_text_length: int | None,
    sentences: SentenceFiles | None,
) -> TextPreprocessing:
    arguments = inspect.signature(module.forward).parameters
    return TextPreprocessing(
        tokenizer,
        tuple(n for n in tokenizer.model_input_names if n in arguments),
        _text_length(name, text_limit(module, tokenizer, sentences.max_length if sentences else None), max_text_length),
        inputs_of.decoder_start(module),
        sentences.prompt if sentences else "",
        lower_case=sentences is not None and sentences.lower_case,
    )


def text_limit(
    module: nn.Module, tokenizer: "PreTrainedTokenizerBase", max_seq_length: int | None = None
) -> int | None:
    """Return the number of tokens to which the model's files limit a text; None without a limit.

    Args:
        max_seq_length: of sentence-transformers, instead of the tokenizer's limit.
    """
    limits = (inputs_of.most_positions(module), max_seq_length or inputs_of.tokenizer_limit(tokenizer))
    return min((limit for limit in limits if limit is not None), default=None)


def _text_length(name: str, limit: int | None, wanted: int | None) -> int:
    if wanted is None:
        if limit is None:
            logger.warning(
                "%s has no limit for texts, neither in its tokenizer nor in its positions. Texts are truncated to %d "
                "tokens; --max-text-length sets another limit",
                name,
                DEFAULT_TEXT_LENGTH,
            )
        return limit or DEFAULT_TEXT_LENGTH
    if limit is not None and wanted > limit:
        raise UserError(f"--max-text-length {wanted}: {name} takes texts of {limit} tokens at most")
    return wanted
