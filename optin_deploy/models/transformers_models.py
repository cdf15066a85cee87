"""Networks from transformers: a local directory or a model id. Remote code is never run."""

import inspect
import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.modelcard import TASK_MAPPING

from optin_deploy.data.preprocessing import Preprocessing, TextPreprocessing
from optin_deploy.errors import UserError
from optin_deploy.models import transformers_inputs as inputs_of
from optin_deploy.models.hub import PROCESSOR_FILES, TOKENIZER_FILES
from optin_deploy.models.sentence_files import SentenceFiles
from optin_deploy.models.transformers_images import read_image_preprocessing
from optin_deploy.models.weight_names import listed
from optin_deploy.network import Network, Source
from optin_deploy.nn.outputs import named_outputs
from optin_deploy.nn.task_head import HeadKind, head_of
from optin_deploy.structure.canonicalize import prunable_form

# Progress is shown by the pipeline.
transformers.utils.logging.disable_progress_bar()

logger = logging.getLogger(__name__)

DEFAULT_TEXT_LENGTH = 512
"""Tokens that texts are cut to for models that have no limit."""
CONFIG_NAME, GENERATION_NAME = "config.json", "generation_config.json"
# transformers takes "transformers_weights" for the name of the weights' file, and ends with an error that tells the
# value where it cannot be one. It would else give layers that a pruned network does not have random weights.
_REFUSAL = "load it with optin_deploy.load(path): it is pruned by optin-deploy"
# Far more than any network has, and built within seconds: layers without end would be made before they are refused.
_MOST_LAYERS = 10_000
# Tokens of the text that a pooler is tried on.
_FEW_TOKENS = 8


def read_config(name: str) -> Any:
    """The configuration of a local directory or model id; OSError when it cannot be had, ValueError when unknown."""
    # Without being told, transformers would ask on the terminal whether to run code that comes with the model.
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    _check_code(config.to_dict())
    return config


def _check_code(config: Mapping[str, Any]) -> None:
    """Raise UserError where an attention (or the like) is named that transformers would fetch, and run, from a hub."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            _check_code(value)
        elif str(key).endswith("_implementation") and isinstance(value, str) and "/" in value:
            raise UserError(f"{key} {value!r} is code to be fetched, which is never run: remove it from config.json")


def source_of(config: Any, task: str | None = None) -> Source:
    """The class that the configuration names (the plain encoder if none) and the configuration itself.

    Args:
        task: "feature-extraction" for the plain encoder, whatever class is named, as sentence-transformers loads it.
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


def _plain_class(config: Any) -> str:
    if type(config) not in transformers.AutoModel._model_mapping:
        raise UserError(f"transformers {transformers.__version__} has no model for {type(config).__name__}")
    found = transformers.AutoModel._model_mapping[type(config)]
    return str((found[0] if isinstance(found, tuple | list) else found).__name__)


def _encoder_class(config: Any) -> str:
    """The plain encoder; of T5 and its kin, the encoder without the decoder."""
    plain = _plain_class(config)
    alone = plain.removesuffix("Model") + "EncoderModel"
    return alone if config.model_type in ("t5", "mt5", "umt5", "longt5") and _is_model_class(alone) else plain


def _is_model_class(name: str) -> bool:
    cls = getattr(transformers, name, None)
    return isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)


def initialised(source: Source) -> nn.Module:
    """The dense module with initial weights, in fp32, as transformers makes it."""
    if not _is_model_class(source.name):
        installed = transformers.__version__
        raise UserError(f"transformers {installed} has no model class {source.name!r}: install the version it is from")
    cls = getattr(transformers, source.name)
    return cls(_config(source)).float().eval()


def _config(source: Source) -> Any:
    _check_code(source.arguments)
    config = getattr(transformers, source.name).config_class.from_dict(dict(source.arguments))
    # By this name, whatever the family calls it.
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > _MOST_LAYERS:
        raise UserError(f"num_hidden_layers {layers} in config.json: at most {_MOST_LAYERS} are built; correct it")
    config.dtype = torch.float32
    if getattr(config, "use_pretrained_backbone", False):
        # A backbone's own weights would be fetched, to be overwritten.
        config.use_pretrained_backbone = False
    return config


