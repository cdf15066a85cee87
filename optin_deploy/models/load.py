"""From what the user names to a `Network`: timm, transformers, or a checkpoint of our own."""

import difflib
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from optin_deploy.data.preprocessing import TextPreprocessing
from optin_deploy.errors import UserError
from optin_deploy.models import checkpoint, timm_files, timm_models, transformers_models
from optin_deploy.models.hub import cached_if_unreachable, read_origin
from optin_deploy.models.intake import validate
from optin_deploy.models.libraries import UNFIT, initialised, ready, reason
from optin_deploy.models.model_directories import check_directory, file_told, variant_of, weights_in
from optin_deploy.models.sentence_files import SentenceFiles, read_sentence_files, sentences_of
from optin_deploy.models.weight_files import named
from optin_deploy.models.weights import load_weights
from optin_deploy.network import Network, Origin, Source
from optin_deploy.nn.sentence_embeddings import FEATURES
from optin_deploy.utils.paths import check_regular_inside

DEFAULT_SEQUENCE_LENGTH = 128
_CHOICES = "use --weights random (for speed only), --weights FILE.safetensors, or --model DIRECTORY"


def load_network(
    model: str,
    *,
    weights: str = "pretrained",
    image_size: int | None = None,
    sequence_length: int = DEFAULT_SEQUENCE_LENGTH,
    max_text_length: int | None = None,
    seed: int = 0,
) -> Network:
    """The network that ``model`` names, on the CPU, in fp32 and eval mode.

    Args:
        model: a timm name or its short form, a transformers model id, a local directory that transformers or timm has
            saved, or a checkpoint of our own.
        weights: "pretrained", "random", or a ``.safetensors`` file, with ``#PART`` behind it where it holds the network
            several times, as in ``w.safetensors#ema``. A checkpoint of our own has its weights.
        image_size: pixels, for vision networks that can take other sizes than their own.
        sequence_length: tokens in the sample input, at most as many as the network has positions for; a checkpoint of
            our own keeps the length that it was pruned at.
        max_text_length: tokens that texts for calibration and evaluation are cut to; what the model takes when None.
        seed: of random weights.

    Raises:
        UserError: the model is unknown, its weights cannot be had, or the image size does not fit.
    """
    if Path(model).is_dir():
        check_regular_inside(Path(model))
    if checkpoint.is_checkpoint(model):
        if weights != "pretrained" or image_size is not None:
            raise UserError(f"{model} is a checkpoint of optin-deploy: it takes no --weights and no --image-size")
        return _checked(_with_text_length(checkpoint.load_network(Path(model)), max_text_length))
    if Path(model).is_dir():
        check_directory(Path(model))
    timm_name = None if Path(model).is_dir() else timm_models.full_name(model)
    saved = timm_files.saved(Path(model))
    if timm_name:
        network = _timm_network(timm_name, weights, image_size, seed)
    elif saved:
        network = _saved_timm_network(model, saved, weights, image_size, seed)
    else:
        network = _transformers_network(model, weights, image_size, sequence_length, max_text_length, seed)
    _check_has_texts(network, max_text_length)
    return _checked(network)


def _checked(network: Network) -> Network:
    check_weights(network)
    return validate(network)


def _with_text_length(network: Network, max_text_length: int | None) -> Network:
    """The network of a checkpoint, its texts cut to that length."""
    _check_has_texts(network, max_text_length)
    preprocessing = network.preprocessing
    if max_text_length is None or not isinstance(preprocessing, TextPreprocessing):
        return network
    limit = transformers_models.text_limit(network.module, preprocessing.tokenizer)
    # Files of sentence-transformers say less than that, or more.
    limit = preprocessing.max_length if network.sentences else max(limit or max_text_length, preprocessing.max_length)
    if max_text_length > limit:
        raise UserError(
            f"--max-text-length {max_text_length}: {network.source.name} takes texts of {limit} tokens at most"
        )
    return replace(network, preprocessing=replace(preprocessing, max_length=max_text_length))


def _check_has_texts(network: Network, max_text_length: int | None) -> None:
    if max_text_length is not None and not isinstance(network.preprocessing, TextPreprocessing):
        raise UserError(f"--max-text-length {max_text_length}: {network.source.name} takes no texts")


def check_weights(network: Network) -> None:
    """Raise UserError where a weight of the network is NaN or infinite."""
    bad = next((name for name, p in network.module.named_parameters() if not p.isfinite().all()), None)
    if bad is not None:
        raise UserError(f"the weights of {network.source.name} ({network.weights}) hold NaN or infinity in {bad}")


def _timm_network(name: str, weights: str, image_size: int | None, seed: int) -> Network:
    told = timm_files.told_by_weights(name, named(weights)) if weights not in ("pretrained", "random") else {}
    source = timm_models.source_of(name, image_size, told)
    if weights == "pretrained":
        try:
            with cached_if_unreachable(name):
                module = timm_models.load_pretrained(source)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"pretrained weights of {name} cannot be fetched or found in the cache: {_CHOICES}"
            ) from error
        except (TypeError, AssertionError) as error:
            raise UserError(f"timm cannot build {name} for image size {image_size}: {error}") from error
    else:
        module = _initialised(source, weights, seed)
    return timm_models.network_of(module, source, weights)


def _saved_timm_network(
    model: str, saved: timm_files.Saved, weights: str, image_size: int | None, seed: int
) -> Network:
    _check_size_is_own(model, image_size)
    own = weights == "pretrained"
    source, file = saved.source, _own_weights(Path(model)) if own else weights
    if file != "random":
        # What the configuration does not say: timm writes only those arguments that it is told.
        told = timm_files.told_by_weights(source.name, named(file))
        source = replace(source, arguments={**told, **source.arguments})
    module = _initialised(source, file, seed)
    origin = read_origin(model, ()) if own else Origin()
    return timm_models.network_of(module, source, weights, saved.pretrained_cfg, origin)


