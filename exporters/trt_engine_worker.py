"""Build one engine in an isolated process: `python -m exporters.trt_engine_worker SPEC.json`.

The environment variable POLYGRAPHY_USE_TENSORRT_RTX of the process decides which product builds.
"""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, TypedDict

_MIB = 2**20

# An object of TensorRT's or TensorRT for RTX's bindings, which have no types.
TrtObject = Any


class BuildSpec(TypedDict):
    """The JSON file of one build; ``engine``, ``flags`` and ``layers`` are files to write.

    Attributes:
        flags: for the names of the builder flags that were set.
        layers: for the engine's description of its layers; null without a GPU.
        inputs: name -> ``least``, ``best`` and ``most`` shape.
        config: an `EngineConfig`.
    """

    onnx: str
    engine: str
    flags: str
    layers: str | None
    inputs: dict[str, dict[str, tuple[int, ...]]]
    config: dict[str, Any]
    timing_cache: str | None


def main(arguments: list[str]) -> None:
    """Build the engine of the spec."""
    from polygraphy.backend.trt import EngineBytesFromNetwork, NetworkFromOnnxPath, SetDecomposableAttentions
    from polygraphy.logger import G_LOGGER
    from polygraphy.mod.trt_importer import lazy_import_trt

    G_LOGGER.module_severity = G_LOGGER.ERROR
    spec: BuildSpec = json.loads(Path(arguments[0]).read_text())
    trt = lazy_import_trt()
    network = NetworkFromOnnxPath(spec["onnx"], strongly_typed=True)
    if hasattr(trt.LayerType, "ATTENTION_INPUT"):
        # Let the product compute attention by its parts where it has no fused kernel.
        network = SetDecomposableAttentions(network)

    flags: list[str] = []

    def configure(builder: TrtObject, parsed: TrtObject) -> TrtObject:
        config = _builder_config(spec, trt, builder, parsed)
        flags.extend(sorted(name for name, flag in trt.BuilderFlag.__members__.items() if config.get_flag(flag)))
        return config

    engine = EngineBytesFromNetwork(network, config=configure, save_timing_cache=spec["timing_cache"])()
    Path(spec["engine"]).write_bytes(engine)
    Path(spec["flags"]).write_text(json.dumps(flags), encoding="utf-8")
    if spec["layers"] and (layers := _layers(trt, engine)):
        Path(spec["layers"]).write_text(layers, encoding="utf-8")


def _layers(trt: ModuleType, engine: bytes) -> str:
    """Return the engine's description of its layers as JSON; "" where this GPU cannot load the engine."""
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    # A version-compatible engine has host code of its own, which is safe here: this process built it.
    runtime.engine_host_code_allowed = True
    loaded = runtime.deserialize_cuda_engine(engine)
    if loaded is None:
        return ""
    return str(loaded.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))


def _builder_config(spec: BuildSpec, trt: ModuleType, builder: TrtObject, network: TrtObject) -> TrtObject:
    from polygraphy.backend.trt import CreateConfig, Profile

    profile, options = Profile(), spec["config"]
    for name, shapes in spec["inputs"].items():
        profile.add(name, shapes["least"], shapes["best"], shapes["most"])
    pools = {trt.MemoryPoolType.WORKSPACE: options["workspace_mib"] * _MIB} if options["workspace_mib"] else None
    config = CreateConfig(
        profiles=[profile],
        load_timing_cache=spec["timing_cache"],
        memory_pool_limits=pools,
        refittable=options["refittable"],
        # Without REFIT: stripped weights come back as they were, so the builder need not keep all weights replaceable.
        strip_plan=options["weight_stripped"],
        version_compatible=options["version_compatible"],
        sparse_weights=options["sparse_weights"],
        builder_optimization_level=options["optimization_level"],
        # The description of layers names their ONNX nodes.
        profiling_verbosity=trt.ProfilingVerbosity.DETAILED,
    )(builder, network)
    # The builder's default is on, Polygraphy's is off.
    if options["tf32"]:
        config.set_flag(trt.BuilderFlag.TF32)
    else:
        config.clear_flag(trt.BuilderFlag.TF32)
    return config


if __name__ == "__main__":
    main(sys.argv[1:])
