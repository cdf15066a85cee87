#!/bin/sh
# Write a model repository for Triton Inference Server.
#
#     sh examples/05_triton.sh [MODEL] [OPTIONS of export]
#
# MODEL may be the checkpoint of a run: runs/example-0.5/checkpoint.
set -eu
model=${1:-deit_small}
[ $# -eq 0 ] || shift

optin-deploy export --model "$model" --layout triton --name example --batch-sizes 8 --output runs/triton "$@"

# The configuration has dynamic batching; its comments name the container and the command that measures it.
cat runs/triton/example_onnx/config.pbtxt