def load_pretrained(name: str, source: Source, variant: str | None = None) -> nn.Module:
    """The module with the weights of a local directory or model id, in fp32; OSError when they cannot be had.

    ``variant`` is in the name of the file of weights, as "fp16" in ``model.fp16.safetensors``.
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
    module = ready(module)
    own = module.state_dict()
    for key, given, wanted in info["mismatched_keys"]:
        if key in own:
            raise UserError(f"{name}: {key} has shape {tuple(given)}, its configuration says {tuple(wanted)}")
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
    """Raise UserError where there are weights of more layers than the configuration says, or of more in a layer.

    Other weights that the network has no place for, such as those of another head, are told.
    """
    patterns = unused_names(module)
    keys = [key for key in keys if not any(re.search(pattern, key) for pattern in patterns)]
    base = f"{getattr(module, 'base_model_prefix', '')}."
    # Files may hold a plain network with or without the name that it has in one with a head.
    lists = {name.removeprefix(base) for name, m in module.named_modules() if isinstance(m, nn.ModuleList) and name}
    inside = [key for key in keys if key.removeprefix(base).startswith(tuple(f"{name}." for name in lists))]
    if inside:
        raise UserError(
            f"{name} has weights for {inside[0]}, which {source.name} has no place for by its configuration: correct "
            "config.json"
        )
    if keys:
        logger.warning("%s: %s has no place for the weights of %s", name, source.name, listed(keys))


def ready(module: nn.Module) -> nn.Module:
    """The module as it is pruned and exported: in eval mode, without what only generation and training need.

    What holds its weights in another way than torch gets linear layers.
    """
    for submodule in module.modules():
        config = getattr(submodule, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False  # type: ignore[union-attr]
    return without_pooler(with_linear_layers(module)).eval()


def write_configs(module: nn.Module, source: Source, directory: Path) -> None:
    """Write what transformers has beside weights: the source's configuration, so that it finds the right tokenizer and
    knows the labels, but builds no network of it; and how texts are generated, where the module can do that."""
    config = {**source.arguments, "architectures": [source.name], "dtype": "float32", "transformers_weights": _REFUSAL}
    (directory / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    generation = getattr(module, "generation_config", None)
    if generation is not None:
        generation.to_json_file(directory / GENERATION_NAME)


def read_generation(module: nn.Module, directory: Path) -> None:
    """Have the module generate texts as `write_configs` says it does; nothing where it did not say."""
    if (directory / GENERATION_NAME).is_file():
        module.generation_config = transformers.GenerationConfig.from_pretrained(directory)


def task(class_name: str, inputs: Iterable[str]) -> str | None:
    """What networks of that class are for, in the words of the hub; plain encoders give features."""
    for name, classes in TASK_MAPPING.items():
        if any(class_name in (each if isinstance(each, tuple | list) else (each,)) for each in classes.values()):
            return str(name)
    features = {inputs_of.IMAGE_INPUT: "image-feature-extraction", inputs_of.TEXT_INPUT: "feature-extraction"}
    found = [features[name] for name in inputs if name in features]
    return found[0] if len(found) == 1 else None


def companions(module: nn.Module) -> tuple[str, ...]:
    """Names of the files beside the weights that no preprocessing of the network holds."""
    kinds = inputs_of.input_kinds(module)
    if kinds == [inputs_of.TEXT_INPUT]:
        return ()
    return PROCESSOR_FILES if kinds == [inputs_of.IMAGE_INPUT] else PROCESSOR_FILES + TOKENIZER_FILES


def with_linear_layers(module: nn.Module) -> nn.Module:
    """Put linear layers in the place of transformers' ``Conv1D``, which is one with transposed weights; in place."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, transformers.pytorch_utils.Conv1D):
            inputs, outputs = layer.weight.shape
            linear = nn.utils.skip_init(nn.Linear, inputs, outputs)
            linear.weight = nn.Parameter(layer.weight.detach().T.contiguous(), layer.weight.requires_grad)
            linear.bias = layer.bias
            module.set_submodule(name, linear)
    return module


class NoPooler(nn.Module):
    """In the place of a pooler whose output nobody needs, in networks that call it anyhow."""

    def forward(self, *_: Any, **__: Any) -> None:
        """Nothing."""


