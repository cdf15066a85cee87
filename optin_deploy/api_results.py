"""What the functions of ``api`` give: plain values, each of which shows itself."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from exporters import EngineInfo, OutputParity, Precision
from optin_deploy.criteria.scoring import Scoring
from optin_deploy.report import values
from optin_deploy.utils import formatting
from optin_deploy.utils.display import html_of
from profilers import Comparison, Measurement


@dataclass(frozen=True, eq=False)
class Scores(Mapping[str, Tensor]):
    """What every unit is worth: group name -> float64 ``(units,)``; a higher score matters more.

    Attributes:
        units: the mapping itself, as plain as `optin_deploy.plan` takes it.
        scoring: how units were scored.
        samples: on how many samples.
    """

    units: Mapping[str, Tensor]
    scoring: Scoring
    samples: int

    def __getitem__(self, group: str) -> Tensor:
        return self.units[group]

    def __iter__(self) -> Iterator[str]:
        return iter(self.units)

    def __len__(self) -> int:
        return len(self.units)

    def __repr__(self) -> str:
        count = sum(len(scores) for scores in self.units.values())
        return f"<Scores by {self.scoring.criterion} on {self.samples} samples: {count} units in {len(self)} groups>"

    def _repr_html_(self) -> str:
        return html_of(values.scores_view(repr(self)[1:-1], self.units))


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX file that computes what torch does.

    Attributes:
        path: of the file; weights of 1.9 GB and more are beside it.
        precision: of its weights and activations; inputs and outputs are float32.
        inputs: name -> shape, with the names of dynamic axes.
        outputs: names.
        sizes: name of a dynamic axis -> its size in the sample inputs.
        parity: how far every output is from torch's, at worst.
    """

    path: Path
    precision: Precision
    inputs: Mapping[str, tuple[int | str, ...]]
    outputs: tuple[str, ...]
    sizes: Mapping[str, int]
    parity: tuple[OutputParity, ...]

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} [{', '.join(map(str, shape))}]" for name, shape in self.inputs.items())
        error = max(each.max_abs_error for each in self.parity)
        mib = formatting.significant(self.path.stat().st_size / 2**20)
        return (
            f"<OnnxFile {self.path} ({mib} MiB, {self.precision}): "
            f"{shapes} -> {', '.join(self.outputs)}; largest error against torch {error:.1e}>"
        )


@dataclass(frozen=True)
class EngineFile:
    """An engine, and what it was built of, by what and for what."""

    path: Path
    info: EngineInfo

    def __repr__(self) -> str:
        shapes = ", ".join(f"{n} {list(r.least)} to {list(r.most)}" for n, r in self.info.inputs.items())
        return f"<EngineFile {self.path} ({self.info.builder} {self.info.builder_version}): {shapes}>"


@dataclass(frozen=True)
class Compared:
    """Dense against pruned, measured here; ``flops_reduction`` is dense ÷ pruned, None where files were measured."""

    comparison: Comparison
    flops_reduction: float | None

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        """One for each runtime and batch size."""
        return self.comparison.measurements

    @property
    def realised(self) -> tuple[float, ...]:
        """The realised ratio of each measurement, speed-up ÷ FLOP reduction; none where FLOPs are not known."""
        return tuple(m.speedup.value / self.flops_reduction for m in self.measurements if self.flops_reduction)

    def __repr__(self) -> str:
        return values.comparison_lines(self.measurements, self.flops_reduction)

    def _repr_html_(self) -> str:
        return html_of(values.comparison_view(self.measurements, self.flops_reduction))
