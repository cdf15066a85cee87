#!/bin/sh
# Prune a network to half of its FLOPs, then compare it with a larger budget.
#
#     sh examples/01_command_line.sh [MODEL] [OPTIONS of prune-export]
#
# MODEL is a timm name, a transformers id or a directory (default: deit_small).
set -eu
model=${1:-deit_small}
[ $# -eq 0 ] || shift

# 1. Score, slice, compensate, export, check and measure. Each run has a directory of its own.
optin-deploy prune-export --model "$model" --flops 0.5 --output runs/example-0.5 "$@"

# 2. The same with a larger budget.
optin-deploy prune-export --model "$model" --flops 0.7 --output runs/example-0.7 "$@"

# 3. Show one report in the terminal, and both next to each other. runs/example-0.5/report.html is the web page.
optin-deploy report runs/example-0.5
optin-deploy report runs/example-0.5 runs/example-0.7
