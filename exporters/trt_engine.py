"""Build engines from ONNX files with one of two products, TensorRT or TensorRT for RTX.

An engine runs only on the device and the version that it was built for. `ENGINE.json`, written next to it, records
these, and `check_engine` compares them with this machine.
"""

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

import torch

from exporters.errors import ExportError
from exporters.files import staged
from exporters.shapes import Range, Shape
from exporters.tracing import DynamicAxes
from exporters.trt_engine_worker import BuildSpec
from profilers.external_data import reading_elsewhere


@dataclass(frozen=True)
class Builder:
    """A product that builds engines.

    Attributes:
        product: its name.
        package: its name in Python.
        extra: the extra of optin-deploy that installs it.
        needs_gpu: whether it builds on a GPU only.
    """

    product: str
    package: str
    extra: str
    needs_gpu: bool


BUILDERS = {
    "tensorrt": Builder("TensorRT", "tensorrt", "tensorrt", needs_gpu=True),
    "rtx": Builder("TensorRT for RTX", "tensorrt_rtx", "rtx", needs_gpu=False),
}
"""Builders by the name of the runtime that runs their engines."""

_FUSED_OPSET = 23
_FUSED_SINCE = (10, 15)


@dataclass(frozen=True)
class EngineConfig:
    """Options of a build. Networks are strongly typed: the ONNX file alone decides the type of each operator.

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
    """How an engine was built.

    Attributes:
        onnx_sha256: of the ONNX file and its external data.
        device: the GPU; None where there was none.
        inputs: shapes that the engine takes, by name.
        flags: builder flags that were set.
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
    """Raise ExportError unless the builder is installed, supports the options, and has the GPU that it needs."""
    builder = BUILDERS[config.builder]
    missing = [p for p in (builder.package, "polygraphy") if importlib.util.find_spec(p) is None]
    if missing:
        raise ExportError(f"{missing[0]} is not installed: pip install 'optin-deploy[{builder.extra}]'")
    if config.version_compatible and config.builder == "rtx":
        raise ExportError(f"{builder.product} has no version-compatible engines; TensorRT has")
    refittable = config.refittable or (config.weight_stripped and config.builder == "rtx")
    if (builder.needs_gpu or refittable) and device_name() is None:
        kind = "refittable engines" if refittable else "engines"
        raise ExportError(f"{builder.product} builds {kind} on a GPU only, and none is present")


def check_opset(name: str, opset: int) -> None:
    """Raise ExportError where the installed builder cannot read the operators of ``opset``.

    TensorRT reads Attention (opset 23) from 10.14 on and RMSNormalization (opset 23) from 10.15 on.
    """
    if name != "tensorrt" or opset < _FUSED_OPSET:
        return
    installed = builder_version(name)
    if parse_version(installed) < _FUSED_SINCE:
        needed = ".".join(map(str, _FUSED_SINCE))
        raise ExportError(f"TensorRT {installed} cannot read opset {opset}, only {needed} and later: give --opset 20")


def builder_version(name: str) -> str:
    """Return the version of the product, which must be installed."""
    return str(importlib.import_module(BUILDERS[name].package).__version__)


def parse_version(text: str) -> tuple[int, ...]:
    """Return a version as numbers that compare, up to the first part that is no number.

    >>> parse_version("10.14.1.48")
    (10, 14, 1, 48)
    """
    numbers = takewhile(str.isdecimal, text.split("."))
    return tuple(map(int, numbers))


