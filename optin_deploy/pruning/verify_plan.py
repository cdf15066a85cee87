"""Check that slicing by a plan computes the same as masking by it, before any compensation.

The description of the network checked this for some units of every group. Here the plan of the run is checked.
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

# Samples of each batch that is checked: enough to differ, and few enough to be fast.
_SAMPLES = 2

Batch = Mapping[str, Tensor]


def check_cut(network: Network, small: nn.Module, structure: Structure, plan: Plan, batches: Sequence[Batch]) -> None:
    """Check that ``small``, sliced by ``plan``, has the outputs of the masked network.

    It is checked on the sample batch and on a calibration batch, before compensation.

    Args:
        batches: calibration inputs. If several processes share them, the main process checks.

    Raises:
        GateError: the outputs differ; the message names the group.
    """
    difference = ranks_of(batches).broadcast_object(lambda: _difference(network, small, structure, plan, batches))
    if difference is not None:
        raise GateError(difference)


def _difference(
    network: Network, small: nn.Module, structure: Structure, plan: Plan, batches: Sequence[Batch]
) -> str | None:
    """Return the difference and what to do about it; None if there is none."""
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
