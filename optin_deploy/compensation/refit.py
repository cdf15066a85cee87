"""Closed-form compensation: refit the linear layers of a pruned network so that it follows the dense one.

Sequential ridge regression, without labels and gradients. Every linear layer and convolution is refitted in the order
in which the pruned network runs, on its inputs there, after the layers before it were refitted. There are two kinds of
targets:

- The projection of a group restores the dense residual stream. Let r̃ be the stream in the pruned network, s the dense
  stream after the sublayer, and γ the factor between projection and stream (LayerScale, batch norm). The targets are
  (s − r̃) / γ, or the dense output if the stream is unknown.
- Any other layer (queries, keys, values, the first layer of an FFN, a classifier) has the outputs of the dense layer as
  targets, in the features that are kept.

The change of the weights is penalised. The strength is chosen on held-out rows (see ``compensation.ridge``). The last
layer of a classifier is refitted further (see ``compensation.classifier``).

Batch norms keep their statistics: the layers before them are fitted to reproduce what the statistics were taken from.
New statistics of the compensated network, whose layers vary less than the dense one's, undo much of the compensation.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from optin_deploy.compensation.linear_layers import RefitLayer, refit_layers_of
from optin_deploy.compensation.pair import CompensationPair
from optin_deploy.compensation.ridge import STRENGTHS, Moments, fit, is_held_out
from optin_deploy.distributed.ranks import own_indices, ranks_of
from optin_deploy.nn.batches import PyTree
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
from optin_deploy.structure.residual import stream_scale, stream_shift
from optin_deploy.structure.slicing import output_bias
from optin_deploy.utils.progress import track
from optin_deploy.utils.spill import SpillList

Batch = Mapping[str, Tensor]


class Refit(Protocol):
    """Returns new weights ``(features + 1, outputs)`` of one layer; the last row is the bias.

    Args:
        module: name of the layer; None if only its bias is left.
        training: moments of its inputs and targets.
        held_out: moments of other rows, or None.
        old: the weights before.
        bias: False keeps the last row as it is.
    """

    def __call__(
        self, module: str | None, training: Moments, held_out: Moments | None, old: Tensor, *, bias: bool
    ) -> Tensor: ...


@torch.no_grad()
def compensate(pair: CompensationPair, batches: Sequence[Batch], strengths: Sequence[float] = STRENGTHS) -> None:
    """Refit the linear layers of the pruned network, from the first pruned group on, in place.

    Args:
        strengths: of the ridge, relative to the mean squared activation. If there are several, every layer gets the one
            that fits best on held-out batches.
    """

    def ridge(module: str | None, training: Moments, held_out: Moments | None, old: Tensor, *, bias: bool) -> Tensor:
        return fit(training, held_out, old, strengths, bias=bias)

    several = len(strengths) > 1
    refit_layers(pair, batches, ridge, hold_out=several)


@torch.no_grad()
def refit_layers(
    pair: CompensationPair, batches: Sequence[Batch], refit: Refit, *, hold_out: bool, everywhere: bool = False
) -> None:
    """Set the weights of every layer of the pruned network to what ``refit`` returns, layer by layer, in place.

    Args:
        hold_out: whether moments of some batches are kept separate.
        everywhere: whether to start at the first layer, not only at the first pruned group.
    """
    state = _Refitting(pair, batches, refit, hold_out)
    state.changed = everywhere
    for layer, block in enumerate(track(pair.structure.blocks)):
        state.block(layer, block)
    state.tail()


@dataclass(frozen=True)
class _Run:
    """One run of a layer: its input, and the input's version, which changes when it is written to in place."""

    name: str
    input: Tensor | None
    version: int

    @property
    def key(self) -> tuple[int, int] | None:
        """Equal for runs on the same values."""
        return None if self.input is None else (self.input.data_ptr(), self.version)


