#!/bin/sh
# Train, choose and measure a draft on a GPU machine without internet, part by part: bench/recipes/one_gpu.sh --help
cd "$(dirname "$0")/../.." || exit 1
command -v nvcc >/dev/null || [ ! -x /usr/local/cuda/bin/nvcc ] || export CUDA_HOME="${CUDA_HOME:-/usr/local/cuda}"
export PYTHONPATH=".:python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
exec "${PYTHON:-python3}" -m bench.recipes.one_gpu "$@"
