"""The files of sentence-transformers next to an encoder: modules after it, prompts, lengths, similarity.

All layouts are supported: the encoder at the root or in a folder of its own, poolings by flags or by name, and the old
names of the encoder's configuration. The package itself is not needed.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypeGuard, cast, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import nn

from optin_deploy.errors import UserError, one_line
from optin_deploy.models.hub import read_file
from optin_deploy.nn.sentence_embeddings import (
    Dense,
    LayerNorm,
    Normalize,
    Pooling,
    PoolingMode,
    SentenceHead,
    Sentences,
    Similarity,
)
from optin_deploy.utils.json_types import JsonObject, JsonValue

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODULES_NAME, CONFIG_NAME = "modules.json", "config_sentence_transformers.json"
ENCODER_CONFIGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# In the order in which their vectors are concatenated.
_FLAGS: dict[str, PoolingMode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_FEATURES, _TASKS = "feature-extraction", ("feature-extraction", "sequence-classification")
_SUPPORTED = "Transformer, Pooling, Dense, LayerNorm, Normalize, Dropout"
_MOST_WIDTH = 1 << 20


@dataclass(frozen=True)
class SentenceFiles:
    """The content of the files.

    Attributes:
        folder: of the encoder, inside the model's directory; "" for the directory itself.
        task: the encoder's, as transformers names it.
        max_length: tokens to which a text is truncated; None for the tokenizer's limit.
        prompt: put before every text.
        pools_prompt: whether the tokens of the prompt are pooled too.
        modes: of pooling.
        layers: the modules after the pooling.
        files: name -> content, for a directory with the encoder at its root.
    """

    folder: str
    task: str
    max_length: int | None
    lower_case: bool
    prompt: str
    pools_prompt: bool
    modes: tuple[PoolingMode, ...]
    layers: tuple[nn.Module, ...]
    similarity: Similarity
    files: Mapping[str, bytes]

    @property
    def embeds(self) -> bool:
        """Whether the model makes sentence embeddings; cross-encoders are classifiers with such files."""
        return bool(self.modes)

    def head(self, prompt_tokens: int) -> SentenceHead:
        """Return the modules after the encoder; every text begins with ``prompt_tokens`` tokens of the prompt."""
        pooling = Pooling(self.modes, 0 if self.pools_prompt else prompt_tokens)
        return SentenceHead(pooling, self.layers).eval().requires_grad_(False)


class _Reader:
    """Reads files of one model and stores their content."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.files: dict[str, bytes] = {}

    def content(self, name: str) -> bytes | None:
        content = read_file(self.model, name)
        if content is not None:
            self.files[name] = content
        return content

    def json(self, name: str, kind: type = dict) -> JsonValue:
        """Return a JSON file's value; None if there is no such file, UserError if it is not a ``kind``."""
        content = self.content(name)
        if content is None:
            return None
        try:
            value = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.path(name)} cannot be read as JSON: {one_line(error, 120)}") from error
        if not isinstance(value, kind):
            raise UserError(f"{self.path(name)} holds a {type(value).__name__}, not a {kind.__name__}")
        return value

    def path(self, name: str) -> str:
        return str(Path(self.model, name)) if Path(self.model).is_dir() else f"{self.model}: {name}"


def read_sentence_files(model: str) -> SentenceFiles | None:
    """Return the files of a local directory or model id; None if it has no ``modules.json``.

    Raises:
        UserError: a file is damaged, or names a module that is not supported.
    """
    reader = _Reader(model)
    modules = reader.json(MODULES_NAME, list)
    if modules is None:
        return None
    entries = [_entry(reader, module) for module in modules]
    if not entries or entries[0][0] != "Transformer":
        first = entries[0][0] if entries else "nothing"
        raise UserError(
            f"{reader.path(MODULES_NAME)} begins with {first}: only models that begin with a Transformer are supported"
        )
    folder = entries[0][1]
    encoder_config = _encoder_config(reader, folder)
    config = reader.json(CONFIG_NAME) or {}
    task = encoder_config.get("transformer_task", _FEATURES)
    if task not in _TASKS:
        raise UserError(f"{reader.path(MODULES_NAME)}: its Transformer is for {task}; supported: {', '.join(_TASKS)}")
    is_classifier = task != _FEATURES
    modes, pools_prompt, layers = ((), True, ()) if is_classifier else _head(reader, entries[1:])
    if is_classifier and len(entries) > 1:
        raise UserError(f"{reader.path(MODULES_NAME)}: a {entries[1][0]} after a classifier is not supported")
    return SentenceFiles(
        folder=folder,
        task=task,
        max_length=_max_length(reader, encoder_config),
        lower_case=encoder_config.get("do_lower_case") is True,
        prompt=_prompt(reader, config, is_classifier=is_classifier),
        pools_prompt=pools_prompt,
        modes=modes,
        layers=layers,
        similarity=_similarity(reader, config),
        files=_with_encoder_at_root(reader.files, modules, folder),
    )


