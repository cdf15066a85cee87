"""Files of ours that were changed: reports, run directories, latency tables; and names that cannot be printed."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bad_input.common import LONG, Material, Row, pipe, pruning
from optin_deploy.config.recipe import Recipe
from optin_deploy.latency.block_stacks import block_types
from optin_deploy.latency.tables import table_key
from optin_deploy.latency.target import target_of
from optin_deploy.models.load import load_network
from optin_deploy.pruning.space import analyze
from profilers.table_cache import table_file

AGAIN = [*pruning("shallow", "--calibration", "images"), "--output", "run"]


def _report(content: Callable[[bytes], bytes]) -> Callable[[Material], Sequence[str]]:
    def make(material: Material) -> Sequence[str]:
        Path("report.json").write_bytes(content((material.folder / "run" / "report.json").read_bytes()))
        return ["report", "report.json"]

    return make


def _edited(**changes: Any) -> Callable[[bytes], bytes]:
    return lambda whole: json.dumps({**json.loads(whole), **changes}).encode()


def _continued(change: Callable[[], object]) -> Callable[[Material], Sequence[str]]:
    """A finished run given again, something in its directory changed."""

    def make(material: Material) -> Sequence[str]:
        material.copy("shallow", "images", "run")
        change()
        return AGAIN

    return make


def _written(name: str, content: Callable[[bytes], bytes]) -> Callable[[], object]:
    path = Path("run", name)
    return lambda: path.write_bytes(content(path.read_bytes()))


def _other_scores() -> None:
    save_file({"blocks.0.mlp": torch.zeros(3)}, Path("run", "scores.safetensors"))


def _unnoted(change: Callable[[], object]) -> Callable[[], object]:
    """Changed, and nothing in run.json that would tell of it."""

    def both() -> None:
        change()
        path = Path("run", "run.json")
        path.write_text(json.dumps({"fingerprint": json.loads(path.read_text())["fingerprint"]}))

    return both


def _latency_table(content: str) -> Callable[[Material], Sequence[str]]:
    """In the cache, where that of shallow's blocks belongs."""

    def make(material: Material) -> Sequence[str]:
        material.copy("shallow")
        network = load_network("shallow")
        (kind,) = block_types(network.module, analyze(network).structure, network.inputs)
        path = table_file(table_key(kind, target_of(Recipe(model="shallow", threads=1, runtimes=("ort-cpu",)))))
        path.parent.mkdir(parents=True)
        path.write_text(content, encoding="utf-8")
        return ["profile", "--table", "--model", "shallow", "--threads", "1"]

    return make


def _foreign(material: Material) -> Sequence[str]:
    material.copy("shallow", "images")
    Path("run").mkdir()
    Path("run", "thesis.tex").touch()
    return AGAIN


def _into_a_file(material: Material) -> Sequence[str]:
    material.copy("shallow", "images")
    Path("run").touch()
    return AGAIN


def _in_place(name: str, make: Callable[[Path], object]) -> Callable[[], object]:
    """Another kind of file in the place of one in the run's directory."""

    def change() -> None:
        path = Path("run", name)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        make(path)

    return change


def _pruning_to(output: str, prepare: Callable[[], object] = lambda: None) -> Callable[[Material], Sequence[str]]:
    def make(material: Material) -> Sequence[str]:
        material.copy("shallow", "images")
        prepare()
        return [*pruning("shallow", "--calibration", "images"), "--output", output]

    return make


def _exporting(
    *more: str, output: str = "o", prepare: Callable[[], object] = lambda: None
) -> Callable[[Material], Sequence[str]]:
    def make(_: Material) -> Sequence[str]:
        prepare()
        # Told before the model is looked for.
        return ["export", "--model", "no-such-model", *more, "--output", output]

    return make


LATIN = os.fsdecode(b"caf\xe9")


def _nothing(*place: str | int) -> Callable[[bytes], bytes]:
    """A report whose figure at ``place``, by which others are divided, is 0."""

    def change(whole: bytes) -> bytes:
        told = json.loads(whole)
        inside = told
        for key in place[:-1]:
            inside = inside[key]
        inside[place[-1]] = 0
        return json.dumps(told).encode()

    return change


