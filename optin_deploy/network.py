"""The value that every stage works on: a module with its inputs, its outputs, and how to build it again."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from numpy.typing import NDArray
from torch import Tensor, nn

from optin_deploy.errors import UserError
from optin_deploy.nn.batches import Batch
from optin_deploy.nn.outputs import named_outputs
from optin_deploy.nn.sentence_embeddings import EMBEDDING, FEATURES, SentenceHead, Sentences
from optin_deploy.nn.task_head import HeadKind

Library = Literal["timm", "transformers", "custom"]


class Preprocessing(Protocol):
    """Makes a batch of inputs from samples: images, texts or pairs of texts."""

    def __call__(self, samples: Sequence[Any], /) -> dict[str, Tensor]:
        """Return the inputs by name; the first axis is the sample."""


@dataclass(frozen=True)
class Source:
    """How to build the dense module.

    timm: ``timm.create_model(name, **arguments)``. transformers: the class ``name`` with the configuration
    ``arguments``. A ``custom`` module can only be built by its owner.
    """

    library: Library
    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Origin:
    """Where a network came from, for the model card and files of the pruned one.

    Attributes:
        base_model: its id on the Hugging Face hub, if its weights are from there.
        license: as its model card or timm states it.
        files: name -> content of files to copy next to the weights: configurations of processors, and of tokenizers
            that no preprocessing holds.
    """

    base_model: str | None = None
    license: str | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Network:
    """A module with sample inputs and the names of its outputs.

    Attributes:
        module: takes ``inputs`` as keyword arguments; in eval mode.
        inputs: a sample batch; the first axis of every tensor is the batch.
        outputs: name of each output, in order -> its key in `named_outputs` of the module's output.
        source: how the dense module is built.
        weights: "pretrained", "random", or where the weights came from.
        sequence_inputs: inputs whose second axis is a sequence of any length.
        token_mask: the input that is 0 at padding tokens, if there is one.
        logits: the output with the logits of a task head, if there is one; scores then have a task term.
        head: what the numbers in that output mean (see `task_head`).
        class_names: the names of each class in timm's files, in the order of class numbers: a label, perhaps a
            description. Networks of transformers have names in their configuration.
        preprocessing: makes inputs from images or texts (see ``data.preprocessing``).
        origin: see `Origin`.
        notes: what was changed or left out when the module was adopted, one sentence each.
        sentences: how sentence embeddings are made from the network's token features, if its files say so.
    """

    module: nn.Module
    inputs: Batch
    outputs: Mapping[str, str]
    source: Source
    weights: str
    sequence_inputs: tuple[str, ...] = ()
    token_mask: str | None = None
    logits: str | None = None
    head: HeadKind = "classes"
    class_names: tuple[tuple[str, ...], ...] = ()
    preprocessing: Preprocessing | None = None
    origin: Origin = field(default_factory=Origin)
    notes: tuple[str, ...] = ()
    sentences: Sentences | None = None

    def __repr__(self) -> str:
        parameters = sum(p.numel() for p in self.module.parameters())
        inputs = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in self.inputs.items())
        return (
            f"<Network {self.source.name} ({self.source.library}, weights: {self.weights}): {inputs} -> "
            f"{', '.join(self.outputs)}; {parameters:,} parameters>"
        )

    def with_module(self, module: nn.Module) -> "Network":
        """Return the same network around another (pruned) module."""
        return replace(self, module=module)

    def forward(self, batch: Batch, module: nn.Module | None = None) -> dict[str, Tensor]:
        """Return the outputs by name for ``batch``, of this network or of ``module`` in its place.

        Raises:
            UserError: the module does not return an output that it returned for the sample inputs.
        """
        output = (module or self.module)(**batch)
        head, mask = self._pooling_head, None
        if head is not None:
            head = copy.deepcopy(head).to(next(iter(batch.values())).device)
            mask = batch[self.token_mask] if self.token_mask else None
        return dict(zip(self.outputs, _select_outputs(output, self.outputs.values(), head, mask), strict=True))

    @property
    def pools(self) -> bool:
        """Whether an output is sentence embeddings, pooled from the module's token features."""
        return self.sentences is not None and EMBEDDING in self.outputs

    @property
    def _pooling_head(self) -> SentenceHead | None:
        return self.sentences.head if self.sentences is not None and self.pools else None

    def with_pooling(self) -> "Network":
        """Return the same network with sentence embeddings as its output; the default pooling is the mean of tokens.

        Raises:
            UserError: the network has no token features.
        """
        if FEATURES not in self.outputs:
            raise UserError(
                f"{self.source.name} returns {', '.join(self.outputs)}, no token features ({FEATURES}): sentence "
                "embeddings cannot be pooled"
            )
        sentences = self.sentences or Sentences()
        return replace(self, outputs={EMBEDDING: EMBEDDING}, sentences=sentences)

    def tensor_outputs(self, module: nn.Module | None = None) -> "TensorOutputs":
        """Return the network, or ``module`` in its place, as a module whose output is a tuple of tensors."""
        return TensorOutputs(module or self.module, self.outputs, self._pooling_head, self.token_mask)

    def valid_tokens(self, batch: Batch) -> Tensor | None:
        """Return a bool tensor ``(batch, tokens)``, False at padding; None if the network has no token mask."""
        return batch[self.token_mask].bool() if self.token_mask else None

    def sample_arrays(self) -> dict[str, NDArray[Any]]:
        """Return the first sample input as NumPy arrays ``(1, ...)`` by name, for runtimes."""
        return {name: tensor[:1].numpy(force=True) for name, tensor in self.inputs.items()}

    @property
    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Input name -> axis -> "batch", "sequence", or "decoder_sequence" for inputs of a decoder."""
        axes: dict[str, dict[int, str]] = {name: {0: "batch"} for name in self.inputs}
        for name in self.sequence_inputs:
            axes[name][1] = "decoder_sequence" if name.startswith("decoder_") else "sequence"
        return axes


class TensorOutputs(nn.Module):
    """A module that returns a tuple of tensors, for exporters, around a module with any output.

    With a ``head``, one of the outputs is sentence embeddings.
    """

    def __init__(
        self,
        module: nn.Module,
        outputs: Mapping[str, str],
        head: SentenceHead | None = None,
        token_mask: str | None = None,
    ) -> None:
        super().__init__()
        self.module = module
        self.keys = tuple(outputs.values())
        self.head = copy.deepcopy(head)
        self.token_mask = token_mask

    def forward(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        mask = inputs[self.token_mask] if self.head is not None and self.token_mask else None
        return _select_outputs(self.module(**inputs), self.keys, self.head, mask)


def _select_outputs(
    output: object, keys: Iterable[str], head: SentenceHead | None, mask: Tensor | None
) -> tuple[Tensor, ...]:
    """Return the tensors with these keys in a module's output, pooled by ``head`` where it does not pool itself."""
    tensors = named_outputs(output)
    try:
        if head is not None and EMBEDDING not in tensors:
            tensors[EMBEDDING] = head(tensors[FEATURES], mask)
        return tuple(tensors[key] for key in keys)
    except KeyError as error:
        raise UserError(f"the network returns no {error.args[0]} for this batch, as it did for the sample") from error
