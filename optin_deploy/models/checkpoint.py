"""Pruned networks on disk: safetensors, and a JSON file from which the network is built. Nothing is unpickled.

optin.json           format version, source, units kept per group and tokens per block, preprocessing, shapes of sample
                     inputs, versions
model.safetensors    the sliced weights

Networks of transformers also have files that `save_pretrained` writes next to weights:

config.json, generation_config.json     of the dense network; `AutoModel.from_pretrained` refuses the weights
tokenizer*, preprocessor_config.json    the preprocessing of texts and images
modules.json, 1_Pooling/ …              of sentence-transformers: how sentence embeddings are made
README.md                               a model card, which a run writes at its end
"""

import importlib.metadata
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from safetensors.torch import load_file
from torch import Tensor, nn

from optin_deploy.data.preprocessing import ImagePreprocessing, ProcessorPreprocessing, TextPreprocessing
from optin_deploy.errors import UserError, one_line
from optin_deploy.models import transformers_models
from optin_deploy.models.hub import PROCESSOR_FILES, TOKENIZER_FILES, read_origin
from optin_deploy.models.libraries import LIBRARY_ERRORS, build
from optin_deploy.models.sentence_files import build_sentences, read_sentence_files
from optin_deploy.models.transformers_images import read_processor
from optin_deploy.models.transformers_inputs import TEXT_INPUT, end_of_text
from optin_deploy.models.transformers_models import read_tokenizer
from optin_deploy.models.validation.inputs import MOST_VALUES
from optin_deploy.network import Network, Preprocessing, Source
from optin_deploy.nn.batches import Batch, dtype_name
from optin_deploy.nn.outputs import named_outputs
from optin_deploy.nn.sentence_embeddings import Sentences
from optin_deploy.nn.task_head import HeadKind, head_of
from optin_deploy.structure.canonicalize import canonicalize
from optin_deploy.structure.describe import describe
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import slice_network
from optin_deploy.tokens.find_stack import token_stack
from optin_deploy.tokens.merging import with_merging
from optin_deploy.utils.atomic_files import atomic_directory, write_tensors
from optin_deploy.utils.paths import require_regular

logger = logging.getLogger(__name__)

JSON_NAME = "optin.json"
WEIGHTS_NAME = "model.safetensors"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


R = TypeVar("R", bound=_Strict)
_Positive = Annotated[float, Field(gt=0)]
_Size = Annotated[int, Field(ge=1, le=1 << 16)]


class _Source(_Strict):
    library: Literal["timm", "transformers", "custom"]
    name: str
    arguments: dict[str, Any]


class _Image(_Strict):
    input_name: str
    size: tuple[_Size, _Size]
    mean: tuple[float, float, float] | tuple[float]
    std: tuple[_Positive, _Positive, _Positive] | tuple[_Positive]
    interpolation: Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]
    crop_pct: Annotated[float, Field(gt=0, le=8)]
    crop_mode: Literal["center", "squash", "border"]
    assumed: bool = False

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if len(self.mean) != len(self.std):
            raise ValueError(f"{len(self.mean)} values in mean, {len(self.std)} in std")
        return self


class _Processor(_Strict):
    input_name: str
    channels: Annotated[int, Field(ge=1, le=1 << 10)]
    size: tuple[_Size, _Size]
    fixed: bool
    masks: tuple[str, ...] = ()


class _Text(_Strict):
    input_names: tuple[str, ...]
    max_length: Annotated[int, Field(ge=1)]
    decoder_start: int | None = None
    prompt: str = ""
    lower_case: bool = False


