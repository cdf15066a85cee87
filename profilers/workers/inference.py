"""Run one file as an `InferenceSpec` says: ``python -m profilers.workers.inference SPEC.json RESULT.json``."""

import sys
from collections.abc import Sequence

from profilers.inference import InferenceResult, InferenceSpec
from profilers.runners import open_runner
from profilers.worker_process import SavedFeeds, answer


def main(arguments: Sequence[str]) -> int:
    """Run; return the exit status."""
    return answer(arguments, InferenceSpec, infer)


def infer(spec: InferenceSpec) -> InferenceResult:
    """Run the file on every batch and save its outputs next to the batch."""
    with open_runner(spec.runtime, spec.file, spec.threads) as runner:
        outputs = [
            SavedFeeds.save(batch.file.with_suffix(".out.npz"), runner.infer(batch.load())) for batch in spec.batches
        ]
    return InferenceResult(tuple(outputs))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
