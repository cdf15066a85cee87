"""A network as the product sees it: a module, what goes in, what comes out, and how to build it again."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor, nn

from optin_deploy.errors import UserError
from optin_deploy.nn.outputs import named_outputs
from optin_deploy.nn.sentence_embeddings import EMBEDDING, FEATURES, SentenceHead, Sentences
from optin_deploy.nn.task_head import HeadKind

Library = Literal["timm", "transformers", "custom"]


@dataclass(frozen=True)
class Source:
    """How to build the dense module: ``timm.create_model(name, **arguments)``, or the transformers class ``name`` with
    the configuration ``arguments``. A ``custom`` module can be built by its owner only."""

    library: Library
    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Origin:
    """What is known of where a network came from, for what is published of it.

    Attributes:
        base_model: its id on the Hugging Face hub, where its weights are from there.
        license: as its model card or timm says it.
        files: name -> content of what goes with the weights: configurations of processors, and of tokenizers that no
            preprocessing holds.
    """

    base_model: str | None = None
    license: str | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Network:
    """A module with sample inputs and the names of its outputs.

    Attributes:
        module: takes ``inputs`` as keyword arguments; in eval mode.
        inputs: a sample batch; every tensor's first axis is the batch.
        outputs: name of each output, in order -> what the module calls it (see `named_outputs`).
        source: how the dense module is built.
        weights: "pretrained", "random", or where they came from.
        sequence_inputs: inputs whose second axis is a sequence of any length.
        token_mask: the input that is 0 at padding tokens, if there is one.
        logits: the output that holds the logits of a task head, if there is one; scores then have a task term.
        head: what the numbers of that output mean (see `task_head`).
        class_names: what timm's files call each class, in the order of class numbers: a name, perhaps a description.
            Networks of transformers have names in their configuration.
        preprocessing: what makes inputs out of images or texts (see ``calibration``).
        origin: see `Origin`.
        notes: what was put right or left out when the network was taken in, a sentence each.
        sentences: how sentence embeddings are made of the network's token features, where its files say so.
    """

    module: nn.Module
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, str]
    source: Source
    weights: str
    sequence_inputs: tuple[str, ...] = ()
    token_mask: str | None = None
    logits: str | None = None
    head: HeadKind = "classes"
    class_names: tuple[tuple[str, ...], ...] = ()
    preprocessing: Any = None
    origin: Origin = field(default_factory=Origin)
    notes: tuple[str, ...] = ()
    sentences: Sentences | None = None

    def __repr__(self) -> str:
        parameters = sum(p.numel() for p in self.module.parameters())
        given = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in self.inputs.items())
        return (
            f"<Network {self.source.name} ({self.source.library}, weights: {self.weights}): {given} -> "
            f"{', '.join(self.outputs)}; {parameters:,} parameters>"
        )

    def with_module(self, module: nn.Module) -> "Network":
        """The same network around another (pruned) module."""
        return replace(self, module=module)

    def forward(self, batch: Mapping[str, Tensor], module: nn.Module | None = None) -> dict[str, Tensor]:
        """Outputs by name for a batch of inputs, of this network or of another ``module`` in its place."""
        output = (module or self.module)(**batch)
        if not self.pools:
            return dict(zip(self.outputs, _of_keys(output, self.outputs.values()), strict=True))
        assert self.sentences is not None
        given = named_outputs(output)
        if EMBEDDING not in given:
            features = given[FEATURES]
            head = copy.deepcopy(self.sentences.head).to(features.device)
            given[EMBEDDING] = head(features, batch[self.token_mask] if self.token_mask else None)
        return {name: given[key] for name, key in self.outputs.items()}

    @property
    def pools(self) -> bool:
        """Whether the output is sentence embeddings, pooled behind the module."""
        return self.sentences is not None and EMBEDDING in self.outputs

    def with_pooling(self) -> "Network":
        """The same network with sentence embeddings for its output; token features that nothing is said of are pooled
        to their mean.

        Raises:
            UserError: it gives no token features.
        """
        if FEATURES not in self.outputs:
            raise UserError(
                f"{self.source.name} gives {', '.join(self.outputs)}, no token features ({FEATURES}): there is nothing "
                "to pool to sentence embeddings"
            )
        sentences = self.sentences or Sentences()
        return replace(self, outputs={EMBEDDING: EMBEDDING}, sentences=sentences)

    def tensor_outputs(self, module: nn.Module | None = None) -> "TensorOutputs":
        """The network as exporters want it, or another ``module`` in its place."""
        head = self.sentences.head if self.sentences is not None and self.pools else None
        return TensorOutputs(module or self.module, self.outputs, head, self.token_mask)

    def valid_tokens(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """Bool ``(batch, tokens)``, False at padding; None where every token counts."""
        return batch[self.token_mask].bool() if self.token_mask else None

    @property
    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Input name -> axis -> "batch" or "sequence", of what a decoder takes "decoder_sequence"."""
        axes: dict[str, dict[int, str]] = {name: {0: "batch"} for name in self.inputs}
        for name in self.sequence_inputs:
            axes[name][1] = "decoder_sequence" if name.startswith("decoder_") else "sequence"
        return axes


class TensorOutputs(nn.Module):
    """A module that gives a tuple of tensors, as exporters want it, around one that gives anything.

    With a ``head``, sentence embeddings are one of the outputs.
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
        output = self.module(**inputs)
        if self.head is None:
            return _of_keys(output, self.keys)
        given = named_outputs(output)
        given[EMBEDDING] = self.head(given[FEATURES], inputs[self.token_mask] if self.token_mask else None)
        return tuple(given[key] for key in self.keys)


def _of_keys(output: Any, keys: Iterable[str]) -> tuple[Tensor, ...]:
    """The tensors of these names, of what a module gives; UserError where one is missing."""
    given = named_outputs(output)
    try:
        return tuple(given[key] for key in keys)
    except KeyError as error:
        raise UserError(f"the network gives no {error.args[0]} for this batch, as it did for the sample") from error
