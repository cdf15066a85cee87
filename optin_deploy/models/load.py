"""Load a network by name or path: from timm, transformers, or a checkpoint of optin-deploy."""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from optin_deploy.config.recipe import Recipe
from optin_deploy.data.preprocessing import TextPreprocessing
from optin_deploy.errors import UserError, one_line
from optin_deploy.models import checkpoint, timm_files, timm_models, transformers_models
from optin_deploy.models.hub import cached_if_unreachable, read_origin
from optin_deploy.models.libraries import LIBRARY_ERRORS, create_module, prepare_module
from optin_deploy.models.model_directories import check_directory, describe_file, find_weights, variant_of
from optin_deploy.models.sentence_files import SentenceFiles, build_sentences, read_sentence_files
from optin_deploy.models.validation.adopt import validate
from optin_deploy.models.weight_files import parse_weights
from optin_deploy.models.weights import load_weights
from optin_deploy.network import Network, Origin, Source
from optin_deploy.nn.sentence_embeddings import FEATURES
from optin_deploy.utils.paths import check_regular_inside

DEFAULT_SEQUENCE_LENGTH = 128
_CHOICES = "use --weights random (for speed only), --weights FILE.safetensors, or --model DIRECTORY"


@dataclass(frozen=True)
class _Options:
    """The arguments of `load_network`."""

    model: str
    weights: str
    image_size: int | None
    sequence_length: int
    max_text_length: int | None
    seed: int

    @property
    def directory(self) -> Path | None:
        return Path(self.model) if Path(self.model).is_dir() else None

    def check_no_image_size(self) -> None:
        if self.image_size is not None:
            raise UserError(
                f"--image-size {self.image_size} is for models with a timm name; {self.model} takes the size in its "
                "configuration"
            )

    def check_text_length(self, network: Network) -> None:
        if self.max_text_length is not None and not isinstance(network.preprocessing, TextPreprocessing):
            raise UserError(f"--max-text-length {self.max_text_length}: {network.source.name} takes no texts")


def load_network(
    model: str,
    *,
    weights: str = "pretrained",
    image_size: int | None = None,
    sequence_length: int = DEFAULT_SEQUENCE_LENGTH,
    max_text_length: int | None = None,
    seed: int = 0,
) -> Network:
    """Return the network ``model`` on the CPU, in fp32 and eval mode.

    Args:
        model: a timm name or its short form, a transformers model id, a directory saved by transformers or timm, or a
            checkpoint of optin-deploy.
        weights: "pretrained", "random", or a ``.safetensors`` file. Add ``#PART`` if the file holds the network several
            times, as in ``w.safetensors#ema``. A checkpoint has its own weights.
        image_size: in pixels, for vision networks that accept several sizes.
        sequence_length: tokens of the sample input, at most the number of positions of the network. A checkpoint keeps
            the length with which it was pruned.
        max_text_length: number of tokens to which calibration and evaluation texts are truncated; the model's own limit
            when None.
        seed: of random weights.

    Raises:
        UserError: the model is unknown, its weights cannot be loaded, or the image size does not fit.

    Example:
        >>> network = load_network("deit_small", weights="random", image_size=224)
    """
    network = _load(_Options(model, weights, image_size, sequence_length, max_text_length, seed))
    check_weights(network)
    return validate(network)


def load_recipe_network(recipe: Recipe) -> Network:
    """Return the network of ``recipe``, as `load_network` does."""
    return load_network(
        recipe.model,
        weights=recipe.weights,
        image_size=recipe.image_size,
        sequence_length=recipe.sequence_length,
        max_text_length=recipe.max_text_length,
        seed=recipe.seed,
    )


def _load(options: _Options) -> Network:
    directory = options.directory
    if directory:
        check_regular_inside(directory)
    if checkpoint.is_checkpoint(options.model):
        return _load_checkpoint(options)
    if directory:
        check_directory(directory)
    name = None if directory else timm_models.full_name(options.model)
    saved = timm_files.read_saved_network(Path(options.model))
    if name:
        network = _load_timm(options, name)
    elif saved:
        network = _load_saved_timm(options, saved)
    else:
        network = _load_transformers(options)
    options.check_text_length(network)
    return network


