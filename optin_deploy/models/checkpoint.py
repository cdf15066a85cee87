"""Pruned networks on disk: safetensors, and one JSON that says how to build the network again. Nothing is unpickled.

optin.json           format version, source, units kept per group and tokens per block, preprocessing, sample inputs'
                     shapes, versions
model.safetensors    the sliced weights

Networks of transformers have more of what `save_pretrained` writes beside weights:

config.json, generation_config.json     of the dense network; `AutoModel.from_pretrained` refuses the weights
tokenizer*, preprocessor_config.json    what makes inputs out of texts and images
modules.json, 1_Pooling/ …              of sentence-transformers: how sentence embeddings are made; these are read
README.md                               a model card, which a run writes at its end
"""

import importlib.metadata
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from safetensors.torch import load_file
from torch import Tensor, nn

from optin_deploy.data.preprocessing import ImagePreprocessing, Preprocessing, ProcessorPreprocessing, TextPreprocessing
from optin_deploy.errors import UserError
from optin_deploy.models import transformers_models
from optin_deploy.models.hub import PROCESSOR_FILES, TOKENIZER_FILES, read_origin
from optin_deploy.models.intake.inputs import MOST_VALUES
from optin_deploy.models.libraries import UNFIT, build, reason
from optin_deploy.models.sentence_files import read_sentence_files, sentences_of
from optin_deploy.models.transformers_images import read_processor
from optin_deploy.models.transformers_inputs import TEXT_INPUT, end_of_text
from optin_deploy.models.transformers_models import read_tokenizer
from optin_deploy.network import Network, Source
from optin_deploy.nn.outputs import named_outputs
from optin_deploy.nn.sentence_embeddings import Sentences
from optin_deploy.nn.task_head import HeadKind, head_of
from optin_deploy.structure.canonicalize import prunable_form
from optin_deploy.structure.describe import describe
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import sliced
from optin_deploy.tokens.find_stack import token_stack
from optin_deploy.tokens.merging import with_merging
from optin_deploy.utils.atomic_files import whole_directory, write_tensors
from optin_deploy.utils.paths import regular

logger = logging.getLogger(__name__)

JSON_NAME = "optin.json"
WEIGHTS_NAME = "model.safetensors"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


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
    def _as_many(self) -> Self:
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
    # Absent from checkpoints of versions that took all logits for those of classes.
    head: HeadKind | None = None
    image: _Image | None = None
    processor: _Processor | None = None
    text: _Text | None = None
    sentences: bool = False
    versions: dict[str, str]

    @field_validator("inputs")
    @classmethod
    def _small(cls, given: dict[str, _Input]) -> dict[str, _Input]:
        if sum(math.prod(each.shape) for each in given.values()) > MOST_VALUES:
            raise ValueError(f"sample inputs of more than {MOST_VALUES} values are none of a checkpoint")
        return given

    @model_validator(mode="after")
    def _names(self) -> Self:
        image = tuple(each.input_name for each in (self.image, self.processor) if each)
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
    """Write ``network``, whose module is already sliced by ``plan`` (in the dense network's indices), to ``path``.

    The directory appears whole or not at all. Raises UserError if it exists.
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
        inputs={n: _Input(shape=tuple(t.shape), dtype=_dtype_name(t)) for n, t in network.inputs.items()},
        outputs=dict(network.outputs),
        sequence_inputs=network.sequence_inputs,
        token_mask=network.token_mask,
        logits=network.logits,
        class_names=network.class_names,
        head=network.head if network.logits is not None else None,
        image=_Image(**asdict(preprocessing)) if isinstance(preprocessing, ImagePreprocessing) else None,
        processor=_Processor(
            input_name=preprocessing.input_name,
            channels=preprocessing.channels,
            size=preprocessing.size,
            fixed=preprocessing.fixed,
            masks=preprocessing.masks,
        )
        if isinstance(preprocessing, ProcessorPreprocessing)
        else None,
        text=_Text(
            input_names=preprocessing.input_names,
            max_length=preprocessing.max_length,
            decoder_start=preprocessing.decoder_start,
            prompt=preprocessing.prompt,
            lower_case=preprocessing.lower_case,
        )
        if isinstance(preprocessing, TextPreprocessing)
        else None,
        sentences=network.sentences is not None and not network.sentences.is_default,
        versions={name: importlib.metadata.version(name) for name in ("torch", "timm", "transformers")},
    )
    with whole_directory(path) as directory:
        # Tied parameters are stored once under every name, so that any reader finds them.
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
    """The pruned network at ``path`` as a plain module, on the CPU, in eval mode.

    Args:
        module: the dense module, for a checkpoint of a module of your own; it is not changed.

    Raises:
        UserError: there is no checkpoint, it is damaged, or ``module`` is missing or does not fit.
    """
    return _load(Path(path), module)[0]


def load_network(path: Path, module: nn.Module | None = None) -> Network:
    """Like `load`, with inputs, outputs and preprocessing; its weights are named "checkpoint PATH"."""
    small, description = _load(path, module)
    inputs = _sample_inputs(description)
    # A tokenizer that preprocessing holds is written by itself.
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
    """The plan of the checkpoint at ``path``, in the dense network's indices."""
    description = _read(path)
    return Plan(description.kept, description.tokens)


