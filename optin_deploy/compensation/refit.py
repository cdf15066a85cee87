"""Closed-form repair: refit the linear maps of a pruned network so that it follows the dense one.

Sequential ridge regression, no labels and no gradients. In the order in which the pruned network runs, every linear
layer and convolution is refitted on the inputs that it gets there, behind the maps already refitted:

- a projection behind a group's units gives the dense residual stream back: with x̃ what enters it and r̃ the stream in
  the pruned network, s the dense stream after the sublayer, γ the factor between (LayerScale, batch norm), the targets
  are (s − r̃) / γ, or the dense output where the stream is unknown;
- any other map (queries, keys, values, the first map of an FFN, a classifier) gives what it gives in the dense
  network, in those features that are left.

What is penalised is the change of the weights, and how strongly is chosen on held-out rows (see ``ridge``). What a
classifier's last map gives is mended further in ``classifier``.

Statistics of batch norms stay as they are: the maps before them are fitted to give what they have seen. Taken anew from
the repaired network, whose maps vary less than the dense one's, they undo much of the repair.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from optin_deploy.compensation.linear_layers import LinearMap, linear_maps
from optin_deploy.compensation.ridge import STRENGTHS, Moments, fit, is_held_out
from optin_deploy.distributed.ranks import own_indices, ranks_of
from optin_deploy.network import Network
from optin_deploy.nn.calls import first_tensor
from optin_deploy.nn.hooks import forward_hooks
from optin_deploy.nn.names import is_inside
from optin_deploy.nn.outputs import named_outputs
from optin_deploy.nn.partial_forward import (
    cat_batch,
    forward_until,
    keep_shapes_only,
    record_inputs,
    record_outputs,
    replay_blocks,
)
from optin_deploy.nn.unfold import (
    Conv,
    design_rows,
    set_weight_matrix,
    some_rows,
    valid_rows,
    weight_matrix,
)
from optin_deploy.structure.groups import Group, Structure, channels_last
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.residual import stream_scale, stream_shift
from optin_deploy.structure.slicing import output_bias
from optin_deploy.utils.progress import track
from optin_deploy.utils.spill import SpillList

Batch = Mapping[str, Tensor]


class Refit(Protocol):
    """How one map is refitted: new weights ``(features + 1, outputs)`` from its moments and its ``old`` weights.

    The last row is the bias, which stays where ``bias`` is False. ``held_out`` are moments of rows that are not in
    ``training``, or None. ``module`` names the map; None stands for one that is only a bias.
    """

    def __call__(
        self, module: str | None, training: Moments, held_out: Moments | None, old: Tensor, *, bias: bool
    ) -> Tensor: ...


@torch.no_grad()
def compensate(
    network: Network,
    pruned: nn.Module,
    structure: Structure,
    plan: Plan,
    batches: Sequence[Batch],
    strengths: Sequence[float] = STRENGTHS,
) -> None:
    """Refit the linear maps of ``pruned`` (a sliced copy of ``network``) from the first pruned group on, in place.

    Args:
        structure: of the dense network.
        strengths: of the ridge, relative to the mean squared activation; where there are several, every map gets the
            one that does best on held-out batches.
    """

    def ridge(module: str | None, training: Moments, held_out: Moments | None, old: Tensor, *, bias: bool) -> Tensor:
        return fit(training, held_out, old, strengths, bias=bias)

    several = len(strengths) > 1
    refit_maps(network, pruned, structure, plan, batches, ridge, hold_out=several)


@torch.no_grad()
def refit_maps(
    network: Network,
    pruned: nn.Module,
    structure: Structure,
    plan: Plan,
    batches: Sequence[Batch],
    refit: Refit,
    *,
    hold_out: bool,
    everywhere: bool = False,
) -> None:
    """Give ``pruned`` the weights that ``refit`` makes of the moments of every map, one behind the other, in place.

    Args:
        hold_out: whether moments of some batches are kept apart.
        everywhere: from the first map on, not only from the first pruned group on.
    """
    repair = _Repair(network, pruned, structure, plan, batches, refit, hold_out)
    repair.changed = everywhere
    for layer, block in enumerate(track(structure.blocks)):
        repair.block(layer, block)
    repair.tail()


class _Repair:
    """The state of a repair: for every batch, what the blocks done so far give in both networks."""

    def __init__(
        self,
        network: Network,
        pruned: nn.Module,
        structure: Structure,
        plan: Plan,
        batches: Sequence[Batch],
        refit: Refit,
        hold_out: bool,
    ) -> None:
        self.network, self.pruned, self.structure, self.plan = network, pruned, structure, plan
        self.batches, self.refit = batches, refit
        self.hold_out = hold_out and any(is_held_out(index, len(batches)) for index in range(len(batches)))
        self.ranks, self.own = ranks_of(batches), own_indices(batches)
        # Of this process's batches only; those of many do not fit in memory.
        self.dense_done: SpillList[dict[str, Any]] = SpillList({} for _ in self.own)
        self.pruned_done: SpillList[dict[str, Any]] = SpillList({} for _ in self.own)
        self.changed = False
        # Maps that have had their turn, also those that were left as they are.
        self.passed: set[str] = set()
        # How often a map runs in one forward pass.
        self.runs: dict[str, int] = {}
        self.skips = _has_skips(network.module, structure, batches[0]) if batches else False
        self.maps = linear_maps(network.module, pruned, structure, plan)

    def block(self, layer: int, block: str) -> None:
        """Refit the maps of one block, from the first pruned group on, and run both networks past it."""
        groups = [g for g in self.structure.groups if g.layer == layer]
        pruned = any(_is_pruned(g, self.structure, self.plan) for g in groups)
        stages = self._stages(block) if self.changed or pruned else []
        while stages and not self.changed:
            first = [m.group for m in stages[0] if m.group is not None]
            self.changed = any(_is_pruned(g, self.structure, self.plan) for g in first)
            stages = stages if self.changed else stages[1:]
        for stage in stages:
            self._refit(stage, block, closing=stage is stages[-1])
        if not stages:
            self._pass(self.network.module, self.dense_done, block)
        self._pass(self.pruned, self.pruned_done, block)

    def _pass(self, module: nn.Module, dones: SpillList[dict[str, Any]], block: str) -> None:
        for place, index in enumerate(self.own):
            done = dones[place]
            with replay_blocks(module, done):
                output = forward_until(module, self.batches[index], block)
            dones[place] = self._with(done, block, output)

    def _with(self, done: dict[str, Any], block: str, output: Any) -> dict[str, Any]:
        """``done`` and ``output``; of earlier blocks no more than the shapes, if they only have to be skipped."""
        if not self.skips:
            keep_shapes_only(done)
        return {**done, block: output}

    def tail(self) -> None:
        """Refit the maps behind the last block."""
        for stage in self._stages(None) if self.changed else []:
            self._refit(stage, None, closing=False)

    def _stages(self, block: str | None) -> list[list[LinearMap]]:
        """Maps of a block and of what runs between the block before and it, or behind the last block, in order; those
        of a stage are given the same input."""
        # The tensors are held: memory that is given back would make the inputs of two maps look like one.
        ran: list[tuple[str, Tensor | None, int]] = []

        def note(name: str, _: nn.Module, args: tuple[Any, ...], __: object) -> None:
            given = first_tensor(args)
            ran.append((name, given, 0 if given is None or given.is_inference() else given._version))

        others = [b for b in self.structure.blocks if b != block]
        free = [m for m in self.maps if m not in self.passed and not any(is_inside(m, b) for b in others)]
        with forward_hooks(self.pruned, free, after=note), replay_blocks(self.pruned, self.pruned_done[0]):
            if block is None:
                self.pruned(**self.batches[self.own[0]])
            else:
                forward_until(self.pruned, self.batches[self.own[0]], block)
        self.passed.update(name for name, *_ in ran)
        shapes: dict[str, list[torch.Size | None]] = {}
        for name, given, _ in ran:
            shapes.setdefault(name, []).append(None if given is None else given.shape)
        self.runs.update({name: len(each) for name, each in shapes.items()})
        stages: list[list[LinearMap]] = []
        before: tuple[int, int] | None = None
        # A map that runs several times has its turn where it runs first; its inputs must fit together.
        first: dict[str, tuple[str, Tensor | None, int]] = {}
        for each in ran:
            first.setdefault(each[0], each)
        for name, given, version in first.values():
            if len(set(shapes[name])) > 1:
                continue
            found = self.maps[name]
            own = None if given is None or found.group is not None else (given.data_ptr(), version)
            if own is not None and own == before:
                stages[-1].append(found)
            else:
                stages.append([found])
            before = own
        return _shortcuts_first(stages)

    def _targets(
        self, stage: list[LinearMap], block: str | None, batch: Batch, place: int, closing: bool
    ) -> dict[str, Tensor]:
        """What the dense network gives in place of the maps of a stage, of a projection in units of the stream.

        It is run anew for every stage, and past the block for the last: keeping what all maps give for all batches
        would take far more memory.

        Args:
            place: of the batch among this process's.
        """
        module, done = self.network.module, self.dense_done[place]
        groups = [m.group for m in stage if m.group is not None]
        with replay_blocks(module, done), _streams(module, groups) as streams, _outputs(module, stage) as outputs:
            if closing and block is not None:
                output = forward_until(module, batch, block)
            else:
                self._run(module, batch, block, stage, stage[-1].dense)
        if closing and block is not None:
            self.dense_done[place] = self._with(done, block, output)
        targets = {}
        for found in stage:
            axis = _axis(module.get_submodule(found.dense))
            target = channels_last(outputs[found.dense], axis)
            if found.group is not None and found.group.stream.known:
                scale, shift = stream_scale(module, found.group), stream_shift(module, found.group)
                target = target if scale is None else target * scale
                target = target if shift is None else target + shift
                target = target + channels_last(streams[found.group.name], axis)
            elif found.outputs is not None:
                factors = found.outputs.to(target)
                target = (target * factors)[..., factors != 0]
            targets[found.module] = target
        return targets

    def _run(self, module: nn.Module, batch: Batch, block: str | None, stage: Sequence[LinearMap], last: str) -> None:
        """Run ``module`` as far as a stage needs it, whose ``last`` map has that name there."""
        if block is None:
            module(**batch)
        else:
            # A shortcut may run behind the projection, and so may a map again.
            whole = any(self.runs[m.module] > 1 or (m.group is not None and m.group.stream.shortcut) for m in stage)
            forward_until(module, batch, block if whole else last)

    def _refit(self, stage: list[LinearMap], block: str | None, *, closing: bool) -> None:
        sums: dict[str, list[Moments | None]] = {m.module: [None, None] for m in stage}
        for place, index in enumerate(self.own):
            held_out, batch = self.hold_out and is_held_out(index, len(self.batches)), self.batches[index]
            targets = self._targets(stage, block, batch, place, closing)
            for name, (x, y) in self._rows(stage, block, batch, self.pruned_done[place], targets).items():
                before = sums[name][held_out]
                sums[name][held_out] = Moments.of(x, y) if before is None else before.add(x, y)
        for found in stage:
            training, held_out_moments = self._total(*sums[found.module])
            self._write(found, training, held_out_moments)

    def _total(self, training: Moments | None, held_out: Moments | None) -> tuple[Moments, Moments | None]:
        """The sums over all processes, of which some may have no batch of one kind."""
        some = training or held_out
        assert some is not None
        training = (training or some.of_nothing()).total(self.ranks)
        return training, (held_out or some.of_nothing()).total(self.ranks) if self.hold_out else None

    def _rows(
        self, stage: list[LinearMap], block: str | None, batch: Batch, done: dict[str, Any], targets: dict[str, Tensor]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """What every map of a stage is given in the pruned network, and what it has to give: rows of both."""
        groups = [m.group for m in stage if m.group is not None]
        names, of_batch = tuple(m.module for m in stage if not m.vanished), self.network.valid_tokens(batch)
        inputs = record_inputs(self.pruned, names)
        with replay_blocks(self.pruned, done), _streams(self.pruned, groups) as streams, inputs as given:
            self._run(self.pruned, batch, block, stage, stage[-1].module)
        found = {}
        for each in stage:
            target = targets[each.module]
            valid = of_batch if of_batch is None else of_batch.repeat(self.runs[each.module], 1)
            if each.group is not None and each.group.stream.known:
                target = self._asked(each, target, streams[each.group.name])
            target = valid_rows(target, valid)
            rows = some_rows(len(target))
            if each.vanished:
                x = target[rows, :0]
            else:
                x = design_rows(self.pruned.get_submodule(each.module), given[each.module], rows, valid)
            found[each.module] = x, target[rows]
        return found

    def _asked(self, each: LinearMap, after: Tensor, before: Tensor) -> Tensor:
        """What the projection has to give, so that the stream is ``after`` behind it."""
        assert each.group is not None
        target = after - channels_last(before, each.group.axis)
        shift, scale = stream_shift(self.pruned, each.group), stream_scale(self.pruned, each.group)
        target = target if shift is None else target - shift
        # A factor of zero hides what the projection gives.
        return target if scale is None else target / torch.where(scale == 0, 1.0, scale)

    def _write(self, found: LinearMap, training: Moments, held_out: Moments | None) -> None:
        module = self.pruned.get_submodule(found.module)
        bias = output_bias(self.pruned, found.group) if found.group is not None else module.bias
        norm_bias = None
        if bias is None and found.group is not None and found.group.stream.norm is not None:
            norm_bias = self.pruned.get_submodule(found.group.stream.norm).bias
        old = torch.zeros_like(training.cross)
        if not found.vanished:
            old[:-1] = weight_matrix(module).T.double()
        if isinstance(bias, Tensor):
            old[-1] = bias.double()
        free = isinstance(bias, Tensor) or norm_bias is not None
        name = None if found.vanished else found.module
        solution = self.ranks.broadcast(lambda: self.refit(name, training, held_out, old, bias=free), old)
        if not found.vanished:
            set_weight_matrix(module, solution[:-1].T)
        if isinstance(bias, Tensor):
            bias.copy_(solution[-1])
        elif isinstance(norm_bias, Tensor):
            assert found.group is not None
            scale = stream_scale(self.pruned, found.group)
            assert scale is not None
            norm_bias.add_(solution[-1] * scale)


def _shortcuts_first(stages: list[list[LinearMap]]) -> list[list[LinearMap]]:
    """The stages in such an order that maps in a shortcut come before the projection that is added to it."""
    ordered: list[list[LinearMap]] = []
    for stage in stages:
        shortcuts = [
            m.group.stream.shortcut for m in stage if m.group is not None and m.group.stream.shortcut is not None
        ]
        early = [s for s in stages if any(is_inside(m.module, name) for m in s for name in shortcuts)]
        ordered += [s for s in (*early, stage) if s not in ordered]
    return ordered


def _is_pruned(group: Group, structure: Structure, plan: Plan) -> bool:
    """Whether units of ``group``, or of its heads' width, are gone."""
    both = (group, structure.child(group.name))
    return any(g is not None and len(plan.units(g)) < g.units for g in both)