def check_weights(network: Network) -> None:
    """Raise UserError if a weight of the network is NaN or infinite."""
    bad = next((name for name, p in network.module.named_parameters() if not p.isfinite().all()), None)
    if bad is not None:
        raise UserError(f"the weights of {network.source.name} ({network.weights}) hold NaN or infinity in {bad}")


def _load_checkpoint(options: _Options) -> Network:
    """Load a checkpoint of optin-deploy; the texts are truncated to ``max_text_length``, if that is given."""
    if options.weights != "pretrained" or options.image_size is not None:
        raise UserError(f"{options.model} is a checkpoint of optin-deploy: it takes no --weights and no --image-size")
    network = checkpoint.load_network(Path(options.model))
    options.check_text_length(network)
    preprocessing, wanted = network.preprocessing, options.max_text_length
    if wanted is None or not isinstance(preprocessing, TextPreprocessing):
        return network
    limit = transformers_models.text_limit(network.module, preprocessing.tokenizer)
    # Files of sentence-transformers may state another length than the tokenizer.
    limit = preprocessing.max_length if network.sentences else max(limit or wanted, preprocessing.max_length)
    if wanted > limit:
        raise UserError(f"--max-text-length {wanted}: {network.source.name} takes texts of {limit} tokens at most")
    return replace(network, preprocessing=replace(preprocessing, max_length=wanted))


def _load_timm(options: _Options, name: str) -> Network:
    arguments = _arguments_from(options.weights, name)
    source = timm_models.source_of(name, options.image_size, arguments)
    if options.weights != "pretrained":
        return timm_models.network_of(_build(source, options.weights, options.seed), source, options.weights)
    try:
        with cached_if_unreachable(name):
            module = timm_models.load_pretrained(source)
    except (OSError, RuntimeError) as error:
        raise UserError(f"pretrained weights of {name} cannot be fetched or found in the cache: {_CHOICES}") from error
    except (TypeError, AssertionError) as error:
        raise UserError(f"timm cannot build {name} for image size {options.image_size}: {error}") from error
    return timm_models.network_of(module, source, options.weights)


def _load_saved_timm(options: _Options, saved: timm_files.SavedNetwork) -> Network:
    options.check_no_image_size()
    is_own = options.weights == "pretrained"
    file = _weights_of(Path(options.model)) if is_own else options.weights
    # timm only writes the arguments that differ from the architecture's; the shapes of weights show the others.
    arguments = {**_arguments_from(file, saved.source.name), **saved.source.arguments}
    source = replace(saved.source, arguments=arguments)
    origin = read_origin(options.model, ()) if is_own else Origin()
    module = _build(source, file, options.seed)
    return timm_models.network_of(module, source, options.weights, saved.pretrained_cfg, origin)


def _arguments_from(weights: str, name: str) -> dict[str, int]:
    if weights in ("pretrained", "random"):
        return {}
    return timm_files.arguments_from_weights(name, parse_weights(weights))


def _weights_of(directory: Path) -> str:
    """Return the file of weights in ``directory``; UserError with the alternatives if there is none."""
    try:
        return str(find_weights(directory))
    except UserError as error:
        # A message that contains a command needs no alternatives.
        has_command = "--weights" in str(error) or "python -c" in str(error)
        raise UserError(str(error) if has_command else f"{error}; or {_CHOICES}") from error


def _load_transformers(options: _Options) -> Network:
    model, directory = options.model, options.directory
    sentences = read_sentence_files(model) if directory else None
    encoder = _encoder_directory(model, sentences)
    config = _read_config(encoder)
    options.check_no_image_size()
    with cached_if_unreachable(model):
        if not directory:
            sentences = read_sentence_files(model)
            _encoder_directory(model, sentences)
        source = transformers_models.source_of(config, sentences.task if sentences else None)
        module = _build_transformers(options, encoder, source)
        with _library_errors(f"the preprocessing of {model} cannot be used"):
            preprocessing = transformers_models.read_preprocessing(encoder, module, options.max_text_length, sentences)
        origin = read_origin(model, transformers_models.companion_files(module))
    if options.weights != "pretrained":
        origin = Origin(files=origin.files)
    source = transformers_models.with_padding(source, module)
    with _library_errors(f"{model} does not take what its own preprocessing makes"):
        network = transformers_models.network_of(
            module, source, options.weights, preprocessing, options.sequence_length
        )
        network = replace(network, origin=origin)
        return _add_sentences(network, sentences) if sentences and sentences.embeds else network