class _Input(_Strict):
    shape: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    dtype: Literal["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]


class _Description(_Strict):
    format: Literal[1]
    source: _Source
    kept: dict[str, tuple[int, ...]]
    tokens: tuple[int, ...] = ()
    weights: str
    inputs: dict[str, _Input]
    outputs: dict[str, str]
    sequence_inputs: tuple[str, ...]
    token_mask: str | None
    logits: str | None
    class_names: tuple[tuple[str, ...], ...] = ()
    # Early versions had no such field; all logits were of classes.
    head: HeadKind | None = None
    image: _Image | None = None
    processor: _Processor | None = None
    text: _Text | None = None
    sentences: bool = False
    versions: dict[str, str]

    @field_validator("inputs")
    @classmethod
    def _check_size(cls, inputs: dict[str, _Input]) -> dict[str, _Input]:
        if sum(math.prod(sample.shape) for sample in inputs.values()) > MOST_VALUES:
            raise ValueError(f"sample inputs have more than {MOST_VALUES} values")
        return inputs

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        image = tuple(pre.input_name for pre in (self.image, self.processor) if pre)
        mask = (self.token_mask,) if self.token_mask else ()
        for name in (*self.sequence_inputs, *mask, *image, *(self.text.input_names if self.text else ())):
            if name not in self.inputs:
                raise ValueError(f"there is no input {name!r}")
        if not self.outputs or (self.logits is not None and self.logits not in self.outputs):
            raise ValueError(f"there is no output {self.logits!r}")
        return self


def is_checkpoint(path: str | Path) -> bool:
    """Whether ``path`` is a directory that `save` wrote."""
    return Path(path, JSON_NAME).is_file()


def save(network: Network, plan: Plan, path: Path) -> None:
    """Write ``network``, whose module is already sliced, to the new directory ``path``.

    The directory appears complete or not at all.

    Args:
        plan: by which the module is sliced, in the dense network's indices.

    Raises:
        UserError: ``path`` exists.
    """
    preprocessing = network.preprocessing
    description = _Description(
        format=1,
        source=_Source(
            library=network.source.library, name=network.source.name, arguments=dict(network.source.arguments)
        ),
        kept=dict(plan.kept),
        tokens=plan.tokens,
        weights=network.weights,
        inputs={
            name: _Input.model_validate({"shape": tuple(tensor.shape), "dtype": dtype_name(tensor.dtype)})
            for name, tensor in network.inputs.items()
        },
        outputs=dict(network.outputs),
        sequence_inputs=network.sequence_inputs,
        token_mask=network.token_mask,
        logits=network.logits,
        class_names=network.class_names,
        head=network.head if network.logits is not None else None,
        image=_record(_Image, preprocessing) if isinstance(preprocessing, ImagePreprocessing) else None,
        processor=_record(_Processor, preprocessing) if isinstance(preprocessing, ProcessorPreprocessing) else None,
        text=_record(_Text, preprocessing) if isinstance(preprocessing, TextPreprocessing) else None,
        sentences=network.sentences is not None and not network.sentences.is_default,
        versions={name: importlib.metadata.version(name) for name in ("torch", "timm", "transformers")},
    )
    with atomic_directory(path) as directory:
        # Tied parameters are stored under every name, so that any reader finds them.
        state = {name: t.detach().cpu().contiguous().clone() for name, t in network.module.state_dict().items()}
        write_tensors(directory / WEIGHTS_NAME, state)
        if isinstance(preprocessing, TextPreprocessing):
            preprocessing.tokenizer.save_pretrained(directory)
        if isinstance(preprocessing, ProcessorPreprocessing):
            preprocessing.processor.save_pretrained(directory)
        if network.source.library == "transformers":
            transformers_models.write_configs(network.module, network.source, directory)
        for name, content in {**network.origin.files, **(network.sentences.files if network.sentences else {})}.items():
            (directory / name).parent.mkdir(exist_ok=True, parents=True)
            (directory / name).write_bytes(content)
        (directory / JSON_NAME).write_text(description.model_dump_json(indent=1), encoding="utf-8")


def load(path: str | Path, module: nn.Module | None = None) -> nn.Module:
    """Return the pruned network at ``path`` as a plain module, on the CPU, in eval mode.

    Args:
        module: the dense module, for a checkpoint of a module of your own; it is not changed.

    Raises:
        UserError: there is no checkpoint, it is damaged, or ``module`` is missing or does not fit.
    """
    return _load(Path(path), module)[0]


def load_network(path: Path, module: nn.Module | None = None) -> Network:
    """Return the same as `load`, with inputs, outputs and preprocessing; ``weights`` is "checkpoint PATH"."""
    small, description = _load(path, module)
    inputs = _sample_inputs(description)
    # A text network's tokenizer is part of its preprocessing.
    has_files = description.source.library == "transformers" and description.text is None
    preprocessing = _preprocessing(description, path)
    return Network(
        module=small,
        inputs=inputs,
        outputs=description.outputs,
        source=_source(description),
        weights="random" if description.weights == "random" else f"checkpoint {path}",
        sequence_inputs=description.sequence_inputs,
        token_mask=description.token_mask,
        logits=description.logits,
        class_names=description.class_names,
        head=_head(description, small, inputs),
        preprocessing=preprocessing,
        sentences=_sentences(path, preprocessing) if description.sentences else None,
        origin=read_origin(str(path), PROCESSOR_FILES + TOKENIZER_FILES if has_files else ()),
    )


def read_plan(path: Path) -> Plan:
    """Return the plan of the checkpoint at ``path``, in the dense network's indices."""
    description = _read(path)
    return Plan(description.kept, description.tokens)


def _read(path: Path) -> _Description:
    if not is_checkpoint(path):
        raise UserError(f"{path} is not a checkpoint of optin-deploy: it has no {JSON_NAME}")
    try:
        return _Description.model_validate_json(require_regular(path / JSON_NAME).read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path / JSON_NAME} is damaged or of another version: {where}: {first['msg']}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path / JSON_NAME} cannot be read: {one_line(error)}") from error


