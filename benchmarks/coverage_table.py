"""The page ``docs/coverage.md`` out of the rows of the coverage benchmark."""

from collections.abc import Mapping, Sequence
from typing import Any

from coverage_worker import COLUMNS, PEER_COLUMNS

_HEADINGS = {
    "score": "scored",
    "slice": "cut = masked",
    "budget": "budget",
    "reload": "reload",
    "onnx": "ONNX",
    "speed": "ORT speed-up",
}
_MOST_DENSE = 3
_TOLD_SHARE = 0.02

_HEAD = """# What can be pruned

Made by `python benchmarks/coverage.py`; do not edit. Every architecture is built small, with random weights, pruned
through the package's own interface and put to the test:

- **prunable**: the part of its FLOPs that lies in prunable groups;
- **scored**: scores of all units are numbers, and a plan is found;
- **cut = masked**: the network without the units is the one in which they are masked, to 1e-5;
- **budget**: 0.5 of the FLOPs is asked for, or the least that can be reached, rounded up; `→` is what came out;
- **reload**: the checkpoint gives the same outputs when it is loaded again;
- **ONNX**: the exported file computes what torch does, at three batch sizes;
- **ORT speed-up**: dense ÷ pruned under ONNX Runtime on one CPU thread at batch 1, interleaved, with its 95 % interval;
  passes where pruned is not slower than dense beyond what dense differs by from itself. Networks this small are far
  from the speed-ups of real ones.

torch-pruning (DepGraph, its public interface, given the number of heads of every attention) runs over the same list:
whether it runs, comes within 0.01 of the same budget, and exports.
"""


def page(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The whole page, a table for each family."""
    parts = [_HEAD, _summary(rows)]
    for family in dict.fromkeys(row["family"] for row in rows.values()):
        some = {name: row for name, row in rows.items() if row["family"] == family}
        parts.append(f"## {family[0].upper()}{family[1:]}\n\n{_table(some)}\n{_notes(some)}")
    return "\n".join(parts).rstrip() + "\n"


def passed(row: Mapping[str, Any]) -> bool:
    """Whether every column passed."""
    return all(column in row["columns"] and row["columns"][column] is None for column in COLUMNS)


def _summary(rows: Mapping[str, Mapping[str, Any]]) -> str:
    whole, peers = sum(passed(row) for row in rows.values()), [row["peer"] for row in rows.values() if row["peer"]]
    told = f"**{whole} of {len(rows)} architectures pass every column.**"
    partly = [row for row in rows.values() if not passed(row) and all(r is None for r in row["columns"].values())]
    if partly:
        told += f" {len(partly)} more pass all that was examined of them so far; a dash is what was not."
    if peers:
        theirs = sum(all(peer.get(column, "") is None for column in PEER_COLUMNS) for peer in peers)
        told += f" torch-pruning passes its three columns on {theirs} of {len(peers)}."
    return told + "\n"


def _table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    heading = ["architecture", "prunable", *_HEADINGS.values(), "torch-pruning: runs", "budget", "ONNX"]
    lines = [heading, [":--", *["--:" for _ in heading[1:]]]]
    for name, row in rows.items():
        cells = [_cell(row, column) for column in COLUMNS]
        peer = [_mark(row["peer"], column) for column in PEER_COLUMNS]
        if row["peer_reached"] is not None:
            peer[1] += f" {row['peer_reached']:.2f}"
        lines.append([_short(name), f"{row['prunable']:.0%}", *cells, *peer])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(row: Mapping[str, Any], column: str) -> str:
    mark = _mark(row["columns"], column)
    if column == "budget" and row["reached"] is not None:
        return f"{mark} {row['asked']:.2f} → {row['reached']:.3f}"
    if column == "speed" and row["speedup"] is not None:
        speedup = row["speedup"]
        return f"{mark} {speedup['value']:.2f} [{speedup['low']:.2f}–{speedup['high']:.2f}]"
    return mark


def _mark(columns: Mapping[str, str | None], column: str) -> str:
    return "–" if column not in columns else "✓" if columns[column] is None else "✗"


def _notes(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """What failed and what stayed dense, a line each."""
    failed = [
        f"- {_short(name)}, {_HEADINGS[column]}: {_escaped(reason)}"
        for name, row in rows.items()
        for column, reason in row["columns"].items()
        if reason is not None
    ]
    dense = [f"- {_short(name)}: {told}" for name, row in rows.items() if (told := _dense(row["left_dense"]))]
    theirs = [
        f"- {_short(name)}, {column}: {_escaped(reason)}"
        for name, row in rows.items()
        for column, reason in row["peer"].items()
        if reason is not None
    ]
    return (
        _details("Why columns fail", failed)
        + _details(f"Left dense, with its share of the FLOPs (of {_TOLD_SHARE:.0%} and more)", dense)
        + _details("Why columns of torch-pruning fail", theirs)
    )


def _dense(left: Sequence[Mapping[str, Any]]) -> str:
    some = [each for each in left if each["flops_share"] >= _TOLD_SHARE][:_MOST_DENSE]
    return "; ".join(f"`{each['module']}` {each['flops_share']:.0%}, {_escaped(each['reason'])}" for each in some)


def _details(title: str, lines: Sequence[str]) -> str:
    return f"\n<details><summary>{title}</summary>\n\n" + "\n".join(lines) + "\n\n</details>\n" if lines else ""


def _short(name: str) -> str:
    return name.partition(": ")[2]


def _escaped(text: str) -> str:
    """Nothing in it that Markdown would read as more than text."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in text)
