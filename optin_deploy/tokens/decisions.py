"""Parity of files below float32 whose tokens merge: torch merges the tokens that the file merged.

Rounding to half precision or 8 bits changes similarities by more than many of them differ, so the file may merge other
tokens than torch. That is not an error. The file's graph has named outputs for its choices. The parity gate reads them,
lets torch merge the same tokens in float32, and compares the outputs with the usual tolerance. Rounding must explain a
choice: no similarity may be off by more than the tolerance.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from exporters import Alternatives, Precision
from optin_deploy.network import Network
from optin_deploy.tokens.choices import Choice, regret
from optin_deploy.tokens.merging import MergingBlocks, merging_names, with_blocks_of

_EXACT: tuple[Precision, ...] = ("fp32", "tf32")


def decision_names(network: Network, precision: Precision) -> tuple[str, ...]:
    """Return the names of a file's choices in ``precision``, two for each merge; none in float32."""
    if precision in _EXACT:
        return ()
    return tuple(name for step in _steps(network.module) for name in _names(*step))


def _steps(module: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield the blocks before which tokens merge, in order: the name of their list and the index in it."""
    for name in merging_names(module):
        blocks = module.get_submodule(name)
        assert isinstance(blocks, MergingBlocks)
        for index in blocks.merging_indices:
            yield name, index


def _names(blocks: str, index: int) -> tuple[str, str]:
    return f"{blocks}.{index}.merging.leaves", f"{blocks}.{index}.merging.nearest"


class _Record:
    """Choices in the order they were made. Not a list, in which torch.export would look for tensors."""

    def __init__(self) -> None:
        self.choices: list[Choice] = []


class RecordingBlocks(MergingBlocks):
    """Merging blocks that record their choices."""

    record: _Record

    def choose(self, index: int, similarity: Tensor, count: int, real: Tensor | None = None) -> Choice:
        choice = super().choose(index, similarity, count, real)
        self.record.choices.append(choice)
        return choice


class WithDecisions(nn.Module):
    """A network with the values of `decision_names` after its own outputs."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.record = _Record()
        module = with_blocks_of(network.module, RecordingBlocks)
        for part in module.modules():
            if isinstance(part, RecordingBlocks):
                part.record = self.record
        self.network = network.tensor_outputs(module)

    def forward(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        self.record.choices.clear()
        outputs = self.network(**inputs)
        decided = [value for choice in self.record.choices for value in (choice.leaves, choice.nearest)]
        self.record.choices.clear()
        return (*outputs, *decided)


class DictatedBlocks(MergingBlocks):
    """Merging blocks that follow the choices ``given``, by index; record how much worse these are."""

    given: dict[int, Choice]
    regrets: list[float]

    def choose(self, index: int, similarity: Tensor, count: int, real: Tensor | None = None) -> Choice:
        own, given = super().choose(index, similarity, count, real), self.given[index]
        if given.leaves.shape != own.leaves.shape:
            self.regrets.append(torch.inf)
            return own
        worst = float(regret(similarity, count, given, real).max())
        self.regrets.append(worst)
        return own if worst == torch.inf else given


def follow_decisions(network: Network, tolerance: float) -> Alternatives:
    """Return alternatives for `exporters.check_parity`: outputs of one sample with the file's choices.

    If a similarity is off by more than ``tolerance``, the outputs with the network's own choices.
    """
    dictated = with_blocks_of(network.module, DictatedBlocks)
    module, plain = network.tensor_outputs(dictated), network.tensor_outputs()

    def outputs_of(sample: Mapping[str, Tensor], decided: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        regrets: list[float] = []
        for name in merging_names(dictated):
            blocks = dictated.get_submodule(name)
            assert isinstance(blocks, DictatedBlocks)
            choices = {index: tuple(decided[n] for n in _names(name, index)) for index in blocks.merging_indices}
            blocks.given, blocks.regrets = {index: Choice(*values) for index, values in choices.items()}, regrets
        outputs = module(**sample)
        # A choice compares two similarities, and both may be off.
        return outputs if max(regrets) <= 2 * tolerance else plain(**sample)

    return outputs_of
