"""A network as the product sees it: a module, what goes in, what comes out, and how to build it again."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from optin_deploy.errors import UserError
from optin_deploy.structure.intake import prunable_form
from optin_deploy.task_head import HeadKind, head_of

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
        preprocessing: what makes inputs out of images or texts (see ``calibration``).
        origin: see `Origin`.
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
    preprocessing: Any = None
    origin: Origin = field(default_factory=Origin)

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
        given = named_outputs((module or self.module)(**batch))
        return {name: given[key] for name, key in self.outputs.items()}

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
    """A module that gives a tuple of tensors, as exporters want it, around one that gives anything."""

    def __init__(self, module: nn.Module, outputs: Mapping[str, str]) -> None:
        super().__init__()
        self.module = module
        self.keys = tuple(outputs.values())

    def forward(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        given = named_outputs(self.module(**inputs))
        return tuple(given[key] for key in self.keys)


def named_outputs(output: Any) -> dict[str, Tensor]:
    """The tensors of a module's output by name: a tensor is ``output``, tuples number it, mappings keep their keys."""
    if isinstance(output, Tensor):
        return {"output": output}
    if isinstance(output, Mapping):
        return {str(k): v for k, v in output.items() if isinstance(v, Tensor)}
    if isinstance(output, tuple | list):
        return {f"output_{i}": v for i, v in enumerate(output) if isinstance(v, Tensor)}
    raise UserError(f"the network gives a {type(output).__name__}; a tensor, a tuple or a mapping of tensors is needed")


def custom_network(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    *,
    logits: str | None = None,
    head: HeadKind | None = None,
    preprocessing: Any = None,
) -> Network:
    """A `Network` around the user's own module, which is put in eval mode: adapters are merged in a copy.

    Args:
        inputs: a sample batch by forward's argument names, first axis the batch.
        logits: name of the output with the task head's logits ("output" when the module gives one tensor), if there
            is one.
        head: what these mean: "classes" (one of several), "binary" (a yes or no for every number: one logit, or
            several labels) or "regression" (plain numbers). None takes "binary" for a single class, else "classes".
        preprocessing: an ``ImagePreprocessing`` or ``TextPreprocessing`` to calibrate and evaluate on files.
    """
    module = prunable_form(module.eval())
    with torch.inference_mode():
        outputs = named_outputs(module(**inputs))
    if logits is not None and logits not in outputs:
        raise UserError(f"there is no output {logits!r}; the network gives {', '.join(outputs)}")
    if logits is None and head is not None:
        raise UserError(f"head={head!r} says what logits mean: name that output with logits=")
    source = Source("custom", f"{type(module).__module__}.{type(module).__qualname__}")
    return Network(
        module,
        dict(inputs),
        {name: name for name in outputs},
        source,
        "user",
        logits=logits,
        head="classes" if logits is None else head_of(outputs[logits], head),
        preprocessing=preprocessing,
    )
