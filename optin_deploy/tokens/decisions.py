"""What a file below float32 decides of which tokens merge, and what the network gives that decides the same.

Rounding to half precision or 8 bits changes similarities by more than many of them differ, and with them which tokens
merge. That is no fault of the file. Its decisions are values of its graph that have names. The parity gate reads them,
lets torch, in float32, merge the same tokens, and holds the outputs to the tolerance as anywhere else. A decision has
to be one that rounding can explain: no similarity may be off by more than the tolerance, as no output may.
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
    """Of the values that a file in ``precision`` decides by, two for each time that tokens merge; none in float32."""
    if precision in _EXACT:
        return ()
    return tuple(name for step in _steps(network.module) for name in _names(*step))


def _steps(module: nn.Module) -> Iterator[tuple[str, int]]:
    """The blocks before which tokens merge, in order: the name of their list, and their index in it."""
    for name in merging_names(module):
        blocks = module.get_submodule(name)
        assert isinstance(blocks, MergingBlocks)
        for index in blocks.merging_indices:
            yield name, index


def _names(blocks: str, index: int) -> tuple[str, str]:
    return f"{blocks}.{index}.merging.leaves", f"{blocks}.{index}.merging.nearest"


class _Record:
    """Choices in the order in which they were made. Not a list: torch.export would look for tensors in one."""

    def __init__(self) -> None:
        self.choices: list[Choice] = []


class RecordingBlocks(MergingBlocks):
    """Remembers what it chooses."""

    record: _Record

    def choose(self, index: int, similarity: Tensor, count: int, real: Tensor | None = None) -> Choice:
        choice = super().choose(index, similarity, count, real)
        self.record.choices.append(choice)
        return choice


class WithDecisions(nn.Module):
    """A network that gives, behind its outputs, the values of `decision_names`."""

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
    """Merges the tokens of ``given``, choices by index, and notes how much worse than its own these are."""

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


def as_decided(network: Network, tolerance: float) -> Alternatives:
    """For `exporters.check_parity`: the network's outputs for one sample with the tokens merged that the file merged.

    Where a similarity is off by more than ``tolerance`` for that, what the network itself gives.
    """
    dictated = with_blocks_of(network.module, DictatedBlocks)
    module, plain = network.tensor_outputs(dictated), network.tensor_outputs()

    def found(sample: Mapping[str, Tensor], decided: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        regrets: list[float] = []
        for name in merging_names(dictated):
            blocks = dictated.get_submodule(name)
            assert isinstance(blocks, DictatedBlocks)
            chosen = {index: tuple(decided[n] for n in _names(name, index)) for index in blocks.merging_indices}
            blocks.given, blocks.regrets = {index: Choice(*values) for index, values in chosen.items()}, regrets
        outputs = module(**sample)
        # Two similarities are compared, and both may be off.
        return outputs if max(regrets) <= 2 * tolerance else plain(**sample)

    return found
