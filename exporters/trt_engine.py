"""TensorRT engines from ONNX files, built by TensorRT or by TensorRT for RTX: one code, two products, never confused.

An engine runs only where it was built for. What that is stands in a file beside it (`ENGINE.json`), which
`check_engine` compares with what is here.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from exporters.errors import ExportError
from exporters.files import staged
from exporters.tracing import DynamicAxes
from profilers.external_data import reading_elsewhere

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Builder:
    """A product that builds engines.

    Attributes:
        product: its name.
        package: what Python imports.
        extra: what installs it.
        needs_gpu: whether it cannot build without one.
    """

    product: str
    package: str
    extra: str
    needs_gpu: bool


BUILDERS = {
    "tensorrt": Builder("TensorRT", "tensorrt", "tensorrt", needs_gpu=True),
    "rtx": Builder("TensorRT for RTX", "tensorrt_rtx", "rtx", needs_gpu=False),
}
"""By the name of the runtime that runs the engines."""

_FUSED_OPSET = 23
_FUSED_SINCE = (10, 15)


@dataclass(frozen=True)
class Range:
    """Shapes of one input that an engine takes, and the one that it is made fastest for."""

    least: Shape
    best: Shape
    most: Shape


@dataclass(frozen=True)
class EngineConfig:
    """How an engine is built; networks are strongly typed, so that the ONNX file alone says what is computed how.

    Attributes:
        builder: one of `BUILDERS`.
        optimization_level: 0 to 5; more takes longer to build; None leaves it to the builder.
        workspace_mib: most scratch memory of the engine; None leaves it to the builder.
        refittable: its weights can be exchanged later.
        weight_stripped: it is saved without its weights; a refit from the same ONNX file brings them back.
        version_compatible: later versions of the product run it too.
        tf32: float32 may be computed in TensorFloat-32.
        sparse_weights: the builder may use sparse tensor cores where weights are 2:4 sparse; others are as without it.
    """

    builder: str
    optimization_level: int | None = None
    workspace_mib: int | None = None
    refittable: bool = False
    weight_stripped: bool = False
    version_compatible: bool = False
    tf32: bool = False
    sparse_weights: bool = False


@dataclass(frozen=True)
class EngineInfo:
    """What an engine was built of, by what, and for what; ``device`` is None where there was no GPU.

    Hashes are SHA-256. ``inputs`` are the shapes that it takes, by name. ``flags`` are the builder flags that were set.
    """

    builder: str
    builder_version: str
    onnx_sha256: str
    engine_sha256: str
    device: str | None
    system: str
    config: EngineConfig
    inputs: dict[str, Range]
    flags: tuple[str, ...] = ()


def check_builder(config: EngineConfig) -> None:
    """Raise ExportError unless the builder is installed, builds such engines, and has the GPU it needs for that."""
    builder = BUILDERS[config.builder]
    missing = [p for p in (builder.package, "polygraphy") if importlib.util.find_spec(p) is None]
    if missing:
        raise ExportError(f"{missing[0]} is not installed: pip install 'optin-deploy[{builder.extra}]'")
    if config.version_compatible and config.builder == "rtx":
        raise ExportError(f"{builder.product} has no version-compatible engines; TensorRT has")
    refitted = config.refittable or (config.weight_stripped and config.builder == "rtx")
    if (builder.needs_gpu or refitted) and device_name() is None:
        what = "refittable engines" if refitted else "engines"
        raise ExportError(f"{builder.product} builds {what} on a GPU only, and none is present")


def check_opset(name: str, opset: int) -> None:
    """Raise ExportError where the installed builder's parser is older than the operators of ``opset``.

    TensorRT reads Attention (opset 23) from 10.14 on and RMSNormalization (opset 23) from 10.15 on.
    """
    if name != "tensorrt" or opset < _FUSED_OPSET:
        return
    here = builder_version(name)
    if version_of(here) < _FUSED_SINCE:
        least = ".".join(map(str, _FUSED_SINCE))
        raise ExportError(f"TensorRT {here} does not read opset {opset}, {least} and later do: give --opset 20")


def builder_version(name: str) -> str:
    """Of the product, which has to be installed."""
    return str(importlib.import_module(BUILDERS[name].package).__version__)


def version_of(text: str) -> tuple[int, ...]:
    """A version as numbers that compare: "10.14.1.48" gives (10, 14, 1, 48), and what is no number ends it."""
    numbers = takewhile(str.isdecimal, text.split("."))
    return tuple(map(int, numbers))


def input_ranges(
    shapes: Mapping[str, Sequence[int]], axes: DynamicAxes, batch_sizes: Sequence[int], best: int, *, static: bool
) -> dict[str, Range]:
    """Shapes for an engine that takes every batch size from the least to the most of ``batch_sizes``.

    Args:
        shapes: of a sample, by input.
        axes: the dynamic dimensions; what is not named "batch" may be anything up to the sample's size.
        best: the batch size to be fastest at.
        static: it takes nothing but ``best``, and of the other dimensions nothing but the sample's size.
    """

    def at(name: str, batch: int, least: bool) -> Shape:
        named = axes.get(name, {})
        return tuple(
            batch if named.get(i) == "batch" else 1 if i in named and least else size
            for i, size in enumerate(shapes[name])
        )

    if static:
        return {name: Range(*(at(name, best, False),) * 3) for name in shapes}
    least, most = min(batch_sizes), max(batch_sizes)
    return {n: Range(at(n, least, True), at(n, best, False), at(n, most, False)) for n in shapes}


def build_engine(
    onnx: Path, engine: Path, inputs: Mapping[str, Range], config: EngineConfig, timing_cache: Path | None = None
) -> EngineInfo:
    """Build ``engine`` from an ONNX file, in a process of its own: a builder that crashes takes nothing with it.

    Args:
        onnx: with its external data beside it, if it has any.
        engine: appears whole or not at all, with `ENGINE.json` beside it and, where there is a GPU,
            `ENGINE.layers.json`: what it says of its layers and the nodes that they were made of.
        inputs: shapes to be taken, see `input_ranges`.
        timing_cache: measurements of earlier builds, read and added to.

    Raises:
        ExportError: the builder is not there or cannot build it, or ``onnx`` has weights outside its own directory.
    """
    if elsewhere := reading_elsewhere(onnx.resolve()):
        raise ExportError(elsewhere)
    check_builder(config)
    if timing_cache is not None:
        timing_cache.parent.mkdir(parents=True, exist_ok=True)
    with staged(engine) as temporary:
        flags = temporary.with_name(f"{engine.name}.flags.json").resolve()
        spec = {
            "onnx": str(onnx.resolve()),
            "engine": str(temporary.resolve()),
            # Only a GPU's runtime can read an engine; without one, constructing it can end the process.
            "flags": str(flags),
            "layers": device_name() and str(temporary.with_name(f"{engine.name}.layers.json").resolve()),
            "inputs": {name: asdict(r) for name, r in inputs.items()},
            "config": asdict(config),
            "timing_cache": timing_cache and str(timing_cache.resolve()),
        }
        _run_worker(spec, onnx)
        info = EngineInfo(
            builder=config.builder,
            builder_version=builder_version(config.builder),
            onnx_sha256=_sha256(onnx),
            engine_sha256=_sha256(temporary),
            device=device_name(),
            system=f"{platform.system()} {platform.machine()}",
            config=config,
            inputs=dict(inputs),
            flags=tuple(json.loads(flags.read_text(encoding="utf-8"))),
        )
        flags.unlink()
        temporary.with_name(f"{engine.name}.json").write_text(json.dumps(asdict(info), indent=1) + "\n")
    return info


def read_info(engine: Path) -> EngineInfo:
    """What stands beside ``engine``; ExportError where that is missing or of another layout."""
    path = engine.with_name(f"{engine.name}.json")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        ranges = {n: Range(*(tuple(r[k]) for k in ("least", "best", "most"))) for n, r in data["inputs"].items()}
        config, flags = EngineConfig(**data["config"]), tuple(data.get("flags", ()))
        return EngineInfo(**{**data, "config": config, "inputs": ranges, "flags": flags})
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}; build {engine.name} again") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"{path} does not describe an engine of this version: build {engine.name} again") from error


def check_engine(engine: Path, onnx: Path | None = None) -> EngineInfo:
    """`read_info`; ExportError says what differs from what is here: the product's version, the device, the file itself,
    or the ONNX file that it should have been built of. That is refused when it has weights outside its directory."""
    if onnx is not None and (elsewhere := reading_elsewhere(onnx.resolve())):
        raise ExportError(elsewhere)
    info = read_info(engine)
    builder = BUILDERS.get(info.builder)
    if builder is None:
        raise ExportError(f"{engine.name} was built by {info.builder!r}, not by one of {', '.join(BUILDERS)}")
    if not engine.is_file():
        raise ExportError(f"{engine} does not exist: build it again")
    differing = _content_differs(engine, onnx, info) or _place_differs(builder, info)
    if differing:
        raise ExportError(f"{engine.name} is {differing}: build it again")
    return info


def _content_differs(engine: Path, onnx: Path | None, info: EngineInfo) -> str:
    if _sha256(engine) != info.engine_sha256:
        return "not what was built"
    return "built of another ONNX file" if onnx is not None and _sha256(onnx) != info.onnx_sha256 else ""


def _place_differs(builder: Builder, info: EngineInfo) -> str:
    here = builder_version(info.builder) if importlib.util.find_spec(builder.package) else "none"
    newer = info.config.version_compatible and here != "none" and version_of(here) >= version_of(info.builder_version)
    if here != info.builder_version and not newer:
        return f"built by {builder.product} {info.builder_version}, and here is {here}"
    device = device_name() or "no GPU"
    return f"built on {info.device}, and here is {device}" if info.device not in (None, device) else ""


def device_name() -> str | None:
    """The first GPU and its compute capability."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(0)
    return f"{torch.cuda.get_device_name(0)} (compute capability {major}.{minor})"


