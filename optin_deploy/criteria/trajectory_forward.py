"""The sketch's scores without a backward pass, for machines that cannot hold the activations of all layers.

One forward pass with tangents r on the masks of a set of units gives, beside what the network computes, the derivative
of all that the trajectory loss compares: with J_bu the derivative for the mask of unit u on sample b, the part of
sample b is D_b = Σ_u r_bu J_bu. With independent random signs, and draws p ≠ q,

    r_bu^p r_bu^q ⟨D_b^p, D_b^q⟩

is an unbiased estimate of ‖J_bu‖²; other units of the set add noise, no bias. Summed over samples and averaged over
pairs it ranks the units of a group, and one factor per group, (Σ_u ‖Σ_b J_bu‖²) / (Σ_bu ‖J_bu‖²), brings in what the
samples' changes have in common, as in ``criteria.trajectory``: its numerator is the mean of ‖Σ_b D_b‖² when samples
share their signs, its denominator that of Σ_b ‖D_b‖².

Noise. The derivative of a large unit hides that of a small one, so units of like size share a set: first they are
ordered by what they add to the projection's output, then also by the scores that the batches so far give. Let the
derivatives of a sample be of like size and lie in about d dimensions. With s units in a set, P draws and N samples the
relative variance of a score is about

    [4 (s − 1) / P + 2 (s − 1)² / (P (P − 1))] / (d N)

Signs of their own for each sample are N draws for the price of one. A pass per unit costs s / P times as much and has
no noise at all: a set of one unit gives ‖Σ_b J_bu‖² as it is. On s / P times fewer samples it costs the same, and is
better than sets where s / P is beyond about d / 2, if scores differ between samples about as much as they are large.

Of Gram matrices, with N the normalised features of the sampled tokens and A = dN Nᵀ, the part of sample b is A + Aᵀ
with only the rows of b in A: ⟨D_b^p, D_b^q⟩ = 2 Σ_{i∈b, j} A_ij^p A_ij^q + 2 Σ_{i,j∈b} A_ij^p A_ji^q.

Memory. Activations of one layer, the outputs of all blocks, and the tangents of both, for as many stacked copies of a
batch as in exact scoring, or ``probes`` where these are more; no graph is kept.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from zlib import crc32

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from optin_deploy.criteria.trajectory import STACKED_TOKENS, repeat_output
from optin_deploy.criteria.trajectory_loss import Batch, LossSettings, Trajectory, directions
from optin_deploy.network import Network
from optin_deploy.nn.hooks import Hook, forward_hooks
from optin_deploy.nn.unfold import feature_dim
from optin_deploy.structure.groups import Group, Structure, channels_last
from optin_deploy.structure.masking import mask_units
from optin_deploy.utils.progress import track

# Draws with signs that the samples share, per batch and group.
_SHARED_DRAWS = 8


@dataclass(frozen=True)
class Draws:
    """How many random directions are drawn.

    Attributes:
        probes: draws per batch and set of units; at least two, unless ``set_size`` is 1.
        set_size: units whose masks have tangents in one pass.

    Raises:
        ValueError: there are too few probes.
    """

    probes: int
    set_size: int = 16

    def __post_init__(self) -> None:
        if self.set_size > 1 and self.probes < 2:
            raise ValueError("sets of several units need two probes at least")

    def passes(self, group: Group) -> int:
        """Return the number of forward passes for a group and batch."""
        if self.set_size == 1:
            return group.units
        return min(group.units, -(-group.units // self.set_size) * self.probes + _SHARED_DRAWS)

    def is_exact(self, group: Group) -> bool:
        """Return whether the group is scored unit by unit, since that takes no more passes."""
        return self.passes(group) == group.units


@torch.no_grad()
def forward_scores(
    network: Network,
    structure: Structure,
    batches: Sequence[Batch],
    settings: LossSettings,
    *,
    draws: Draws,
    groups: Sequence[Group] | None = None,
) -> dict[str, Tensor]:
    """Score all units to second order by forward passes only.

    Groups for which it takes no more passes are scored unit by unit, without noise.

    Args:
        groups: the groups of ``structure`` to score, if not all; a group's scores do not depend on the others.

    Returns:
        group name -> float64 ``(units,)`` on the CPU.
    """
    device = next(network.module.parameters()).device
    groups = structure.groups if groups is None else groups
    scores = {g.name: torch.zeros(g.units, dtype=torch.float64, device=device) for g in groups}
    # Sums over the units of a group: with signs that the samples share, and with signs of their own.
    joint, single = (dict.fromkeys(scores, 0.0) for _ in range(2))
    for index, inputs in enumerate(track(batches)):
        differential = _Differential(Trajectory(network, structure, inputs, settings.seed + index), settings)
        for group in track(groups, [draws.passes(group) for group in groups]):
            # On the CPU, so that draws are the same on every device.
            generator = torch.Generator().manual_seed(settings.seed + index + crc32(group.name.encode()))
            if draws.is_exact(group):
                for units, changes in differential.of(group, torch.eye(group.units)[:, None]):
                    scores[group.name][units] += changes.sizes()
                continue
            order = _order(differential.energies[group.name], scores[group.name] if index else None)
            for own, total in _estimates(differential, group, order, draws, generator):
                scores[group.name] += own
                single[group.name] += total
            shared = _signs((_SHARED_DRAWS, 1, group.units), generator)
            for _, changes in differential.of(group, shared):
                joint[group.name] += float(changes.sizes().sum()) / _SHARED_DRAWS
    for group in groups:
        if not draws.is_exact(group):
            scores[group.name] *= joint[group.name] / max(single[group.name], 1e-300)
    return {name: each.clamp_min(0.0).cpu() for name, each in scores.items()}


def _order(energies: Tensor, scores: Tensor | None) -> Tensor:
    """The units by size, as far as it is known: by energies, and by the scores that the batches so far give."""
    ranks = [t.cpu().argsort(stable=True).argsort() for t in (energies, scores) if t is not None]
    return torch.stack(ranks).sum(0).argsort(stable=True)


def _estimates(
    differential: "_Differential", group: Group, order: Tensor, draws: Draws, generator: torch.Generator
) -> Iterator[tuple[Tensor, float]]:
    """Yield ``(Σ_b ‖J_bu‖² of every unit, their sum)``, a stack of sets at a time.

    Args:
        order: of the units; neighbours are in one set.
    """
    probes, set_size = draws.probes, draws.set_size
    sets = -(-group.units // set_size)
    # Places left over in the last set stand for no unit: their signs are 0.
    places = F.pad(order, (0, sets * set_size - group.units), value=-1)
    members = places.reshape(sets, set_size)
    pairs = torch.ones(probes, probes, dtype=torch.float64).triu(1) * 2 / (probes * (probes - 1))
    for some in members.split(max(1, differential.copies // probes)):
        signs = _signs((len(some), probes, differential.trajectory.size, set_size), generator)
        signs *= (some >= 0)[:, None, None]
        tangents = torch.zeros(*signs.shape[:3], group.units)
        tangents.scatter_add_(-1, some.clamp_min(0)[:, None, None].expand(signs.shape), signs)
        ((_, changes),) = differential.of(group, tangents.flatten(0, 1), at_once=len(some) * probes)
        products = changes.products(len(some))
        signs, pairs = signs.to(products), pairs.to(products.device)
        own = torch.einsum("spqb,spbu,sqbu->su", products * pairs[:, :, None], signs, signs)
        scores = torch.zeros(group.units, dtype=torch.float64, device=products.device)
        scores.index_add_(0, some.clamp_min(0).flatten().to(products.device), own.flatten())
        yield scores, float(torch.einsum("sppb->", products)) / probes


def _signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator).float() * 2 - 1


@contextmanager
def _energies(trajectory: Trajectory) -> Iterator[dict[str, Tensor]]:
    """Collect, by group, what each unit adds to the projection's output, squared, but for what its features share."""
    found: dict[str, Tensor] = {}

    def note(group: Group) -> Hook:
        def hook(_: str, projection: torch.nn.Module, args: tuple[Tensor, ...], __: object) -> None:
            weight = projection.get_parameter("weight").transpose(0, feature_dim(projection, "in"))
            each = channels_last(args[0], group.axis).flatten(0, -2).square().sum(0) * weight.flatten(1).square().sum(1)
            # The units of a width are the same in all heads.
            of_unit = (-1, group.units) if group.kind == "width" else (group.units, -1)
            energy = each.reshape(of_unit).sum(0 if group.kind == "width" else 1)
            # The projection may run several times.
            found[group.name] = found[group.name] + energy if group.name in found else energy

        return hook

    with ExitStack() as stack:
        for group in trajectory.structure.groups:
            stack.enter_context(forward_hooks(trajectory.network.module, [group.output], before=note(group)))
        yield found