def _own_weights(directory: Path) -> str:
    """The file of weights in ``directory``; UserError, which tells the other choices too, where there is none."""
    try:
        return str(weights_in(directory))
    except UserError as error:
        # What tells a command to be given needs no other choice.
        more = "" if "--weights" in str(error) or "python -c" in str(error) else f"; or {_CHOICES}"
        raise UserError(f"{error}{more}") from error


def _check_size_is_own(model: str, image_size: int | None) -> None:
    if image_size is not None:
        raise UserError(
            f"--image-size {image_size} is for models named as timm does; {model} takes the size of its configuration"
        )


def _transformers_network(
    model: str,
    weights: str,
    image_size: int | None,
    sequence_length: int,
    max_text_length: int | None,
    seed: int,
) -> Network:
    sentences = read_sentence_files(model) if Path(model).is_dir() else None
    encoder = _encoder_directory(model, sentences)
    config = _transformers_config(encoder)
    _check_size_is_own(model, image_size)
    with cached_if_unreachable(model):
        if not Path(model).is_dir():
            sentences = read_sentence_files(model)
            _encoder_directory(model, sentences)
        source = transformers_models.source_of(config, sentences.task if sentences else None)
        try:
            if weights == "pretrained":
                file = Path(_own_weights(Path(encoder))) if Path(encoder).is_dir() else None
                module = transformers_models.load_pretrained(encoder, source, variant_of(file) if file else None)
            else:
                module = _initialised(source, weights, seed)
        except OSError as error:
            raise UserError(
                f"the weights of {model} cannot be fetched or found ({reason(error)}): {_CHOICES}"
            ) from error
        except UNFIT as error:
            raise UserError(f"{model} cannot be loaded as {source.name}: {reason(error)}") from error
        try:
            preprocessing = transformers_models.read_preprocessing(encoder, module, max_text_length, sentences)
        except (OSError, *UNFIT) as error:
            raise UserError(f"the preprocessing of {model} cannot be used: {reason(error)}") from error
        origin = read_origin(model, transformers_models.companions(module))
    if weights != "pretrained":
        origin = Origin(files=origin.files)
    source = transformers_models.with_padding(source, module)
    try:
        network = transformers_models.network_of(module, source, weights, preprocessing, sequence_length)
        network = replace(network, origin=origin)
        return with_sentences(network, sentences) if sentences and sentences.embeds else network
    except UNFIT as error:
        raise UserError(f"{model} does not take what its own preprocessing gives: {reason(error)}") from error


def _encoder_directory(model: str, sentences: SentenceFiles | None) -> str:
    """Where the encoder of a model is: files of sentence-transformers may name a folder for it."""
    if sentences is None or not sentences.folder:
        return model
    encoder = Path(model, sentences.folder)
    if not encoder.is_dir():
        if not Path(model).is_dir():
            raise UserError(
                f"{model} keeps its encoder in the folder {sentences.folder}: download it, give its directory"
            )
        raise UserError(f"{encoder} does not exist, though modules.json names it: it is to hold the encoder")
    check_regular_inside(encoder)
    return str(encoder)


def with_sentences(network: Network, files: SentenceFiles) -> Network:
    """``network`` with the sentence embeddings that its files say it makes; UserError where it cannot."""
    if not isinstance(network.preprocessing, TextPreprocessing) or FEATURES not in network.outputs:
        raise UserError(
            f"modules.json makes sentence embeddings of texts, {network.source.name} takes "
            f"{', '.join(network.inputs)} and gives {', '.join(network.outputs)}: no {FEATURES} of tokens"
        )
    sentences = sentences_of(files, network.preprocessing.tokenizer)
    try:
        with torch.inference_mode():
            replace(network, sentences=sentences).with_pooling().forward(network.inputs)
    except RuntimeError as error:
        raise UserError(f"modules.json does not fit {network.source.name}: {reason(error)}") from error
    return replace(network, sentences=sentences)


def _transformers_config(model: str) -> object:
    if Path(model).is_dir() and not Path(model, "config.json").is_file():
        raise UserError(f"{model} is a directory without config.json (transformers) and without optin.json (our own)")
    try:
        with cached_if_unreachable(model):
            return transformers_models.read_config(model)
    except (OSError, *UNFIT) as error:
        if Path(model).is_dir():
            raise UserError(f"{Path(model, 'config.json')} cannot be used: {reason(error)}") from error
        if Path(model).is_file():
            told = file_told(Path(model))
            raise UserError(
                told
                or f"--model {model} is a file: name the model that its weights are of, as in --model deit_small "
                f"--weights {model}, or give a directory"
            ) from error
        near = difflib.get_close_matches(model, timm_models.short_names(), n=3, cutoff=0.6)
        hint = f"did you mean {', '.join(near)}?" if near else "`optin-deploy models` lists what is supported"
        raise UserError(
            f"unknown model {model!r}: no timm model, no local directory, and no transformers model that can be "
            f"fetched or found in the cache; {hint}"
        ) from error


def _initialised(source: Source, weights: str, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = initialised(source)
    if weights == "random":
        return ready(source, module)
    if source.library != "transformers":
        load_weights(module, named(weights))
        return ready(source, module)
    module = transformers_models.without_pooler(module)
    load_weights(
        module,
        named(weights),
        namings=transformers_models.file_names(module),
        unused=transformers_models.unused_names(module),
    )
    return ready(source, module)