class _Refitting:
    """The state of a refit: for every batch, the outputs of the blocks so far, in both networks."""

    def __init__(self, pair: CompensationPair, batches: Sequence[Batch], refit: Refit, hold_out: bool) -> None:
        self.pair, self.network, self.pruned, self.structure = pair, pair.dense, pair.pruned, pair.structure
        self.batches, self.refit = batches, refit
        self.hold_out = hold_out and any(is_held_out(index, len(batches)) for index in range(len(batches)))
        self.ranks, self.own = ranks_of(batches), own_indices(batches)
        # Of this process's batches only; those of many do not fit in memory.
        self.dense_done: SpillList[dict[str, PyTree]] = SpillList({} for _ in self.own)
        self.pruned_done: SpillList[dict[str, PyTree]] = SpillList({} for _ in self.own)
        self.changed = False
        # Layers that had their turn, also those that were left as they are.
        self.passed: set[str] = set()
        # How often a layer runs in one forward pass.
        self.runs: dict[str, int] = {}
        self.skips = _has_skips(pair.dense.module, pair.structure, batches[0]) if batches else False
        self.layers = refit_layers_of(pair)

    def block(self, layer: int, block: str) -> None:
        """Refit the layers of one block, from the first pruned group on, and run both networks through it."""
        groups = [g for g in self.structure.groups if g.layer == layer]
        pruned = any(map(self.pair.is_pruned, groups))
        stages = self._stages(block) if self.changed or pruned else []
        while stages and not self.changed:
            first = [m.group for m in stages[0] if m.group is not None]
            self.changed = any(map(self.pair.is_pruned, first))
            stages = stages if self.changed else stages[1:]
        for stage in stages:
            self._refit(stage, block, closing=stage is stages[-1])
        if not stages:
            self._pass(self.network.module, self.dense_done, block)
        self._pass(self.pruned, self.pruned_done, block)

    def _pass(self, module: nn.Module, done_by_batch: SpillList[dict[str, PyTree]], block: str) -> None:
        for local, index in enumerate(self.own):
            done = done_by_batch[local]
            with replay_blocks(module, done):
                output = forward_until(module, self.batches[index], block)
            done_by_batch[local] = self._with(done, block, output)

    def _with(self, done: dict[str, PyTree], block: str, output: PyTree) -> dict[str, PyTree]:
        """Return ``done`` with ``output``; earlier blocks keep only shapes if they are only skipped."""
        if not self.skips:
            keep_shapes_only(done)
        return {**done, block: output}

    def tail(self) -> None:
        """Refit the layers after the last block."""
        for stage in self._stages(None) if self.changed else []:
            self._refit(stage, None, closing=False)

    def _stages(self, block: str | None) -> list[list[RefitLayer]]:
        """Return the layers of a block, and those between the block before and it, in stages with the same input.

        Without a block they are those after the last block.
        """
        runs = self._trace(block)
        self.passed.update(runs)
        self.runs.update({name: len(each) for name, each in runs.items()})
        stages: list[list[RefitLayer]] = []
        previous: tuple[int, int] | None = None
        for name, each in runs.items():
            # A layer that runs several times has its turn where it runs first; its inputs must have one shape.
            if len({run.input.shape if run.input is not None else None for run in each}) > 1:
                continue
            layer = self.layers[name]
            key = None if layer.group is not None else each[0].key
            if key is not None and key == previous:
                stages[-1].append(layer)
            else:
                stages.append([layer])
            previous = key
        return _shortcuts_first(stages)

    def _trace(self, block: str | None) -> dict[str, list[_Run]]:
        """Run the pruned network through ``block``; return the runs of layers that had no turn, by first run."""
        # The runs hold their inputs: freed memory would make the inputs of two layers look like one.
        runs: dict[str, list[_Run]] = {}

        def note(name: str, _: nn.Module, args: tuple[object, ...], __: object) -> None:
            first = first_tensor(args)
            version = 0 if first is None or first.is_inference() else first._version
            runs.setdefault(name, []).append(_Run(name, first, version))

        others = [b for b in self.structure.blocks if b != block]
        free = [m for m in self.layers if m not in self.passed and not any(is_inside(m, b) for b in others)]
        with forward_hooks(self.pruned, free, after=note), replay_blocks(self.pruned, self.pruned_done[0]):
            if block is None:
                self.pruned(**self.batches[self.own[0]])
            else:
                forward_until(self.pruned, self.batches[self.own[0]], block)
        return runs

    def _targets(
        self, stage: list[RefitLayer], block: str | None, batch: Batch, local: int, closing: bool
    ) -> dict[str, Tensor]:
        """Return the outputs of a stage's layers in the dense network; those of projections in units of the stream.

        The network runs again for every stage, and through the block for the last one: storing the outputs of all
        layers for all batches would take far more memory.

        Args:
            local: index of the batch among those of this process.
        """
        module, done = self.network.module, self.dense_done[local]
        groups = [m.group for m in stage if m.group is not None]
        with replay_blocks(module, done), _streams(module, groups) as streams, _outputs(module, stage) as outputs:
            if closing and block is not None:
                output = forward_until(module, batch, block)
            else:
                self._run(module, batch, block, stage, stage[-1].dense)
        if closing and block is not None:
            self.dense_done[local] = self._with(done, block, output)
        targets = {}
        for layer in stage:
            axis = _axis(module.get_submodule(layer.dense))
            target = channels_last(outputs[layer.dense], axis)
            if layer.group is not None and layer.group.stream.known:
                scale, shift = stream_scale(module, layer.group), stream_shift(module, layer.group)
                target = target if scale is None else target * scale
                target = target if shift is None else target + shift
                target = target + channels_last(streams[layer.group.name], axis)
            elif layer.outputs is not None:
                factors = layer.outputs.to(target)
                target = (target * factors)[..., factors != 0]
            targets[layer.module] = target
        return targets

    def _run(self, module: nn.Module, batch: Batch, block: str | None, stage: Sequence[RefitLayer], last: str) -> None:
        """Run ``module`` as far as a stage needs it; ``last`` is the name of its last layer there."""
        if block is None:
            module(**batch)
        else:
            # A shortcut may run after the projection, and a layer may run again.
            whole = any(self.runs[m.module] > 1 or (m.group is not None and m.group.stream.shortcut) for m in stage)
            forward_until(module, batch, block if whole else last)

    def _refit(self, stage: list[RefitLayer], block: str | None, *, closing: bool) -> None:
        sums: dict[str, list[Moments | None]] = {m.module: [None, None] for m in stage}
        for local, index in enumerate(self.own):
            held_out, batch = self.hold_out and is_held_out(index, len(self.batches)), self.batches[index]
            targets = self._targets(stage, block, batch, local, closing)
            for name, (x, y) in self._rows(stage, block, batch, self.pruned_done[local], targets).items():
                before = sums[name][held_out]
                sums[name][held_out] = Moments.of(x, y) if before is None else before.add(x, y)
        for layer in stage:
            training, held_out_moments = self._total(*sums[layer.module])
            self._write(layer, training, held_out_moments)

    def _total(self, training: Moments | None, held_out: Moments | None) -> tuple[Moments, Moments | None]:
        """Return the sums over all processes; some may have no batch of one kind."""
        some = training or held_out
        assert some is not None
        training = (training or some.of_nothing()).all_reduce(self.ranks)
        return training, (held_out or some.of_nothing()).all_reduce(self.ranks) if self.hold_out else None

    def _rows(
        self,
        stage: list[RefitLayer],
        block: str | None,
        batch: Batch,
        done: dict[str, PyTree],
        targets: dict[str, Tensor],
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return rows of the inputs of a stage's layers in the pruned network, and of their targets."""
        groups = [m.group for m in stage if m.group is not None]
        names, of_batch = tuple(m.module for m in stage if not m.vanished), self.network.valid_tokens(batch)
        recorded = record_inputs(self.pruned, names)
        with replay_blocks(self.pruned, done), _streams(self.pruned, groups) as streams, recorded as inputs:
            self._run(self.pruned, batch, block, stage, stage[-1].module)
        rows_of = {}
        for layer in stage:
            target = targets[layer.module]
            valid = of_batch if of_batch is None else of_batch.repeat(self.runs[layer.module], 1)
            if layer.group is not None and layer.group.stream.known:
                target = self._projection_target(layer.group, target, streams[layer.group.name])
            target = valid_rows(target, valid)
            rows = some_rows(len(target))
            if layer.vanished:
                x = target[rows, :0]
            else:
                x = design_rows(self.pruned.get_submodule(layer.module), inputs[layer.module], rows, valid)
            rows_of[layer.module] = x, target[rows]
        return rows_of

    def _projection_target(self, group: Group, after: Tensor, before: Tensor) -> Tensor:
        """Return the output of the projection that brings the stream from ``before`` to ``after``."""
        target = after - channels_last(before, group.axis)
        shift, scale = stream_shift(self.pruned, group), stream_scale(self.pruned, group)
        target = target if shift is None else target - shift
        # A factor of zero hides the output of the projection.
        return target if scale is None else target / torch.where(scale == 0, 1.0, scale)

    def _write(self, layer: RefitLayer, training: Moments, held_out: Moments | None) -> None:
        module = self.pruned.get_submodule(layer.module)
        bias = output_bias(self.pruned, layer.group) if layer.group is not None else module.bias
        norm_bias = None
        if bias is None and layer.group is not None and layer.group.stream.norm is not None:
            norm_bias = self.pruned.get_submodule(layer.group.stream.norm).bias
        old = torch.zeros_like(training.cross)
        if not layer.vanished:
            old[:-1] = weight_matrix(module).T.double()
        if isinstance(bias, Tensor):
            old[-1] = bias.double()
        free = isinstance(bias, Tensor) or norm_bias is not None
        name = None if layer.vanished else layer.module
        solution = self.ranks.broadcast(lambda: self.refit(name, training, held_out, old, bias=free), old)
        if not layer.vanished:
            set_weight_matrix(module, solution[:-1].T)
        if isinstance(bias, Tensor):
            bias.copy_(solution[-1])
        elif isinstance(norm_bias, Tensor):
            assert layer.group is not None
            scale = stream_scale(self.pruned, layer.group)
            assert scale is not None
            norm_bias.add_(solution[-1] * scale)


def _shortcuts_first(stages: list[list[RefitLayer]]) -> list[list[RefitLayer]]:
    """Return the stages in an order in which layers in a shortcut come before the projection that is added to it."""
    ordered: list[list[RefitLayer]] = []
    for stage in stages:
        shortcuts = [
            m.group.stream.shortcut for m in stage if m.group is not None and m.group.stream.shortcut is not None
        ]
        early = [s for s in stages if any(is_inside(m.module, name) for m in s for name in shortcuts)]
        ordered += [s for s in (*early, stage) if s not in ordered]
    return ordered


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
def _outputs(module: nn.Module, layers: Sequence[RefitLayer]) -> Iterator[dict[str, Tensor]]:
    """Collect copies of the layers' outputs in the dense network: a later activation may work in place."""
    found: dict[str, Tensor] = {}

    def copy(name: str, _: nn.Module, __: object, output: Tensor) -> None:
        found[name] = cat_batch(found.get(name), output.clone())

    with forward_hooks(module, [layer.dense for layer in layers], after=copy):
        yield found


def _has_skips(module: nn.Module, structure: Structure, batch: Batch) -> bool:
    """Return whether anything except the next block reads a block's output, as in a U-Net; found by hiding it."""
    done: dict[str, PyTree] = {}
    for block in structure.blocks:
        with replay_blocks(module, done):
            output = forward_until(module, batch, block)
        if not _is_finite(output):
            return True
        keep_shapes_only(done)
        done[block] = output
    with replay_blocks(module, done):
        return not _is_finite(module(**batch))


def _is_finite(output: PyTree) -> bool:
    return all(bool(t.isfinite().all()) for t in named_outputs(output).values())