def _sha256(path: Path) -> str:
    """Of a file, and of the external data beside an ONNX file."""
    digest = hashlib.sha256()
    for part in (path, path.with_name(f"{path.name}.data")):
        if part == path or part.is_file():
            with part.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _run_worker(spec: Mapping[str, Any], onnx: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="optin-engine-") as folder:
        path = Path(folder, "spec.json")
        path.write_text(json.dumps(spec))
        search = [str(Path(entry).resolve()) for entry in (*sys.path, str(Path(__file__).parent.parent))]
        rtx = "1" if spec["config"]["builder"] == "rtx" else "0"
        ended = subprocess.run(
            [sys.executable, "-m", "exporters.trt_engine_worker", str(path)],
            env={
                **os.environ,
                "POLYGRAPHY_USE_TENSORRT_RTX": rtx,
                "PYTHONPATH": os.pathsep.join(search),
                "PYTHONSAFEPATH": "1",
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
    if ended.returncode != 0:
        product = BUILDERS[spec["config"]["builder"]].product
        raise ExportError(f"{product} cannot build {onnx.name}: {_reason(ended.stdout + ended.stderr)}")


def _reason(output: str) -> str:
    """The builder's own word on why, rather than what follows from it; nothing of a GPU that is not needed."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("[E] ") for line in lines if line.startswith("[E]") and "Cuda Runtime" not in line]
    return (errors or lines or ["it said nothing"])[0 if errors else -1]