def without_pooler(module: nn.Module) -> nn.Module:
    """Drop the pooler of a plain encoder: its output is not exported, and often its weights were never trained.

    It stays where the network computes something else of its output, as EfficientNet does, which a forward pass tells.
    In place.
    """
    pooler: Any = getattr(module, "pooler", None)
    if pooler is None or isinstance(pooler, NoPooler) or not hasattr(module, "embeddings"):
        return module
    module.eval()
    inputs = _short_inputs(module)
    for instead in (None, NoPooler()):
        setattr(module, "pooler", instead)  # noqa: B010 - modules take any attribute
        if inputs is None or _runs(module, inputs):
            return module
    setattr(module, "pooler", pooler)  # noqa: B010
    return module


def _short_inputs(module: nn.Module) -> dict[str, Tensor] | None:
    """One sample that ``module`` takes; None where none is known."""
    try:
        inputs = {name: t[:1] for name, t in inputs_of.sample_inputs(module, None, _FEW_TOKENS).items()}
    except (UserError, AttributeError, TypeError, ValueError, RuntimeError):
        return None
    return inputs if _runs(module, inputs) else None


def _runs(module: nn.Module, inputs: Mapping[str, Tensor]) -> bool:
    try:
        # Not in inference mode: what a module keeps of its first pass could not be saved.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            module(**inputs)
    except Exception:  # of any type, in forward passes of others
        return False
    return True


def file_names(module: nn.Module) -> list[dict[str, str]]:
    """By which names files may hold the module's tensors, each with the module's own name: as transformers saves them,
    which are those of earlier releases, and without the name of the plain network inside of one with a head."""
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
    """The names that ``save_pretrained`` writes -> the module's, of the tensors that it writes as they are."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # releases that rename nothing
        return {name: name for name in own}
    # Empty tensors of their own, by which each is known again.
    marks = {name: tensor.detach().to("meta") for name, tensor in own.items()}
    names = {id(mark): name for name, mark in marks.items()}
    try:
        written: Mapping[str, Tensor] = revert_weight_conversion(module, dict(marks))
    except Exception:  # it is not made for calls from outside, and there are other namings
        return {name: name for name in own}
    return {name: names[id(tensor)] for name, tensor in written.items() if id(tensor) in names}


def unused_names(module: nn.Module) -> list[str]:
    """Patterns of names in files of weights that ``module`` does not need."""
    known = list(getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ())
    has_none = hasattr(module, "pooler") and isinstance(module.pooler, NoPooler | None)
    return [*known, *([r"(^|\.)pooler\."] if has_none else [])]


def network_of(
    module: nn.Module, source: Source, weights: str, preprocessing: Preprocessing | None, sequence_length: int
) -> Network:
    """`Network` around a transformers model; a sample text has ``sequence_length`` tokens where that many fit."""
    inputs = inputs_of.sample_inputs(module, preprocessing, sequence_length)
    names = inputs_of.counted_outputs(module, inputs)
    with torch.no_grad():
        logits = named_outputs(module(**inputs))["logits"] if "logits" in names else None
    return Network(
        module=prunable_form(module),
        inputs=inputs,
        outputs={name: name for name in names},
        source=source,
        weights=weights,
        sequence_inputs=tuple(n for n, t in inputs.items() if not t.is_floating_point() and t.dim() == 2),
        token_mask="attention_mask" if "attention_mask" in inputs else None,
        logits="logits" if "logits" in names else None,
        head=head(module, logits) if logits is not None else "classes",
        preprocessing=preprocessing,
    )


def head(module: nn.Module, logits: Tensor) -> HeadKind:
    """What ``logits`` of a transformers model mean; ``problem_type`` says it of those of whole samples, ``(batch,
    labels)``.

    A single label whose ``problem_type`` is not set is a yes or no, as in transformers' own pipelines: training one as
    a regression sets it.
    """
    said = getattr(module.config, "problem_type", None) if logits.dim() == 2 else None
    return head_of(logits, {"regression": "regression", "multi_label_classification": "binary"}.get(str(said)))


def read_preprocessing(
    name: str, module: nn.Module, max_text_length: int | None = None, sentences: SentenceFiles | None = None
) -> Preprocessing | None:
    """The tokenizer or image processor beside the weights; UserError when there is no tokenizer.

    Args:
        max_text_length: tokens that texts are cut to; what the model takes when None.
        sentences: files of sentence-transformers, which may have a length, a prompt and lower-casing of their own.

    None for networks that take sounds, pictures of other channels than the processor makes, or pictures and texts
    together: they are calibrated on ready tensors.
    """
    kinds = inputs_of.input_kinds(module)
    if kinds == [inputs_of.IMAGE_INPUT]:
        return read_image_preprocessing(name, module)
    if kinds != [inputs_of.TEXT_INPUT]:
        return None
    tokenizer = read_tokenizer(name)
    if tokenizer.model_max_length < 1:
        raise UserError(
            f"the tokenizer of {name} gives no tokens: correct model_max_length {tokenizer.model_max_length} in "
            "tokenizer_config.json"
        )
    if type(module).__name__.endswith("ForSequenceClassification") and hasattr(module, "score"):
        config: Any = module.config
        _pad_by_config(name, tokenizer, config.get_text_config())
    elif tokenizer.pad_token is None:
        # Decoders are often trained without padding; which token it is does not matter where the mask is 0.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return text_preprocessing(tokenizer, module, name, max_text_length, sentences)


def _pad_by_config(name: str, tokenizer: Any, config: Any) -> None:
    """Have tokenizer and configuration of a decoder's classifier agree about the padding token: it finds the end of a
    text by that. Where neither says one, it is a special token that no text ends with.

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
                f"{name} has no padding token, by which its classifier finds the end of a text: set pad_token in "
                "tokenizer_config.json and pad_token_id in config.json"
            )
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(ids[0])
    config.pad_token_id = tokenizer.pad_token_id
    logger.info("%s: texts are padded with %s, which is set as pad_token_id", name, tokenizer.pad_token)


