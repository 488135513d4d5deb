#!/bin/sh
# Address, undefined-behaviour and thread sanitizer runs of both executors, CUDA's in the emulator: csrc/sanitize.cpp
# drives every op. `csrc/sanitize.sh none` only compares the two. BEAGLE_SEED: in which order threads and blocks run.
set -e
cd "$(dirname "$0")"
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
flags="-std=c++17 -O1 -g -ffp-contract=off -fno-math-errno -fno-trapping-math -Wno-psabi -Wno-unknown-pragmas -DBEAGLE_NO_CLONES -DBEAGLE_EMULATED"
ops="choose_tokens top_candidates build_tree accept_tree verify_tree verify_chain compact_cache"
for kind in ${@:-address,undefined thread}; do
  sanitize=$([ "$kind" = none ] || echo "-fsanitize=$kind -fno-sanitize-recover=all")
  compile() { out="$build/$(echo "$1" | tr / _).o"; source=$1; shift; ${CXX:-g++} $flags $sanitize "$@" -c "$source" -o "$out"; }
  ${CXX:-g++} -std=c++17 -O2 -c emulator/emulator.cpp -o "$build/emulator.o"
  for source in sanitize.cpp cpu/pool.cpp cpu/dispatch.cpp cpu/rows.cpp cpu/products.cpp cpu/tree_attention.cpp \
      cpu/skinny_linear.cpp; do compile "$source"; done
  for op in $ops; do
    compile "cpu/$op.cpp"
    compile "cuda/$op.cu" -Iemulator -include cuda_runtime.h -x c++
  done
  ${CXX:-g++} $sanitize "$build"/*.o -o "$build/run" -lpthread
  "$build/run" "${BEAGLE_SEED:-1}"
  echo "sanitizers clean: $kind"
done
