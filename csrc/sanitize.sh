#!/bin/sh
# Address, undefined-behaviour and thread sanitizer runs of both executors, CUDA's in the emulator: csrc/sanitize.cpp
# drives every op. `csrc/sanitize.sh none` only compares the two. BEAGLE_SEED: in which order threads and blocks run.
set -e
here=$(dirname "$0")
program=$(mktemp)
trap 'rm -f "$program"' EXIT
for kind in ${@:-address,undefined thread}; do
  "$here/emulated.sh" sanitize "$program" $([ "$kind" = none ] || echo "-fsanitize=$kind -fno-sanitize-recover=all")
  "$program" "${BEAGLE_SEED:-1}"
  echo "sanitizers clean: $kind"
done