def _entry(reader: _Reader, module: JsonValue) -> tuple[str, str]:
    """Return class and folder of a module; UserError if it is not supported, or its folder is outside the model."""
    path = reader.path(MODULES_NAME)
    if not isinstance(module, dict) or not isinstance(module.get("type"), str):
        raise UserError(f"{path}: every module is an object with a type; found {str(module)[:60]}")
    kind, folder = module["type"], module.get("path", "")
    if not kind.startswith("sentence_transformers."):
        raise UserError(f"{path}: {kind} is code that comes with the model, which is never run")
    name = kind.rsplit(".", 1)[-1]
    if name not in _SUPPORTED.split(", "):
        others = _SUPPORTED.split(", ", 1)[1]
        raise UserError(f"{path}: a {name} is not supported; a Transformer may be followed by {others}")
    if not isinstance(folder, str) or ".." in PurePosixPath(folder).parts or PurePosixPath(folder).is_absolute():
        raise UserError(f"{path}: {str(folder)[:60]!r} is no folder of the model")
    return name, "" if folder == "." else folder.strip("/")


def _encoder_config(reader: _Reader, folder: str) -> JsonObject:
    for name in ENCODER_CONFIGS:
        config = reader.json(_join(folder, name))
        if config is not None:
            return cast(JsonObject, config)
    return {}


def _max_length(reader: _Reader, config: JsonObject) -> int | None:
    nested = config.get("processor_kwargs") or config.get("tokenizer_args") or {}
    length = config.get("max_seq_length")
    if length is None and isinstance(nested, Mapping):
        length = nested.get("model_max_length")
    if length is None:
        return None
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise UserError(
            f"{reader.model}: max_seq_length {str(length)[:40]} in sentence_…_config.json is not a length: correct it"
        )
    return length


def _prompt(reader: _Reader, config: JsonObject, *, is_classifier: bool) -> str:
    name, prompts = config.get("default_prompt_name"), config.get("prompts") or {}
    if name is None:
        return ""
    if not isinstance(prompts, Mapping) or not isinstance(prompts.get(name), str):
        raise UserError(f"{reader.path(CONFIG_NAME)}: default_prompt_name {str(name)[:40]!r} is not one of its prompts")
    if is_classifier and prompts[name]:
        raise UserError(
            f"{reader.path(CONFIG_NAME)}: prompts of cross-encoders are not supported; set default_prompt_name to null"
        )
    return str(prompts[name])


def _similarity(reader: _Reader, config: JsonObject) -> Similarity:
    name = config.get("similarity_fn_name") or "cosine"
    if name not in get_args(Similarity):
        raise UserError(
            f"{reader.path(CONFIG_NAME)}: similarity_fn_name {str(name)[:40]!r} is not one of "
            f"{', '.join(get_args(Similarity))}"
        )
    return cast("Similarity", name)


def _head(
    reader: _Reader, entries: list[tuple[str, str]]
) -> tuple[tuple[PoolingMode, ...], bool, tuple[nn.Module, ...]]:
    """Return the pooling modes, whether prompts are pooled, and the layers after the pooling."""
    path = reader.path(MODULES_NAME)
    if not entries or entries[0][0] != "Pooling":
        raise UserError(
            f"{path}: a Transformer is followed by {entries[0][0] if entries else 'nothing'}, not by a Pooling"
        )
    config = reader.json(_join(entries[0][1], "config.json"))
    if config is None:
        raise UserError(
            f"{reader.path(_join(entries[0][1], 'config.json'))} is missing: it states how tokens are pooled"
        )
    include = config.get("include_prompt", True)
    makers: dict[str, Callable[[_Reader, str], nn.Module | None]] = {
        "Dense": _dense,
        "LayerNorm": _layer_norm,
        "Normalize": _normalize,
        "Dropout": lambda *_: None,
    }
    layers = []
    for name, folder in entries[1:]:
        if name not in makers:
            raise UserError(f"{path}: a second {name} is not supported")
        layers.append(makers[name](reader, folder))
    return _modes(reader, config, entries[0][1]), include is not False, tuple(m for m in layers if m is not None)