def input_ranges(
    shapes: Mapping[str, Sequence[int]], axes: DynamicAxes, batch_sizes: Sequence[int], best: int, *, static: bool
) -> dict[str, Range]:
    """Return shapes for an engine that takes every batch size from the smallest to the largest of ``batch_sizes``.

    Args:
        shapes: of a sample, by input.
        axes: dynamic dimensions; those not named "batch" take every size up to the sample's.
        best: the batch size that the engine is fastest at.
        static: the engine takes ``best`` only, and of the other dimensions only the sample's size.
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
    """Build ``engine`` from an ONNX file, in a process of its own, because builders can crash.

    Args:
        onnx: its external data, if any, is next to it.
        engine: written whole or not at all, with `ENGINE.json` next to it and, where there is a GPU,
            `ENGINE.layers.json`, which lists the engine's layers and their ONNX nodes.
        inputs: shapes that the engine takes, see `input_ranges`.
        timing_cache: measurements of earlier builds; new ones are added.

    Raises:
        ExportError: the builder is missing or cannot build the engine, or ``onnx`` has weights outside its directory.
    """
    if elsewhere := reading_elsewhere(onnx.resolve()):
        raise ExportError(elsewhere)
    check_builder(config)
    if timing_cache is not None:
        timing_cache.parent.mkdir(parents=True, exist_ok=True)
    with staged(engine) as temporary:
        flags = temporary.with_name(f"{engine.name}.flags.json").resolve()
        spec: BuildSpec = {
            "onnx": str(onnx.resolve()),
            "engine": str(temporary.resolve()),
            "flags": str(flags),
            # Only a GPU's runtime can read an engine; without a GPU, constructing it can end the process.
            "layers": device_name() and str(temporary.with_name(f"{engine.name}.layers.json").resolve()),
            "inputs": {name: asdict(r) for name, r in inputs.items()},
            "config": asdict(config),
            "timing_cache": None if timing_cache is None else str(timing_cache.resolve()),
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
    """Read `ENGINE.json`; ExportError where it is missing or damaged."""
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
    """Return how an engine was built, after a check that it runs on this machine.

    Args:
        onnx: the file that the engine must have been built from.

    Raises:
        ExportError: the product's version, the device, the engine file or the ONNX file differs, or ``onnx`` has
            weights outside its directory.
    """
    if onnx is not None and (elsewhere := reading_elsewhere(onnx.resolve())):
        raise ExportError(elsewhere)
    info = read_info(engine)
    builder = BUILDERS.get(info.builder)
    if builder is None:
        raise ExportError(f"{engine.name} was built by {info.builder!r}, not by one of {', '.join(BUILDERS)}")
    if not engine.is_file():
        raise ExportError(f"{engine} does not exist: build it again")
    if difference := _file_difference(engine, onnx, info) or _machine_difference(builder, info):
        raise ExportError(f"{engine.name} {difference}: build it again")
    return info


def _file_difference(engine: Path, onnx: Path | None, info: EngineInfo) -> str:
    """Return how the files differ from those of the build, "" where they do not."""
    if _sha256(engine) != info.engine_sha256:
        return "was changed after its build"
    return "was built from another ONNX file" if onnx is not None and _sha256(onnx) != info.onnx_sha256 else ""


def _machine_difference(builder: Builder, info: EngineInfo) -> str:
    """Return how this machine differs from that of the build, "" where the engine runs here."""
    installed = builder_version(info.builder) if importlib.util.find_spec(builder.package) else None
    if installed != info.builder_version and not (
        installed and info.config.version_compatible and parse_version(installed) >= parse_version(info.builder_version)
    ):
        version = f"has {installed}" if installed else "does not have it"
        return f"was built by {builder.product} {info.builder_version}, and this machine {version}"
    device = device_name()
    return (
        f"was built on {info.device}, and this machine has {device or 'no GPU'}"
        if info.device not in (None, device)
        else ""
    )


def device_name() -> str | None:
    """Return the name of the first GPU with its compute capability; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(0)
    return f"{torch.cuda.get_device_name(0)} (compute capability {major}.{minor})"


def _sha256(path: Path) -> str:
    """Return the hash of a file, and of the external data next to an ONNX file."""
    digest = hashlib.sha256()
    data = path.with_name(f"{path.name}.data")
    for hashed in (path, data) if data.is_file() else (path,):
        with hashed.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _run_worker(spec: BuildSpec, onnx: Path) -> None:
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
    """Return the builder's first error, which is the cause of later ones; errors about a missing GPU are left out."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("[E] ") for line in lines if line.startswith("[E]") and "Cuda Runtime" not in line]
    return (errors or lines or ["it said nothing"])[0 if errors else -1]
