"""The files of sentence-transformers beside an encoder: which modules follow it, prompts, lengths, similarity.

All layouts are read: ``modules.json`` with the encoder at the root or in a folder of its own, poolings by flags or by
name, and the names that the configuration of the encoder has had. The package itself is not needed.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard, cast, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import nn

from optin_deploy.errors import UserError
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

MODULES_NAME, CONFIG_NAME = "modules.json", "config_sentence_transformers.json"
ENCODER_CONFIGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# In the order in which their vectors stand one behind the other.
_FLAGS: dict[str, PoolingMode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_FEATURES, _TASKS = "feature-extraction", ("feature-extraction", "sequence-classification")
_READ = "Transformer, Pooling, Dense, LayerNorm, Normalize, Dropout"
_MOST_WIDTH = 1 << 20


@dataclass(frozen=True)
class SentenceFiles:
    """What the files say.

    Attributes:
        folder: where the encoder is, inside the model's directory; "" for the directory itself.
        task: what the encoder is built for.
        max_length: tokens that a text is cut to; None where the tokenizer says it.
        prompt: put before every text.
        pools_prompt: whether the tokens of a prompt are pooled with the others.
        modes: of pooling.
        layers: what follows.
        files: name -> content, of a directory with the encoder at its root.
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
        """Whether the model gives sentence embeddings; cross-encoders are classifiers with such files."""
        return bool(self.modes)

    def head(self, prompt_tokens: int) -> SentenceHead:
        """What follows the encoder; ``prompt_tokens`` stand at the beginning of every text."""
        pooling = Pooling(self.modes, 0 if self.pools_prompt else prompt_tokens)
        return SentenceHead(pooling, self.layers).eval().requires_grad_(False)


class _Reader:
    """Files of one model, kept as they are read."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.files: dict[str, bytes] = {}

    def content(self, name: str) -> bytes | None:
        content = read_file(self.model, name)
        if content is not None:
            self.files[name] = content
        return content

    def json(self, name: str, kind: type = dict) -> Any:
        """A JSON file's value; None where there is no such file, UserError where it is no ``kind``."""
        content = self.content(name)
        if content is None:
            return None
        try:
            value = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.place(name)} cannot be read as JSON: {str(error)[:120]}") from error
        if not isinstance(value, kind):
            raise UserError(f"{self.place(name)} holds a {type(value).__name__}, not a {kind.__name__}")
        return value

    def place(self, name: str) -> str:
        return str(Path(self.model, name)) if Path(self.model).is_dir() else f"{self.model}: {name}"


def read_sentence_files(model: str) -> SentenceFiles | None:
    """What the files of a local directory or model id say; None where it has no ``modules.json``.

    Raises:
        UserError: a file is damaged, or names a module that is not read here.
    """
    reader = _Reader(model)
    modules = reader.json(MODULES_NAME, list)
    if modules is None:
        return None
    entries = [_entry(reader, module) for module in modules]
    if not entries or entries[0][0] != "Transformer":
        first = entries[0][0] if entries else "nothing"
        raise UserError(
            f"{reader.place(MODULES_NAME)} begins with {first}: only models that begin with a Transformer are read"
        )
    folder = entries[0][1]
    own = _encoder_config(reader, folder)
    whole = reader.json(CONFIG_NAME) or {}
    task = own.get("transformer_task", _FEATURES)
    if task not in _TASKS:
        raise UserError(f"{reader.place(MODULES_NAME)}: its Transformer is for {task}; {', '.join(_TASKS)} are read")
    is_classifier = task != _FEATURES
    modes, pools_prompt, layers = ((), True, ()) if is_classifier else _head(reader, entries[1:])
    if is_classifier and len(entries) > 1:
        raise UserError(f"{reader.place(MODULES_NAME)}: a {entries[1][0]} behind a classifier is not read")
    return SentenceFiles(
        folder=folder,
        task=task,
        max_length=_max_length(reader, own),
        lower_case=own.get("do_lower_case") is True,
        prompt=_prompt(reader, whole, is_classifier=is_classifier),
        pools_prompt=pools_prompt,
        modes=modes,
        layers=layers,
        similarity=_similarity(reader, whole),
        files=_moved(reader.files, modules, folder),
    )