DAMAGED, NOT_A_REPORT = r"--output run: {} .*what the run wrote", r"report\.json .*not a report.*"
NESTED = b'{"a":' * 100_000
ROWS = (
    Row("report-truncated", _report(lambda whole: whole[: len(whole) // 2]), NOT_A_REPORT),
    Row("report-empty", _report(lambda _: b""), NOT_A_REPORT),
    Row("report-nested", _report(lambda _: NESTED), NOT_A_REPORT),
    Row("report-not-utf8", _report(lambda whole: whole.replace(b"dense", b"\xff\xfe")), NOT_A_REPORT),
    Row("report-other-layout", _report(_edited(schema_version=999)), NOT_A_REPORT),
    Row("report-wrong-type", _report(_edited(gates="all passed")), NOT_A_REPORT + ": gates"),
    Row("report-no-flops", _report(_nothing("pruned", "flops")), NOT_A_REPORT + r": pruned\.flops"),
    Row("report-no-speed", _report(_nothing("profile", 0, "speedup", "value")), NOT_A_REPORT + r": .*speedup\.value"),
    Row("report-no-time", _report(_nothing("layers", 0, "measured", "dense_ms")), NOT_A_REPORT + r": .*measured"),
    Row("report-missing", lambda _: ["report", "none"], "cannot read .*none"),
    Row("report-endless", lambda _: ["report", "/dev/zero"], "/dev/zero"),
    Row("run-json-truncated", _continued(_written("run.json", lambda _: b'{"fing')), "--output run .*holds no run"),
    Row("run-json-nested", _continued(_written("run.json", lambda _: NESTED)), "--output run .*holds no run"),
    Row("run-of-another", _continued(_written("run.json", lambda _: b'{"fingerprint": "x"}')), "holds another run"),
    Row(
        "run-plan-changed",
        _continued(_written("plan.json", lambda t: t.replace(b"0, ", b"", 1))),
        DAMAGED.format(r"plan\.json"),
    ),
    Row(
        "run-scores-truncated",
        _continued(_written("scores.safetensors", lambda t: t[:-5])),
        DAMAGED.format(r"scores\.safetensors"),
    ),
    Row("run-scores-of-other-units", _continued(_other_scores), DAMAGED.format(r"scores\.safetensors")),
    Row(
        "run-agreement-no-json",
        _continued(_written("agreement.json", lambda _: b"{")),
        DAMAGED.format(r"agreement\.json"),
    ),
    Row("run-onnx-truncated", _continued(_written("pruned.onnx", lambda t: t[:-5])), DAMAGED.format(r"pruned\.onnx")),
    Row(
        "run-checkpoint-changed",
        _continued(_written("checkpoint/optin.json", lambda t: t + b" ")),
        DAMAGED.format("checkpoint"),
    ),
    Row(
        "run-checkpoint-half",
        _continued(lambda: Path("run", "checkpoint", "model.safetensors").unlink()),
        DAMAGED.format("checkpoint"),
    ),
    Row("output-holds-something-else", _foreign, "--output run .*holds no run"),
    Row("output-is-a-file", _into_a_file, "--output run is a file"),
    Row("output-long-name", _pruning_to(LONG), f"--output {LONG} .*File name too long"),
    Row("output-long-name-below", _pruning_to(f"runs/{LONG}"), "--output runs/n+ .*File name too long"),
    Row("output-below-a-file", _pruning_to("f/x", lambda: Path("f").touch()), "--output f/x .*f is a file"),
    Row(
        "output-link-to-nothing",
        _pruning_to("d", lambda: Path("d").symlink_to("gone")),
        "--output d .* link to nothing",
    ),
    Row("output-link-to-itself", _pruning_to("d", lambda: Path("d").symlink_to("d")), "--output d .* link to nothing"),
    Row("export-long-name", _exporting(output=LONG), f"{LONG} .*File name too long"),
    Row(
        "export-below-a-file",
        _exporting(output="f/x", prepare=lambda: Path("f").touch()),
        "f/x .*f is a",
    ),
    Row(
        "export-link-to-nothing",
        _exporting(output="d", prepare=lambda: Path("d").symlink_to("gone")),
        "d exists already",
    ),
    Row(
        "export-below-a-link-to-itself",
        _exporting(output="d/x", prepare=lambda: Path("d").symlink_to("d")),
        "d/x .*d is a link to nothing",
    ),
    Row("export-name-of-dots", _exporting("--layout", "triton", "--name", ".."), r"--name \.\.: only letters"),
    Row("export-name-of-a-dash", _exporting("--layout", "triton", "--name=-"), "--name -: only letters"),
    Row("export-name-long", _exporting("--layout", "triton", "--name", LONG), "o/n+_onnx .*File name too long"),
    Row("report-long-name", lambda _: ["report", LONG], f"{LONG}.*File name too long"),
    Row(
        "run-checkpoint-link-to-nothing",
        _continued(_in_place("checkpoint", lambda p: p.symlink_to("gone"))),
        "--output run: checkpoint .*no directory",
    ),
    Row("run-report-directory", _continued(_in_place("report.json", Path.mkdir)), r"run: report\.json is no file"),
    Row("run-recipe-directory", _continued(_in_place("recipe.yaml", Path.mkdir)), r"run: recipe\.yaml is no file"),
    Row("run-plan-pipe", _continued(_in_place("plan.json", pipe)), r"--output run: plan\.json is no file"),
    Row("run-json-pipe", _continued(_in_place("run.json", pipe)), "--output run .*holds no run"),
    Row("latency-table-truncated", _latency_table('{"rows": ['), "latency table .* remove it"),
    Row("latency-table-nested", _latency_table(NESTED.decode()), "latency table .* remove it"),
    Row(
        "latency-table-types",
        _latency_table('{"setting": {}, "depth": 3, "depths": {}, "rows": [], "loads": 1}'),
        "latency table .* remove it",
    ),
    Row("name-of-a-model-not-utf8", lambda _: pruning(LATIN), r"caf\\xe9.* is not UTF-8"),
    Row("name-of-data-not-utf8", lambda _: pruning("test_vit", "--calibration", LATIN), r"caf\\xe9.* is not UTF-8"),
    Row("name-of-output-not-utf8", lambda _: [*pruning("test_vit"), "--output", LATIN], r"caf\\xe9.* is not UTF-8"),
)


UNNOTED = (
    Row("scores-truncated", _continued(_unnoted(_written("scores.safetensors", lambda t: t[:-5]))), r"scores\.safet"),
    Row("scores-of-other-units", _continued(_unnoted(_other_scores)), r"scores\.safetensors .*damaged"),
    Row("plan-truncated", _continued(_unnoted(_written("plan.json", lambda t: t[:-5]))), r"plan\.json is damaged"),
    Row(
        "plan-types", _continued(_unnoted(_written("plan.json", lambda _: b'{"kept": [1]}'))), r"plan\.json is damaged"
    ),
    Row(
        "agreement-no-json", _continued(_unnoted(_written("agreement.json", lambda _: b"{"))), r"agreement\.json is da"
    ),
    Row(
        "checkpoint-half",
        _continued(_unnoted(_written("checkpoint/model.safetensors", lambda t: t[:-5]))),
        r"checkpoint/model\.safetensors is damaged",
    ),
)
"""Rows whose stages before the damaged one are told of, too."""
