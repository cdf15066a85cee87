"""The isolated process that builds one engine: `python -m exporters.trt_engine_worker SPEC.json`.

The spec holds `onnx`, `engine`, `flags` (the file for the names of the builder flags that were set), `layers` (the file
for what the engine says of itself, null without a GPU), `inputs` (name to `least`, `best` and `most` shape), `config`
(an `EngineConfig`) and `timing_cache`. Which product builds,
POLYGRAPHY_USE_TENSORRT_RTX has said when the process started.
"""

import json
import sys
from pathlib import Path
from typing import Any

_MIB = 2**20


def main(arguments: list[str]) -> None:
    """Build what the spec describes."""
    from polygraphy.backend.trt import EngineBytesFromNetwork, NetworkFromOnnxPath, SetDecomposableAttentions
    from polygraphy.logger import G_LOGGER
    from polygraphy.mod.trt_importer import lazy_import_trt

    G_LOGGER.module_severity = G_LOGGER.ERROR
    spec, trt = json.loads(Path(arguments[0]).read_text()), lazy_import_trt()
    network = NetworkFromOnnxPath(spec["onnx"], strongly_typed=True)
    if hasattr(trt.LayerType, "ATTENTION_INPUT"):
        # Fused attention may fall back to its parts where the product has no kernel for it.
        network = SetDecomposableAttentions(network)

    flags: list[str] = []

    def config(builder: Any, parsed: Any) -> Any:
        made = _config(spec, trt, builder, parsed)
        flags.extend(_flags(trt, made))
        return made

    engine = EngineBytesFromNetwork(network, config=config, save_timing_cache=spec["timing_cache"])()
    Path(spec["engine"]).write_bytes(engine)
    Path(spec["flags"]).write_text(json.dumps(flags), encoding="utf-8")
    if spec["layers"] and (layers := _layers(trt, engine)):
        Path(spec["layers"]).write_text(layers, encoding="utf-8")


def _layers(trt: Any, engine: Any) -> str:
    """What the engine says of its layers, as JSON; nothing where this GPU cannot load it, which may be another's."""
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    # A version-compatible engine brings code of its own; this one was built in this process.
    runtime.engine_host_code_allowed = True
    loaded = runtime.deserialize_cuda_engine(engine)
    if loaded is None:
        return ""
    return str(loaded.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))


def _config(spec: dict[str, Any], trt: Any, builder: Any, network: Any) -> Any:
    from polygraphy.backend.trt import CreateConfig, Profile

    profile, asked = Profile(), spec["config"]
    for name, shapes in spec["inputs"].items():
        profile.add(name, shapes["least"], shapes["best"], shapes["most"])
    pools = {trt.MemoryPoolType.WORKSPACE: asked["workspace_mib"] * _MIB} if asked["workspace_mib"] else None
    config = CreateConfig(
        profiles=[profile],
        load_timing_cache=spec["timing_cache"],
        memory_pool_limits=pools,
        refittable=asked["refittable"],
        # Alone: with REFIT, which any weights may follow, a builder can drop what it fuses; these get their own back.
        strip_plan=asked["weight_stripped"],
        version_compatible=asked["version_compatible"],
        sparse_weights=asked["sparse_weights"],
        builder_optimization_level=asked["optimization_level"],
        # Layers tell which nodes of the ONNX file they are made of.
        profiling_verbosity=trt.ProfilingVerbosity.DETAILED,
    )(builder, network)
    # The builder's default is on, Polygraphy's is off.
    if asked["tf32"]:
        config.set_flag(trt.BuilderFlag.TF32)
    else:
        config.clear_flag(trt.BuilderFlag.TF32)
    return config


def _flags(trt: Any, config: Any) -> list[str]:
    """Names of the builder flags that are set."""
    return sorted(name for name, flag in trt.BuilderFlag.__members__.items() if config.get_flag(flag))


if __name__ == "__main__":
    main(sys.argv[1:])
