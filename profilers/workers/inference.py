"""The isolated process that runs one file on inputs: `python -m profilers.workers.inference SPEC.json`.

The spec holds `runtime`, `file`, `threads`, `batches` (a list of `feeds`, an `.npz` with arrays in the order of
`inputs`, `inputs`, their names, and `outputs`, the `.npz` to write), and `result`, the JSON file to write: `outputs`,
for each batch the names of its outputs in the order of their arrays. Errors are told as by `profilers.workers.latency`.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from profilers.runners import open_runner
from profilers.workers.latency import answer, load_feeds


def main(arguments: list[str]) -> int:
    """Runs what the spec describes; the exit status."""
    return answer(arguments, infer)


def infer(spec: dict[str, Any]) -> dict[str, Any]:
    """Runs the file on every batch, writes what it gives, and returns what goes into the result file."""
    names = []
    with open_runner(spec["runtime"], Path(spec["file"]), spec["threads"]) as runner:
        for batch in spec["batches"]:
            outputs = runner.infer(load_feeds(Path(batch["feeds"]), batch["inputs"], 1))
            np.savez(batch["outputs"], *outputs.values())
            names.append(list(outputs))
    return {"outputs": names}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
