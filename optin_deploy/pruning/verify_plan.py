"""The plan that a run has chosen, sliced against masked before anything is repaired.

What may be pruned was tried when the network was described, on some units of every group. This is the plan itself.
"""

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from optin_deploy.distributed.ranks import ranks_of
from optin_deploy.errors import GateError
from optin_deploy.network import Network
from optin_deploy.structure.groups import Structure
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.verify import find_failing, reason
from optin_deploy.structure.verify_slices import compare_slices

# Of the sample batch and of a calibration batch: two samples differ, and more take longer.
_SAMPLES = 2

Batch = Mapping[str, Tensor]


def check_cut(network: Network, small: nn.Module, structure: Structure, plan: Plan, batches: Sequence[Batch]) -> None:
    """Check that ``small``, sliced by ``plan`` and not repaired yet, computes what the masked network does, on the
    sample batch and on a calibration batch.

    Args:
        batches: calibration inputs; of several processes that share them, the main one checks.

    Raises:
        GateError: it does not, with the group to blame.
    """
    found = ranks_of(batches).broadcast_object(lambda: _difference(network, small, structure, plan, batches))
    if found is not None:
        raise GateError(found)


def _difference(
    network: Network, small: nn.Module, structure: Structure, plan: Plan, batches: Sequence[Batch]
) -> str | None:
    """What differs, and what to do; None where nothing does."""
    kept = {g.name: plan.units(g) for g in structure.groups}
    cut = [g for g in structure.groups if len(kept[g.name]) < g.units]
    for inputs in _inputs(network, batches):
        verdict = compare_slices(network.module, small, cut, kept, inputs)
        if verdict.passed:
            continue
        alone = find_failing(network.module, inputs, cut, lambda group: kept[group.name])
        left = sum(len(kept[g.name]) for g in cut)
        together = {"the network": reason(left, sum(g.units for g in cut), verdict.error, verdict.largest)}
        name, why = next(iter((alone or together).items()))
        others = f" (and {len(alone) - 1} more)" if len(alone) > 1 else ""
        return (
            f"{name}{others} cannot be cut as this plan asks: {why}; no pruned network is written. Register an "
            "adapter that returns LeftDense for it (see Modules of your own in the documentation), take another "
            "budget, or report it"
        )
    return None


def _inputs(network: Network, batches: Sequence[Batch]) -> Iterator[Batch]:
    device = next(network.module.parameters()).device
    for batch in (network.inputs, *batches[:1]):
        yield {name: tensor[:_SAMPLES].to(device) for name, tensor in batch.items()}
