"""What ``benchmarks/gpu.sh`` measured, as Markdown and line by line."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu.record import NAME

NOTHING = "Nothing was measured on a GPU yet: `sh benchmarks/gpu.sh` does it."
_METHODS = {
    "trajectory-obs": "trajectory-obs",
    "trajectory": "trajectory, sketch (heads exactly)",
    "trajectory-exact": "trajectory, exact",
}


def of_folder(results: Path) -> str:
    """The tables of all GPUs that have a folder in ``results``; a sentence where none has."""
    paths = sorted(path for path in results.glob(f"*/{NAME}.json") if path.parent.name != "cpu")
    return "\n\n".join(markdown(path) for path in paths) if paths else NOTHING


def markdown(path: Path) -> str:
    """Tables of one device, and what failed, is not available or was not reached."""
    written = json.loads(path.read_text(encoding="utf-8"))
    figures, versions = written["figures"], written["environment"]["versions"]
    rows = figures["rows"]
    parts = {part: [row for key, row in rows.items() if key.startswith(f"{part}/")] for part in _TABLES}
    title = f"{figures['basis']['device']}, torch {figures['basis']['torch']}, " + ", ".join(
        f"{name} {versions[name]}" for name in ("onnxruntime", "onnxruntime-gpu") if versions.get(name)
    )
    tables = [_table(*_TABLES[part](found)) for part, found in parts.items() if found]
    lists = [
        _list(title, figures[name])
        for name, title in (("unavailable", "Not available"), ("failed", "Failed"), ("not_measured", "Not measured"))
        if figures[name]
    ]
    return "\n\n".join([title.removesuffix(", "), *tables, *lists])


def in_a_line(row: Mapping[str, Any]) -> str:
    """The gist of a row."""
    if "speedup" not in row:
        return f"{row['seconds']:.2f} s" + (" (extrapolated)" if _extrapolated(row) else "")
    return f"{_ratio(row['speedup'])} faster, realised {row['realised']:.2f}"


def _scoring(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    heading = ["Network", "Criterion", "units", "samples", "seconds", "extrapolated from"]
    return heading, [
        [
            row["network"],
            _METHODS[row["method"]],
            f"{row['units']:,}",
            str(row["samples"]),
            f"{row['seconds']:.3g}",
            f"{row['measured_units']:,} units on one batch" if _extrapolated(row) else "–",
        ]
        for row in rows
    ]


def _pruning(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    heading = ["Network", "samples", "scored, searched, compensated in s", "FLOPs left"]
    return heading, [[r["network"], str(r["samples"]), f"{r['seconds']:.3g}", f"{r['flops']:.3f}"] for r in rows]


def _latency(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    heading = ["Network", "Precision", "Runtime", "batch", "dense p50 ms", "pruned p50 ms", "pruned samples/s"]
    ordered = sorted(rows, key=lambda row: (row["network"], row["precision"], row["runtime"], row["batch_size"]))
    return [*heading, "speed-up", "realised", "dense ÷ dense again"], [
        [
            row["network"],
            row["precision"],
            row["runtime"],
            str(row["batch_size"]),
            f"{row['summary']['dense']['p50_ms']:.3g}",
            f"{row['summary']['pruned']['p50_ms']:.3g}",
            f"{row['batch_size'] * 1e3 / row['summary']['pruned']['mean_ms']:,.0f}",
            _ratio(row["speedup"]),
            f"{row['realised']:.2f}",
            _ratio(row["noise"]),
        ]
        for row in ordered
    ]


_TABLES = {"scoring": _scoring, "pruning": _pruning, "latency": _latency}


def _extrapolated(row: Mapping[str, Any]) -> bool:
    return row.get("measured_units") != row.get("units")


def _ratio(interval: Mapping[str, float]) -> str:
    return f"{interval['value']:.2f}× [{interval['low']:.2f}–{interval['high']:.2f}]"


def _table(heading: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [heading, ["---"] * len(heading), *lines])


def _list(title: str, reasons: Mapping[str, str]) -> str:
    """One line for each reason, with all that it holds for; batch sizes, which come last in a key, together."""
    by_reason: dict[str, dict[str, list[str]]] = {}
    for key, reason in reasons.items():
        name, _, size = key.rpartition("/") if key.startswith("latency/") else (key, "", "")
        by_reason.setdefault(reason, {}).setdefault(name, []).append(size)
    return "\n".join(
        f"- {title}, {reason}: " + ", ".join(f"{n} {'·'.join(sizes)}".strip() for n, sizes in names.items())
        for reason, names in by_reason.items()
    )
