#!/bin/sh
# Address, undefined-behaviour and thread sanitizer runs of the host executor: csrc/sanitize.cpp drives every op.
set -e
cd "$(dirname "$0")"
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
flags="-std=c++17 -O1 -g -ffp-contract=off -fno-math-errno -fno-trapping-math -Wno-psabi -Wno-unknown-pragmas -DBEAGLE_NO_CLONES"
sources="sanitize.cpp cpu/pool.cpp cpu/dispatch.cpp cpu/rows.cpp cpu/choose_tokens.cpp cpu/top_candidates.cpp \
  cpu/build_tree.cpp cpu/accept_tree.cpp cpu/verify_tree.cpp cpu/verify_chain.cpp cpu/compact_cache.cpp \
  cpu/tree_attention.cpp"
for kind in address,undefined thread; do
  for source in $sources; do
    ${CXX:-g++} $flags -fsanitize=$kind -fno-sanitize-recover=all -c "$source" -o "$build/$(basename "$source").o"
  done
  ${CXX:-g++} -fsanitize=$kind "$build"/*.o -o "$build/run" -lpthread
  "$build/run"
  echo "sanitizers clean: $kind"
done