def with_padding(source: Source, module: nn.Module) -> Source:
    """``source`` with the padding token of ``module`` where it says none."""
    whole: Any = module.config
    arguments, config = dict(source.arguments), whole.get_text_config()
    where = "text_config" if config is not whole and "text_config" in arguments else None
    told = dict(arguments[where]) if where else arguments
    if told.get("pad_token_id") is not None or getattr(config, "pad_token_id", None) is None:
        return source
    told["pad_token_id"] = config.pad_token_id
    return replace(source, arguments={**arguments, where: told} if where else told)


def read_tokenizer(name: str) -> Any:
    """The tokenizer of a local directory or model id; UserError when there is none, or when it is damaged."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises no other type
        told = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"the tokenizer of {name} cannot be read: {told}") from error
    # Where the files are missing, transformers 5 makes a tokenizer that knows no words.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise UserError(f"{name} has no tokenizer: add tokenizer.json (or vocab.txt and the like) to it")
    return tokenizer


def text_preprocessing(
    tokenizer: Any,
    module: nn.Module,
    name: str,
    max_text_length: int | None = None,
    sentences: SentenceFiles | None = None,
) -> TextPreprocessing:
    """Texts are cut to what the model takes, or to less where ``max_text_length`` says so."""
    arguments = inspect.signature(module.forward).parameters
    return TextPreprocessing(
        tokenizer,
        tuple(n for n in tokenizer.model_input_names if n in arguments),
        _text_length(name, text_limit(module, tokenizer, sentences.max_length if sentences else None), max_text_length),
        inputs_of.decoder_start(module),
        sentences.prompt if sentences else "",
        lower_case=sentences is not None and sentences.lower_case,
    )


def text_limit(module: nn.Module, tokenizer: Any, max_seq_length: int | None = None) -> int | None:
    """Tokens that a text is cut to by the model's own files; None where they have no limit.

    ``max_seq_length``, of sentence-transformers, takes the place of the tokenizer's.
    """
    positions = inputs_of.most_positions(module)
    own = max_seq_length or inputs_of.tokenizer_limit(tokenizer)
    return min((limit for limit in (positions, own) if limit is not None), default=None)


def _text_length(name: str, limit: int | None, wanted: int | None) -> int:
    if wanted is None:
        if limit is None:
            logger.warning(
                "%s has no longest text: neither its tokenizer nor its positions end. Texts are cut to %d tokens; "
                "--max-text-length takes others",
                name,
                DEFAULT_TEXT_LENGTH,
            )
        return limit or DEFAULT_TEXT_LENGTH
    if limit is not None and wanted > limit:
        raise UserError(f"--max-text-length {wanted}: {name} takes texts of {limit} tokens at most")
    return wanted