def _modes(reader: _Reader, config: JsonObject, folder: str) -> tuple[PoolingMode, ...]:
    value = config.get("pooling_mode")
    if value is None:
        value = [mode for flag, mode in _FLAGS.items() if config.get(flag) is True] or ["mean"]
    modes = [value] if isinstance(value, str) else value
    known = get_args(PoolingMode)
    if not modes or not isinstance(modes, list) or any(mode not in known for mode in modes):
        raise UserError(
            f"{reader.path(_join(folder, 'config.json'))}: pooling_mode {str(value)[:40]!r} is not one of "
            f"{', '.join(known)}"
        )
    return tuple(modes)


def _dense(reader: _Reader, folder: str) -> nn.Module:
    config, path = reader.json(_join(folder, "config.json")) or {}, reader.path(folder)
    _check_features(config, path)
    inputs, outputs = config.get("in_features"), config.get("out_features")
    if not (_is_width(inputs) and _is_width(outputs)):
        values = f"{str(inputs)[:20]} and {str(outputs)[:20]}"
        raise UserError(f"{path}: config.json of a Dense names in_features and out_features; found {values}")
    dense = Dense(
        inputs,
        outputs,
        _activation(config.get("activation_function", "torch.nn.modules.activation.Tanh"), path),
        bias=config.get("bias") is not False,
        residual=config.get("use_residual") is True,
    )
    return _with_weights(reader, dense, folder)


def _is_width(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and 0 < value <= _MOST_WIDTH


def _activation(name: object, path: str) -> nn.Module:
    """Return the activation of torch.nn with this name; UserError if there is none without arguments and weights."""
    short = str(name).rsplit(".", 1)[-1]
    cls = getattr(nn.modules.activation, short, None) if short != "Identity" else nn.Identity
    if str(name).startswith("torch.nn.") and isinstance(cls, type) and issubclass(cls, nn.Module):
        with suppress(TypeError):
            module = cls()
            if not list(module.parameters()):
                return module
    raise UserError(f"{path}: activation_function {str(name)[:60]} is not a module of torch.nn without weights")


def _layer_norm(reader: _Reader, folder: str) -> nn.Module:
    config = reader.json(_join(folder, "config.json")) or {}
    width = config.get("dimension")
    if not _is_width(width):
        raise UserError(
            f"{reader.path(folder)}: config.json of a LayerNorm names its dimension; found {str(width)[:40]}"
        )
    return _with_weights(reader, LayerNorm(width), folder)


def _normalize(reader: _Reader, folder: str) -> nn.Module:
    _check_features(reader.json(_join(folder, "config.json")) or {}, reader.path(folder))
    return Normalize()


def _check_features(config: JsonObject, path: str) -> None:
    """Raise UserError if a module works on other features than the embedding."""
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, "sentence_embedding"):
            raise UserError(f"{path}: {key} {str(config[key])[:40]!r} is not supported; only sentence_embedding is")


def _with_weights(reader: _Reader, module: nn.Module, folder: str) -> nn.Module:
    name = _join(folder, "model.safetensors")
    content = reader.content(name)
    if content is None:
        if read_file(reader.model, _join(folder, "pytorch_model.bin")) is not None:
            raise UserError(
                f"{reader.path(folder)} has its weights in pytorch_model.bin, a pickle, which is never loaded: save "
                "the model again with a recent sentence-transformers, which writes model.safetensors"
            )
        raise UserError(f"{reader.path(name)} is missing")
    try:
        module.load_state_dict({key: t.to(torch.float32) for key, t in load_tensors(content).items()})
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise UserError(f"{reader.path(name)} does not fit: {one_line(error, 160)}") from error
    if bad := next((key for key, t in module.state_dict().items() if not t.isfinite().all()), None):
        raise UserError(f"{reader.path(name)} holds NaN or infinity in {bad}")
    return module


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _with_encoder_at_root(files: Mapping[str, bytes], modules: list[JsonValue], folder: str) -> dict[str, bytes]:
    """Return ``files`` for a directory with the encoder at its root instead of in ``folder``."""
    if not folder:
        return dict(files)
    moved = {_join(folder, name): name for name in ENCODER_CONFIGS}
    first = json.dumps([{**modules[0], "path": ""}, *modules[1:]], indent=2) + "\n"
    return {moved.get(name, name): content for name, content in files.items()} | {MODULES_NAME: first.encode()}


def build_sentences(files: SentenceFiles, tokenizer: "PreTrainedTokenizerBase") -> Sentences:
    """Return how the model of ``files`` makes sentence embeddings from the tokens of ``tokenizer``."""
    prompt = files.prompt.lower() if files.lower_case else files.prompt
    ids = tokenizer(prompt)["input_ids"] if prompt else []
    # The prompt is followed by the text, not by the end token.
    count = len(ids) - (1 if ids and ids[-1] in tokenizer.all_special_ids else 0)
    return Sentences(files.head(count), files.similarity, files.files)
