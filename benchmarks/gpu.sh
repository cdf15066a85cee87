#!/bin/sh
# Every GPU figure in one call of under 9 minutes that needs no network, installs nothing and can be given again to go on
# where it stopped:
#
#     sh benchmarks/gpu.sh                      # into benchmarks/results/DEVICE/gpu.json
#     sh benchmarks/gpu.sh --results "$OUT"     # into another folder
#
# PYTHON names the interpreter; the package need not be installed. Options are those of gpu/main.py.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root:$root/benchmarks${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}"
exec "${PYTHON:-python3}" -m gpu --minutes 8.5 "$@"
