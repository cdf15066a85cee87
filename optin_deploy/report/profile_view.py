"""A network's profile and its latency tables for the terminal, within 100 columns."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from optin_deploy.report import wording
from optin_deploy.utils import formatting
from optin_deploy.utils.display import html_of
from profilers.stats import Summary


@dataclass(frozen=True)
class PartTime:
    """A part of the network (attention, FFN, …) and what it takes of one run, in milliseconds."""

    name: str
    ms: float


@dataclass(frozen=True)
class NetworkProfile:
    """The latency of one network.

    ``parts`` are scaled so that they sum to the median, with what no operator takes as "between operators"; none where
    the runtime has no profile by layer.
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
        return html_of(profile_view("network", self))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict whose keys are the attributes."""
        return {**asdict(self), "throughput_per_s": self.throughput_per_s}


@dataclass(frozen=True)
class SizeRow:
    """A size of a part of a block: milliseconds that the block takes with it, and whether a search takes it.

    ``spread`` is half the middle half of its samples, relative to their median.
    """

    units: int
    width: int | None
    block_ms: float
    of_dense: float
    spread: float
    edge: bool


@dataclass(frozen=True)
class PartTable:
    """The sizes of one part of one type of block; ``blocks`` are how many of the network's are of that type."""

    block: str
    blocks: int
    part: str
    dense_block_ms: float
    rows: tuple[SizeRow, ...]


@dataclass(frozen=True)
class TableView:
    """The latency tables of a network: its dense latency, what is left with every unit removed, and every part's sizes.

    ``dense_ms``, ``floor_ms`` are of now, the tables' own figures of when they were measured.
    """

    runtime: str
    batch_size: int
    threads: int
    dense_ms: float
    floor_ms: float
    cached: int
    parts: tuple[PartTable, ...]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict whose keys are the attributes."""
        return asdict(self)


def profile_view(name: str, profile: NetworkProfile) -> Group:
    """Latency, throughput, and where the time goes."""
    summary = profile.summary
    title = Text(f"{name}: {_where(profile)}", style="bold")
    head = _table()
    for column in ("p50 ms", "p90 ms", "p99 ms", "samples/s", "runs"):
        head.add_column(column, justify="right")
    latencies = (formatting.milliseconds(ms) for ms in (summary.p50_ms, summary.p90_ms, summary.p99_ms))
    head.add_row(*latencies, formatting.per_second(profile.throughput_per_s), str(summary.count))
    if not profile.parts:
        note = f"{wording.runtime_name(profile.runtime)} has no profile by layer."
        return Group(title, head, Text(note, style="dim"))
    parts = _table()
    for column in ("part", "ms", "share"):
        parts.add_column(column, justify="left" if column == "part" else "right")
    for part in profile.parts:
        parts.add_row(part.name, formatting.milliseconds(part.ms), formatting.percent(part.ms / summary.p50_ms))
    return Group(title, head, Text("\nwhere the time goes", style="bold"), parts)


def profile_line(profile: NetworkProfile) -> str:
    """The same on one line, with what takes most of the time."""
    summary = profile.summary
    figures = {"p50": summary.p50_ms, "p90": summary.p90_ms, "p99": summary.p99_ms}
    told = ", ".join(f"{name} {formatting.milliseconds(ms)} ms" for name, ms in figures.items())
    most = max(profile.parts, key=lambda part: part.ms, default=None)
    where = f"; most of it {most.name}, {formatting.percent(most.ms / summary.p50_ms)}" if most else ""
    return f"{_where(profile)}: {told}{where}"


def table_view(name: str, view: TableView) -> Group:
    """Dense latency, floor, and every part's sizes."""
    head = Text.assemble(
        (f"{name}: {_where(view)}\n", "bold"),
        f"dense {formatting.milliseconds(view.dense_ms)} ms; with every prunable unit removed "
        f"{formatting.milliseconds(view.floor_ms)} ms ({formatting.percent(view.floor_ms / view.dense_ms)})",
    )
    return Group(head, *(_part(part) for part in view.parts))


def cache_view(settings: Sequence[Mapping[str, Any]], folder: str) -> RenderableType:
    """The tables that are kept, a line each."""
    if not settings:
        return Text(f"no latency tables in {folder}: --model measures those of a network")
    table = _table()
    for column in ("runtime", "batch", "threads", "block", "input", "device", "versions"):
        table.add_column(column, justify="right" if column in ("batch", "threads") else "left", overflow="fold")
    for setting in settings:
        block = setting["block"]
        versions = ", ".join(f"{package} {version}" for package, version in setting["versions"].items())
        shape = " × ".join(str(n) for n in block["inputs"][0][1:])
        sizes = (str(setting["batch_size"]), str(setting["threads"]))
        table.add_row(setting["runtime"], *sizes, block["class"], shape, setting["device"], versions)
    return Group(Text(f"latency tables in {folder}", style="bold"), table)


def _part(part: PartTable) -> Group:
    times = f" × {part.blocks}" if part.blocks > 1 else ""
    title = f"\n{part.part} of {part.block}{times}: dense block {formatting.milliseconds(part.dense_block_ms)} ms"
    made = _table()
    wide = any(row.width is not None for row in part.rows)
    for column in ("units", *(["width"] if wide else []), "block ms", "of dense", "spread", ""):
        made.add_column(column, justify="right" if column else "left")
    for row in part.rows:
        width = [str(row.width) if row.units else "–"] if wide else []
        figures = (formatting.milliseconds(row.block_ms), f"{row.of_dense:.3f}", f"±{100 * row.spread:.1f} %")
        made.add_row(str(row.units), *width, *figures, "edge" if row.edge else "")
    return Group(Text(title, style="bold"), made)


def _where(of: NetworkProfile | TableView) -> str:
    threads = f"{of.threads} thread{'s' if of.threads > 1 else ''}"
    return f"{wording.runtime_name(of.runtime)}, batch {of.batch_size}, {threads}"


def _table() -> Table:
    # A table's own title would be folded to the width of the table.
    return Table(header_style="dim", box=None, pad_edge=False)