class _Differential:
    """Derivatives of what the loss compares on one batch, along directions of one group's masks."""

    def __init__(self, trajectory: Trajectory, settings: LossSettings) -> None:
        self.trajectory, self.settings = trajectory, settings
        with _energies(trajectory) as self.energies:
            self.blocks, self.outputs = trajectory.run()
        tokens = [trajectory.tokens(b, y)[0].shape[:-1].numel() for b, y in self.blocks.items()]
        self.copies = max(1, STACKED_TOKENS // max([1, *tokens]))

    def of(self, group: Group, tangents: Tensor, at_once: int | None = None) -> Iterator[tuple[Tensor, "_Changes"]]:
        """Yield the indices of some directions and the changes along them.

        Args:
            tangents: of the masks, ``(directions, samples, units)``, or 1 in the place of samples that share them.
            at_once: directions; None for as many as are stacked.
        """
        size = self.trajectory.size
        for chosen in torch.arange(len(tangents)).split(at_once or self.copies):
            wide = tangents[chosen].expand(-1, size, -1).flatten(0, 1)
            yield chosen, self._changes(group, wide, len(chosen))

    def _changes(self, group: Group, tangents: Tensor, copies: int) -> "_Changes":
        trajectory, structure = self.trajectory, self.trajectory.structure
        like = next(trajectory.network.module.parameters())
        given = {b: repeat_output(self.blocks[b], copies, trajectory.size) for b in structure.blocks[: group.layer]}
        tangents = tangents.to(like)
        changes = _Changes(trajectory.size, copies, like.device)
        # The fused kernels of attention have no forward derivatives.
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            masks = {group.name: forward_ad.make_dual(torch.ones_like(tangents), tangents)}
            with mask_units(trajectory.network.module, structure, masks):
                later, outputs = trajectory.run(copies, given)
            for block, output in trajectory.compared(later).items() if self.settings.manifold else ():
                features, tokens = trajectory.tokens(block, output, copies)
                of_sample = tokens // (features.shape[:-1].numel() // (copies * trajectory.size))
                normalised = forward_ad.unpack_dual(directions(features, tokens, copies))
                weight = (self.settings.manifold * trajectory.weight(block)) ** 0.5
                changes.add_gram(normalised.primal[0], normalised.tangent, weight, of_sample)
            for name, factor in self.settings.factors.items():
                change = forward_ad.unpack_dual(outputs[name]).tangent
                if factor and change is not None:
                    root = trajectory.task_root(name, self.outputs[name], change)
                    changes.add_task(factor**0.5 * root)
        return changes


class _Changes:
    """Inner products of changes along stacked directions."""

    def __init__(self, samples: int, copies: int, device: torch.device) -> None:
        self.samples, self.copies, self.device = samples, copies, device
        self.grams: list[tuple[Tensor, Tensor]] = []
        self.tasks: list[Tensor] = []

    def add_gram(self, features: Tensor, change: Tensor | None, weight: float, of_sample: Tensor) -> None:
        """A Gram matrix of ``features`` ``(K, width)`` that change by ``change`` ``(copies, K, width)``."""
        if change is not None:
            self.grams.append((weight * change @ features.T, of_sample))

    def add_task(self, root: Tensor) -> None:
        """Of an output, ``(copies, samples, …)``, as `Trajectory.task_root` gives it."""
        self.tasks.append(root.flatten(2) if root.dim() > 2 else root[..., None])

    def sizes(self) -> Tensor:
        """Squared norm of the change of all samples together, for every direction: float64 ``(copies,)``."""
        total = torch.zeros(self.copies, dtype=torch.float64, device=self.device)
        for one_sided, _ in self.grams:
            change = one_sided + one_sided.transpose(1, 2)
            total += change.square().sum((1, 2)).double()
        for root in self.tasks:
            total += root.square().sum((1, 2)).double()
        return total

    def products(self, sets: int) -> Tensor:
        """Inner products of each sample's changes along the directions of a set: ``(sets, draws, draws, samples)``."""
        draws = self.copies // sets
        total = torch.zeros(sets, draws, draws, self.samples, dtype=torch.float64, device=self.device)
        for one_sided, of_sample in self.grams:
            each = one_sided.unflatten(0, (sets, draws))
            same = (of_sample[:, None] == of_sample).to(each.dtype)
            rows = torch.einsum("spij,sqij->spqi", each, each)
            rows = rows + torch.einsum("spij,sqji->spqi", each * same, each)
            total.index_add_(-1, of_sample, 2 * rows.double())
        for root in self.tasks:
            each = root.unflatten(0, (sets, draws))
            total += torch.einsum("spbn,sqbn->spqb", each, each).double()
        return total
