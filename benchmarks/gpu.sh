#!/usr/bin/env bash
# All that a GPU can tell, in one call of less than 9 minutes: tests, times, memory, a profile, a training run.
#
#     benchmarks/gpu.sh gpu_results                  # a folder of small files: start with its summary.md
#     benchmarks/gpu.sh gpu_results --images FOLDER  # FOLDER/train/<class>/*, FOLDER/test/<class>/*
#     benchmarks/gpu.sh gpu_results --smoke          # everything in small, on the CPU, in a minute
set -euo pipefail
exec timeout 539 "${PYTHON:-python3}" -u "$(dirname "$0")/gpu.py" "$@"