def _read(path: Path) -> _Description:
    if not is_checkpoint(path):
        raise UserError(f"{path} is not a checkpoint of optin-deploy: it has no {JSON_NAME}")
    try:
        return _Description.model_validate_json(regular(path / JSON_NAME).read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path / JSON_NAME} is damaged or of another version: {where}: {first['msg']}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path / JSON_NAME} cannot be read: {reason(error)}") from error


def _load(path: Path, module: nn.Module | None) -> tuple[nn.Module, _Description]:
    description = _read(path)
    try:
        dense = prunable_form(build(_source(description)) if module is None else module)
        inputs, plan = _sample_inputs(description), Plan(description.kept, description.tokens)
        # Which units leave together was settled when the plan was made. Here only how many stay matters: all weights
        # are read below.
        structure = describe(dense, inputs).without_tuples()
        small = sliced(dense, structure, plan)
        if plan.tokens:
            with_merging(small, structure, token_stack(dense, inputs, structure, description.token_mask), plan)
    except UserError as error:
        raise UserError(f"checkpoint {path}: {error}") from error
    except UNFIT as error:
        raise UserError(f"checkpoint {path} does not fit {description.source.name}: {reason(error)}") from error
    load_weights(small, path)
    transformers_models.read_generation(small, path)
    # Some attentions keep what they have made of their weights, those before loading, until they are in train mode.
    return small.train().eval(), description


def load_weights(small: nn.Module, path: Path) -> None:
    """Load the weights of the checkpoint at ``path`` into a module sliced by its plan; UserError if they do not fit."""
    try:
        state = load_file(regular(path / WEIGHTS_NAME))
        check_kinds(small, state, path / WEIGHTS_NAME)
        small.load_state_dict(state)
    except (OSError, *UNFIT) as error:
        raise UserError(f"{path / WEIGHTS_NAME} is damaged or belongs to another network: {reason(error)}") from error


def check_kinds(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Raise UserError where ``state``, read from ``path``, holds integers for what ``module`` computes in, or such."""
    for name, own in module.state_dict().items():
        given = state.get(name, own)
        if given.is_floating_point() != own.is_floating_point():
            raise UserError(f"{path}: {name} holds {_dtype_name(given)}, the network takes {_dtype_name(own)}")


def _source(description: _Description) -> Source:
    return Source(description.source.library, description.source.name, description.source.arguments)


def _sample_inputs(description: _Description) -> Mapping[str, Tensor]:
    """Sample inputs of the recorded shapes: noise for pictures, ones for masks, and for tokens but the last."""
    generator = torch.Generator().manual_seed(0)
    inputs = {
        name: torch.randn(given.shape, generator=generator).to(getattr(torch, given.dtype))
        if "float" in given.dtype
        else torch.ones(given.shape, dtype=getattr(torch, given.dtype))
        for name, given in description.inputs.items()
    }
    if description.source.library == "transformers" and TEXT_INPUT in inputs:
        inputs[TEXT_INPUT] = end_of_text(inputs[TEXT_INPUT], description.source.arguments)
    return inputs


def _head(description: _Description, module: nn.Module, inputs: Mapping[str, Tensor]) -> HeadKind:
    """What the logits mean: as it was saved, else as it is found for a network that is pruned."""
    if description.logits is None:
        return "classes"
    with torch.no_grad():
        logits = named_outputs(module(**inputs)).get(description.outputs[description.logits])
    if logits is None:
        # What is no output is told where outputs are asked for.
        return description.head or "classes"
    if description.head is None and description.source.library == "transformers":
        return transformers_models.head(module, logits)
    try:
        return head_of(logits, description.head)
    except UserError as error:
        raise UserError(f"{JSON_NAME} of {description.source.name}: {error}") from error


def _dtype_name(tensor: Tensor) -> Any:
    return str(tensor.dtype).removeprefix("torch.")


def _preprocessing(description: _Description, path: Path) -> Preprocessing | None:
    if description.image:
        if description.source.library == "transformers" and not description.image.assumed:
            logger.warning(
                "%s is of an earlier version, which did not prepare pictures by the model's own image processor: prune "
                "the model again for accuracies of its own pipeline",
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
    except (OSError, *UNFIT) as error:
        raise UserError(f"the image processor in {path} cannot be read: {reason(error)}") from error


def _sentences(path: Path, preprocessing: Preprocessing | None) -> Sentences:
    """How the checkpoint at ``path`` makes sentence embeddings; UserError where what says so is gone."""
    files = read_sentence_files(str(path))
    if files is None or not files.embeds or not isinstance(preprocessing, TextPreprocessing):
        raise UserError(
            f"checkpoint {path} is damaged: modules.json, which says how sentences are embedded, is missing"
        )
    return sentences_of(files, preprocessing.tokenizer)
