#!/bin/sh
# Builds csrc/DRIVER.cpp with both executors, CUDA's in the emulator, into OUT: emulated.sh DRIVER OUT [flags].
set -e
out=$(realpath -m "$2"); driver=$1; shift 2
cd "$(dirname "$0")"
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
flags="-std=c++17 -O1 -g -ffp-contract=off -fno-math-errno -fno-trapping-math -Wno-psabi -Wno-unknown-pragmas"
flags="$flags -DBEAGLE_NO_CLONES -DBEAGLE_EMULATED"
compile() {
  object="$build/$(echo "$1" | tr / _).o"; source=$1; shift
  ${CXX:-g++} $flags "$@" -c "$source" -o "$object"
}
${CXX:-g++} -std=c++17 -O2 -c emulator/emulator.cpp -o "$build/emulator.o"
for source in "$driver.cpp" cpu/pool.cpp cpu/dispatch.cpp cpu/rows.cpp cpu/products.cpp cpu/int8_product.cpp \
    cpu/tree_attention.cpp cpu/attention_exact.cpp cpu/linear.cpp cpu/skinny_linear.cpp cpu/int8_linear.cpp \
    cpu/decoder_layer.cpp cpu/layer_steps.cpp; do compile "$source" "$@"; done
for op in choose_tokens perturb_logits adjust_logits top_candidates lookup join_branch build_tree accept_tree verify_tree \
    verify_chain compact_cache; do
  compile "cpu/$op.cpp" "$@"
  compile "cuda/$op.cu" "$@" -Iemulator -include cuda_runtime.h -x c++
done
${CXX:-g++} "$@" "$build"/*.o -o "$out" -lpthread
