#!/bin/sh
# One command on a borrowed GPU machine, nine minutes of steps: bench/gpu/call.sh --help
cd "$(dirname "$0")/../.." || exit 1
command -v nvcc >/dev/null || [ ! -x /usr/local/cuda/bin/nvcc ] || export CUDA_HOME="${CUDA_HOME:-/usr/local/cuda}"
export PYTHONPATH=".:python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
# the time counts from here: a machine that has just started takes up to half a minute for Python's first imports
exec "${PYTHON:-python3}" -m bench.gpu.call --began "$(date +%s)" "$@"
