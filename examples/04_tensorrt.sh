#!/bin/sh
# Prune a network, then build an fp16 engine of the result.
#
#     sh examples/04_tensorrt.sh [MODEL] [OPTIONS of prune-export]
#
# With RUNTIME=tensorrt (the default) a GPU is needed, and the engine is compared with torch on it.
# With RUNTIME=rtx, TensorRT for RTX builds it without a GPU. The two are separate products: an engine of one does not
# run in the other. On a GPU, `prune-export --runtimes tensorrt` builds and measures both networks in one run.
set -eu
model=${1:-deit_small}
[ $# -eq 0 ] || shift
runtime=${RUNTIME:-tensorrt}

optin-deploy prune-export --model "$model" --flops 0.5 --runtimes ort-cpu --output runs/example-engine "$@"
optin-deploy export --model runs/example-engine/checkpoint --precision fp16 --runtimes "$runtime" \
    --batch-sizes 1,8 --output runs/example-engine/engine

# The JSON file next to the engine holds the builder, its version, the shapes and the flags.
ls runs/example-engine/engine
