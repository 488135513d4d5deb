#!/bin/sh
# Everything a GPU is needed for, into one JSON: bench/gpu/check.sh [OUT [build] [smoke] [tests] [round] [bench] [tune] [speed] ...]
cd "$(dirname "$0")/../.." || exit 1
command -v nvcc >/dev/null || [ ! -x /usr/local/cuda/bin/nvcc ] || export CUDA_HOME="${CUDA_HOME:-/usr/local/cuda}"
export PYTHONPATH=".:python${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m bench.gpu.check "$@"
