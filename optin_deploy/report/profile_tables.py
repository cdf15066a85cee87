"""A network's profile and its latency tables for the terminal, within 100 columns."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from optin_deploy.report import wording
from optin_deploy.utils import formatting
from optin_deploy.utils.display import Table, html_of, render_table
from profilers.stats import Summary


@dataclass(frozen=True)
class PartTime:
    """A part of the network (attention, FFN, …) and its milliseconds in one run."""

    name: str
    ms: float


@dataclass(frozen=True)
class NetworkProfile:
    """The latency of one network.

    ``parts`` are scaled so that they sum to the median; "between operators" is the time outside operators. They are
    empty if the runtime has no profile by layer.
    """

    runtime: str
    batch_size: int
    threads: int
    summary: Summary
    parts: tuple[PartTime, ...]

    @property
    def throughput_per_s(self) -> float:
        """All samples ÷ the time of all runs, in seconds."""
        return 1000 * self.batch_size / self.summary.mean_ms

    def __repr__(self) -> str:
        return f"<NetworkProfile {profile_line(self)}>"

    def _repr_html_(self) -> str:
        return html_of(render_profile("network", self))

    def to_dict(self) -> dict[str, object]:
        """Return a dict of plain JSON values, with the attributes as keys."""
        return {**asdict(self), "throughput_per_s": self.throughput_per_s}


@dataclass(frozen=True)
class SizeRow:
    """A size of one part of a block: the block's milliseconds at it, and whether the search uses it (``edge``).

    ``spread`` is half the interquartile range of the samples, relative to their median.
    """

    units: int
    width: int | None
    block_ms: float
    of_dense: float
    spread: float
    edge: bool


@dataclass(frozen=True)
class PartTable:
    """The sizes of one part of one type of block; ``blocks`` is the number of blocks of that type."""

    block: str
    blocks: int
    part: str
    dense_block_ms: float
    rows: tuple[SizeRow, ...]


@dataclass(frozen=True)
class LatencyTables:
    """The latency tables of a network: dense latency, floor with every unit removed, sizes of each part.

    ``dense_ms`` and ``floor_ms`` were measured now; the figures in the tables are from when the tables were made.
    """

    runtime: str
    batch_size: int
    threads: int
    dense_ms: float
    floor_ms: float
    cached: int
    parts: tuple[PartTable, ...]

    def to_dict(self) -> dict[str, object]:
        """Return a dict of plain JSON values, with the attributes as keys."""
        return asdict(self)


def render_profile(name: str, profile: NetworkProfile) -> Group:
    """Return latency, throughput and latency breakdown for a rich console."""
    summary = profile.summary
    latencies = [formatting.milliseconds(ms) for ms in (summary.p50_ms, summary.p90_ms, summary.p99_ms)]
    latency = Table(
        ("p50 ms", "p90 ms", "p99 ms", "samples/s", "runs"),
        [(*latencies, formatting.per_second(profile.throughput_per_s), str(summary.count))],
        left=frozenset(),
    )
    head = render_table(latency, f"{name}: {_where(profile)}")
    if not profile.parts:
        note = f"{wording.runtime_name(profile.runtime)} has no profile by layer."
        return Group(head, Text(note, style="dim"))
    rows = [
        (part.name, formatting.milliseconds(part.ms), formatting.percent(part.ms / summary.p50_ms))
        for part in profile.parts
    ]
    return Group(head, render_table(Table(("part", "ms", "share"), rows), "\nlatency breakdown"))


def profile_line(profile: NetworkProfile) -> str:
    """Return one line with the latency and the slowest part."""
    summary = profile.summary
    figures = {"p50": summary.p50_ms, "p90": summary.p90_ms, "p99": summary.p99_ms}
    latencies = ", ".join(f"{name} {formatting.milliseconds(ms)} ms" for name, ms in figures.items())
    most = max(profile.parts, key=lambda part: part.ms, default=None)
    where = f"; most of it {most.name}, {formatting.percent(most.ms / summary.p50_ms)}" if most else ""
    return f"{_where(profile)}: {latencies}{where}"


def render_latency_tables(name: str, view: LatencyTables) -> Group:
    """Return the dense latency, the latency floor, and the sizes of every part for a rich console."""
    head = Text.assemble(
        (f"{name}: {_where(view)}\n", "bold"),
        f"dense {formatting.milliseconds(view.dense_ms)} ms; with every prunable unit removed "
        f"{formatting.milliseconds(view.floor_ms)} ms ({formatting.percent(view.floor_ms / view.dense_ms)})",
    )
    return Group(head, *(_part(part) for part in view.parts))


def render_cache(settings: Sequence[Mapping[str, Any]], folder: str) -> RenderableType:
    """Return the latency tables in the cache, one row each."""
    if not settings:
        return Text(f"no latency tables in {folder}: --model measures those of a network")
    heading = ("runtime", "batch", "threads", "block", "input", "device", "versions")
    table = Table(heading, [_cache_row(setting) for setting in settings], left=frozenset({0, 3, 4, 5, 6}))
    return render_table(table, f"latency tables in {folder}")


def _cache_row(setting: Mapping[str, Any]) -> tuple[str, ...]:
    block = setting["block"]
    versions = ", ".join(f"{package} {version}" for package, version in setting["versions"].items())
    shape = " × ".join(str(n) for n in block["inputs"][0][1:])
    sizes = (str(setting["batch_size"]), str(setting["threads"]))
    return (setting["runtime"], *sizes, block["class"], shape, setting["device"], versions)


def _part(part: PartTable) -> RenderableType:
    times = f" × {part.blocks}" if part.blocks > 1 else ""
    title = f"\n{part.part} of {part.block}{times}: dense block {formatting.milliseconds(part.dense_block_ms)} ms"
    with_width = any(row.width is not None for row in part.rows)
    heading = ("units", *(["width"] if with_width else []), "block ms", "of dense", "spread", "")
    rows = []
    for row in part.rows:
        width = [str(row.width) if row.units else "–"] if with_width else []
        figures = (formatting.milliseconds(row.block_ms), f"{row.of_dense:.3f}", f"±{100 * row.spread:.1f} %")
        rows.append((str(row.units), *width, *figures, "edge" if row.edge else ""))
    return render_table(Table(heading, rows, left=frozenset({len(heading) - 1})), title)


def _where(value: NetworkProfile | LatencyTables) -> str:
    return f"{wording.runtime_name(value.runtime)}, batch {value.batch_size}, {wording.threads(value.threads)}"