def _entry(reader: _Reader, module: Any) -> tuple[str, str]:
    """Class and folder of a module; UserError where it is none of sentence-transformers, or its folder is outside."""
    place = reader.place(MODULES_NAME)
    if not isinstance(module, dict) or not isinstance(module.get("type"), str):
        raise UserError(f"{place}: every module is an object with a type; found {str(module)[:60]}")
    kind, folder = module["type"], module.get("path", "")
    if not kind.startswith("sentence_transformers."):
        raise UserError(f"{place}: {kind} is code that comes with the model, which is never run")
    name = kind.rsplit(".", 1)[-1]
    if name not in _READ.split(", "):
        raise UserError(f"{place}: a {name} is not read; a Transformer may be followed by {_READ.split(', ', 1)[1]}")
    if not isinstance(folder, str) or ".." in PurePosixPath(folder).parts or PurePosixPath(folder).is_absolute():
        raise UserError(f"{place}: {str(folder)[:60]!r} is no folder of the model")
    return name, "" if folder == "." else folder.strip("/")


def _encoder_config(reader: _Reader, folder: str) -> dict[str, Any]:
    for name in ENCODER_CONFIGS:
        found = reader.json(_join(folder, name))
        if found is not None:
            return cast("dict[str, Any]", found)
    return {}


def _max_length(reader: _Reader, config: Mapping[str, Any]) -> int | None:
    nested = config.get("processor_kwargs") or config.get("tokenizer_args") or {}
    length = config.get("max_seq_length")
    if length is None and isinstance(nested, Mapping):
        length = nested.get("model_max_length")
    if length is None:
        return None
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise UserError(
            f"{reader.model}: max_seq_length {str(length)[:40]} in its sentence_…_config.json is no length: correct it"
        )
    return length


def _prompt(reader: _Reader, config: Mapping[str, Any], *, is_classifier: bool) -> str:
    name, prompts = config.get("default_prompt_name"), config.get("prompts") or {}
    if name is None:
        return ""
    if not isinstance(prompts, Mapping) or not isinstance(prompts.get(name), str):
        raise UserError(f"{reader.place(CONFIG_NAME)}: default_prompt_name {str(name)[:40]!r} is none of its prompts")
    if is_classifier and prompts[name]:
        raise UserError(
            f"{reader.place(CONFIG_NAME)}: prompts of cross-encoders are not read; set default_prompt_name to null"
        )
    return str(prompts[name])


def _similarity(reader: _Reader, config: Mapping[str, Any]) -> Similarity:
    name = config.get("similarity_fn_name") or "cosine"
    if name not in get_args(Similarity):
        raise UserError(
            f"{reader.place(CONFIG_NAME)}: similarity_fn_name {str(name)[:40]!r} is none of "
            f"{', '.join(get_args(Similarity))}"
        )
    return cast("Similarity", name)


