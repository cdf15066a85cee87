"""Check on two samples, before scoring, whether derivatives reach the units.

A module may cut the graph: it runs without gradients, detaches tensors, or computes something without a derivative. The
scores of all units before it are then zero or wrong, without an error. If the network cuts a graph, or a group gets no
derivative at all, derivatives d of random sums of the outputs are compared with finite differences,

    ⟨d, v⟩  and  (y(+εv) − y(−εv)) / 2ε,

with random signs v at the output of the group's projection. A group that changes no output needs no derivative.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from optin_deploy.criteria.restored_gradients import restore_gradients, watch_cuts
from optin_deploy.criteria.trajectory_loss import Batch, differentiable, gradients, signs
from optin_deploy.network import Network
from optin_deploy.nn.hooks import Hook, forward_hooks
from optin_deploy.nn.partial_forward import record_outputs
from optin_deploy.structure.groups import Group, Structure

# Samples of the first check, and of the check before a refusal: the derivative of a few samples may be 0 by chance.
_SAMPLES, _MORE = 2, 16
_PROBES = 4
# Relative to the root mean square of the projection's output.
_STEP = 1e-2
# Relative errors above the curvature and rounding of smooth networks, and of any network.
_SMOOTH, _COARSE = 0.03, 0.3
# Smallest change of an output that counts, in units of its precision.
_NOISE = 10.0


@dataclass(frozen=True)
class Reach:
    """How derivatives must be taken.

    Attributes:
        restoring: whether `restore_gradients` is needed.
        cut: groups without derivatives, even so.
        wrong: groups whose derivatives are far from finite differences, even so, as before coarse rounding.
        reason: the error raised by taking derivatives.
    """

    restoring: bool = False
    cut: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    reason: str | None = None


def find_reach(network: Network, structure: Structure, batch: Batch) -> Reach:
    """Check which units derivatives reach, on the first samples of ``batch``.

    It takes one forward and backward pass unless something is suspicious. Checkpointing must be off.
    """
    found = _find(network, structure, {name: t[:_SAMPLES] for name, t in batch.items()})
    return _find(network, structure, {name: t[:_MORE] for name, t in batch.items()}) if found.cut else found


def _find(network: Network, structure: Structure, some: Batch) -> Reach:
    groups = tuple(group for group in structure.groups if group.kind != "width")
    first = _derivatives(network, groups, some, restoring=False, probes=1)
    suspects = groups if first.suspicious else tuple(g for g in groups if not bool(first.slopes[g.name].any()))
    if not suspects:
        return Reach()
    own = _derivatives(network, groups, some, restoring=False)
    sizes = _sizes(network, suspects, some)
    expected = {group.name: _difference(network, group, sizes[group.name], some) for group in suspects}
    errors = _errors(own, expected, sizes)
    if own.reason is None and max(errors.values()) <= _SMOOTH:
        return Reach()
    found = _judge(own, errors, restoring=False)
    again = _derivatives(network, groups, some, restoring=True)
    better = _errors(again, expected, sizes)
    brought = _judge(again, better, restoring=True)
    # A straight-through estimator detaches on purpose: then the network's own derivative is meant.
    nearer = max(better.values()) < max(errors.values()) / 2 and set(brought.cut) <= set(found.cut)
    return brought if brought.reason is None and (nearer or found.reason is not None) else found


@torch.no_grad()
def find_forward_reach(network: Network, structure: Structure, batch: Batch) -> Reach:
    """Do the same for forward-mode derivatives, with a pass per group; these cannot be restored."""
    some = {name: t[:_SAMPLES] for name, t in batch.items()}
    groups = tuple(group for group in structure.groups if group.kind != "width")
    sizes = _sizes(network, groups, some)
    expected = {group.name: _difference(network, group, sizes[group.name], some) for group in groups}
    try:
        found = _Derivatives({group.name: _forward_slopes(network, group, some) for group in groups})
    except RuntimeError as error:
        return Reach(reason=" ".join(str(error).split())[:160])
    return _judge(found, _errors(found, expected, sizes), restoring=False)


def _forward_slopes(network: Network, group: Group, batch: Batch) -> Tensor:
    def hook(_: str, __: nn.Module, ___: object, output: Tensor) -> Tensor:
        return output + forward_ad.make_dual(torch.zeros_like(output), _direction(group.name, output))

    # The fused kernels of attention have no forward derivatives.
    with (
        forward_ad.dual_level(),
        sdpa_kernel(SDPBackend.MATH),
        forward_hooks(network.module, [group.output], after=hook),
    ):
        pairs = {name: forward_ad.unpack_dual(y) for name, y in _outputs(network, batch).items()}
        changes = {n: torch.zeros_like(y.primal) if y.tangent is None else y.tangent for n, y in pairs.items()}
        norms = {name: y.primal.double().norm() for name, y in pairs.items()}
        return torch.tensor([float(_sum_randomly(changes, p, norms)) for p in range(_PROBES)], dtype=torch.float64)


@dataclass(frozen=True)
class _Derivatives:
    """Derivatives; ``slopes`` has ⟨d, v⟩ of every probe by group, float64 ``(probes,)``, for signs v of size 1."""

    slopes: Mapping[str, Tensor]
    suspicious: bool = False
    reason: str | None = None


def _derivatives(
    network: Network, groups: Sequence[Group], batch: Batch, *, restoring: bool, probes: int = _PROBES
) -> _Derivatives:
    slopes = {g.name: torch.zeros(probes, dtype=torch.float64) for g in groups}
    with ExitStack() as stack:
        stack.enter_context(differentiable(network))
        seen: list[bool] = []
        if restoring:
            stack.enter_context(restore_gradients(network.module))
        else:
            seen = stack.enter_context(watch_cuts(network.module))
        try:
            with _tap_outputs(network, groups) as taps:
                outputs = _outputs(network, batch)
            leaves = [(g.name, tap) for g in groups for tap in taps[g.name]]
            for probe in range(probes):
                total = _sum_randomly(outputs, probe)
                if not total.requires_grad or not leaves:
                    continue
                each = gradients(total, [tap for _, tap in leaves], keep=probe + 1 < probes)
                for (name, _), gradient in zip(leaves, each, strict=True):
                    slopes[name][probe] += float((gradient.double() * _direction(name, gradient).double()).sum())
        except RuntimeError as error:
            nothing = {name: torch.zeros_like(slope) for name, slope in slopes.items()}
            return _Derivatives(nothing, suspicious=True, reason=" ".join(str(error).split())[:160])
    return _Derivatives(slopes, suspicious=bool(seen))


@torch.no_grad()
def _sizes(network: Network, groups: Sequence[Group], batch: Batch) -> dict[str, float]:
    """Return the root mean square of each group's projection output."""
    with record_outputs(network.module, tuple(group.output for group in groups)) as given:
        network.forward(batch)
    return {
        g.name: float(given[g.output].double().square().mean().sqrt()) if g.output in given else 0.0 for g in groups
    }