def _load(path: Path, module: nn.Module | None) -> tuple[nn.Module, _Description]:
    description = _read(path)
    try:
        dense = canonicalize(build(_source(description)) if module is None else module)
        inputs, plan = _sample_inputs(description), Plan(description.kept, description.tokens)
        # Tied units were found when the plan was made. Here only the number of units matters: weights are read below.
        structure = describe(dense, inputs).without_tuples()
        small = slice_network(dense, structure, plan)
        if plan.tokens:
            with_merging(small, structure, token_stack(dense, inputs, structure, description.token_mask), plan)
    except UserError as error:
        raise UserError(f"checkpoint {path}: {error}") from error
    except LIBRARY_ERRORS as error:
        raise UserError(f"checkpoint {path} does not fit {description.source.name}: {one_line(error)}") from error
    load_weights(small, path)
    transformers_models.read_generation(small, path)
    # Some attentions cache tensors computed from their weights before loading; train mode clears them.
    return small.train().eval(), description


def load_weights(small: nn.Module, path: Path) -> None:
    """Load the weights of the checkpoint at ``path`` into a module sliced by its plan; UserError if they do not fit."""
    try:
        state = load_file(require_regular(path / WEIGHTS_NAME))
        check_kinds(small, state, path / WEIGHTS_NAME)
        small.load_state_dict(state)
    except (OSError, *LIBRARY_ERRORS) as error:
        raise UserError(f"{path / WEIGHTS_NAME} is damaged or belongs to another network: {one_line(error)}") from error


def check_kinds(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Raise UserError if a tensor in ``state`` is an integer where ``module`` has a float, or the reverse."""
    for name, own in module.state_dict().items():
        dtype = state.get(name, own).dtype
        if dtype.is_floating_point != own.is_floating_point():
            raise UserError(f"{path}: {name} holds {dtype_name(dtype)}, the network takes {dtype_name(own.dtype)}")


def _source(description: _Description) -> Source:
    return Source(description.source.library, description.source.name, description.source.arguments)


def _sample_inputs(description: _Description) -> Batch:
    """Return sample inputs of the recorded shapes: noise for floats, ones for integers, the end token last in texts."""
    generator = torch.Generator().manual_seed(0)
    inputs = {
        name: torch.randn(sample.shape, generator=generator).to(getattr(torch, sample.dtype))
        if "float" in sample.dtype
        else torch.ones(sample.shape, dtype=getattr(torch, sample.dtype))
        for name, sample in description.inputs.items()
    }
    if description.source.library == "transformers" and TEXT_INPUT in inputs:
        inputs[TEXT_INPUT] = end_of_text(inputs[TEXT_INPUT], description.source.arguments)
    return inputs


def _head(description: _Description, module: nn.Module, inputs: Batch) -> HeadKind:
    """Return what the logits mean: the recorded kind, or else the default for the network."""
    if description.logits is None:
        return "classes"
    with torch.no_grad():
        logits = named_outputs(module(**inputs)).get(description.outputs[description.logits])
    if logits is None:
        # A missing output is reported where outputs are computed.
        return description.head or "classes"
    if description.head is None and description.source.library == "transformers":
        return transformers_models.head_kind(module, logits)
    try:
        return head_of(logits, description.head)
    except UserError as error:
        raise UserError(f"{JSON_NAME} of {description.source.name}: {error}") from error


def _record(record: type[R], preprocessing: Preprocessing) -> R:
    """Return the fields of ``preprocessing`` that ``record`` has."""
    return record(**{name: getattr(preprocessing, name) for name in record.model_fields})


def _preprocessing(description: _Description, path: Path) -> Preprocessing | None:
    if description.image:
        if description.source.library == "transformers" and not description.image.assumed:
            logger.warning(
                "%s is of an earlier version, which did not use the model's own image processor: prune the model again "
                "for accuracies of its own pipeline",
                path,
            )
        return ImagePreprocessing(**description.image.model_dump())
    if description.processor:
        return ProcessorPreprocessing(_processor(path), **description.processor.model_dump())
    if description.text:
        text = description.text
        return TextPreprocessing(read_tokenizer(str(path)), **text.model_dump())
    return None


def _processor(path: Path) -> Any:
    try:
        return read_processor(str(path))
    except (OSError, *LIBRARY_ERRORS) as error:
        raise UserError(f"the image processor in {path} cannot be read: {one_line(error)}") from error


def _sentences(path: Path, preprocessing: Preprocessing | None) -> Sentences:
    """Return how the checkpoint at ``path`` makes sentence embeddings; UserError if the files are missing."""
    files = read_sentence_files(str(path))
    if files is None or not files.embeds or not isinstance(preprocessing, TextPreprocessing):
        raise UserError(
            f"checkpoint {path} is damaged: modules.json, which states how sentences are embedded, is missing"
        )
    return build_sentences(files, preprocessing.tokenizer)