def _head(
    reader: _Reader, entries: list[tuple[str, str]]
) -> tuple[tuple[PoolingMode, ...], bool, tuple[nn.Module, ...]]:
    """Modes of pooling, whether prompts are pooled, and the layers behind."""
    place = reader.place(MODULES_NAME)
    if not entries or entries[0][0] != "Pooling":
        raise UserError(
            f"{place}: a Transformer is followed by {entries[0][0] if entries else 'nothing'}, not by a Pooling"
        )
    config = reader.json(_join(entries[0][1], "config.json"))
    if config is None:
        raise UserError(
            f"{reader.place(_join(entries[0][1], 'config.json'))} is missing: it says how tokens are pooled"
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
            raise UserError(f"{place}: a second {name} is not read")
        layers.append(makers[name](reader, folder))
    return _modes(reader, config, entries[0][1]), include is not False, tuple(m for m in layers if m is not None)


def _modes(reader: _Reader, config: Mapping[str, Any], folder: str) -> tuple[PoolingMode, ...]:
    given = config.get("pooling_mode")
    if given is None:
        on = [mode for flag, mode in _FLAGS.items() if config.get(flag) is True]
        given = on or ["mean"]
    found = [given] if isinstance(given, str) else given
    wrong = (
        next((mode for mode in found if mode not in get_args(PoolingMode)), None) if isinstance(found, list) else found
    )
    if wrong is not None or not found:
        known = ", ".join(get_args(PoolingMode))
        raise UserError(
            f"{reader.place(_join(folder, 'config.json'))}: pooling_mode {str(wrong)[:40]!r} is none of {known}"
        )
    return tuple(found)


def _dense(reader: _Reader, folder: str) -> nn.Module:
    config, place = reader.json(_join(folder, "config.json")) or {}, reader.place(folder)
    _check_features(config, place)
    inputs, outputs = config.get("in_features"), config.get("out_features")
    if not (_is_width(inputs) and _is_width(outputs)):
        found = f"{str(inputs)[:20]} and {str(outputs)[:20]}"
        raise UserError(f"{place}: config.json of a Dense names in_features and out_features; found {found}")
    made = Dense(
        inputs,
        outputs,
        _activation(config.get("activation_function", "torch.nn.modules.activation.Tanh"), place),
        bias=config.get("bias") is not False,
        residual=config.get("use_residual") is True,
    )
    return _with_weights(reader, made, folder)


def _is_width(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and 0 < value <= _MOST_WIDTH


def _activation(name: Any, place: str) -> nn.Module:
    """A module of torch without weights, by its name."""
    short = str(name).rsplit(".", 1)[-1]
    found = getattr(nn.modules.activation, short, None) if short != "Identity" else nn.Identity
    if str(name).startswith("torch.nn.") and isinstance(found, type) and issubclass(found, nn.Module):
        try:
            made = found()
        except TypeError:
            made = None
        if made is not None and not list(made.parameters()):
            return made
    raise UserError(f"{place}: activation_function {str(name)[:60]} is not read; those of torch.nn without weights are")


def _layer_norm(reader: _Reader, folder: str) -> nn.Module:
    config = reader.json(_join(folder, "config.json")) or {}
    width = config.get("dimension")
    if not _is_width(width):
        raise UserError(
            f"{reader.place(folder)}: config.json of a LayerNorm names its dimension; found {str(width)[:40]}"
        )
    return _with_weights(reader, LayerNorm(width), folder)


def _normalize(reader: _Reader, folder: str) -> nn.Module:
    _check_features(reader.json(_join(folder, "config.json")) or {}, reader.place(folder))
    return Normalize()


def _check_features(config: Mapping[str, Any], place: str) -> None:
    """Raise UserError where a module works on other features than the embedding."""
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, "sentence_embedding"):
            raise UserError(f"{place}: {key} {str(config[key])[:40]!r} is not read; only sentence_embedding is")


def _with_weights(reader: _Reader, module: nn.Module, folder: str) -> nn.Module:
    name = _join(folder, "model.safetensors")
    content = reader.content(name)
    if content is None:
        if read_file(reader.model, _join(folder, "pytorch_model.bin")) is not None:
            raise UserError(
                f"{reader.place(folder)} has its weights in pytorch_model.bin, a pickle, which is never loaded: save "
                "the model again with a recent sentence-transformers, which writes model.safetensors"
            )
        raise UserError(f"{reader.place(name)} is missing")
    try:
        module.load_state_dict({key: t.to(torch.float32) for key, t in load_tensors(content).items()})
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise UserError(f"{reader.place(name)} does not fit: {' '.join(str(error).split())[:160]}") from error
    bad = next((key for key, t in module.state_dict().items() if not t.isfinite().all()), None)
    if bad is not None:
        raise UserError(f"{reader.place(name)} holds NaN or infinity in {bad}")
    return module


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _moved(files: Mapping[str, bytes], modules: list[Any], folder: str) -> dict[str, bytes]:
    """``files`` as they stand in a directory whose root holds the encoder."""
    if not folder:
        return dict(files)
    own = {_join(folder, name): name for name in ENCODER_CONFIGS}
    first = json.dumps([{**modules[0], "path": ""}, *modules[1:]], indent=2) + "\n"
    return {own.get(name, name): content for name, content in files.items()} | {MODULES_NAME: first.encode()}


def sentences_of(files: SentenceFiles, tokenizer: Any) -> Sentences:
    """How the model of ``files``, which embeds, makes sentence embeddings of the tokens of ``tokenizer``."""
    prompt = files.prompt.lower() if files.lower_case else files.prompt
    ids = tokenizer(prompt)["input_ids"] if prompt else []
    # The token that ends every text does not end the prompt.
    count = len(ids) - (1 if ids and ids[-1] in tokenizer.all_special_ids else 0)
    return Sentences(files.head(count), files.similarity, files.files)