@torch.no_grad()
def _difference(network: Network, group: Group, size: float, batch: Batch) -> Tensor:
    """Return the finite differences of a group, to compare with its slopes times ``size``; 0 if no output changes."""
    moved = []
    for sign in (1.0, -1.0):
        with _shift_output(network, group, sign * _STEP * size):
            moved.append(_outputs(network, batch))
    more, less = moved
    if not differ(more, less):
        return torch.zeros(_PROBES, dtype=torch.float64)
    change = {n: (more[n].double() - less[n].double()) / (2 * _STEP) for n in more}
    scale = {n: (more[n].double() + less[n].double()).norm() / 2 for n in more}
    return torch.tensor([float(_sum_randomly(change, probe, scale)) for probe in range(_PROBES)], dtype=torch.float64)


def differ(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Return whether outputs differ by more than rounding."""
    return any(
        bool((y - other[n]).abs().max() > _NOISE * torch.finfo(y.dtype).eps * y.abs().max()) for n, y in one.items()
    )


def _errors(found: _Derivatives, expected: Mapping[str, Tensor], sizes: Mapping[str, float]) -> dict[str, float]:
    """Return the relative error of each group's slopes.

    It is 1 if the group has no slopes, and 0 if it needs none.
    """
    return {
        name: float((found.slopes[name] * sizes[name] - wanted).norm() / wanted.norm()) if bool(wanted.any()) else 0.0
        for name, wanted in expected.items()
    }


def _judge(found: _Derivatives, errors: Mapping[str, float], *, restoring: bool) -> Reach:
    cut = tuple(name for name, error in errors.items() if error and not bool(found.slopes[name].any()))
    wrong = tuple(name for name, error in errors.items() if error > _COARSE and name not in cut)
    return Reach(restoring, cut, wrong, found.reason)


def _outputs(network: Network, batch: Batch) -> dict[str, Tensor]:
    return {name: y for name, y in network.forward(batch).items() if y.is_floating_point()}


def _sum_randomly(outputs: Mapping[str, Tensor], probe: int, scale: Mapping[str, Tensor] | None = None) -> Tensor:
    """Return a random sum of all outputs, each relative to its norm."""
    parts = []
    for place, (name, y) in enumerate(outputs.items()):
        generator = torch.Generator(y.device).manual_seed(1_000 * probe + place)
        norm = y.detach().double().norm() if scale is None else scale[name]
        parts.append((signs(y.detach().double(), generator) * y.double()).sum() / norm.clamp_min(1e-30))
    return torch.stack(parts).sum() if parts else torch.zeros(())


def _direction(name: str, like: Tensor) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(len(name))
    return signs(like.detach(), generator)


@contextmanager
def _tap_outputs(network: Network, groups: Sequence[Group]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect, by group, zeros added to the projections' outputs; their gradients are those of the outputs."""
    added: dict[str, list[Tensor]] = {g.name: [] for g in groups}

    def hook_of(name: str) -> Hook:
        def hook(_: str, __: nn.Module, ___: object, output: Tensor) -> Tensor:
            with torch.inference_mode(False):
                zeros = torch.zeros(output.shape, dtype=output.dtype, device=output.device, requires_grad=True)
            added[name].append(zeros)
            return output + zeros

        return hook

    with ExitStack() as stack:
        for group in groups:
            stack.enter_context(forward_hooks(network.module, [group.output], after=hook_of(group.name)))
        yield added


@contextmanager
def _shift_output(network: Network, group: Group, step: float) -> Iterator[None]:
    def hook(_: str, __: nn.Module, ___: object, output: Tensor) -> Tensor:
        return output + step * _direction(group.name, output)

    with forward_hooks(network.module, [group.output], after=hook):
        yield
