"""The prunable units of a network and their costs."""

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch

from optin_deploy.errors import UserError
from optin_deploy.models.validation.adopt import validate
from optin_deploy.models.validation.inputs import check_batches
from optin_deploy.network import Network
from optin_deploy.nn.batches import Batches
from optin_deploy.search.costs import Costs, flop_costs
from optin_deploy.structure.describe import describe, prunable
from optin_deploy.structure.groups import Structure
from optin_deploy.structure.unpruned import UNCOUNTED, find_unpruned, never_pruned
from optin_deploy.tokens.find_stack import token_stack
from optin_deploy.tokens.stack import TokenStack

# How many modules the message names when nothing is prunable.
_LARGEST = 3


@dataclass(frozen=True)
class PruningSpace:
    """The prunable groups of a network and their FLOPs; ``stack`` holds the blocks between which tokens may merge."""

    structure: Structure
    costs: Costs
    stack: TokenStack | None = None


def analyze(network: Network, *, narrow: bool = True, tokens: bool = False) -> PruningSpace:
    """Find the prunable groups and count their FLOPs.

    Args:
        narrow: whether heads may also get narrower.
        tokens: whether tokens may merge.

    Raises:
        UserError: nothing is prunable, or tokens cannot merge.
    """
    structure = describe(network.module, network.inputs)
    if not narrow:
        structure = structure.without_widths()
    if not structure.groups:
        raise UserError(_nothing_prunable(network, structure))
    stack = token_stack(network.module, network.inputs, structure, network.token_mask) if tokens else None
    return PruningSpace(structure, flop_costs(network.module, structure, network.inputs), stack)


def validate_on(network: Network, batches: Batches) -> Network:
    """Return the network as `validate` does; UserError if it cannot be pruned or does not take ``batches``."""
    network = validate(network)
    check_batches(network.module, network.inputs, batches)
    if len(batches):
        with torch.no_grad():
            outputs = network.forward({name: tensor[:1].clone() for name, tensor in batches[0].items()})
        bad = next((name for name, output in outputs.items() if not output.isfinite().all()), None)
        if bad is not None:
            raise UserError(f"the network gives NaN or infinity in {bad} on the first sample of batch 0")
    return network


def analyze_for(network: Network, groups: Collection[str], *, tokens: bool = False) -> PruningSpace:
    """Return `analyze` for a plan or scores: heads may get narrower exactly if ``groups`` names widths of heads."""
    space = analyze(network, tokens=tokens)
    if any(group.kind == "width" and group.name in groups for group in space.structure.groups):
        return space
    structure = space.structure.without_widths()
    return replace(space, structure=structure, costs=flop_costs(network.module, structure, network.inputs))


def _nothing_prunable(network: Network, structure: Structure) -> str:
    """Return the message that says where the FLOPs are and which modules could be pruned."""
    largest = find_unpruned(network.module, structure, network.inputs)[:_LARGEST]
    parts = [f"{left.module} ({100 * left.flops_share:.1f} %: {left.reason})" for left in largest]
    named = {left.module for left in largest}
    uncounted = [(n, m) for n, m in network.module.named_modules() if isinstance(m, UNCOUNTED) and n not in named]
    parts += [f"{name or 'the network'} (not counted: {never_pruned(m)})" for name, m in uncounted[:_LARGEST]]
    return (
        f"nothing prunable found in {network.source.name}; its FLOPs are in {', '.join(parts) or 'no layer'}; "
        f"looked for: {' '.join(prunable())}"
    )
