"""A realistic report: figures with the noise, the drift and the odd sizes of real runs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from optin_deploy.report import Report
from profilers import Measurement, RawSamples


def measurement(runtime: str, batch: int, dense_ms: float, speedup: float, noise: float = 0.01) -> dict[str, Any]:
    """What profilers hands over for 40 rounds of 3 runs, with a long tail as latencies have."""
    generator = np.random.default_rng(batch)

    def samples(median: float) -> list[list[float]]:
        rounds = median * (1 + noise * generator.standard_normal((40, 1)))
        return (rounds * (1 + generator.exponential(0.03, (40, 3)))).tolist()

    values = {"dense": samples(dense_ms), "dense_again": samples(dense_ms), "pruned": samples(dense_ms / speedup)}
    return asdict(Measurement.from_samples(runtime, batch, RawSamples(values, True, 912.4)))


def document() -> dict[str, Any]:
    generator = np.random.default_rng(0)
    heads = generator.integers(2, 7, 12)
    neurons = 64 * generator.integers(4, 22, 12)
    plan = [
        {"group": f"blocks.{i}.{name}", "kind": kind, "layer": i, "units": units, "kept": int(kept[i])}
        for kind, name, units, kept in (("head", "attn", 6, heads), ("neuron", "mlp", 1536, neurons))
        for i in range(12)
    ]
    return {
        "schema_version": 2,
        "created": "2026-03-02T14:05:09Z",
        "version": "0.1.0",
        "command": "optin-deploy prune-export --model deit_small_patch16_224 --flops 0.5 --calibration ./photos "
        "--batch-sizes 1,8,32 --output runs/deit-small-0.5",
        "model": {
            "name": "deit_small_patch16_224",
            "library": "timm 1.0.31",
            "weights": "pretrained",
            "inputs": {"x": ["batch", 3, 224, 224]},
        },
        "calibration": {"source": "./photos", "builtin": False, "samples": 256, "seed": 0},
        "budget": {"flops": 0.5},
        "settings": {"scorer": "sketch", "align": 64, "compensate": True, "criteria": {"lambda": 0.5}, "rank": None},
        "dense": {"flops": 9_203_613_696, "parameters": 22_050_664, "onnx_mib": 84.21},
        "pruned": {"flops": 4_583_219_712, "parameters": 10_913_704, "onnx_mib": 41.73},
        "plan": plan,
        "left_dense": [
            {"module": "patch_embed.proj", "reason": "its channels are the residual stream", "flops_share": 0.0251},
            {"module": "head", "reason": "it gives the output", "flops_share": 0.0001},
        ],
        "agreement": [
            {"output": "logits", "cosine": 0.97312, "relative_error": 0.2288, "top1_agreement": 0.9141, "samples": 256}
        ],
        "evaluation": {
            "metric": "top-1 %",
            "dataset": "ImageNet-1k val",
            "samples": 5000,
            "dense": 79.84,
            "pruned": 76.92,
        },
        "parity": [
            {
                "variant": variant,
                "output": "logits",
                "max_abs_error": error,
                "max_abs_reference": 9.31,
                "tolerance": 1e-4,
                "passed": True,
            }
            for variant, error in (("dense", 3.1e-6), ("pruned", 2.6e-6))
        ],
        "profile": [
            measurement("ort-cpu", 1, 41.2, 1.62),
            measurement("ort-cpu", 8, 301.7, 1.83),
            measurement("torch", 1, 48.9, 1.41),
            measurement("torch", 8, 322.4, 1.7),
        ],
        "protocol": {
            "isolation": "each runtime and batch size in a process of its own",
            "interleaving": "dense, dense again and pruned take turns in rounds, in an order shuffled every round",
            "input_transfer": "excluded: inputs are placed on the device beforehand, outputs stay on it",
            "interval": "bootstrap over whole rounds, paired across variants, 95%",
            "warm_up_runs": 10,
            "threads": 4,
        },
        "gates": [
            {"name": "parity", "passed": True, "detail": "largest error 3.1e-06 of 9.31, tolerance 1e-04"},
            {"name": "budget", "passed": True, "detail": "0.498 of the dense FLOPs, asked for 0.49 to 0.50"},
        ],
        "warnings": [],
        "stage_seconds": {"load": 1.9, "calibrate": 8.4, "score": 41.2, "search": 0.3, "export": 24.8, "profile": 61.0},
        "environment": {
            "date": "2026-03-02T14:05:09+00:00",
            "cpu": "AMD EPYC 7763 64-Core Processor",
            "physical_cores": 4,
            "logical_cores": 8,
            "memory_gib": 31.3,
            "os": "Linux-6.8.0-x86_64-with-glibc2.39",
            "python": "3.12.1",
            "versions": {"onnxruntime": "1.32.0", "timm": "1.0.31", "torch": "2.15.0", "tensorrt": None},
            "cuda_devices": [],
        },
    }


@pytest.fixture
def data() -> dict[str, Any]:
    return document()


@pytest.fixture
def report(data: dict[str, Any]) -> Report:
    return Report.model_validate(data)