@contextmanager
def _library_errors(message: str) -> Iterator[None]:
    """Raise the errors of libraries as UserError that begins with ``message``."""
    try:
        yield
    except (OSError, *LIBRARY_ERRORS) as error:
        raise UserError(f"{message}: {one_line(error)}") from error


def _build_transformers(options: _Options, encoder: str, source: Source) -> nn.Module:
    try:
        if options.weights != "pretrained":
            return _build(source, options.weights, options.seed)
        variant = variant_of(Path(_weights_of(Path(encoder)))) if Path(encoder).is_dir() else None
        return transformers_models.load_pretrained(encoder, source, variant)
    except OSError as error:
        raise UserError(
            f"the weights of {options.model} cannot be fetched or found ({one_line(error)}): {_CHOICES}"
        ) from error
    except LIBRARY_ERRORS as error:
        raise UserError(f"{options.model} cannot be loaded as {source.name}: {one_line(error)}") from error


def _encoder_directory(model: str, sentences: SentenceFiles | None) -> str:
    """Return where the encoder of ``model`` is: files of sentence-transformers may name a folder for it."""
    if sentences is None or not sentences.folder:
        return model
    encoder = Path(model, sentences.folder)
    if not Path(model).is_dir():
        raise UserError(
            f"{model} has its encoder in the folder {sentences.folder}: download it, and give its directory"
        )
    if not encoder.is_dir():
        raise UserError(f"{encoder} does not exist, though modules.json names it as the folder of the encoder")
    check_regular_inside(encoder)
    return str(encoder)


def _add_sentences(network: Network, files: SentenceFiles) -> Network:
    """Return ``network`` with the sentence embeddings that its files describe; UserError if they do not fit."""
    if not isinstance(network.preprocessing, TextPreprocessing) or FEATURES not in network.outputs:
        raise UserError(
            f"modules.json makes sentence embeddings of texts, {network.source.name} takes "
            f"{', '.join(network.inputs)} and returns {', '.join(network.outputs)}: no {FEATURES} of tokens"
        )
    sentences = build_sentences(files, network.preprocessing.tokenizer)
    try:
        with torch.inference_mode():
            replace(network, sentences=sentences).with_pooling().forward(network.inputs)
    except RuntimeError as error:
        raise UserError(f"modules.json does not fit {network.source.name}: {one_line(error)}") from error
    return replace(network, sentences=sentences)


def _read_config(model: str) -> object:
    path = Path(model)
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"{model} is a directory without config.json (transformers) and without optin.json (our own)")
    try:
        with cached_if_unreachable(model):
            return transformers_models.read_config(model)
    except (OSError, *LIBRARY_ERRORS) as error:
        if path.is_dir():
            raise UserError(f"{path / 'config.json'} cannot be used: {one_line(error)}") from error
        raise UserError(describe_file(path) if path.is_file() else _unknown_model(model)) from error


def _unknown_model(model: str) -> str:
    similar = difflib.get_close_matches(model, timm_models.short_names(), n=3, cutoff=0.6)
    hint = f"did you mean {', '.join(similar)}?" if similar else "`optin-deploy models` lists what is supported"
    return (
        f"unknown model {model!r}: no timm model, no local directory, and no transformers model that can be fetched or "
        f"found in the cache; {hint}"
    )


def _build(source: Source, weights: str, seed: int) -> nn.Module:
    """Return the module with ``weights``: "random" or a file."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = create_module(source)
    if weights == "random":
        return prepare_module(source, module)
    if source.library != "transformers":
        load_weights(module, parse_weights(weights))
        return prepare_module(source, module)
    module = transformers_models.without_pooler(module)
    load_weights(
        module,
        parse_weights(weights),
        namings=transformers_models.file_names(module),
        unused=transformers_models.unused_names(module),
    )
    return prepare_module(source, module)
