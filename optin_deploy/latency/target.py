"""Where a latency is measured and how thoroughly, and the files that the target's runtime loads."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from exporters import (
    DynamicAxes,
    EngineConfig,
    OnnxSpec,
    Precision,
    build_engine,
    in_precision,
    input_ranges,
    onnx_in_precision,
    save_program,
    trace,
)
from optin_deploy.config.recipe import Recipe
from optin_deploy.export.engines import timing_cache
from optin_deploy.network import Network
from profilers import RUNTIMES, Case, loads_for, usable_cores


@dataclass(frozen=True)
class LatencySettings:
    """How finely latency tables are measured, and how long plans are searched for and measured.

    Attributes:
        depth: blocks in a stack.
        sizes: sizes of a group of neurons or channels: enough to see a staircase, few enough for a minute.
        sizes_within_step: distances of further sizes within one step, which show stairs narrower than the step.
        head_counts: numbers of heads that are measured.
        head_widths: widths of heads that are measured at each of these.
        anchor_seconds: time limit of the dense network's measurement next to the stacks.
        iterations: how often a plan is searched, built and measured, at most.
        plan_seconds: time limit of the measurement of one iteration's plans.
    """

    depth: int = 3
    sizes: int = 12
    sizes_within_step: tuple[int, ...] = (16, 32, 48, 64, 96)
    head_counts: int = 3
    head_widths: int = 4
    anchor_seconds: float = 10.0
    iterations: int = 3
    plan_seconds: float = 60.0


DEFAULT_SETTINGS = LatencySettings()
"""The settings of `target_of`. Tests replace them to be quick."""


@dataclass(frozen=True)
class Target:
    """Where a latency is measured: runtime, batch size, CPU threads. ``seconds`` is the time limit of one table."""

    runtime: str
    batch_size: int
    threads: int
    opset: int = 20
    seconds: float = 60.0
    seed: int = 0
    precision: Precision = "fp32"
    settings: LatencySettings = DEFAULT_SETTINGS

    def case(self, seconds: float, compared: Iterable[Path] = ()) -> Case:
        """Return a measurement of at most ``seconds``, which ends earlier when ratios have settled to a hundredth.

        Files that are ``compared`` are loaded as often as `profilers.loads_for` says.
        """
        return Case(
            self.runtime,
            self.batch_size,
            self.threads,
            seconds,
            self.seed,
            tolerance=0.01,
            loads=loads_for(self.runtime, compared),
            tf32=self.precision == "tf32",
        )


def target_of(recipe: Recipe) -> Target:
    """Return where a latency budget of ``recipe`` holds, or would hold."""
    return Target(
        recipe.target_runtime,
        recipe.target_batch_size,
        recipe.threads or usable_cores().physical,
        recipe.opset,
        recipe.table_seconds,
        recipe.seed,
        recipe.precision,
        DEFAULT_SETTINGS,
    )


def write_module(
    module: nn.Module, inputs: Mapping[str, Tensor], axes: DynamicAxes, target: Target, stem: Path
) -> Path:
    """Write the file that the target's runtime loads, named ``stem`` with a suffix.

    Args:
        module: returns a tensor or a tuple of tensors.
        inputs: a sample batch by forward's argument names.
    """
    program = in_precision(trace(module, inputs, axes), target.precision, target.opset)
    artifact = RUNTIMES[target.runtime]
    if artifact == "program":
        save_program(program, stem.with_suffix(".pt2"))
        return stem.with_suffix(".pt2")
    onnx, engine = stem.with_suffix(".onnx"), stem.with_suffix(".engine")
    names = tuple(f"y{i}" for i in range(len(program.graph_signature.user_outputs)))
    # Calibrated ranges do not change how long 8 bits take: one sample is enough.
    onnx_in_precision(program, onnx, OnnxSpec(names, axes, target.opset), target.precision, [inputs])
    if artifact == "onnx":
        return onnx
    shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
    ranges = input_ranges(shapes, axes, (target.batch_size,), target.batch_size, static=True)
    config = EngineConfig(target.runtime, tf32=target.precision == "tf32")
    build_engine(onnx, engine, ranges, config, timing_cache(target.runtime))
    return engine


def write_network(network: Network, module: nn.Module, target: Target, stem: Path) -> Path:
    """Write the file of ``module``, which takes the place of the network's own; see `write_module`."""
    return write_module(network.tensor_outputs(module), network.inputs, network.dynamic_axes, target, stem)
