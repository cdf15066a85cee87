"""Latencies for ``gpu.sh``: files of the dense and the pruned network, one process for all batch sizes of a case."""

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter

import torch

from exporters import (
    DynamicAxes,
    EngineConfig,
    Precision,
    build_engine,
    in_precision,
    input_ranges,
    onnx_from_program,
    save_program,
    trace,
)
from gpu.cases import Case
from gpu.networks import Pair
from gpu.record import Outcome
from gpu.worker import GpuResult, GpuSpec
from optin_deploy.network import Network, TensorOutputs
from profilers import GPU_RUNTIMES, RUNTIMES, Measurement, RawSamples, usable_cores
from profilers import Case as MeasureCase
from profilers.gpu_watch import cuda_uuid
from profilers.measure import LatencySpec, NetworkFiles
from profilers.runners.base import first_line
from profilers.worker_process import SavedFeeds, run_worker

VARIANTS = ("dense", "pruned")
OPSET = 20
# What a process takes to start, and for one batch size: none is begun later.
_RESERVE_S = 15.0
_PAIRS = (("dense", "pruned"), ("dense", "dense_again"))


def _stem(folder: Path, name: str, precision: str, variant: str) -> Path:
    """Where a network's files are, the suffix left out."""
    return folder / f"{name}-{precision}-{variant}"


def export(
    pairs: Mapping[str, Pair], precision: Precision, folder: Path, *, onnx: bool, workers: int
) -> dict[str, str]:
    """Write ``.pt2`` files of all pairs and, where ``onnx``, ONNX files, these in ``workers`` processes; what is there
    is kept. Nothing runs any more when this returns.

    Returns:
        networks that failed, and why.
    """
    failed: dict[str, str] = {}
    lowered: dict[str, list[Future[None]]] = {name: [] for name in pairs}
    with _pool(workers) as pool:
        for name, variant in product(pairs, VARIANTS):
            network: Network = getattr(pairs[name], variant)
            path = _stem(folder, name, precision, variant)
            try:
                _save(network, precision, path.with_suffix(".pt2"))
            except Exception as error:  # of one network; the others go on
                failed[name] = first_line(error)
                continue
            if onnx and not path.with_suffix(".onnx").is_file():
                lowered[name].append(pool.submit(_lower, path, tuple(network.outputs), network.dynamic_axes))
        for name, futures in lowered.items():
            for future in futures:
                if cause := future.exception():
                    failed[name] = first_line(cause)
    return failed


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that begin nothing more when the body is left early."""
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _save(network: Network, precision: Precision, path: Path) -> None:
    if not path.is_file():
        exact = trace(TensorOutputs(network.module, network.outputs), network.inputs, network.dynamic_axes)
        save_program(in_precision(exact, precision, OPSET), path)


def _lower(path: Path, outputs: tuple[str, ...], axes: DynamicAxes) -> None:
    """Write the ONNX file of a ``.pt2`` file that `export` wrote."""
    program = torch.export.load(path.with_suffix(".pt2"))
    onnx_from_program(program, path.with_suffix(".onnx"), output_names=outputs, dynamic_axes=axes, opset=OPSET)


def latency(
    case: Case, keys: Sequence[str], pair: Pair, folder: Path, round_seconds: float, seconds: float
) -> dict[str, Outcome]:
    """Rows, or reasons, of the measurements ``keys`` of a case, of those that there is time for.

    Args:
        folder: with what `export` wrote.
        round_seconds: time limit of one measurement's rounds.
        seconds: that there are for all of it.
    """
    sizes = {key: case.sizes[key] for key in keys}
    start = perf_counter()
    try:
        files = {variant: _file(case, pair, folder, variant) for variant in VARIANTS}
        sample = {name: tensor[:1].numpy() for name, tensor in pair.dense.inputs.items()}
        feeds = SavedFeeds.save(folder / "feeds.npz", sample)
        # The dense file is measured twice: by how much it differs from itself is the noise floor.
        networks = {
            name: NetworkFiles((files[name.removesuffix("_again")],), feeds)
            for name in ("dense", "dense_again", "pruned")
        }
        work = f"measuring {case.runtime}", usable_cores().physical
        rounds = MeasureCase(case.runtime, 1, usable_cores().physical, round_seconds)
        uuid = cuda_uuid() if case.runtime in GPU_RUNTIMES else None
        left_s = seconds - (perf_counter() - start) - _RESERVE_S
        spec = GpuSpec(*work, LatencySpec(*work, rounds, networks, _PAIRS, uuid), tuple(sizes.values()), left_s)
        result = run_worker("gpu.worker", spec, GpuResult, lambda _: None)
    except Exception as error:  # the folder's name is of no use to anyone
        raise RuntimeError(str(error).replace(f"{folder}{os.sep}", "")) from error
    rows: dict[str, Outcome] = {}
    for key, size in sizes.items():
        if raw := result.samples.get(str(size)):
            rows[key] = _row(case, pair, size, raw)
        elif str(size) in result.failed:
            rows[key] = result.failed[str(size)]
    return rows


def _file(case: Case, pair: Pair, folder: Path, variant: str) -> Path:
    """What the runtime runs; engines are built when they are first needed."""
    stem = _stem(folder, case.network, case.precision, variant)
    if RUNTIMES[case.runtime] != "engine":
        return stem.with_suffix(".onnx" if RUNTIMES[case.runtime] == "onnx" else ".pt2")
    engine = stem.with_name(f"{stem.name}.{case.runtime}.engine")
    shapes = {name: tuple(tensor.shape) for name, tensor in pair.dense.inputs.items()}
    sizes = sorted(case.batch_sizes)
    ranges = input_ranges(shapes, pair.dense.dynamic_axes, sizes, sizes[len(sizes) // 2], static=False)
    build_engine(stem.with_suffix(".onnx"), engine, ranges, EngineConfig(case.runtime))
    return engine


def _row(case: Case, pair: Pair, size: int, raw: RawSamples) -> Outcome:
    measured = Measurement.from_samples(case.runtime, size, raw)
    figures = asdict(measured)
    # A hundred numbers for each of a hundred cases, of which everything that is told is worked out above.
    samples = figures.pop("samples_ms")
    realised = measured.speedup.value * pair.flops
    where = {"network": case.network, "precision": case.precision, "flops": pair.flops}
    return {**where, **figures, "realised": realised, "rounds": len(samples["dense"])}