def _axis(module: nn.Module) -> int:
    return 1 if isinstance(module, Conv) else -1


@contextmanager
def _streams(module: nn.Module, groups: Sequence[Group]) -> Iterator[dict[str, Tensor]]:
    """Collect, by group, the residual streams that projections add to."""
    inputs = tuple(g.stream.residual for g in groups if g.stream.residual is not None)
    outputs = tuple(g.stream.shortcut for g in groups if g.stream.shortcut is not None)
    found: dict[str, Tensor] = {}
    with record_inputs(module, inputs) as given, record_outputs(module, outputs) as returned:
        yield found
    for group in groups:
        if group.stream.residual is not None:
            found[group.name] = given[group.stream.residual]
        elif group.stream.shortcut is not None:
            found[group.name] = returned[group.stream.shortcut]


@contextmanager
def _outputs(module: nn.Module, maps: Sequence[LinearMap]) -> Iterator[dict[str, Tensor]]:
    """Collect copies of what the maps give in the dense network: an activation behind may work in place."""
    found: dict[str, Tensor] = {}

    def copy(name: str, _: nn.Module, __: object, output: Tensor) -> None:
        found[name] = cat_batch(found.get(name), output.clone())

    with forward_hooks(module, [each.dense for each in maps], after=copy):
        yield found


def _has_skips(module: nn.Module, structure: Structure, batch: Batch) -> bool:
    """Whether more is made of a block's output than the next block's input, as in a U-Net: tried by hiding it."""
    done: dict[str, Any] = {}
    for block in structure.blocks:
        with replay_blocks(module, done):
            output = forward_until(module, batch, block)
        if not _is_finite(output):
            return True
        keep_shapes_only(done)
        done[block] = output
    with replay_blocks(module, done):
        return not _is_finite(module(**batch))


def _is_finite(output: Any) -> bool:
    return all(bool(t.isfinite().all()) for t in named_outputs(output).values())
